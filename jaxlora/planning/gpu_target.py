"""GPUs that are not here: the target description that XLA's CUDA plugin compiles for."""

from collections.abc import Sequence
from typing import Any

from jaxlora.planning.hardware import HARDWARE

# Facts of the chips that XLA's code generation asks for: streaming multiprocessors, clock in GHz,
# second-level cache, compute capability.
_CHIPS = {
    "a100": (108, 1.41, 40 * 2**20, 8, 163_840 + 3072),
    "h100": (132, 1.98, 50 * 2**20, 9, 232_448),
    "h200": (132, 1.98, 50 * 2**20, 9, 232_448),
}


def target_config(kind: str) -> str:
    """Returns XLA's text proto of a chip, for compiling where there is none."""
    cores, clock, cache, capability, shared = _CHIPS[kind]
    chip = HARDWARE[kind]
    accelerated = " feature_extension: ACCELERATED_FEATURES" if capability >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared + 1024}
  shared_memory_per_block_optin: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.memory_bytes_per_s)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {chip.memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {capability}{accelerated} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.name}"
"""


def gpu_devices(kind: str, count: int) -> Sequence[Any]:
    """Returns `count` GPUs that can only be compiled for.

    Needs the CUDA plugin of JAX, and no GPU.
    """
    from jax._src import xla_bridge
    from jax.experimental import topologies

    # Private, and the only way to have the plugin without its devices.
    xla_bridge.discover_pjrt_plugins()
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        topology=f"1x1x{count}",
        target_config=target_config(kind),
    )
    return described.devices

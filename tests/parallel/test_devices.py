"""A run on eight devices is the run on one: same losses, however weights and rows are split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2")
METHODS = ("lora", "int4", "nf4", "int8", "gptq", "full")
# float32 losses near 5; splitting a sum changes its rounding, 5e-7 relative at a time.
TOLERANCE = 2e-5
# What splits the largest array (gate and up, [128, 256] and stacked) into how many parts.
SHARES = dict.fromkeys(MESHES, 1 / 8) | {"data=8": 1, "data=2,fsdp=2,tensor=2": 1 / 4}


def results_of(cases, folder):
    script = Path(__file__).with_name("eight_devices.py")
    # The program reads what was compiled, and runs it: the cache saves compiling it twice.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **cache}
    process = subprocess.run(
        [sys.executable, str(script), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def check(results, cases):
    for case in cases:
        method, _, mesh = case.partition(":")
        alone = results[f"{method}:"]
        difference = np.abs(np.subtract(results[case]["losses"], alone["losses"])).max()
        assert difference <= TOLERANCE, (case, difference)
        assert np.ptp(alone["losses"]) > 100 * TOLERANCE, "nothing was trained"
        assert results[case]["compiled"] == 1, (case, "a later step compiled anew")
        assert results[case]["largest_share"] == SHARES[mesh], case
        if "fsdp" in mesh and method in ("int4", "nf4", "int8", "gptq"):
            check_gathers(case, results[case])


def check_gathers(case, result):
    """The base travels packed: no matrix, nor a stack of them, is gathered as floats."""
    gathered = {(kind, int(np.prod(shape))) for kind, shape in result["gathers"]}
    layers, kinds = 2, {"s4", "s8", "u4", "u8"}
    sizes = [int(np.prod(shape)) * n for shape in result["matrices"] for n in (1, layers)]
    packed = {size // 2 if case.startswith("nf4") else size for size in sizes}
    assert any(kind in kinds and size in packed for kind, size in gathered), (case, gathered)
    unpacked = {each for each in gathered if each[0] not in kinds and each[1] in sizes}
    assert not unpacked, (case, unpacked)


def test_losses_on_eight_devices_equal_one_device(tmp_path):
    cases = ["lora:data=2,fsdp=2,tensor=2", "int4:fsdp=8", "nf4:fsdp=4,tensor=2"]
    check(results_of(["lora:", "int4:", "nf4:", *cases], tmp_path), cases)


@pytest.mark.oracle
@pytest.mark.parametrize("method", METHODS)
def test_losses_on_every_mesh_equal_one_device(tmp_path, method):
    cases = [f"{method}:{mesh}" for mesh in MESHES]
    check(results_of([f"{method}:", *cases], tmp_path), cases)

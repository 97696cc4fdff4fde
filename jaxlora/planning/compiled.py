"""A plan by compiling: XLA's own account of memory, and what its program sends."""

import dataclasses
import re
import time
from typing import Any

import jax

from jaxlora.ops.arrays import QuantizedArray
from jaxlora.planning.estimate import Estimate, Memory, Traffic, bytes_per_device
from jaxlora.planning.flops import flops_per_token
from jaxlora.planning.hardware import GIB, Hardware, usable_bytes
from jaxlora.planning.hlo import Module
from jaxlora.planning.program import Program

# "... required for HLO temporaries (26.50G) exceeds available HBM (15.75G)", and older words.
_WANTED = re.compile(r"(?:HLO temporaries \(|Used )([\d.]+)([MGT])\b")
_UNITS = {"M": 2**20, "G": GIB, "T": 2**40}


def estimate(program: Program, *, topology: str, hardware: Hardware) -> tuple[Estimate, str]:
    """Compiles a program and returns what that says, and the text of what came out.

    A program that does not compile for want of memory has an estimate too, of what the error says,
    and no text.

    Args:
      program: from `make_program`.
      topology: what to call the devices.
      hardware: one of them.
    """
    started = time.monotonic()
    found = _account(program, hardware.platform)
    module = Module(found.text)
    memory = _memory(program, found, module)
    return describe(
        program,
        topology=topology,
        hardware=hardware,
        method="compiled",
        memory=memory,
        traffic=tuple(
            Traffic(c.kind, c.array.dtype, c.times, c.payload_bytes, c.sent_bytes)
            for c in module.collectives()
        ),
        compile_s=found.finished - started,
        peak_bytes=found.peak,
        listed_bytes=found.listed - found.temporaries + memory.total,
        host_bytes=found.host,
    ), found.text


def needed_bytes(program: Program) -> int | None:
    """Returns the bytes of one device that a compiled step takes.

    None where there was not enough memory to compile it, and the compiler does not say for what.
    """
    try:
        found = _account(program, program.shape.placement.mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return _memory(program, found, Module("")).total


@dataclasses.dataclass(frozen=True)
class _Account:
    """What a compiler says of a step, in bytes of one device.

    Attributes:
      text: the program; nothing if it was refused for want of memory.
      finished: when it was known, by `time.monotonic`.
      arguments: of the step, as they lie.
      temporaries: what must be there beside them, outputs that are not donated included.
      listed: that, were all temporaries there at once.
      code: the program.
      peak: the compiler's own figure of all of it; 0 where it has none.
      host: what it keeps in the memory of the host.
    """

    text: str
    finished: float
    arguments: int
    temporaries: int
    listed: int
    code: int = 0
    peak: int = 0
    host: int = 0


def _account(program: Program, platform: str) -> _Account:
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted, held = _wanted(error), _held(program)
        on_tpu = platform == "tpu"  # its compiler says what it wants with the arguments
        temporaries = max(wanted - held, 0) if on_tpu else wanted
        peak = wanted if on_tpu else 0
        return _Account("", time.monotonic(), held, temporaries, temporaries, peak=peak)
    text, stats = compiled.as_text(), compiled.memory_analysis()
    arguments, peak = stats.argument_size_in_bytes, stats.peak_memory_in_bytes
    unaliased = stats.output_size_in_bytes - stats.alias_size_in_bytes
    listed = stats.temp_size_in_bytes + max(unaliased, 0)
    # What libtpu holds against the memory of a chip is the moment of the peak: the sum it lists has
    # temporaries in it that share a place (docs/decisions.md).
    at_once = min(listed, max(peak - arguments, 0)) if platform == "tpu" else listed
    return _Account(
        text,
        time.monotonic(),
        arguments,
        at_once,
        listed,
        stats.generated_code_size_in_bytes,
        peak,
        stats.host_temp_size_in_bytes,
    )


def _held(program: Program) -> int:
    """Bytes of the arguments of the step."""
    own = (program.frozen, program.trainable, program.opt_state, program.batch)
    return bytes_per_device(own)


def _wanted(error: Exception) -> int:
    """What the compiler wanted, on a TPU with the arguments, elsewhere for temporaries; other
    errors are no answer."""
    found = _WANTED.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not found:
        raise error
    return int(float(found[1]) * _UNITS[found[2]])


def _memory(program: Program, found: _Account, module: Module) -> Memory:
    trained, temporaries = bytes_per_device(program.trainable), found.temporaries
    activations = min(int(module.saved_for_backward()), temporaries)
    gradients = min(trained, temporaries - activations)
    return Memory(
        weights=bytes_per_device(program.frozen),
        trained=trained + bytes_per_device(program.initial),
        optimizer=bytes_per_device(program.opt_state),
        batch=bytes_per_device(program.batch),
        activations=activations,
        gradients=gradients,
        workspace=temporaries - activations - gradients,
        program=found.code,
        padding=max(found.arguments - _held(program), 0),
    )


def describe(program: Program, **known: Any) -> Estimate:
    """Returns an estimate, given what the program does not say itself."""
    shape, tokens = program.shape, program.batch["tokens"]
    accumulation, rows, length = tokens.shape
    mesh = dict(shape.placement.mesh.shape)
    _, rows_here, _ = tokens.sharding.shard_shape(tokens.shape)
    each = flops_per_token(program, length)
    count = accumulation * rows * length
    formats = {x.format for x in _leaves(program.frozen) if isinstance(x, QuantizedArray)}
    return Estimate(
        devices=shape.placement.mesh.size,
        mesh=mesh,
        limit_bytes=usable_bytes(known["hardware"]),
        tokens=count,
        model_flops=each.model * count,
        executed_flops=each.executed * count,
        wasted_flops=each.wasted * count,
        rows=rows_here,
        accumulation=accumulation,
        length=length,
        remat=shape.transformer.remat,
        base=" ".join(sorted(formats)) or str(shape.transformer.dtype),
        weight_passes=2 + (shape.transformer.remat != "none"),
        **known,
    )


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedArray))

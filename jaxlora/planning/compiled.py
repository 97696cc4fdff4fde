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
    lowered = program.lower()
    text, peak, host = "", 0, 0
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporaries, code, unaliased, arguments = _wanted(error), 0, 0, 0
    else:
        text = compiled.as_text()
        stats = compiled.memory_analysis()
        temporaries, code = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
        unaliased = stats.output_size_in_bytes - stats.alias_size_in_bytes
        arguments = stats.argument_size_in_bytes
        peak, host = stats.peak_memory_in_bytes, stats.host_temp_size_in_bytes
    seconds = time.monotonic() - started
    module = Module(text)
    temporaries += max(unaliased, 0)
    memory = _memory(program, temporaries, code, module)
    known = memory.weights + memory.trained + memory.optimizer + memory.batch
    padding = max(arguments - known + bytes_per_device(program.initial), 0)
    memory = dataclasses.replace(memory, padding=padding)
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
        compile_s=seconds,
        peak_bytes=peak,
        host_bytes=host,
    ), text


def needed_bytes(program: Program) -> int | None:
    """Returns the bytes of one device that a compiled step takes.

    None where there was not enough memory to compile it, and the compiler does not say for what.
    """
    known = bytes_per_device((program.trainable, program.opt_state, program.frozen, program.batch))
    kept = bytes_per_device(program.initial)
    try:
        stats = program.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return known + kept + _wanted(error) if _WANTED.search(str(error)) else None
    unaliased = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    temporaries = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return max(stats.argument_size_in_bytes, known) + kept + temporaries + unaliased


def _wanted(error: Exception) -> int:
    """What the compiler wanted for temporaries; other errors are no answer."""
    found = _WANTED.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not found:
        raise error
    return int(float(found[1]) * _UNITS[found[2]])


def _memory(program: Program, temporaries: int, code: int, module: Module) -> Memory:
    trained = bytes_per_device(program.trainable)
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
        program=code,
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

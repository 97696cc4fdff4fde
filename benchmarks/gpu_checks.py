"""One GPU: what it computes is what the CPU computes, and how long attention takes.

    python benchmarks/gpu_checks.py --output FILE [--times]

Every attention against the reference, values and gradients, at a small shape with packed rows,
padding and windows; a train step by each of them; dequantization against the CPU, bit for bit; with
`--times` forward and backward at the shape of Llama-3-8B.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.ops.attention import Visibility, reference_attention
from jaxlora.ops.attention_chunked import chunked_attention
from jaxlora.ops.attention_cudnn import CudnnAttention
from jaxlora.ops.quantize import dequantize, quantize

# Three segments and padding; one that fills the row; nothing at all.
LENGTHS = ((57, 3, 150), (256,), ())
LENGTH = 256


def packed(lengths=LENGTHS, length=LENGTH, windows=(None,), kind=0, causal=True) -> Visibility:
    """Returns the visibility of rows of segments of these lengths."""
    segments = np.zeros((len(lengths), length), np.int32)
    positions = np.zeros_like(segments)
    for row, of_row in enumerate(lengths):
        start = 0
        for number, size in enumerate(of_row, 1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    at, within = jnp.asarray(positions), jnp.asarray(segments)
    return Visibility(at, at, within, within, jnp.int32(kind), windows, causal, in_place=True)


def operands(rows: int, length: int, heads: int, kv_heads: int, channels: int) -> list[jax.Array]:
    """Returns random q, k, v and a gradient of the result, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return [
        jax.random.normal(key, (rows, length, count, channels), jnp.bfloat16)
        for key, count in zip(keys, counts, strict=True)
    ]


def forward_and_back(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns a jitted ``(q, k, v, dy, visible) -> (y, (dq, dk, dv))``."""

    def both(q, k, v, dy, visible):
        y, back = jax.vjp(lambda q, k, v: attend(q, k, v, visible), q, k, v)
        return y, back(dy)

    return jax.jit(both)


def attention_errors(names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Compares in bfloat16 with the reference in float32: relative to the largest number."""
    arrays = operands(len(LENGTHS), LENGTH, 8, 2, 64)
    cases = {
        "packed": packed(),
        "window": packed(windows=(40,)),
        "two windows": packed(windows=(None, 40), kind=1),
        "both ways": packed(causal=False),
        "both ways, window": packed(causal=False, windows=(40,)),
        "one example a row": packed(((200,), (256,), ())),
    }
    for case, seen in cases.items():
        if names and case not in names:
            continue
        real = np.asarray(seen.query_segments > 0)[..., None, None]
        q, k, v, dy = arrays
        dy = dy * real
        exact = forward_and_back(reference_attention)(
            *(x.astype(jnp.float32) for x in (q, k, v, dy)), seen
        )
        backends = {
            "reference": reference_attention,
            "chunked": chunked_attention,
            "cudnn, bias": CudnnAttention(None),
            "cudnn, offsets": CudnnAttention(4),
        }
        if case == "one example a row":
            backends["cudnn, lengths"] = CudnnAttention(1)
        for name, attend in backends.items():
            found: dict[str, Any] = {"check": "attention", "case": case, "backend": name}
            try:
                got = forward_and_back(attend)(q, k, v, dy, seen)
                found["errors"] = [
                    error(ours * real, theirs * real)
                    for ours, theirs in zip(
                        jax.tree.leaves(got), jax.tree.leaves(exact), strict=True
                    )
                ]
            except Exception as problem:
                found["error"] = str(problem)[:300]
            yield found


def error(ours: jax.Array, theirs: jax.Array) -> float:
    """Returns the largest difference over the largest number."""
    expected = np.asarray(theirs, np.float32)
    return float(np.abs(np.asarray(ours, np.float32) - expected).max() / np.abs(expected).max())


def dequantization() -> Iterator[dict[str, Any]]:
    """Compares the GPU's matrices with the CPU's, bit for bit."""
    matrix = np.random.default_rng(0).standard_normal((512, 384)).astype(np.float32) * 0.02
    cpu = jax.devices("cpu")[0]
    for format in ("nf4", "int4", "int8"):
        leaf = jax.tree.map(jnp.asarray, quantize(matrix, format, dtype="bfloat16"))
        here = np.asarray(jax.jit(dequantize)(leaf), np.float32)
        with jax.default_device(cpu):
            there = jax.device_put(leaf, cpu)
            wanted = np.asarray(jax.jit(dequantize)(there), np.float32)
        differing = int((here != wanted).sum())
        yield {"check": "dequantize", "format": format, "differing": differing}


def steps() -> Iterator[dict[str, Any]]:
    """Takes three steps of a tiny nf4 model by each attention, in bfloat16 and float32."""
    import gpu
    import gpu_model

    for dtype, attentions in (
        ("float32", ("reference", "chunked")),
        ("bfloat16", ("reference", "chunked", "cudnn")),
    ):
        for attention in attentions:
            found: dict[str, Any] = {"check": "step", "dtype": dtype, "attention": attention}
            try:
                subject = gpu_model.make_subject("tiny", "nf4", dtype)
                step, _ = subject.step("attention", attention)
                batch = gpu.batch_of(subject.cfg, 2, 64)
                found["losses"], found["grad_norms"] = [], []
                for number in range(3):
                    subject.trainable, subject.opt_state, metrics = step(
                        subject.trainable, subject.opt_state, subject.frozen, batch, number
                    )
                    found["losses"].append(float(metrics["loss"]))
                    found["grad_norms"].append(float(metrics["grad_norm"]))
            except Exception as problem:
                found["error"] = str(problem)[:300]
            yield found


def times(rows: int, length: int) -> Iterator[dict[str, Any]]:
    """Times forward and backward of a layer of Llama-3-8B, rows full or of eight examples."""
    arrays = operands(rows, length, 32, 8, 128)
    full, eight = ((length,),) * rows, ((length // 8,) * 8,) * rows
    cases = {
        "lengths": (CudnnAttention(1), full),
        "offsets of 8": (CudnnAttention(8), eight),
        "offsets of 32": (CudnnAttention(32), eight),
        "bias": (CudnnAttention(None), eight),
        "chunked, 256": (lambda *x: chunked_attention(*x, chunk=256), full),
        "chunked, 512": (lambda *x: chunked_attention(*x, chunk=512), full),
    }
    for name, (attend, lengths) in cases.items():
        found: dict[str, Any] = {"check": "time", "case": name, "rows": rows, "length": length}
        try:
            seen = packed(lengths, length)
            run = forward_and_back(attend).lower(*arrays, seen).compile()
            found["temp_bytes"] = run.memory_analysis().temp_size_in_bytes
            found["ms"] = 1e3 * _seconds(lambda run=run, seen=seen: run(*arrays, seen))
        except Exception as problem:
            found["error"] = str(problem)[:300]
        yield found


def _seconds(run: Callable[[], Any], repeats: int = 20) -> float:
    jax.block_until_ready(run())
    started = time.monotonic()
    for _ in range(repeats):
        last = run()
    jax.block_until_ready(last)
    return (time.monotonic() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--cases", nargs="*")
    options = parser.parse_args()
    checks: list[Iterator[dict[str, Any]]] = [attention_errors(options.cases), steps()]
    if not options.cases:
        checks.append(dequantization())
    if options.times:
        checks += [times(4, 2048), times(2, 4096)]
    found = []
    for check in checks:
        try:
            for each in check:
                found.append(each)
                print(json.dumps(each), flush=True)
                options.output.write_text(json.dumps(found, indent=1) + "\n")
        except Exception:
            traceback.print_exc(file=sys.stdout)


if __name__ == "__main__":
    main()

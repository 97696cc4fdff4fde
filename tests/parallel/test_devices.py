"""A run on eight devices is the run on one: same losses, however weights and rows are split."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

AXES = ("data", "fsdp", "tensor", "context", "expert")
# float32 losses near 5; splitting a sum changes its rounding, 5e-7 relative at a time.
TOLERANCE = 2e-5
# What has been trained, as a share of its norm: Adam makes steps of gradients that are rounding.
EXPORT_TOLERANCE = 1e-2
QUANTIZED = ("int4", "nf4", "int8", "gptq", "kernel-int4", "kernel-nf4")
METHODS = ("lora", "full", "int4", "nf4")
DEFAULT = (
    "lora:data=2,fsdp=2,tensor=2",
    "int4:fsdp=4,context=2",
    "nf4:fsdp=4,tensor=2",
    "moe-nf4:fsdp=2,expert=2,context=2",
    "moe-nf4:fsdp=2,tensor=2,context=2",
)


def layouts(axes):
    """Every way to lay eight devices out along these axes."""
    found = itertools.product((1, 2, 4, 8), repeat=len(axes))
    sizes = [each for each in found if math.prod(each) == 8]
    return [
        ",".join(f"{axis}={n}" for axis, n in zip(axes, each, strict=True) if n > 1)
        for each in sizes
    ]


def sizes_of(mesh):
    return dict.fromkeys(AXES, 1) | {a: int(n) for a, n in (p.split("=") for p in mesh.split(","))}


def results_of(cases, steps, accumulation):
    script = Path(__file__).with_name("eight_devices.py")
    cases = [*dict.fromkeys(f"{case.partition(':')[0]}:" for case in cases), *cases]
    process = subprocess.run(
        [sys.executable, str(script), str(steps), str(accumulation), *cases],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    return {case: found for line in lines for case, found in json.loads(line).items()}


def check(results, cases):
    for case in cases:
        method, _, mesh = case.partition(":")
        alone, sizes = results[f"{method}:"], sizes_of(mesh)
        difference = difference_of(results[case], alone)
        assert difference <= TOLERANCE, (case, difference)
        assert np.ptp(alone["losses"]) > 100 * TOLERANCE, "nothing was trained"
        assert results[case]["exported"] == alone["exported"], (case, "exports other tensors")
        assert results[case]["apart"] <= EXPORT_TOLERANCE, (case, results[case]["apart"])
        assert results[case]["compiled"] == 1, (case, "a later step compiled anew")
        # The largest array: gate and up, or the experts'.
        split = ("fsdp", "tensor", "expert") if method.startswith("moe") else ("fsdp", "tensor")
        share = 1 / math.prod(sizes[axis] for axis in split)
        assert results[case]["largest_share"] == share, case
        assert results[case]["pairs_share"] <= 1 / sizes["fsdp"], case
        whole = [shape for _, shape in results[case]["gathers"] if shape == results[case]["head"]]
        assert not whole, (case, "logits are computed by parts of the vocabulary")
        if sizes["fsdp"] > 1 and method.removeprefix("moe-") in QUANTIZED:
            check_gathers(case, results[case], sizes["expert"])


def difference_of(result, alone):
    return float(np.abs(np.subtract(result["losses"], alone["losses"])).max())


def check_gathers(case, result, expert):
    """The base travels packed: no matrix, nor a stack of them, is gathered as floats."""
    gathered = {(kind, int(np.prod(shape))) for kind, shape in result["gathers"]}
    layers, kinds = 2, {"s4", "s8", "u4", "u8"}
    sizes = [
        int(np.prod(shape)) * n // (expert if len(shape) == 3 else 1)
        for shape in result["matrices"]
        for n in (1, layers)
    ]
    packed = {size // 2 if "nf4" in case else size for size in sizes}
    assert any(kind in kinds and size in packed for kind, size in gathered), (case, gathered)
    unpacked = {each for each in gathered if each[0] not in kinds and each[1] in sizes}
    assert not unpacked, (case, unpacked)


def test_losses_on_eight_devices_equal_one_device():
    check(results_of(DEFAULT, steps=4, accumulation=2), DEFAULT)


def rows():
    """``{row of the table in docs/sharding.md: cases}``.

    To a dense model `expert` is another axis along which rows are split, as `data` is: with LoRA
    all of its layouts are tried, with the others those of the four other axes.
    """
    found = {}
    for method in METHODS:
        for kind in (method, f"moe-{method}"):
            every = layouts(AXES if kind == "lora" or kind.startswith("moe-") else AXES[:-1])
            found[kind] = [f"{kind}:{mesh}" for mesh in every if "context" not in mesh]
            found[f"{kind}, context"] = [f"{kind}:{mesh}" for mesh in every if "context" in mesh]
    meshes = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2")
    for kind in ("int8", "gptq"):
        found[kind] = [f"{kind}:{mesh}" for mesh in (*meshes, "fsdp=2,context=4")]
    return found


ROWS = rows()


@pytest.mark.oracle
@pytest.mark.parametrize("row", ROWS)
def test_losses_on_every_layout_equal_one_device(record_property, row):
    results = results_of(ROWS[row], steps=20, accumulation=1)
    cases = {case: found for case, found in results.items() if not case.endswith(":")}
    (one,) = (found for case, found in results.items() if case.endswith(":"))
    record_property("row", row)
    record_property("layouts", len(cases))
    record_property("losses", max(difference_of(found, one) for found in cases.values()))
    record_property("exports", max(found["apart"] for found in cases.values()))
    record_property("cpu_s", round(sum(found["cpu_s"] for found in results.values())))
    check(results, ROWS[row])


@pytest.mark.oracle
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_losses_with_the_tpus_kernel_equal_one_device(format):
    cases = [f"kernel-{format}:{mesh}" for mesh in ("fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2")]
    check(results_of(cases, steps=20, accumulation=1), cases)

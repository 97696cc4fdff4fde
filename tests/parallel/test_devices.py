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
QUANTIZED = ("int4", "nf4", "int8", "gptq")
DEFAULT = (
    "lora:data=2,fsdp=2,tensor=2",
    "int4:fsdp=4,context=2",
    "nf4:fsdp=4,tensor=2",
    "moe-int4:fsdp=2,expert=2,context=2",
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


def results_of(cases, folder, steps=4):
    script = Path(__file__).with_name("eight_devices.py")
    # The program reads what was compiled, and runs it: the cache saves compiling it twice.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **cache}
    process = subprocess.run(
        [sys.executable, str(script), "--steps", str(steps), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def check(results, cases):
    for case in cases:
        method, _, mesh = case.partition(":")
        alone, sizes = results[f"{method}:"], sizes_of(mesh)
        difference = np.abs(np.subtract(results[case]["losses"], alone["losses"])).max()
        assert difference <= TOLERANCE, (case, difference)
        assert np.ptp(alone["losses"]) > 100 * TOLERANCE, "nothing was trained"
        assert results[case]["trained"] == alone["trained"], "other arrays are trained and exported"
        assert results[case]["compiled"] == 1, (case, "a later step compiled anew")
        # The largest array: gate and up, or the experts'.
        split = ("fsdp", "tensor", "expert") if method.startswith("moe") else ("fsdp", "tensor")
        share = 1 / math.prod(sizes[axis] for axis in split)
        assert results[case]["largest_share"] == share, case
        assert results[case]["pairs_share"] <= 1 / sizes["fsdp"], case
        if sizes["fsdp"] > 1 and method.removeprefix("moe-") in QUANTIZED:
            check_gathers(case, results[case], sizes["expert"])


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


def alone(cases):
    return list(dict.fromkeys(f"{case.partition(':')[0]}:" for case in cases))


def test_losses_on_eight_devices_equal_one_device(tmp_path):
    check(results_of([*alone(DEFAULT), *DEFAULT], tmp_path), DEFAULT)


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["lora", "int4", "full", "moe-lora", "moe-int4", "moe-full"])
def test_losses_on_every_layout_equal_one_device(tmp_path, method):
    axes = AXES if method.startswith("moe") else AXES[:-1]
    cases = [f"{method}:{mesh}" for mesh in layouts(axes)]
    check(results_of([*alone(cases), *cases], tmp_path, steps=20), cases)


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["nf4", "int8", "gptq", "moe-nf4"])
def test_losses_of_other_storage_equal_one_device(tmp_path, method):
    meshes = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2")
    cases = [f"{method}:{mesh}" for mesh in (*meshes, "fsdp=2,context=4")]
    check(results_of([*alone(cases), *cases], tmp_path, steps=20), cases)

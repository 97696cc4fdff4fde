"""Attention over `context` is the attention of one device, and a device is sent what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from jaxlora.ops.layout import MESH_AXES
from jaxlora.parallel.head_shares import HeadShares, shares_over_context

# Sums of 32 products of float32 numbers near 1, in another order.
TOLERANCE = 1e-5
DEFAULT = (
    "each is read on two devices",
    "some are read on two devices",
    "heads are filled up",
    "heads are too few",
    "tensor does not divide key-value heads",
    "a kernel",
)
OTHERS = (
    "key-value heads divide",
    "fewer heads than devices",
    "tensor splits heads too",
    "tensor divides no heads",
)


def results_of(cases):
    script = Path(__file__).with_name("context_devices.py")
    done = subprocess.run(
        [sys.executable, str(script), *cases],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(results):
    for case, found in results.items():
        assert found["difference"] <= TOLERANCE, (case, found)
        assert found["smallest"] > 0.1, (case, "nothing to compare")
        moved = {(kind, dtype) for kind, dtype, *_ in found["transfers"]}
        exchanged = case != "heads are too few"
        assert (("all-to-all", "f32") in moved) == exchanged, (case, moved)
        # Whole keys and values; over `tensor` half of each head is elsewhere in one case.
        gathered = case in ("heads are too few", "tensor does not divide key-value heads")
        assert (("all-gather", "f32") in moved) == gathered, (case, moved)


@pytest.fixture(scope="module")
def found():
    return results_of(DEFAULT)


def test_attention_over_context_equals_one_device(found):
    check(found)


def test_a_device_is_sent_its_own_heads_and_no_others(found):
    transfers = found["each is read on two devices"]["transfers"]
    ((times, nbytes),) = (t[2:] for t in transfers if t[0] == "all-to-all")
    # 16 query heads and 4 key-value heads on 8 devices: 2 and 1 for each; queries, results, keys,
    # values, and their gradients; 4 rows of 32 tokens, 8 channels of float32.
    assert (times, nbytes) == (8, 2 * (2 + 2 + 1 + 1) * 4 * 32 * 8 * 4)


@pytest.mark.oracle
def test_attention_over_context_equals_one_device_in_other_layouts():
    check(results_of(OTHERS))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "each", "copies"),
    [
        (32, 8, 4, 8, 1),
        (32, 8, 8, 4, 1),
        (32, 8, 16, 2, 2),
        (32, 8, 32, 1, 4),
        (24, 8, 16, 2, 3),  # filled up to 32; groups of three heads are cut apart
        (28, 4, 8, 4, 7),
        (12, 12, 8, 2, 1),
        (12, 6, 4, 3, 2),
    ],
)
def test_every_device_has_the_key_value_heads_of_its_queries(heads, kv_heads, parts, each, copies):
    shares = HeadShares(heads, kv_heads, parts)
    assert (shares.heads, shares.copies) == (each, copies)
    group = heads // kv_heads // copies
    assert (shares.heads % group, shares.kv_heads) == (0, shares.heads // group)
    for head in range(heads):  # the place of its key-value head, as copies lie, and on its device
        device, within = divmod(head, shares.heads)
        assert device * shares.heads // group + within // group == head // group


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_heads_are_exchanged_unless_zeros_would_be_more():
    assert shares_over_context(mesh(context=16), 8, 2) is not None
    assert shares_over_context(mesh(context=17), 8, 2) is None
    # Over `tensor` a device has but some of them.
    assert shares_over_context(mesh(context=16, tensor=2), 8, 2) is None
    found = shares_over_context(mesh(context=4, tensor=4), 32, 2)
    assert found is not None
    assert (found.num_heads, found.heads, found.copies) == (8, 2, 4)

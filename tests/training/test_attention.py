"""What a run tells an attention kernel of its rows, and which one serves over several devices."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.models import attention_backend
from jaxlora.models.config import ModelConfig
from jaxlora.ops.layout import MESH_AXES
from jaxlora.training.attention import attention_of

CFG = ModelConfig(8, 16, 8, 1, 2, 1, 8, 16, 1e-5)


def placed(platform, **sizes) -> Any:
    """Stands in for devices that are not here."""
    devices = np.array([SimpleNamespace(platform=platform)])
    shape = dict.fromkeys(MESH_AXES, 1) | sizes
    mesh = SimpleNamespace(devices=devices, shape=shape, size=int(np.prod(list(shape.values()))))
    return SimpleNamespace(mesh=mesh)


@pytest.mark.parametrize(
    ("packs", "known", "told"),
    [
        ({"sample_packing": False}, None, 1),
        ({"sample_packing": False}, 1, 1),
        ({"sample_packing": False, "eval_sample_packing": True}, None, None),
        ({"sample_packing": False, "eval_sample_packing": True}, 3, 3),
        ({"sample_packing": True}, None, None),
        ({"sample_packing": True}, 5, 5),
    ],
)
def test_a_kernel_is_told_of_every_segment_of_a_row(keys, monkeypatch, packs, known, told):
    """One too few and it attends from one example to another."""
    monkeypatch.setattr(attention_backend.attention_cudnn, "missing", lambda: None)
    config = load_config({**keys, **packs, "val_set_size": 2, "output_dir": "unused"})
    attend: Any
    attend, notes = attention_of(config, CFG, "bfloat16", placed("gpu"), known)
    assert notes == ()
    assert attend.most_segments == told


@pytest.mark.parametrize(
    ("platform", "heads", "sizes", "name", "words"),
    [
        ("tpu", 4, {"context": 4}, "splash", None),
        ("gpu", 4, {"context": 2, "tensor": 2}, "cudnn", None),
        ("tpu", 6, {"context": 4}, "splash", "6 heads are filled up with zeros to 8"),
        ("tpu", 1, {"context": 4}, "chunked", "1 heads are too few"),
        ("cpu", 4, {"context": 4, "tensor": 4}, "chunked", "4 heads are too few"),
    ],
)
def test_kernels_serve_over_context_where_heads_are_exchanged(
    keys, monkeypatch, platform, heads, sizes, name, words
):
    monkeypatch.setattr(attention_backend.attention_cudnn, "missing", lambda: None)
    asked = []

    def choose(*arguments, **options):
        asked.append(attention_backend.choose_backend(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr("jaxlora.training.attention.choose_backend", choose)
    config = load_config({**keys, "val_set_size": 2, "output_dir": "unused"})
    cfg = dataclasses.replace(CFG, num_heads=heads)
    _, notes = attention_of(config, cfg, "bfloat16", placed(platform, **sizes))
    assert [each.name for each in asked] == [name]
    assert [words in note for note in notes] == [True] * bool(words)


def test_a_kernel_is_refused_where_no_device_has_whole_rows(keys):
    config = load_config({**keys, "attn_implementation": "splash", "output_dir": "unused"})
    with pytest.raises(UserError, match="heads are too few to be shared out over mesh"):
        attention_of(
            config, dataclasses.replace(CFG, num_heads=1), "bfloat16", placed("tpu", context=4)
        )

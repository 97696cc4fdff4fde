"""What a run tells an attention kernel of its rows."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxlora.config.load import load_config
from jaxlora.models import attention_backend
from jaxlora.models.config import ModelConfig
from jaxlora.training.attention import attention_of

CFG = ModelConfig(8, 16, 8, 1, 2, 1, 8, 16, 1e-5)


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
    gpu = SimpleNamespace(platform="gpu")
    mesh = SimpleNamespace(devices=np.array([gpu]), shape={"context": 1}, size=1)
    config = load_config({**keys, **packs, "val_set_size": 2, "output_dir": "unused"})
    placement: Any = SimpleNamespace(mesh=mesh)
    attend: Any
    attend, notes = attention_of(config, CFG, "bfloat16", placement, known)
    assert notes == ()
    assert attend.most_segments == told

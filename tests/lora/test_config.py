import dataclasses

import pytest

from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig


def test_defaults_are_those_of_peft():
    peft = pytest.importorskip("peft")
    theirs, ours = peft.LoraConfig(), LoraConfig()
    assert (ours.r, ours.alpha, ours.dropout) == (theirs.r, theirs.lora_alpha, theirs.lora_dropout)
    assert (ours.use_rslora, ours.use_dora) == (theirs.use_rslora, theirs.use_dora)
    assert (ours.rank_pattern, ours.alpha_pattern) == (theirs.rank_pattern, theirs.alpha_pattern)


def test_scale_is_alpha_over_r_or_its_root():
    assert LoraConfig().scale(8, 16) == 2
    assert LoraConfig(use_rslora=True).scale(4, 16) == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "lora_r: 0"),
        ({"rank_pattern": {"q_proj": 0}}, "lora_r: 0"),
        ({"dropout": 1.0}, r"lora_dropout: 1\.0"),
        ({"dropout": -0.1}, r"lora_dropout: -0\.1"),
        ({"lora_bias": True, "use_dora": True}, "does not go with DoRA"),
        ({"train_bias": "some"}, "peft_bias: 'some' is unknown"),
        ({"train_bias": "all", "init": "olora"}, "does not go with init olora"),
        ({"lora_bias": True, "init": "pissa"}, "does not go with init pissa"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**fields)


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 4

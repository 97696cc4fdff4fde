import pytest
from minimal_configs import LORA, MINIMAL

from jaxlora.config.load import load_config
from jaxlora.config.notes import notes

TARGETS = LORA | {"lora_target_linear": True}


@pytest.mark.parametrize(
    ("values", "start"),
    [
        (
            MINIMAL | {"optimizer": "adamw_bnb_8bit"},
            "optimizer: adamw_bnb_8bit is read as adamw_8bit",
        ),
        (MINIMAL | {"optimizer": "paged_adamw_32bit"}, "optimizer: paged_adamw_32bit is read as"),
        (
            MINIMAL | {"gradient_checkpointing": "offload_disk"},
            "gradient_checkpointing: read as offload: ",
        ),
        (MINIMAL | {"evals_per_epoch": 1}, "evals_per_epoch: no effect: no data is held out"),
        (MINIMAL | {"nonfinite_limit": 3}, "nonfinite_limit: no effect: nonfinite is stop"),
        (MINIMAL | {"loss_watchdog_patience": 3}, "loss_watchdog_patience: no effect"),
        (MINIMAL | {"pretraining_dataset": [{"path": "x"}]}, "pretraining_dataset: read as dat"),
        (MINIMAL | {"lora_r": 8}, "lora_r: no effect: adapter is not set"),
        (LORA, "lora_target_modules: not set"),
        (
            TARGETS | {"unfrozen_parameters": ["^lm_head.*"]},
            "unfrozen_parameters: no effect: it ma",
        ),
        (MINIMAL | {"tokens": {"pad_token": "<p>"}}, "tokens: a mapping is read as special_tokens"),
        (
            MINIMAL | {"tokens": ["<e>"], "special_tokens": {"eos_token": "<e>"}},
            "tokens: <e> is one of special_tokens",
        ),
        (TARGETS | {"added_tokens_overrides": {3: "<a>"}}, "added_tokens_overrides: the rows"),
        (TARGETS | {"lora_target_modules": ["q_proj"]}, "lora_target_modules: no effect"),
        (
            TARGETS | {"bnb_config_kwargs": {"bnb_4bit_compute_dtype": "bfloat16"}},
            "bnb_config_kwargs.bnb_4bit_compute_dtype: no effect",
        ),
        (
            TARGETS | {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": True}},
            "bnb_config_kwargs.bnb_4bit_use_double_quant: no effect",
        ),
        (
            MINIMAL | {"datasets": [{"path": "x", "type": "alpaca", "preprocess_shards": 4}]},
            "datasets[0].preprocess_shards: no effect",
        ),
    ],
)
def test_key_without_its_plain_effect_is_noted_once(values, start):
    lines = notes(load_config(values))
    assert len(lines) == 1
    assert lines[0].startswith(start)


def test_nothing_is_noted_of_keys_that_act():
    assert notes(load_config(TARGETS)) == notes(load_config(MINIMAL)) == []

import pytest
from minimal_configs import LORA, MINIMAL

from jaxlora.config import derived
from jaxlora.config.derived import Quantization
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("adamw_torch_4bit", "adamw_8bit"),
        ("adamw_torch_fused", "adamw"),
        ("paged_adamw_32bit", "adamw"),
        ("optimi_adamw", "adamw"),
        ("lion_8bit", "lion"),
        ("paged_lion_32bit", "lion"),
        ("sgd", "sgd"),
        ("adafactor", "adafactor"),
        ("muon", "muon"),
        ("galore_adamw_8bit", None),
        ("schedule_free_adamw", None),
        ("dion", None),
        ("adam", None),
    ],
)
def test_optimizer_names_have_one_meaning(name, canonical):
    assert derived.canonical_optimizer(name) == canonical


@pytest.mark.parametrize(
    ("values", "plan"),
    [
        ({}, None),
        ({"load_in_4bit": True}, Quantization("nf4", True)),
        ({"load_in_8bit": True}, Quantization("int8", False)),
        ({"quantization": "int4"}, Quantization("int4", False)),
        ({"load_in_4bit": True, "quantization": "int4"}, Quantization("int4", False)),
        (
            {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
            Quantization("nf4", False),
        ),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, Quantization("nf4", True)),
        ({"peft": {"loftq_config": {"loftq_bits": 8}}}, Quantization("int8", False)),
        (
            {"peft": {"loftq_config": {}}, "quantization": "int4"},
            Quantization("int4", False),
        ),
    ],
)
def test_quantization_follows_from_the_keys(values, plan):
    assert derived.quantization(load_config(LORA | values)) == plan


@pytest.mark.parametrize(
    ("values", "targets"),
    [
        ({}, ("q_proj", "v_proj")),
        ({"lora_target_linear": True}, "all-linear"),
        ({"lora_target_modules": ["k_proj"]}, ("k_proj",)),
        ({"lora_target_modules": "all-linear"}, "all-linear"),
        ({"lora_target_modules": ["k_proj"], "lora_target_linear": True}, "all-linear"),
    ],
)
def test_lora_targets_follow_from_the_keys(values, targets):
    assert derived.lora_targets(load_config(LORA | values)) == targets


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ({}, 100),
        ({"num_epochs": 2.5}, 250),
        ({"num_epochs": 0.001}, 1),
        ({"max_steps": 7}, 7),
        ({"max_steps": 1000}, 1000),
        ({"max_steps": 1000, "num_epochs": 2}, 200),
        ({"max_steps": 7, "num_epochs": 2}, 7),
    ],
)
def test_run_ends_with_the_first_limit(values, total):
    assert derived.total_steps(load_config(MINIMAL | values), 100) == total


@pytest.mark.parametrize(
    ("values", "total", "steps"),
    [
        ({}, 1000, 30),
        ({}, 10_000, 100),
        ({}, 20, 0),
        ({"warmup_steps": 0}, 1000, 0),
        ({"warmup_ratio": 0.1}, 101, 11),
        ({"warmup_steps": 0.1}, 101, 11),
        ({"warmup_steps": 1}, 101, 1),
    ],
)
def test_warm_up_is_given_or_three_percent(values, total, steps):
    assert derived.warmup_steps(load_config(MINIMAL | values), total) == steps


@pytest.mark.parametrize(
    ("values", "every"),
    [
        ({}, 100),
        ({"saves_per_epoch": 4}, 25),
        ({"saves_per_epoch": 3, "num_epochs": 2}, 34),
        ({"saves_per_epoch": 1000}, 1),
        ({"saves_per_epoch": 0}, None),
        ({"save_strategy": "no"}, None),
        ({"save_strategy": "epoch"}, 100),
        ({"save_steps": 30}, 30),
        ({"save_steps": 0.1, "num_epochs": 2}, 20),
        ({"max_steps": 50, "saves_per_epoch": 1}, 100),
        ({"max_steps": 50, "num_epochs": 4, "saves_per_epoch": 1}, 13),
    ],
)
def test_save_cadence_follows_from_the_keys(values, every):
    config = load_config(MINIMAL | values | {"val_set_size": 0.1})
    renamed = {key.replace("save", "eval"): value for key, value in values.items()}
    as_eval = load_config(MINIMAL | renamed | {"val_set_size": 0.1})
    assert derived.save_every(config, 100) == every
    assert derived.eval_every(as_eval, 100) == derived.save_every(config, 100)


def test_nothing_is_evaluated_without_held_out_data():
    assert derived.eval_every(load_config(MINIMAL), 100) is None
    with_tests = load_config(MINIMAL | {"test_datasets": MINIMAL["datasets"]})
    assert derived.eval_every(with_tests, 100) == 100


def test_batch_size_sets_accumulation_or_is_refused():
    config = load_config(MINIMAL | {"batch_size": 16, "micro_batch_size": 2})
    assert derived.accumulation_steps(config, 4) == 2
    with pytest.raises(UserError, match=r"batch_size: 16 is not a multiple of 6 .*use 18"):
        derived.accumulation_steps(config, 3)
    assert derived.accumulation_steps(load_config(MINIMAL), 4) == 1
    given = load_config(MINIMAL | {"gradient_accumulation_steps": 3})
    assert derived.accumulation_steps(given, 4) == 3


def test_packing_carries_over_to_evaluation_and_padding():
    packed = load_config(MINIMAL | {"sample_packing": True})
    assert derived.eval_packing(packed)
    assert derived.pads_to_sequence_len(packed)
    assert not derived.eval_packing(load_config(MINIMAL))
    chosen = MINIMAL | {"sample_packing": True, "eval_sample_packing": False}
    assert not derived.eval_packing(load_config(chosen))


def test_precision_follows_the_device_unless_given():
    config = load_config(MINIMAL)
    assert derived.compute_dtype(config, "cpu") == "float32"
    assert derived.compute_dtype(config, "tpu") == "bfloat16"
    assert derived.compute_dtype(load_config(MINIMAL | {"bf16": False}), "gpu") == "float32"
    assert derived.matmul_precision(config) is None
    assert derived.matmul_precision(load_config(MINIMAL | {"tf32": False})) == "float32"


@pytest.mark.parametrize(
    ("values", "policy"),
    [
        ({}, "auto"),
        ({"gradient_checkpointing": False}, "none"),
        ({"gradient_checkpointing": True}, "full"),
        ({"gradient_checkpointing": "offload"}, "offload"),
        ({"gradient_checkpointing": "offload_disk"}, "offload"),
        ({"gradient_checkpointing": True, "remat": "offload"}, "offload"),
        ({"gradient_checkpointing": True, "remat": "attention"}, "attention"),
    ],
)
def test_remat_policy_is_one_the_decoder_knows(values, policy):
    from jaxlora.models.transformer import REMAT_POLICIES

    assert derived.remat_policy(load_config(MINIMAL | values)) == policy
    assert policy in ("auto", *REMAT_POLICIES)


def test_loggers_and_rows_follow_from_the_keys():
    config = load_config(MINIMAL | {"wandb_project": "p", "micro_batch_size": 3})
    assert derived.uses_wandb(config)
    assert not derived.uses_wandb(load_config(MINIMAL | {"wandb_project": "p", "use_wandb": False}))
    assert derived.eval_rows(config) == 3
    assert derived.logging_steps(config, 1000) == 5
    assert derived.logging_steps(config, 10) == 1
    assert derived.logging_steps(config, 10_000) == 10

import json

import pytest
import yaml
from minimal_configs import LORA, MINIMAL

from jaxlora.config import report
from jaxlora.config.load import dump_config, examine_config, load_config
from jaxlora.config.schema import Config

FILE = LORA | {
    "lora_target_linear": True,
    "optimizer": "adamw_bnb_8bit",
    "flash_attention": True,
    "fsdp_config": {"offload_params": True},
    "dp_shard_size": 2,
    "fp16": True,
    "deepspeed": None,
    "gptq": False,
    "wandb_name": None,
    "datasets": [
        {"path": "x", "type": "alpaca", "preprocess_shards": 2, "message_field_role": "from"}
    ],
    "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "bfloat16"},
}


def test_every_key_of_a_file_has_its_role():
    roles = report.key_roles(examine_config(FILE))
    by_role = {}
    for name, (role, text) in roles.items():
        by_role.setdefault(role, set()).add(name)
        assert bool(text) == (role in (report.READ_AS, report.NO_EFFECT)), name
    assert by_role[report.READ_AS] == {"optimizer", "dp_shard_size", "fp16"}
    assert by_role[report.NO_EFFECT] == {
        "flash_attention",
        "fsdp_config",
        "gptq",
        "datasets[0].preprocess_shards",
        "bnb_config_kwargs.bnb_4bit_compute_dtype",
    }
    assert by_role[report.NOT_SET] == {"deepspeed", "wandb_name"}
    assert {"adapter", "datasets[0].path", "datasets[0].message_field_role"} <= by_role["acted on"]
    top = {name.split("[")[0].split(".")[0] for name in roles}
    assert top == FILE.keys(), "no key is silently dropped"


def test_refused_keys_stand_beside_the_others():
    examined = examine_config(FILE | {"rl": "dpo", "lora_rr": 1, "micro_batch_size": 0})
    roles = report.key_roles(examined)
    refused = {name for name, (role, _) in roles.items() if role == report.REFUSED}
    assert refused == {"rl", "lora_rr", "micro_batch_size"}
    assert roles["flash_attention"][0] == report.NO_EFFECT
    printed = report.describe_keys(examined)
    assert "refused (3):" in printed
    assert all(text in printed for _, text in roles.values())


def test_resolved_values_are_yaml_of_every_key_and_read_back():
    config = load_config(FILE)
    text = report.describe_values(config)
    values = yaml.safe_load(text)
    assert set(values) == set(Config.model_fields) - {"foreign"}
    assert load_config(values).model_dump(exclude={"foreign"}) == config.model_dump(
        exclude={"foreign"}
    )
    assert "lora_r: 8\n" in text
    assert "seed: 42  # default" in text


DERIVED = [
    ({}, {"steps": "needs the data", "rows per step": "1 for each data or fsdp device"}),
    ({"batch_size": 8}, {"rows per step": "8", "tokens per step": "at most 4,096"}),
    ({"max_steps": 200}, {"steps": "200", "warm-up": "6 steps", "log lines": "every 1 step"}),
    ({"max_steps": 200, "num_epochs": 2}, {"steps": "needs the data"}),
    ({"warmup_steps": 7}, {"warm-up": "7 steps"}),
    ({"warmup_ratio": 0.1}, {"warm-up": "10.0% of the steps; the number needs the data"}),
    ({"warmup_steps": 0.1}, {"warm-up": "10.0% of the steps; the number needs the data"}),
    ({"warmup_steps": 0.1, "max_steps": 50}, {"warm-up": "5 steps"}),
    ({"save_steps": 50}, {"checkpoints": "every 50 steps, and at the end"}),
    ({"save_steps": 0.5, "max_steps": 50}, {"checkpoints": "every 25 steps, and at the end"}),
    ({"save_steps": 0.5}, {"checkpoints": "50.0% of the run; the number needs the data"}),
    ({"save_strategy": "no"}, {"checkpoints": "only at the end"}),
    ({"saves_per_epoch": 2}, {"checkpoints": "2 in an epoch; the number needs the data"}),
    ({}, {"evaluation": "none: no data is held out"}),
    ({"val_set_size": 9}, {"evaluation": "1 in an epoch; the number needs the data"}),
    ({"val_set_size": 9, "evals_per_epoch": 0}, {"evaluation": "only before and after training"}),
    ({"logging_steps": 3}, {"log lines": "every 3 steps"}),
    (LORA | {"load_in_4bit": True}, {"frozen base": "nf4, scales quantized too"}),
    (LORA, {"adapter": "rank 8, alpha 16, on q_proj, v_proj"}),
    ({"sample_packing": True}, {"tokens per step": "512 for each data or fsdp device"}),
]


def rows_of(text):
    return dict(line.split("  ", 1) for line in text.splitlines())


@pytest.mark.parametrize(("values", "expected"), DERIVED)
def test_derived_values_are_said_without_model_and_data(values, expected):
    rows = rows_of(report.describe_derived(load_config(MINIMAL | values)))
    found = {name: text.strip() for name, text in rows.items()}
    assert {name: found[name] for name in expected} == expected


def test_derived_values_are_numbers_once_the_data_are_known():
    values = {"num_epochs": 2, "val_set_size": 0.1, "evals_per_epoch": 4, "micro_batch_size": 2}
    config = load_config(MINIMAL | values | {"gradient_accumulation_steps": 4})
    text = report.describe_derived(config, replicas=8, steps_per_epoch=100)
    assert "needs" not in text
    found = {name: text.strip() for name, text in rows_of(text).items()}
    assert found["steps"] == "200"
    assert found["rows per step"] == "64"
    assert found["tokens per step"] == "at most 32,768"
    assert found["warm-up"] == "6 steps"
    assert found["checkpoints"] == "every 100 steps, and at the end"
    assert found["evaluation"] == "every 25 steps, and before and after training"


def test_a_dumped_configuration_has_the_same_report():
    config = load_config(FILE)
    again = load_config(yaml.safe_load(dump_config(config)))
    assert report.describe_derived(again) == report.describe_derived(config)
    assert json.loads(json.dumps(report.key_roles(examine_config(FILE))))

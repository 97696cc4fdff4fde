import pytest
from minimal_configs import LORA, MINIMAL

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError

QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}
HELD_OUT = {"val_set_size": 0.1}
LOFTQ = {"peft": {"loftq_config": {"loftq_bits": 4}}}
ROWS = {"path": "x", "type": "alpaca"}
CONFLICTS = [
    ("mixing_weights", {"mixing_weights": [1]}),
    ("output_dir", {"output_dir": "https://host/run"}),
    ("base_model", {"base_model": "gss://bucket/model"}),
    ("resume_from_checkpoint", {"resume_from_checkpoint": "ftp://host/run"}),
    ("dataset_prepared_path", {"dataset_prepared_path": "gs://bucket/tokens"}),
    ("mixing_weights", {"mixing_weights": [1, 2], "dataset_mixing_strategy": "interleave"}),
    ("streaming", {"streaming": True}),
    ("val_set_size", {"streaming": True, "max_steps": 3, "val_set_size": 0.1}),
    (
        "dataset_exact_deduplication",
        {"streaming": True, "max_steps": 3, "dataset_exact_deduplication": True},
    ),
    (
        "excess_length_strategy",
        {"datasets": [ROWS | {"type": "classification"}], "excess_length_strategy": "split"},
    ),
    ("mixing_stops", {"mixing_stops": "all_exhausted"}),
    ("datasets[0].shards_idx", {"datasets": [ROWS | {"shards": 4, "shards_idx": 4}]}),
    ("datasets[0].shards", {"datasets": [ROWS | {"shards": 4, "preprocess_shards": 4}]}),
    ("val_set_size", {"val_set_size": 1.5}),
    ("val_set_size", HELD_OUT | {"test_datasets": MINIMAL["datasets"]}),
    ("eval_steps", {"eval_steps": 10}),
    ("eval_strategy", {"eval_strategy": "epoch"}),
    ("eval_exact_match", {"eval_exact_match": True}),
    ("early_stopping_patience", {"early_stopping_patience": 3}),
    ("early_stopping_patience", HELD_OUT | {"early_stopping_patience": 3, "evals_per_epoch": 0}),
    (
        "eval_exact_match",
        HELD_OUT
        | {"eval_exact_match": True, "datasets": None, "pretraining_dataset": [{"path": "x"}]},
    ),
    (
        "eval_exact_match",
        HELD_OUT | {"eval_exact_match": True, "datasets": [{"path": "x", "type": "completion"}]},
    ),
    ("added_tokens_overrides", {"added_tokens_overrides": {3: "<a>", 4: "<a>"}}),
    ("tokens", {"added_tokens_overrides": {3: "<a>"}, "tokens": ["<b>", "<a>"]}),
    ("save_steps", {"save_steps": 10, "saves_per_epoch": 1}),
    ("save_steps", {"save_steps": 1.5}),
    ("eval_steps", HELD_OUT | {"eval_steps": 10, "evals_per_epoch": 1}),
    ("save_strategy", {"save_strategy": "epoch", "save_steps": 10}),
    ("save_strategy", {"save_strategy": "no", "saves_per_epoch": 1}),
    ("save_strategy", {"save_strategy": "steps"}),
    ("eval_strategy", HELD_OUT | {"eval_strategy": "no", "eval_steps": 10}),
    ("batch_size", {"batch_size": 8, "gradient_accumulation_steps": 2}),
    ("batch_size", {"batch_size": 8, "micro_batch_size": 3}),
    ("warmup_steps", {"warmup_steps": 10, "warmup_ratio": 0.1}),
    ("warmup_steps", {"warmup_steps": 1.5}),
    ("lr_quadratic_warmup", {"lr_quadratic_warmup": True, "lr_scheduler": "linear"}),
    ("lr_quadratic_warmup", {"lr_quadratic_warmup": True, "cosine_min_lr_ratio": 0.1}),
    ("cosine_constant_lr_ratio", {"cosine_constant_lr_ratio": 0.8}),
    ("cosine_min_lr_ratio", {"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"}),
    ("lora_model_dir", {"lora_model_dir": "x"}),
    ("unfrozen_parameters", LORA | {"unfrozen_parameters": ["^lm_head", "lm_head"]}),
    ("tokens", {"tokens": {"pad_token": "<p>"}, "special_tokens": {"pad_token": "<q>"}}),
    ("special_tokens.pad", {"tokens": {"pad": "<p>"}}),
    ("lora_r", LORA | {"lora_r": None}),
    ("lora_alpha", LORA | {"lora_alpha": None}),
    ("reinit_weights", LORA | {"reinit_weights": True}),
    ("lora_target_modules", LORA | {"lora_target_modules": "("}),
    ("lora_target_modules", LORA | {"lora_target_modules": ["embed"], "lora_target_linear": True}),
    ("load_in_8bit", LORA | {"load_in_8bit": True, "load_in_4bit": True}),
    ("quantization", LORA | {"quantization": "int8", "load_in_4bit": True}),
    ("quantization", LORA | {"quantization": "nf4", "load_in_8bit": True}),
    ("quantization", {"quantization": "nf4"}),
    ("load_in_4bit", {"load_in_4bit": True}),
    ("load_in_8bit", {"load_in_8bit": True}),
    ("adapter", LORA | {"adapter": "qlora"}),
    ("adapter", LORA | {"adapter": "qlora", "load_in_8bit": True}),
    (
        "bnb_config_kwargs",
        QLORA | {"quantization": "int4", "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}},
    ),
    ("lora_exclude_modules", LORA | {"lora_exclude_modules": "("}),
    ("lora_rank_pattern", LORA | {"lora_rank_pattern": {"(": 4}}),
    ("lora_alpha_pattern", LORA | {"lora_alpha_pattern": {"[": 4}}),
    ("peft_init_lora_weights", LORA | {"peft_init_lora_weights": "pisa"}),
    ("peft_init_lora_weights", LORA | {"peft_init_lora_weights": "orthogonal", "lora_r": 7}),
    ("peft_init_lora_weights", LORA | {"peft_init_lora_weights": "loftq"}),
    ("peft", LORA | LOFTQ | {"peft_init_lora_weights": "pissa"}),
    ("peft.loftq_config.loftq_bits", LORA | LOFTQ | {"load_in_8bit": True}),
    ("peft_lora_bias", LORA | {"peft_lora_bias": True, "peft_use_dora": True}),
    ("peft_bias", LORA | {"peft_bias": "all", "peft_init_lora_weights": "olora"}),
    ("peft_layers_pattern", LORA | {"peft_layers_pattern": "h"}),
    ("peft_lora_bias", LORA | {"peft_lora_bias": True, "peft_init_lora_weights": "pissa"}),
    ("optimizer", {"optimizer": "galore_adamw"}),
    ("remat", {"remat": "none", "gradient_checkpointing": True}),
    ("remat", {"remat": "full", "gradient_checkpointing": False}),
    ("mu_dtype", {"mu_dtype": "bfloat16", "optimizer": "adafactor"}),
    ("mu_dtype", {"mu_dtype": "bfloat16", "optimizer": "adamw_bnb_8bit"}),
    ("remat", {"remat": "auto", "gradient_checkpointing": False}),
    ("remat", {"remat": "full", "gradient_checkpointing": "offload"}),
    ("remat", {"remat": "none", "gradient_checkpointing": "offload"}),
    ("chat_template", {"chat_template": "jinja"}),
    ("chat_template", {"chat_template": "lama3"}),
    ("chat_template", {"chat_template": "tokenizer_default_fallback_lama3"}),
    ("chat_template_jinja", {"chat_template": "chatml", "chat_template_jinja": "{{x}}"}),
    (
        "datasets[0].chat_template",
        {"datasets": [{"path": "x", "type": "alpaca", "chat_template": "jinja"}]},
    ),
]


@pytest.mark.parametrize(("key", "values"), CONFLICTS)
def test_conflict_is_refused_in_one_line_naming_the_key(key, values):
    with pytest.raises(UserError) as error:
        load_config(MINIMAL | values)
    assert str(error.value).startswith(f"configuration: {key}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        QLORA,
        QLORA | {"quantization": "int4"},
        LORA | {"load_in_8bit": True},
        LORA | {"lora_target_modules": ["q_proj"], "lora_target_linear": True},
        HELD_OUT | {"eval_steps": 0.25, "eval_strategy": "steps"},
        {"evals_per_epoch": 1, "eval_strategy": "no"} | {"evals_per_epoch": None},
        {"evals_per_epoch": 0, "warmup_steps": 0},
        {"val_set_size": 100},
        {"datasets": [ROWS | {"shards": 4, "shards_idx": 3}]},
        {
            "datasets": [ROWS, ROWS],
            "dataset_mixing_strategy": "interleave",
            "mixing_weights": [0.3, 1],
        },
        {"warmup_steps": 0.1},
        {"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.8},
        {"datasets": None, "pretraining_dataset": [{"path": "x", "type": "pretrain"}]},
        {"chat_template": "jinja", "chat_template_jinja": "{{ messages }}"},
        {"remat": "full", "gradient_checkpointing": True},
        LORA | LOFTQ,
        LORA | LOFTQ | {"peft_init_lora_weights": "loftq", "quantization": "int4"},
        QLORA | {"peft_init_lora_weights": "pissa_niter_16"},
        LORA | {"peft_init_lora_weights": False},
        LORA | {"peft_init_lora_weights": True, "peft": None},
    ],
)
def test_what_agrees_is_accepted(values):
    load_config(MINIMAL | values)

"""Rules between keys (Axolotl's validation); each yields the problems it finds."""

import re
from collections.abc import Iterator

from jaxlora.config import derived
from jaxlora.config.problem import Problem
from jaxlora.config.schema import Config
from jaxlora.config.source_rules import addresses, mixing, shards, streaming
from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.tokenizer import unknown_template
from jaxlora.lora.initializers import changes_base, check_init

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def problems(config: Config) -> list[Problem]:
    """Returns every broken rule, in the order of the rules."""
    rules = (_tokens, _data, _templates, _held_out, _labels, _cadence, _batch, _length, _adapter)
    rules = (*rules, _start, _quantization, _training, mixing, shards, streaming, addresses)
    return [problem for rule in rules for problem in rule(config)]


def _tokens(config: Config) -> Iterator[Problem]:
    texts, key = list(config.added_tokens_overrides.values()), "added_tokens_overrides"
    for text in sorted({text for text in texts if texts.count(text) > 1}):
        yield Problem((key,), f"{text} is given to two tokens; each needs a text of its own")
    for text in config.tokens:
        if text in texts:
            problem = f"{text} is in {key} too; leave it out of one of them"
            yield Problem(("tokens",), problem, (key,))


def _data(config: Config) -> Iterator[Problem]:
    if not config.datasets and not config.pretraining_dataset:
        text = "at least one entry {path: ..., type: ...} is required"
        yield Problem(("datasets",), text, ("pretraining_dataset",))
    if config.val_set_size > 1 and config.val_set_size != int(config.val_set_size):
        yield Problem(("val_set_size",), "expected a share below 1 or a whole number of rows")
    if config.val_set_size and config.test_datasets:
        text = "set it or test_datasets, not both"
        yield Problem(("val_set_size",), text, ("test_datasets",))


def _templates(config: Config) -> Iterator[Problem]:
    entries = [((), config)]
    entries += [(("datasets", i), entry) for i, entry in enumerate(config.datasets)]
    entries += [(("test_datasets", i), entry) for i, entry in enumerate(config.test_datasets)]
    for path, entry in entries:
        name, text = entry.chat_template, entry.chat_template_jinja
        if name == "jinja" and text is None:
            problem = "jinja needs chat_template_jinja, a template or the path of one"
            yield Problem((*path, "chat_template"), problem, ("chat_template_jinja",))
        elif name not in (None, "jinja") and (problem := unknown_template(name)):
            yield Problem((*path, "chat_template"), problem.removesuffix("."))
        if text is not None and name not in (None, "jinja"):
            problem = f"set chat_template: jinja with it, not {name}"
            yield Problem((*path, "chat_template_jinja"), problem, ("chat_template",))


def _held_out(config: Config) -> Iterator[Problem]:
    held_out = ("val_set_size", "test_datasets")
    if not derived.has_held_out(config):
        asked = {
            "eval_steps": config.eval_steps,
            "eval_strategy": config.eval_strategy not in (None, "no"),
            "eval_exact_match": config.eval_exact_match,
            "early_stopping_patience": config.early_stopping_patience,
        }
        for key in (key for key, value in asked.items() if value):
            if config.eval_strategy != "no" or key not in ("eval_steps", "eval_strategy"):
                text = "there is no held-out data; set val_set_size or test_datasets"
                yield Problem((key,), text, held_out)
        return
    if config.early_stopping_patience and derived.eval_every(config, 1) is None:
        text = "nothing is evaluated while training; set evals_per_epoch or eval_steps"
        others = ("eval_strategy", "evals_per_epoch")
        yield Problem(("early_stopping_patience",), text, others)
    if config.eval_exact_match:
        sets = config.test_datasets or config.datasets
        promptless = ("completion", "classification")
        if all(entry.type in promptless for entry in sets):
            kind = sets[0].type if sets else "completion"
            text = f"data of type {kind} has no prompts to answer"
            yield Problem(("eval_exact_match",), text, ("datasets", "test_datasets"))


def _labels(config: Config) -> Iterator[Problem]:
    sets = ("datasets", "test_datasets")
    types = {(key, i): entry.type for key in sets for i, entry in enumerate(getattr(config, key))}
    if "classification" not in types.values():
        for key in ("num_labels", "label_names"):
            if getattr(config, key):
                text = "a classifier learns from data of type: classification; set it in datasets"
                yield Problem((key,), text, sets)
        return
    for at, kind in types.items():
        if kind != "classification":
            text = "it does not go with data of type: classification; a run learns one thing"
            yield Problem((*at, "type"), text)
    for key in ("sample_packing", "eval_sample_packing"):
        if getattr(config, key):
            text = "a classifier reads one text in a row; remove it"
            yield Problem((key,), text, sets)
    if config.excess_length_strategy == "split":
        text = "a label belongs to a whole text; use drop, truncate or raise"
        yield Problem(("excess_length_strategy",), text, sets)
    names = config.label_names
    if len(set(names)) < len(names):
        yield Problem(("label_names",), "a name is there twice; list each once")
    elif names and config.num_labels not in (None, len(names)):
        text = f"{config.num_labels}, but label_names lists {len(names)}"
        yield Problem(("num_labels",), text, ("label_names",))
    elif len(names) == 1:
        yield Problem(("label_names",), "expected 2 labels or more")


def _cadence(config: Config) -> Iterator[Problem]:
    for key in ("save_steps", "eval_steps", "warmup_steps"):
        steps = getattr(config, key)
        if steps is not None and steps > 1 and steps != int(steps):
            text = f"expected a whole number or a share of the run below 1, not {steps}"
            yield Problem((key,), text)
    for verb in ("save", "eval"):
        steps, per_epoch = getattr(config, f"{verb}_steps"), getattr(config, f"{verb}s_per_epoch")
        strategy = getattr(config, f"{verb}_strategy")
        if steps and per_epoch:
            text = f"set it or {verb}s_per_epoch, not both"
            yield Problem((f"{verb}_steps",), text, (f"{verb}s_per_epoch",))
        if strategy in ("epoch", "no") and (steps or per_epoch):
            key = f"{verb}_steps" if steps else f"{verb}s_per_epoch"
            text = f"{strategy} contradicts {key}; remove one of them"
            yield Problem((f"{verb}_strategy",), text, (key,))
        if strategy == "steps" and not (steps or per_epoch):
            text = f"steps needs {verb}_steps or {verb}s_per_epoch"
            others = (f"{verb}_steps", f"{verb}s_per_epoch")
            yield Problem((f"{verb}_strategy",), text, others)


def _batch(config: Config) -> Iterator[Problem]:
    if config.batch_size is None:
        return
    if config.gradient_accumulation_steps is not None:
        text = "set it or gradient_accumulation_steps, not both"
        yield Problem(("batch_size",), text, ("gradient_accumulation_steps",))
    if config.batch_size % config.micro_batch_size:
        text = (
            f"{config.batch_size} is not a multiple of micro_batch_size {config.micro_batch_size}"
        )
        yield Problem(("batch_size",), text, ("micro_batch_size",))


def _length(config: Config) -> Iterator[Problem]:
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        yield Problem(("warmup_steps",), "set it or warmup_ratio, not both", ("warmup_ratio",))
    for key in ("cosine_min_lr_ratio", "lr_quadratic_warmup"):
        if getattr(config, key) not in (None, False) and config.lr_scheduler != "cosine":
            text = f"it needs lr_scheduler: cosine, not {config.lr_scheduler}"
            yield Problem((key,), text, ("lr_scheduler",))
    if config.lr_quadratic_warmup and config.cosine_min_lr_ratio:
        text = "it does not go with cosine_min_lr_ratio"
        yield Problem(("lr_quadratic_warmup",), text, ("cosine_min_lr_ratio",))
    if config.cosine_constant_lr_ratio is not None and not config.cosine_min_lr_ratio:
        text = "it needs cosine_min_lr_ratio, the rate that stays"
        yield Problem(("cosine_constant_lr_ratio",), text, ("cosine_min_lr_ratio",))


def _adapter(config: Config) -> Iterator[Problem]:
    if config.adapter is None:
        if config.lora_model_dir is not None:
            yield Problem(("lora_model_dir",), "it needs adapter: lora or qlora", ("adapter",))
        for key in ("lora_modules_to_save", "peft_trainable_token_indices"):
            if getattr(config, key):
                text = "without an adapter every weight trains; set adapter: lora or qlora"
                yield Problem((key,), text, ("adapter",))
        if config.unfrozen_parameters and config.reinit_weights:
            text = "random weights must not be frozen; remove one of them"
            yield Problem(("unfrozen_parameters",), text, ("reinit_weights",))
        return
    if any(derived.matches_beside_adapter(each) for each in config.unfrozen_parameters):
        text = "it is for training without an adapter; use lora_modules_to_save"
        yield Problem(("unfrozen_parameters",), text, ("adapter",))
    for key, common in (("lora_r", 16), ("lora_alpha", 32)):
        if getattr(config, key) is None:
            text = f"required with adapter: {config.adapter}; {common} is a common value"
            yield Problem((key,), text, ("adapter",))
    if config.reinit_weights:
        text = "an adapter on random weights learns nothing; remove adapter or reinit_weights"
        yield Problem(("reinit_weights",), text, ("adapter",))
    targets = config.lora_target_modules
    for key in ("lora_target_modules", "lora_exclude_modules"):
        if isinstance(rule := getattr(config, key), str):
            yield from _expression(key, rule)
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in getattr(config, key):
            yield from _expression(key, pattern)
    pattern = config.peft_layers_pattern or ()
    for text in (pattern,) if isinstance(pattern, str) else pattern:
        yield from _expression("peft_layers_pattern", text)
    if pattern and config.peft_layers_to_transform is None:
        text = "it needs peft_layers_to_transform"
        yield Problem(("peft_layers_pattern",), text, ("peft_layers_to_transform",))
    yield from _parameters(config)
    plain = targets is None or targets == "all-linear" or set(targets) <= set(_PROJECTIONS)
    if config.lora_target_linear and not plain:
        text = "set it or lora_target_linear, not both"
        yield Problem(("lora_target_modules",), text, ("lora_target_linear",))


def _parameters(config: Config) -> Iterator[Problem]:
    """PEFT's limits of adapters on experts."""
    for key in ("lora_dropout", "peft_use_dora", "peft_lora_bias", "peft_bias"):
        if config.lora_target_parameters and getattr(config, key) not in (0, False, "none"):
            text = "it does not go with lora_target_parameters; remove it"
            yield Problem((key,), text, ("lora_target_parameters",))


def _expression(key: str, text: str) -> Iterator[Problem]:
    try:
        re.compile(text)
    except re.error as error:
        yield Problem((key,), f"not a regular expression: {error}")


def _start(config: Config) -> Iterator[Problem]:
    init, loftq = derived.lora_init(config), config.peft.loftq_config
    if config.adapter is None:
        return
    key = "peft_init_lora_weights" if config.peft_init_lora_weights else "peft"
    ranks = [config.lora_r or 2, *config.lora_rank_pattern.values()]
    try:
        check_init(init, ranks)
    except UserError as error:
        yield Problem((key,), str(error).partition(": ")[2], ("lora_r", "lora_rank_pattern"))
    if config.peft_lora_bias and (config.peft_use_dora or not isinstance(init, bool)):
        other = "peft_use_dora" if config.peft_use_dora else key
        yield Problem(("peft_lora_bias",), f"it does not go with {other}", (other,))
    if config.peft_bias != "none" and changes_base(init):
        yield Problem(("peft_bias",), f"it does not go with {key}: {init}", (key,))
    if init != "loftq":
        if loftq is not None:
            yield Problem(("peft",), f"loftq_config contradicts peft_init_lora_weights: {init}")
        return
    plan = derived.quantization(config)
    if plan is None:
        text = "loftq needs a quantized base: load_in_4bit: true, or quantization: int4"
        yield Problem((key,), text, ("load_in_4bit", "quantization"))
    elif loftq is not None and (loftq.loftq_bits == 8) != (plan.format == "int8"):
        text = f"{loftq.loftq_bits} contradicts a base stored as {plan.format}"
        others = ("load_in_4bit", "load_in_8bit", "quantization")
        yield Problem(("peft", "loftq_config", "loftq_bits"), text, others)


def _quantization(config: Config) -> Iterator[Problem]:
    wanted = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(config, key)]
    if len(wanted) == 2:
        yield Problem(("load_in_8bit",), "set it or load_in_4bit, not both", ("load_in_4bit",))
        return
    storage = config.quantization
    if storage is not None and wanted and (storage == "int8") != (wanted == ["load_in_8bit"]):
        yield Problem(("quantization",), f"{storage} contradicts {wanted[0]}", tuple(wanted))
        return
    plan = derived.quantization(config)
    if plan is None and config.adapter == "qlora":
        text = "qlora needs load_in_4bit: true, or quantization: int4 or nf4"
        yield Problem(("adapter",), text, ("load_in_4bit", "quantization"))
    if plan is None and config.quantize_embeddings is not None:
        text = f"{config.quantize_embeddings} needs a quantized base; set quantization: int4"
        yield Problem(("quantize_embeddings",), text, ("quantization", "load_in_4bit"))
    if plan is None:
        return
    key = "quantization" if storage is not None else (*wanted, "peft")[0]
    if config.adapter is None:
        text = "a quantized base cannot be trained itself; set adapter: qlora or lora"
        yield Problem((key,), text, ("adapter",))
    if config.adapter == "qlora" and plan.format == "int8":
        yield Problem(("adapter",), "qlora is 4-bit; use adapter: lora with int8", (key,))
    given = "bnb_4bit_quant_type" in config.bnb_config_kwargs.model_fields_set
    if given and plan.format == "int4":
        text = "bnb_4bit_quant_type contradicts quantization: int4"
        yield Problem(("bnb_config_kwargs",), text, ("quantization",))


def _training(config: Config) -> Iterator[Problem]:
    if derived.canonical_optimizer(config.optimizer) is None:
        known = ", ".join(derived.OPTIMIZERS)
        near = did_you_mean(config.optimizer, derived.OPTIMIZERS)
        yield Problem(("optimizer",), f"{config.optimizer} is not available; known: {known}.{near}")
    optimizer = derived.canonical_optimizer(config.optimizer)
    if config.mu_dtype != "float32" and optimizer not in (None, "adamw", "lion", "muon"):
        text = f"{config.mu_dtype} is for adamw, lion and muon, not for {optimizer}"
        yield Problem(("mu_dtype",), text, ("optimizer",))
    checkpoints = config.gradient_checkpointing
    given = "gradient_checkpointing" in config.model_fields_set
    if given and config.remat is not None and bool(checkpoints) == (config.remat == "none"):
        text = f"{config.remat} contradicts gradient_checkpointing: {str(checkpoints).lower()}"
        yield Problem(("remat",), text, ("gradient_checkpointing",))
    elif str(checkpoints).startswith("offload") and config.remat not in (None, "offload"):
        text = f"{config.remat} contradicts gradient_checkpointing: {checkpoints}"
        yield Problem(("remat",), text, ("gradient_checkpointing",))

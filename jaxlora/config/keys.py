"""Axolotl's keys that are not fields of ours: what becomes of each, with the reason.

No-op: the run is the same without it; reported as a note. Refused: the run would not be what the
file asks, so a live value is an error (null, false, empty or an inert value never is).
Mapped: another spelling of a key of ours.
"""

from collections.abc import Mapping
from typing import Any

_NO_OP = {
    "jaxlora chooses the attention backend by device": """attn_implementation flash_attention
        sdp_attention xformers_attention eager_attention flex_attention sage_attention
        flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp
        flash_attn_fuse_qkv flash_optimum gemma4_hybrid_attn_impl""",
    "XLA compiles and fuses the whole step": """torch_compile torch_compile_backend
        torch_compile_mode use_kernels use_scattermoe use_sonicmoe experts_implementation
        fused_attn_kernel lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel
        liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_rms_norm_gated
        use_dsv4_kernels dsv4_fp4_grouped_mode use_glm_dsa_kernels tiled_mlp""",
    "the cross-entropy is always computed in chunks": """cut_cross_entropy chunked_cross_entropy
        liger_fused_linear_cross_entropy liger_cross_entropy""",
    "the mesh key lays out the devices; by default fsdp takes them all": """fsdp fsdp_config
        fsdp_version fsdp_final_state_dict_type deepspeed ddp ddp_find_unused_parameters ddp_timeout
        ddp_bucket_cap_mb ddp_broadcast_buffers accelerator_config device_map local_rank
        world_size use_ray ray_num_workers ray_run_name resources_per_worker""",
    "no remote code is ever run; the architecture must be one that jaxlora knows": """
        trust_remote_code""",
    "the architecture is read from config.json": "model_type is_llama_derived_model",
    "the tokenizer is read from its own files": """tokenizer_type tokenizer_use_fast
        tokenizer_legacy tokenizer_use_mistral_common""",
    "activations are recomputed or kept on the device": """gradient_checkpointing_kwargs
        activation_offloading""",
    "weights are streamed from safetensors and quantized one by one": """low_cpu_mem_usage
        torchdistx_path experimental_skip_move_to_device quantize_moe_experts max_memory
        gpu_memory_limit lora_on_cpu""",
    "the layout of the weights is known": "lora_fan_in_fan_out",
    "checkpoints always hold the optimizer, and weights are always safetensors": """save_only_model
        save_safetensors""",
    "nothing is uploaded; use `hf upload` on the output folder": """hub_model_id hub_strategy
        hub_revision push_dataset_to_hub wandb_log_model""",
    "the login of the hub's own client is used": "hf_use_auth_token",
    "gradients and weights are not sent to Weights & Biases": "wandb_watch",
    "packing is planned exactly, row by row": """sample_packing_eff_est total_num_tokens
        sample_packing_group_size sample_packing_bin_size sample_packing_sequentially
        sample_packing_seq_len_multiplier max_packed_sequence_len pretrain_multipack_attn
        streaming_multipack_buffer_size""",
    "data is tokenized once and read from a memory map": """remove_unused_columns dataset_processes
        dataset_num_proc dataset_keep_in_memory dataloader_pin_memory dataloader_num_workers
        dataloader_prefetch_factor dataloader_drop_last""",
    "the embedding keeps its size": """resize_token_embeddings_to_32x
        mean_resizing_embeddings""",
    "unknown keys are always errors": "strict",
    "leave adapter out to train every weight": "full_finetune",
    "bf16 sets the compute dtype": "torch_dtype",
    "it is in no schema of Axolotl and has no effect there; use cosine_min_lr_ratio": "eta_min",
    "it only matters with a key that jaxlora refuses": """gptq_groupsize gptq_model_v1
        gptq_disable_exllama fp8_enable_fsdp_float8_all_gather relora_prune_ratio
        relora_cpu_offload swanlab_project swanlab_experiment_name swanlab_description swanlab_mode
        swanlab_workspace swanlab_log_model swanlab_log_completions swanlab_completion_log_interval
        swanlab_completion_max_buffer trackio_run_name trackio_space_id otel_metrics_host
        otel_metrics_port expert_parallel_num_nvl_bytes expert_parallel_token_capacity
        eaft_alpha eaft_k lisa_step_interval lisa_layers_attribute""",
    "use `jaxlora preprocess` to look at the data": "debug base_model_ignore_patterns",
}

_REFUSED = {
    "float16 overflows without loss scaling; use bf16: true": "fp16 float16",
    "only supervised fine-tuning is available": """rl rl_beta trl vllm ebft reward_model
        process_reward_model num_labels center_rewards_coefficient kto_desirable_weight
        kto_undesirable_weight orpo_alpha dpo_use_weighting simpo_gamma diffusion""",
    "only text models are available": "processor_type freeze_mm_modules skip_prepare_dataset",
    "not available; use quantization: int4, nf4 or int8": """gptq qat quantization_config
        model_quantization_config model_quantization_config_kwargs llmcompressor fp8
        use_onebitllms nvfp4_merge_aware llama4_linearized_experts""",
    "context parallelism is not available; raise mesh.fsdp and use remat": """context_parallel_size
        sequence_parallel_degree""",
    "experts are not spread over devices": "expert_parallel_size",
    "not available; put every text in datasets with type: completion": """pretraining_dataset
        streaming""",
    "not available; remove duplicates or short rows from the file": """dataset_exact_deduplication
        min_sample_len""",
    "not available; sample_packing wastes less": "group_by_length curriculum_sampling",
    "not available; the vocabulary stays as it is": """tokens added_tokens_overrides
        fix_untrained_tokens""",
    "not available; learning_rate holds for every weight": """lr_groups embedding_lr
        embedding_lr_scale""",
    "not available; leave it out": """s2_attention neftune_noise_alpha relora jagged_restart_steps
        jagged_restart_warmup_steps jagged_restart_anneal_steps lisa_n_layers use_eaft
        cosine_constant_lr_ratio lr_quadratic_warmup lr_scheduler_kwargs optim_args
        model_config cls_model_config
        overrides_of_model_config overrides_of_model_kwargs model_kwargs eval_causal_lm_metrics
        do_causal_lm_eval eval_table_size""",
    "not available; a run ends after num_epochs or max_steps": """early_stopping_patience
        loss_watchdog_threshold loss_watchdog_patience""",
    "not available; metrics go to metrics.jsonl, TensorBoard and Weights & Biases": """use_swanlab
        trackio_project_name use_trackio use_mlflow use_comet use_otel_metrics""",
}

_DATASET_REFUSED = {
    "not available; only whole turns of roles_to_train are trained": """train_on_eot
        message_field_training message_field_training_detail""",
    "not available; leave it out": """field_tools field_thinking template_thinking_key
        split_thinking drop_system_message temperature""",
    "not available; use split, for instance train[:10%]": "shards shards_idx preprocess_shards",
    "no remote code is ever run": "trust_remote_code",
    "not available; use type: chat_template and message_property_mappings": "conversation",
}

MAPPED: Mapping[str, tuple[str, ...]] = {
    "model_revision": ("revision_of_model",),
    "bfloat16": ("bf16",),
    "adam_eps": ("adam_epsilon",),
    "evaluation_strategy": ("eval_strategy",),
    "dp_shard_size": ("mesh", "fsdp"),
    "dp_replicate_size": ("mesh", "data"),
    "tensor_parallel_size": ("mesh", "tensor"),
}
"""Key: path of our key that means the same."""

SYNONYMS: Mapping[str, str] = {
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "lr": "learning_rate",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "steps": "max_steps",
    "max_length": "sequence_len",
    "max_seq_len": "sequence_len",
    "max_seq_length": "sequence_len",
    "packing": "sample_packing",
    "per_device_train_batch_size": "micro_batch_size",
    "scheduler": "lr_scheduler",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "dataset": "datasets",
    "train_data": "datasets",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "layers_to_transform": "peft_layers_to_transform",
    "exclude_modules": "lora_exclude_modules",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "lora_bias": "peft_lora_bias",
    "bias": "peft_bias",
    "init_lora_weights": "peft_init_lora_weights",
}
"""Names that other programs use: our key."""

# Live-looking values that ask for nothing.
_INERT: Mapping[str, Any] = {
    "context_parallel_size": 1,
    "sequence_parallel_degree": 1,
    "expert_parallel_size": 1,
}

# Plugins that only make the same computation faster on NVIDIA GPUs.
_SPEED_PLUGINS = ("cut_cross_entropy", "liger", "kernels", "expert_parallel")


def _by_key(reasons: Mapping[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in reasons.items() for key in keys.split()}


NO_OP: Mapping[str, str] = _by_key(_NO_OP) | {"plugins": "XLA compiles and fuses the whole step"}
"""Key: why it changes nothing."""
REFUSED: Mapping[str, str] = _by_key(_REFUSED)
"""Key: why a live value is an error, and what to do."""

DATASET_REFUSED: Mapping[str, str] = _by_key(_DATASET_REFUSED)
"""The same for the keys of a data set."""


def is_live(key: str, value: Any) -> bool:
    """Returns whether `value` asks for anything.

    >>> is_live("gptq", False), is_live("rl", "dpo"), is_live("context_parallel_size", 1)
    (False, True, False)
    """
    inert = _INERT.get(key)
    return bool(value) and not (value == inert and type(value) is type(inert))


def refusal(key: str, value: Any) -> str | None:
    """Returns why `key: value` is an error, or None."""
    if key == "plugins":
        return _plugin_refusal(value)
    return REFUSED[key] if key in REFUSED and is_live(key, value) else None


def _plugin_refusal(value: Any) -> str | None:
    plugins = value if isinstance(value, list | tuple) else [value]
    speed = tuple(f"axolotl.integrations.{name}." for name in _SPEED_PLUGINS)
    for name in filter(None, plugins):
        if not f"{name}.".startswith(speed):
            return (
                f"{name} is not available; only plugins that merely speed Axolotl up are accepted"
            )
    return None

"""Axolotl's keys that are not fields of ours: what becomes of each, with the reason.

No-op: the trained weights are the same without it; reported as a note. Refused: the run would not
be what the file asks, so a live value is an error (null, false, empty or an inert value never is).
Mapped: another spelling of a key of ours. `jaxlora.config.roles` applies these tables.
"""

from collections.abc import Mapping

_NO_OP = {
    "jaxlora chooses the attention backend by device": """flash_attention
        sdp_attention xformers_attention flex_attention sage_attention
        flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp
        flash_attn_fuse_qkv flash_attn_d512 flash_optimum gemma4_hybrid_attn_impl
        large_head_attention sdpa_varlen""",
    "XLA compiles and fuses the whole step": """torch_compile torch_compile_backend
        torch_compile_mode torch_compile_options deepcompile use_kernels use_scattermoe
        use_sonicmoe experts_implementation expert_backend moe_grouped_backend
        moe_dequant_chunk_size moe_bnb_fast fused_attn_kernel lora_mlp_kernel lora_qkv_kernel
        lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm liger_layer_norm
        liger_glu_activation liger_swiglu liger_rms_norm_gated liger_kernel_impl use_dsv4_kernels
        dsv4_fp4_grouped_mode dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel use_glm_dsa_kernels
        tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp unsloth_cross_entropy_loss
        unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope""",
    "the cross-entropy is always computed in chunks": """cut_cross_entropy chunked_cross_entropy
        chunked_cross_entropy_num_chunks liger_fused_linear_cross_entropy liger_cross_entropy""",
    "the mesh key lays out the devices; by default fsdp takes them all": """fsdp fsdp_config
        fsdp_version fsdp_final_state_dict_type deepspeed ddp ddp_find_unused_parameters ddp_timeout
        ddp_bucket_cap_mb ddp_broadcast_buffers accelerator_config device_map device local_rank
        world_size use_ray ray_num_workers ray_run_name resources_per_worker""",
    "tokens go to their experts by the collectives of XLA, and none is dropped": """
        expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes expert_parallel_token_capacity
        expert_parallel_backend expert_parallel_fallback_on_unsupported""",
    "heads are traded for tokens over context, by no ring": "heads_k_stride ring_attn_func",
    "no remote code is ever run; the architecture must be one that jaxlora knows": """
        trust_remote_code""",
    "the architecture is read from config.json": """model_type type_of_model cls_model_config
        is_llama_derived_model is_falcon_derived_model is_mistral_derived_model
        is_qwen_derived_model""",
    "the tokenizer is read from its own files": """tokenizer_type tokenizer_use_fast
        tokenizer_legacy tokenizer_use_mistral_common""",
    "the chat template is always saved in the tokenizer's folder": "tokenizer_save_jinja_files",
    "activations are recomputed or kept on the device": """gradient_checkpointing_kwargs
        selective_checkpointing""",
    "gradient_checkpointing: offload keeps activations in the host's memory": """
        activation_offloading""",
    "weights are streamed from safetensors and quantized one by one": """low_cpu_mem_usage
        torchdistx_path experimental_skip_move_to_device quantize_moe_experts max_memory
        gpu_memory_limit lora_on_cpu layer_offloading ple_cpu_offload
        qlora_sharded_model_loading""",
    "how the base is stored is read from its files": "gptq gptq_groupsize gptq_model_v1",
    "the layout of the weights is known": "lora_fan_in_fan_out",
    "adapters are always trained in float32": """peft_autocast_adapter_dtype
        embeddings_skip_upcast""",
    "norms are always computed in float32": "fp32_norms fp32_norm_classes",
    "use `jaxlora merge` after training": "merge_lora merge_method",
    "use `jaxlora chat` after training": """gradio_title gradio_share gradio_server_name
        gradio_server_port gradio_max_new_tokens gradio_temperature""",
    "checkpoints always hold the optimizer, and weights are always safetensors": """save_only_model
        save_safetensors""",
    "checkpoints come as saves_per_epoch and save_steps say, and on Ctrl-C": """save_first_step
        dynamic_checkpoint""",
    "nothing is uploaded; use `hf upload` on the output folder": """hub_model_id hub_strategy
        hub_revision push_dataset_to_hub wandb_log_model hf_mlflow_log_artifacts""",
    "the login of the hub's own client is used": "hf_use_auth_token",
    "gradients and weights are not sent to Weights & Biases": "wandb_watch",
    "metrics go to metrics.jsonl, TensorBoard and Weights & Biases": """use_swanlab swanlab_project
        swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace
        swanlab_log_model swanlab_log_completions swanlab_completion_log_interval
        swanlab_completion_max_buffer swanlab_api_key swanlab_web_host swanlab_api_host
        swanlab_lark_webhook_url swanlab_lark_secret use_trackio trackio_project_name
        trackio_run_name trackio_space_id use_mlflow mlflow_tracking_uri mlflow_experiment_name
        mlflow_run_name use_comet comet_api_key comet_workspace comet_project_name
        comet_experiment_key comet_mode comet_online comet_experiment_config use_otel_metrics
        otel_metrics_host otel_metrics_port""",
    "tokens per second are always logged": "include_tokens_per_second include_tkps",
    "no answers are sampled while training; eval_exact_match: true scores some": """generate_samples
        num_generation_samples generation_max_new_tokens generation_temperature generation_top_p
        generation_top_k generation_prompt_ratio generation_do_sample eval_table_size""",
    "memory is XLA's; nothing is collected or profiled step by step": """gc_steps gc_collect_steps
        torch_empty_cache_steps profiler_steps profiler_steps_start""",
    "out of memory is an error; lower micro_batch_size": "auto_find_batch_size",
    "packing is planned exactly, row by row": """sample_packing_eff_est total_num_tokens
        sample_packing_group_size sample_packing_bin_size
        sample_packing_seq_len_multiplier sample_packing_mp_start_method max_packed_sequence_len
        pretrain_multipack_attn pretrain_multipack_buffer_size streaming_multipack_buffer_size
        multipack_real_batches batch_flattening pad_to_multiple_of""",
    "data is tokenized once and read from a memory map": """remove_unused_columns dataset_processes
        dataset_num_proc dataset_keep_in_memory dataloader_pin_memory dataloader_num_workers
        dataloader_prefetch_factor dataloader_drop_last num_dataset_shards_to_save
        preprocess_iterable""",
    "shuffle_merged_datasets sets the order": "shuffle_before_merging_datasets",
    "unknown keys are always errors": "strict",
    "leave adapter out to train every weight": "full_finetune",
    "bf16 sets the compute dtype": "torch_dtype",
    "it is in no schema of Axolotl and has no effect there; use cosine_min_lr_ratio": "eta_min",
    "it is in no schema of Axolotl and has no effect there": """test_value
        base_model_ignore_patterns""",
    "Axolotl fills it in itself": """capabilities env_capabilities axolotl_config_path is_preprocess
        total_supervised_tokens""",
    "it only matters with rl or a reward model": """rl_beta dpo_beta trl vllm ebft
        center_rewards_coefficient kto_desirable_weight kto_undesirable_weight orpo_alpha rpo_alpha
        cpo_alpha simpo_gamma dpo_use_weighting dpo_label_smoothing dpo_loss_type dpo_loss_weights
        dpo_use_liger_kernel dpo_padding_free dpo_use_logits_to_keep dpo_generate_during_eval
        dpo_norm_loss precompute_ref_log_probs max_prompt_len""",
    "it only matters with a key that jaxlora refuses": """gptq_disable_exllama
        fp8_enable_fsdp_float8_all_gather fp8_config nvfp4_merge_aware_start_step
        relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_warmup_steps
        jagged_restart_anneal_steps eaft_alpha eaft_k
        lisa_step_interval lisa_layers_attribute pose_split_on_token_ids pose_max_context_len
        pose_num_chunks scaling_softmax_factor scaling_softmax_bias image_size
        image_resize_algorithm processor_kwargs role_boundaries pretraining_sample_concatenation
        bench_dataset bench_split metric_for_best_model greater_is_better""",
    "it only matters with an optimizer or a scheduler that jaxlora refuses": """optim_target_modules
        lr_div_factor adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction
        dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type
        qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold
        qgalore_gamma_proj qgalore_queue_size""",
    "it only matters with a plugin that jaxlora refuses": """diffusion mora hatchery dense_mixer
        llmcompressor lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model
        nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port
        nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout nemo_gym_datasets
        nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn nemo_gym_max_turns kd_ce_alpha
        kd_alpha kd_temperature kd_temperature_min kd_beta kd_normalize_topk kd_online_server
        kd_online_server_base_url kd_online_topk kd_online_timeout spectrum_top_fraction
        spectrum_model_name grokfast_alpha grokfast_lamb""",
    "use `jaxlora preprocess` to look at the data": "debug",
}

_REFUSED = {
    "preference and reward training are not available": "rl reward_model process_reward_model",
    "only supervised fine-tuning is available": "kd_trainer",
    "only text models are available": "processor_type freeze_mm_modules skip_prepare_dataset",
    "not available; use quantization: int4, nf4 or int8": """qat quantization_config
        model_quantization_config model_quantization_config_kwargs fp8 use_onebitllms
        nvfp4_merge_aware nonexpert_quantization gemma4_fp8_nonexpert gemma4_nf4_nonexpert
        dsv4_fp8_nonexpert_mode dsv4_bf16_all llama4_linearized_experts""",
    "not available; use split, for instance train[:10%]": "dataset_shard_num dataset_shard_idx",
    "not available; sample_packing wastes less": "group_by_length",
    "not available; train their rows: peft_trainable_token_indices": "fix_untrained_tokens",
    "not available; the embedding never shrinks": "shrink_embeddings",
    "not available; learning_rate holds for every weight": """lr_groups embedding_lr
        embedding_lr_scale""",
    "not available; change the model's config.json": """model_config overrides_of_model_config
        model_kwargs overrides_of_model_kwargs rope_scaling""",
    "not available; write it into the data or a chat_template_jinja": """chat_template_kwargs
        default_system_message""",
    "not available; sequence_len holds for evaluation too": "eval_sequence_len",
    "not available; use jaxlora export for an earlier checkpoint": "load_best_model_at_end",
    "no code of others is ever run": "trainer_cls",
    "not available; leave it out": """s2_attention neftune_noise_alpha noisy_embedding_alpha relora
        jagged_restart_steps lisa_n_layers use_eaft use_pose scaling_softmax
        liger_use_token_scaling peft_layer_replication peft_ensure_weight_tying
        lr_scheduler_kwargs optim_args
        eval_causal_lm_metrics do_causal_lm_eval do_bench_eval""",
    "not available; only plugins that merely speed Axolotl up, or log, are accepted": "plugins",
}

_DATASET_REFUSED = {
    "not available; leave it out": "temperature logprobs_field",
    "no code of others is ever run": "trust_remote_code input_transform",
    "not available; use type: chat_template and message_property_mappings": """conversation
        field_human field_model input_format""",
    "preference and reward training are not available": """field_chosen field_rejected
        step_separator max_completion_length train_on_last_step_only""",
    "Axolotl's synthetic data are not available; write a file": """length sequence_length
        min_input_id max_input_id seed""",
}

MAPPED: Mapping[str, tuple[str, ...]] = {
    "model_revision": ("revision_of_model",),
    "bfloat16": ("bf16",),
    "adam_eps": ("adam_epsilon",),
    "evaluation_strategy": ("eval_strategy",),
    "dp_shard_size": ("mesh", "fsdp"),
    "dp_replicate_size": ("mesh", "data"),
    "tensor_parallel_size": ("mesh", "tensor"),
    "context_parallel_size": ("mesh", "context"),
    "sequence_parallel_degree": ("mesh", "context"),
    "expert_parallel_size": ("mesh", "expert"),
}
"""Key: path of our key that means the same."""

IMPLIED: Mapping[str, tuple[str, bool | str, str]] = {
    "fp16": ("bf16", True, "float16 would need its loss scaled"),
    "float16": ("bf16", True, "float16 would need its loss scaled"),
    "float32": ("bf16", False, ""),
    "eager_attention": ("attn_implementation", "eager", ""),
    "curriculum_sampling": ("shuffle_merged_datasets", False, ""),
}
"""Flag: our key that it sets when true, the value, and why it is not taken as it is."""

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


def _by_key(reasons: Mapping[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in reasons.items() for key in keys.split()}


NO_OP: Mapping[str, str] = _by_key(_NO_OP)
"""Key: why it changes nothing."""
REFUSED: Mapping[str, str] = _by_key(_REFUSED)
"""Key: why a live value is an error, and what to do."""

DATASET_REFUSED: Mapping[str, str] = _by_key(_DATASET_REFUSED)
"""The same for the keys of a data set."""

"""QLoRA on Llama 3 8B as a Python configuration: the same run as llama-3-8b-qlora.yml.

Command:  jaxlora train configs/llama_3_8b_qlora.py --lora_r=64
Hardware: meant for one TPU host, or one GPU with 24 GB.
Expected: 8.4 GiB on one H100 by `jaxlora plan` (an analytic model). Not run here: time and loss
are not known.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.base_model = "meta-llama/Meta-Llama-3-8B"
    config.datasets = [{"path": "tatsu-lab/alpaca", "type": "alpaca"}]
    config.val_set_size = 0.02
    config.output_dir = "outputs/llama-3-8b-qlora"

    config.adapter = "qlora"
    config.quantization = "int4"
    config.lora_r = 32
    config.lora_alpha = 16
    config.lora_dropout = 0.05
    config.lora_target_linear = True

    config.sequence_len = 2048
    config.sample_packing = True
    config.micro_batch_size = 1
    config.gradient_accumulation_steps = 8
    config.num_epochs = 1
    config.learning_rate = 2e-4
    config.warmup_ratio = 0.03
    config.bf16 = "auto"
    config.gradient_checkpointing = True

    config.evals_per_epoch = 4
    config.saves_per_epoch = 1
    return config

"""A train step on nf4 for TPUs that are not here: the kernel of `ops/dequantize_tpu.py` compiles in
it, on a mesh (`make plan-tests`)."""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxlora.config.load import load_config
from jaxlora.planning.plan import plan
from jaxlora.planning.topology import parse

pytestmark = [
    pytest.mark.plan,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jaxlora[plan]"),
]

WIDTH, HIDDEN = 512, 1024
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


def test_each_device_unpacks_what_it_gathered_in_4_bits(tmp_path):
    llama = json.loads((Path(__file__).parent / "models/llama3-8b/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**llama, **SIZES}))
    config = load_config(
        {
            "base_model": str(tmp_path),
            "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
            "output_dir": "out",
            "adapter": "qlora",
            "quantization": "nf4",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_linear": True,
            "learning_rate": 1e-4,
            "sequence_len": 512,
            "micro_batch_size": 2,
            "gradient_checkpointing": True,
            "sample_packing": True,
            "max_steps": 10,
            "mesh": {"fsdp": 2, "tensor": 2},
        }
    )
    made = plan(config, parse("v6e:2x2"), hlo=tmp_path / "step.hlo")
    text = (tmp_path / "step.hlo").read_text()
    unpacked = [line for line in text.splitlines() if "look_up" in line and "custom-call(" in line]
    # What each device multiplies with is the compiler's to split: no kernel of a product.
    assert not any("product" in line for line in unpacked)
    # Seven matrices forward and again backward, split over `tensor` one way or the other.
    assert len(unpacked) >= 2 * 7
    assert any(f"bf16[{WIDTH},{HIDDEN // 2}]" in line for line in unpacked)
    assert "u4" in {t.dtype for t in made.traffic if t.kind == "all-gather"}

"""The benchmarks of loading, quantizing, generating and starting run, at tiny sizes."""

import generate
import numpy as np
import pytest
import startup

from jaxlora.core.errors import UserError

TINY = generate.LLAMA_110M | {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_help_is_said_within_two_seconds_of_a_core():
    assert startup.help_s()["cpu_s"] < 2.0  # 0.1 where nothing heavy is imported, 3 with all


def test_nf4_is_given_a_speed_only_if_its_bytes_are_equal(monkeypatch):
    pytest.importorskip("bitsandbytes")
    import quantize

    found = quantize.measure(64, 1)
    assert found["float32"]["ratio"] > 0
    assert set(quantize.ALONE) < found["bfloat16"]["wall_s"].keys()
    true = quantize.quantize
    monkeypatch.setattr(
        quantize, "quantize", lambda w, kind, **more: true(w * np.float32(1.1), kind, **more)
    )
    with pytest.raises(UserError, match="no speed given"):
        quantize.measure(64, 1)


@pytest.mark.oracle
def test_generation_is_given_a_speed_only_if_its_tokens_are_equal(monkeypatch):
    found = generate.measure(TINY, new=6, rounds=1)
    assert found.keys() == {"1", "8"}
    assert all(each["ratio"] > 0 and each["distinct_tokens"] > 3 for each in found.values())
    monkeypatch.setattr(
        generate, "OURS", generate.OURS.replace("max_new_tokens=new", "max_new_tokens=new-1")
    )
    with pytest.raises(UserError, match="no speed"):
        generate.measure(TINY, new=6, rounds=1)


@pytest.mark.oracle
def test_a_start_is_timed_to_its_first_step(tmp_path):
    found = startup.train_s(startup.QUICKSTART, tmp_path, "--eval_exact_match=false")
    assert found["data"] < found["weights"] < found["held-out loss"] < found["first step"]

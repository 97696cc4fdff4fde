import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.save import save_model


def test_precision_shards_and_a_tied_copy_do_not_change_it(tiny_llama, tmp_path):
    folder = tiny_llama(tie_word_embeddings=True)
    cfg, _ = read_model_config(folder)
    params = load_params(folder, cfg, dtype="float32")
    save_model(params, cfg, tmp_path / "half", source_folder=folder, dtype=jnp.bfloat16)
    save_model(params, cfg, tmp_path / "cut", source_folder=folder, max_shard_bytes=30_000)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    (tmp_path / "both").mkdir()
    save_file(tensors, tmp_path / "both" / "model.safetensors")
    expected = base_fingerprint(folder)
    for name in ("half", "cut", "both"):
        assert base_fingerprint(tmp_path / name) == expected, name


def test_other_weights_of_equal_shape_change_it(tiny_llama, tmp_path):
    folder = tiny_llama()
    assert base_fingerprint(folder) != base_fingerprint(tiny_llama(seed=1))
    for name in load_file(folder / "model.safetensors"):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] * 1.01
        save_file(tensors, tmp_path / "model.safetensors")
        changed = base_fingerprint(tmp_path) != base_fingerprint(folder)
        assert changed == (name != "lm_head.weight"), name

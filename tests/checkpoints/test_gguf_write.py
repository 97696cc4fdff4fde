"""A model written as GGUF reads back as itself, within its format, tokenizer included."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_writing import SPECIAL, TEXTS, byte_level, gguf_weights, of_folder, wrapped

from jaxlora.checkpoints.gguf_write import save_gguf
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.data.tokenizer import load_tokenizer
from jaxlora.generation.probe import probe_logits

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")  # transformers reads a tokenizer from GGUF with it

VOCAB = 640


def sentencepiece():
    """A tokenizer as Llama 2's: characters, bytes where there is none, merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    texts = ["Hello world two spaces and lines they have hello", "I've cafes, they'll!"]
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    start = len(vocab)
    vocab.update({f"<0x{byte:02X}>": start + byte for byte in range(256)})
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(tokenizer)


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    """``saved(kind, tokenizer, **changes) -> (HF folder, GGUF file)``."""

    def save(kind="F16", tokenizer=None, *, file=None, **changes):
        folder = tiny_llama(vocab_size=VOCAB, **changes)
        cfg, params = loaded(folder)
        file = file or tmp_path_factory.mktemp("gguf") / "model.gguf"
        save_gguf(params, cfg, file, kind=kind, tokenizer=tokenizer or byte_level())
        return folder, file

    return save


def loaded(path):
    cfg, _ = read_model_config(path)
    return cfg, load_params(path, cfg, dtype=jnp.float32)


# What a read-back may cost in logits of standard deviation 1, largest and mean: half a unit of the
# 11 bits of float16, or of the 8 bits of a block, through 3 layers of 32 channels. Measured 0.008
# and 0.0007, 0.2 and 0.02.
COST = {"F16": (0.03, 0.002), "Q8_0": (0.6, 0.06)}
MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("kind", COST)
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True, "head_dim": 16},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5, "head_dim": 64},
        MISTRAL,
    ],
    ids=["bias", "tied", "linear", "llama3", "mistral"],
)
def test_a_written_file_reads_back_within_the_error_of_its_format(saved, kind, changes):
    folder, file = saved(kind, **changes)
    (cfg, params), (expected_cfg, expected) = loaded(file), loaded(folder)
    assert cfg.rope_scaling == expected_cfg.rope_scaling
    distances = np.abs(probe_logits(cfg, params) - probe_logits(expected_cfg, expected))
    largest, mean = COST[kind]
    assert distances.max() < largest
    assert distances.mean() < mean


@pytest.mark.parametrize("kind", COST)
def test_tensors_are_those_of_llama_cpps_converter(saved, kind):
    """Names, order of rows, types and bytes, by an independent writing of its rules."""
    folder, file = saved(kind, attention_bias=True)
    expected = gguf_weights(*of_folder(folder))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        qtype = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        assert tensors[name].tensor_type == qtype, name
        stored = gguf.quants.quantize(np.ascontiguousarray(values), qtype)
        np.testing.assert_array_equal(tensors[name].data, stored, err_msg=name)


def test_rows_that_no_block_fits_are_float16(saved):
    _, file = saved("Q8_0", intermediate_size=40)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    loaded(file)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_tokenizer_reads_back(saved, make):
    tokenizer = make()
    _, file = saved(tokenizer=tokenizer)
    again = load_tokenizer(file)
    for text in TEXTS:
        # transformers reads every SentencePiece tokenizer as one that adds no second space.
        text = text.strip() if make is sentencepiece else text
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
    assert len(again) == max(again.get_vocab().values()) + 1 == VOCAB
    assert again.chat_template == tokenizer.chat_template


def test_metadata_is_that_of_llama_cpps_converter(saved):
    _, file = saved("Q8_0")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.block_count": 3,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: fields.get(key) for key in expected} == expected
    types, tokens = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.tokens"]
    assert len(types) == len(tokens) == VOCAB
    # Control, a normal token, one a user added, and rows of the embedding beyond the tokenizer.
    assert (types[1], types[50], types[tokens.index("<think>")], types[-1]) == (3, 1, 4, 5)
    assert tokens[-1] == f"[PAD{VOCAB - 1}]"


def refused(saved, file, expected, **options):
    before = sorted(file.parent.iterdir())
    with pytest.raises(UserError, match=expected) as caught:
        saved(file=file, **options)
    assert "\n" not in str(caught.value)
    assert sorted(file.parent.iterdir()) == before, "nothing is written"


def test_a_splitting_rule_without_a_name_is_refused(saved, tmp_path):
    odd = byte_level(r" ?\p{L}+|\s+|\p{N}|[^\p{L}\p{N}\s]+")
    refused(saved, tmp_path / "m.gguf", "splits text by a rule", tokenizer=odd)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_llama, tmp_path):
    cfg, params = loaded(tiny_llama())
    with pytest.raises(UserError, match="the model 97"):
        save_gguf(params, cfg, tmp_path / "m.gguf", kind="F16", tokenizer=byte_level())


def test_an_existing_file_or_another_name_is_refused(saved, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"mine")
    refused(saved, tmp_path / "m.gguf", "is there already")
    refused(saved, tmp_path / "m.bin", r"ends in \.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


def test_an_architecture_without_a_layout_is_refused(tiny_llama, tmp_path):
    import dataclasses

    cfg, params = loaded(tiny_llama())
    cfg = dataclasses.replace(cfg, family="Phi3ForCausalLM")
    with pytest.raises(UserError, match=r"'Phi3ForCausalLM' models are not read from or written"):
        save_gguf(params, cfg, tmp_path / "m.gguf", kind="F16", tokenizer=byte_level())


def test_values_beyond_float16_leave_no_file(tiny_llama, tmp_path):
    cfg, params = loaded(tiny_llama(vocab_size=VOCAB))
    leaf = flatten(params)["embed/embedding"]
    params["embed"]["embedding"] = leaf.at[0, 0].set(1e6)
    with pytest.raises(UserError, match="not finite in float16"):
        save_gguf(params, cfg, tmp_path / "m.gguf", kind="F16", tokenizer=byte_level())
    assert list(tmp_path.iterdir()) == []

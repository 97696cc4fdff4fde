"""Tokenizers for the data tests: a tiny one made here, and the real ones where they are present."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with <s>, </s> and chat markers; one token per byte (ids 8 to 263)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<x>", "<y>"]
    vocabulary = {text: i for i, text in enumerate(special)}
    for char in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[char] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def llama2():
    return real("tokenizers/llama2")


def real(name: str):
    """A tokenizer of the shared folder, or a skip."""
    from jaxlora.data.tokenizer import load_tokenizer

    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {name} in the shared data folder")
    return load_tokenizer(SHARED / name)


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the shared data folder")
    return SHARED

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from jaxlora.core.errors import UserError
from jaxlora.data.templates import NAMED_TEMPLATES
from jaxlora.data.tokenizer import (
    Encoder,
    _is_generic,
    load_tokenizer,
    pad_id,
    template_text,
    tokenizer_digest,
)


def test_a_saved_tokenizer_loads_with_its_special_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == "<pad>"
    assert len(loaded) == len(tokenizer)
    assert loaded.encode("a</s>") == tokenizer.encode("a</s>")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer; expected one of tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer cannot be loaded"),
        (None, "no such folder"),
    ],
)
def test_missing_or_broken_files_are_one_line(tmp_path, files, message):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_special_text_is_text_unless_asked(tokenizer):
    encoder = Encoder(tokenizer)
    text = "a</s><|im_end|>"
    assert encoder.has_special(text)
    assert not encoder.special_ids & set(encoder.ids([text])[0])
    assert tokenizer.decode(encoder.ids([text])[0]) == text
    assert encoder.ids([text], literal=False)[0][-2:] == [2, 5]
    assert not encoder.has_special("a</s")


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer):
    backend = tokenizer.backend_tokenizer
    before = backend.encode("a</s>").ids
    Encoder(tokenizer).ids(["a</s>"])
    assert backend.encode("a</s>").ids == before


def test_prefix_is_what_the_tokenizer_adds(tokenizer, llama2):
    assert Encoder(tokenizer).prefix == [1]
    assert Encoder(llama2).prefix == [1]


def test_llama_ids_equal_transformers(llama2):
    texts = ["Hello there", " two  spaces", "line\nbreak", "\u4f60\u597d", ""]
    encoder = Encoder(llama2)
    expected = [llama2(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoder.ids(texts) == expected


def test_literal_ids_add_no_space(llama2):
    encoder = Encoder(llama2)
    ids = encoder.literal_ids("</s>")
    assert llama2.decode([*encoder.ids(["a"])[0], *ids]) == "a</s>"
    assert not encoder.special_ids & set(ids)


def test_a_missing_end_token_is_refused(tokenizer):
    import copy

    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        _ = Encoder(without).eos_id


def test_template_choices(tokenizer, tmp_path):
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ messages }}"
    (tmp_path / "t.jinja").write_text("{{ 1 }}", encoding="utf-8")
    assert template_text(own) == template_text(own, "tokenizer_default") == "{{ messages }}"
    assert template_text(own, "tokenizer_default_fallback_chatml") == "{{ messages }}"
    chatml = NAMED_TEMPLATES["chatml"]
    assert template_text(tokenizer, "tokenizer_default_fallback_chatml") == chatml
    assert template_text(own, "chatml") == chatml
    assert template_text(own, "{{ 2 }}") == "{{ 2 }}"
    assert template_text(own, str(tmp_path / "t.jinja")) == "{{ 1 }}"
    with pytest.raises(UserError, match='Did you mean "chatml"'):
        template_text(own, "chat_ml")
    with pytest.raises(UserError, match="the tokenizer has none"):
        template_text(tokenizer)


def test_the_digest_follows_added_and_special_tokens(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    assert tokenizer_digest(other) == tokenizer_digest(tokenizer)
    other.pad_token = "<x>"
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_pad_id_falls_back_to_the_end_token(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    assert pad_id(other) == 0
    other.pad_token = None
    assert pad_id(other) == 2


@pytest.mark.parametrize("model", [None, "llama", "qwen2"])
def test_the_short_way_to_a_tokenizer_leads_to_the_same(model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    if model is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    assert _is_generic(tmp_path) == (model != "qwen2")  # whose class overrules the file
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.init_kwargs == theirs.init_kwargs
    assert ours.chat_template == theirs.chat_template


def test_a_generic_tokenizer_loads_without_torch():
    program = (
        "import sys; from jaxlora.data.tokenizer import load_tokenizer; import jaxlora;"
        "load_tokenizer(jaxlora.__path__[0] + '/assets/tiny-llama');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""Loading a tokenizer, and encoding many texts at once with its Rust half."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.templates import NAMED_TEMPLATES
from jaxlora.data.tokenizer_files import tokenizer_of_model_file

_FILES = (
    *("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json"),
    "tokenizer_config.json",
)

# Names of the class that adds nothing to tokenizer.json.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")

_OWN, _FALLBACK = "tokenizer_default", "tokenizer_default_fallback_"


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """A transformers fast tokenizer from a folder or a hub id; code of a repository never runs.

    Raises:
        UserError: no tokenizer is there, it cannot be read, or it is not a fast one.
    """
    folder = Path(path).expanduser()
    gguf = _gguf_file(folder)
    if gguf is None and folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        raise UserError(f"{path}: holds no tokenizer; expected one of {', '.join(_FILES)}.")
    if gguf is None and not folder.is_dir() and str(path).startswith((".", "/", "~")):
        raise UserError(f"{path}: there is no such folder to load a tokenizer from.")
    own = tokenizer_of_model_file(folder) if folder.is_dir() else None
    if own is not None:
        return own
    source = str(folder) if folder.is_dir() else str(path)
    options: dict[str, Any] = {"revision": revision or "main"}
    if gguf is not None:
        source, options = str(gguf.parent), {"gguf_file": gguf.name}
    try:
        if gguf is None and _is_generic(folder):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(source)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, use_fast=True, **options
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        advice = "" if gguf is None else " (set tokenizer_config to the original model's folder)"
        raise UserError(f"{path}: its tokenizer cannot be loaded{advice}: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{path}: has no fast tokenizer; a tokenizer.json is needed.")
    return tokenizer if gguf is None else _without_invented(tokenizer)


def _is_generic(folder: Path) -> bool:
    """Whether a folder's tokenizer is all in tokenizer.json, by the rules of AutoTokenizer.

    Asking that class loads the configurations of all models, and torch where it is installed: 2 s.
    It also overrules the files of some kinds of model, so that only LLaMA's are taken here, and
    folders that say nothing of a model, as those of adapters.
    """
    if not (folder / "tokenizer.json").is_file() or (folder / "tekken.json").is_file():
        return False
    try:
        settings, model = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            for path in (folder / "tokenizer_config.json", folder / "config.json")
        )
        generic = settings.get("tokenizer_class") in _GENERIC and "auto_map" not in settings
        return generic and model.get("model_type") in (None, "llama")
    except (ValueError, AttributeError):
        return False  # and AutoTokenizer says why


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one in a folder without tokenizer files."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any((path / name).is_file() for name in _FILES):
        return None
    found = list(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def _without_invented(tokenizer: Any) -> Any:
    """The tokenizer less the tokens that are not in its file.

    transformers builds every byte-level tokenizer of a GGUF file as GPT-2's, and adds that model's
    end token where there is none, with an id beyond the embedding.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(content["model"]["vocab"])
    kept = [token for token in content["added_tokens"] if token["id"] < size]
    if len(kept) == len(content["added_tokens"]):
        return tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: getattr(tokenizer, name) for name in names}
    texts = {token["content"] for token in kept} | set(content["model"]["vocab"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps({**content, "added_tokens": kept})),
        chat_template=tokenizer.chat_template,
        **{name: text for name, text in special.items() if text in texts},
    )


def template_text(tokenizer: Any, choice: str | None = None) -> str:
    """The jinja text of a chat template choice.

    None and ``tokenizer_default`` mean the tokenizer's own, ``tokenizer_default_fallback_chatml``
    the tokenizer's own if it has one; else a name, a ``.jinja`` file, or jinja text.

    Raises:
        UserError: the tokenizer has no template, or the name is not known.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if choice is None or choice.startswith(_OWN):
        fallback = choice.removeprefix(_FALLBACK) if choice and choice != _OWN else None
        if own:
            return own
        if fallback is None:
            raise UserError(
                "chat_template: the tokenizer has none; set chat_template to one of "
                f"{', '.join(NAMED_TEMPLATES)}, a .jinja file, or jinja text."
            )
        choice = fallback
    if choice in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[choice]
    if "{{" in choice or "{%" in choice:
        return choice
    path = Path(choice).expanduser()
    if path.suffix in (".jinja", ".j2") and path.is_file():
        return path.read_text(encoding="utf-8")
    raise UserError(f"chat_template: {unknown_template(choice) or f'{choice}: no such file.'}")


def unknown_template(choice: str) -> str | None:
    """What is wrong with a chat template choice that is no name; None where it may be one.

    >>> unknown_template("lama3")[-22:]
    'Did you mean "llama3"?'
    """
    name = choice.removeprefix(_FALLBACK)
    if name in (_OWN, *NAMED_TEMPLATES) or "{{" in name or "{%" in name:
        return None
    if Path(name).suffix in (".jinja", ".j2"):
        return None
    names = (_OWN, *NAMED_TEMPLATES)
    return (
        f'"{name}" is not known; expected one of {", ".join(names)}, a .jinja file, or jinja text.'
        f"{did_you_mean(name, names)}"
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of all that decides its token ids (vocabulary, merges, added and special tokens)."""
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(special, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def pad_id(tokenizer: Any) -> int:
    """The id for empty places: the pad token, else the end token, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


class Encoder:
    """Encodes lists of texts; knows the tokens that a tokenizer puts around a text.

    `literal` texts keep the text of a special token as text: a ``</s>`` that a user typed does not
    become the end token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self.special_ids = {int(i) for i, token in added.items() if token.special}
        self.special_ids |= {int(i) for i in tokenizer.all_special_ids}
        texts = {str(token.content) for token in added.values() if token.special}
        texts |= {str(text) for text in tokenizer.all_special_tokens}
        self.special_texts = frozenset(text for text in texts if text)
        longest_first = sorted(self.special_texts, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        plain = self.ids(["a"])[0]
        around = self._encode(["a"], literal=True, fast=True, add_special_tokens=True)[0].ids
        at = next(
            (i for i in range(len(around)) if around[i : i + len(plain)] == plain), len(around)
        )
        # What the tokenizer writes before a text (BOS); what it writes after is ours to decide.
        self.prefix: list[int] = list(around[:at])

    @cached_property
    def eos_id(self) -> int:
        """The end token's id; BERT's tokenizers have only a separator, which ends a text there.

        Raises:
            UserError: the tokenizer has no end token.
        """
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        end = next((token for token in ends if token is not None), None)
        if end is None:
            raise UserError(
                "special_tokens: the tokenizer has no eos_token, so the end of an answer could "
                "not be learned; set special_tokens.eos_token."
            )
        return int(end)

    def has_special(self, text: str) -> bool:
        """Whether a text holds the text of a special token."""
        return self._special.search(text) is not None

    def ids(self, texts: Sequence[str], *, literal: bool = True) -> list[list[int]]:
        """Token ids of each text, nothing added around it."""
        return [each.ids for each in self._encode(texts, literal=literal, fast=True)]

    def literal_ids(self, text: str) -> list[int]:
        """Token ids of a text in the middle of another, special tokens as text."""
        # The newline stands for what comes before: alone, many tokenizers add a space in front.
        encoding = self._encode(["\n" + text], literal=True, fast=False)[0]
        offsets = encoding.offsets
        if any(start < 1 < stop for start, stop in offsets):
            return self.ids([text])[0]
        return [i for i, (start, _) in zip(encoding.ids, offsets, strict=True) if start >= 1]

    def with_offsets(self, texts: Sequence[str]) -> list[Any]:
        """Encodings with ``.ids`` and ``.offsets`` (characters); special tokens are special."""
        return self._encode(texts, literal=False, fast=False)

    def whole(self, texts: Sequence[tuple[str, ...]], limit: int | None = None) -> list[Any]:
        """Encodings of one text or two, as ``tokenizer(*texts)`` makes them.

        With a `limit` longer ones are cut as the tokenizer cuts, and ``.overflowing`` says so.
        """
        inputs = [text[0] if len(text) == 1 else text for text in texts]
        return self._encode(inputs, literal=False, fast=False, add_special_tokens=True, limit=limit)

    def _encode(
        self,
        texts: Sequence[Any],
        *,
        literal: bool,
        fast: bool,
        add_special_tokens: bool = False,
        limit: int | None = None,
    ) -> list[Any]:
        # Another caller of the same tokenizer may have left these set.
        self._backend.no_truncation()
        self._backend.no_padding()
        if limit is not None:
            self._backend.enable_truncation(limit, direction=self.tokenizer.truncation_side)
        before = self._backend.encode_special_tokens
        self._backend.encode_special_tokens = literal
        encode = self._backend.encode_batch_fast if fast else self._backend.encode_batch
        try:
            return encode(list(texts), add_special_tokens=add_special_tokens)
        finally:
            self._backend.encode_special_tokens = before
            self._backend.no_truncation()

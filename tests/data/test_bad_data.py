"""Files that are damaged or wrong: each is refused by file, line and reason, or counted."""

import dataclasses
import gzip
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec

GOOD = '{"instruction": "i", "output": "o"}\n'
CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
COMPLETION, TALK = {"type": "completion"}, {"type": "chat_template", "chat_template": "chatml"}
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}</s>{% endfor %}"
)


@dataclass(frozen=True)
class Case:
    """A file, the error it gives, and with on_bad_row: skip the rows kept and the reason.

    `kept` None: skipping does not help, the error is the same.
    """

    content: bytes | str
    error: str
    kept: int | None = None
    reason: str = ""
    name: str = "a.jsonl"
    spec: dict[str, Any] = field(default_factory=dict)


def row(**columns: Any) -> str:
    return json.dumps(columns) + "\n"


def talk(*roles: str) -> str:
    return row(messages=[{"role": role, "content": "x"} for role in roles])


def binary(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


def array(*rows: str, end: str = "\n]") -> str:
    return "[\n" + ",\n".join(text.strip() for text in rows) + end


LONE = '{"instruction": "\\ud800", "output": "o"}\n'
JSON = "is not valid JSON"
CASES = {
    "truncated last line": Case(GOOD * 3 + GOOD[:20], r":4: is not valid JSON", 3, JSON),
    "truncated middle line": Case(GOOD + GOOD[:20] + "\n" + GOOD, ":2: is not valid JSON", 2, JSON),
    "bad UTF-8": Case(GOOD.encode() + b'{"a": "\xff"}\n', ":2: byte 8 .* not UTF-8", 1, "UTF-8"),
    "latin-1": Case((GOOD + GOOD.replace("i", "\xe9")).encode("latin-1"), ":2: byte", 1, "UTF-8"),
    "lone surrogate": Case(GOOD + LONE, ":2: .* half of a surrogate pair", 1, "surrogate"),
    "NUL": Case(GOOD + '{"instruction": "\0"}\n', ":2: is not valid JSON", 1, JSON),
    "NUL in text": Case("a\n\0\0b\n", ":2: holds a NUL", 1, "NUL", "a.txt", COMPLETION),
    "NUL in csv": Case("text\na\n\0b\n", ":3: holds a NUL", 1, "NUL", "a.csv", COMPLETION),
    "UTF-16": Case(GOOD.encode("utf-16"), ":1: the file is UTF-16"),
    "UTF-16 without mark": Case(GOOD.encode("utf-16-le"), ":1: is not valid JSON"),
    "empty object": Case(GOOD + "{}\n", ":2: .* columns found: none", 1, 'column "instruction"'),
    "null": Case(GOOD + "null\n", ":2: a row must be an object .* got null", 1, "an object"),
    "number": Case(GOOD + "7\n", ":2: a row must be an object .* got int", 1, "an object"),
    "list": Case(GOOD + "[1]\n", ":2: a row must be an object .* got list", 1, "an object"),
    "wrong type early": Case(
        row(instruction=1, output="o") + GOOD, r":1: .*\"instruction\" is int \(1\)", 1, "is int"
    ),
    "wrong type late": Case(
        GOOD * 9 + row(instruction="i", output=["o"]), r":10: .*\"output\" is list", 9, "is list"
    ),
    "null column": Case(GOOD + row(instruction="i", output=None), ":2: .*null", 1, "is null"),
    "missing column early": Case(row(instruction="i") + GOOD, ':1: .*"output"', 1, '"output"'),
    "missing column late": Case(GOOD * 9 + row(output="o"), ':10: .*"instruction"', 9, "needs"),
    "misspelt column": Case(GOOD + row(instuction="i", output="o"), '"instuction"', 1, "needs"),
    "duplicate key": Case(GOOD + '{"a": 1, "a": 2}\n', ':2: .*"a" appears twice', 1, JSON),
    "NaN": Case(GOOD + '{"instruction": NaN}\n', ":2: .* NaN is not JSON", 1, JSON),
    "infinity": Case(GOOD + '{"instruction": -Infinity}\n', ":2: .*Infinity is not", 1, JSON),
    "deep nesting": Case(GOOD + "[" * 100_000 + "\n", ":2: is not valid JSON", 1, JSON),
    "trailing garbage": Case(GOOD + GOOD.strip() + " x\n", ":2: .*Extra data", 1, JSON),
    "two rows a line": Case(GOOD + GOOD.strip() * 2 + "\n", ":2: .*Extra data", 1, JSON),
    "comma at the end": Case(GOOD + GOOD.strip() + ",\n", ":2: .*Extra data", 1, JSON),
    "single quotes": Case(GOOD + "{'instruction': 'i'}\n", ":2: is not valid JSON", 1, JSON),
    "empty file": Case("", "holds no row"),
    "only blank lines": Case("\n \n\n", "holds no row"),
    "binary": Case(binary(5000), r":1: (byte \d+ of the line is not UTF-8|is not valid)"),
    "html": Case("<!DOCTYPE html>\n<p>\n", ":1: is not valid JSON"),
    "truncated array": Case(array(GOOD, GOOD, end=',\n{"a'), ":4: is not valid", name="a.json"),
    "array without end": Case(array(GOOD, end="\n"), ":3: .*expected ','", name="a.json"),
    "array then text": Case(array(GOOD, end="]\nx"), ":3: .*after the closing", name="a.json"),
    "array of a text": Case(array(GOOD, '"b"'), ":3: a row must", 1, "object", "a.json"),
    "array with a key twice": Case(
        array(GOOD, '{"a": 1, "a": 2}', GOOD), ":3: .*twice", 2, JSON, "a.json"
    ),
    "array with bad UTF-8": Case(b'[{"a":\n"\xff"}]', ":2: is not UTF-8", name="a.json"),
    "empty array": Case("[]", "holds no row", name="a.json"),
    "short csv row": Case(
        "instruction,output\na,b\nc\n", ":3: has 1 fields", 1, "has N fields", "a.csv"
    ),
    "long csv row": Case(
        "instruction,output\na,b\nc,d,e\n", ":3: has 3 fields", 1, "has N fields", "a.csv"
    ),
    "csv with bad UTF-8": Case(
        b"instruction,output\na,b\n\xff,d\n", ":3: byte 1 .* UTF-8", 1, "UTF-8", "a.csv"
    ),
    "text after a csv quote": Case(
        'instruction,output\na,b\n"c"d,e\nf,g\n', ":3: is not valid CSV", 2, "CSV", "a.csv"
    ),
    "open csv quote": Case('instruction,output\na,b\n"c,d\n', ":3: is not valid CSV", name="a.csv"),
    "csv header twice": Case("a,a\n1,2\n", ":1: a column name appears twice", name="a.csv"),
    "csv without rows": Case("instruction,output\n", "holds no row", name="a.csv"),
    "truncated gzip": Case(
        gzip.compress((GOOD * 999).encode())[:-30], "cannot be read", name="a.jsonl.gz"
    ),
    "damaged gzip": Case(
        gzip.compress(binary(999))[:500] + b"x" * 600, "cannot be read", name="a.jsonl.gz"
    ),
    "not gzip": Case(GOOD, "cannot be read", name="a.jsonl.gz"),
    "not parquet": Case(GOOD, "a.parquet: cannot be read", name="a.parquet"),
    "not arrow": Case(GOOD, "a.arrow: cannot be read", name="a.arrow"),
    "unknown suffix": Case(GOOD, "data files end in .json", name="a.xls"),
    "all rows over-long": Case(
        row(instruction="i" * 999, output="o") * 2, "2 read, 2 longer than sequence_len .first .*:1"
    ),
    "nothing trained": Case(
        row(segments=[{"text": "a", "label": False}]), "1 no trained", spec={"type": "input_output"}
    ),
    "no assistant turn": Case(talk("user"), "1 no trained token", spec=TALK),
    "wrong order of roles": Case(
        CHAT * 2 + talk("assistant", "user"),
        ":3: .*roles must alternate",
        2,
        "roles must alternate",
        spec={**TALK, "chat_template": STRICT},
    ),
    "no messages": Case(CHAT + '{"messages": []}\n', ":2: .*an empty list", 1, "mess", spec=TALK),
    "message without role": Case(
        CHAT + '{"messages": [{"content": "x"}]}\n', ':2: .* has no "role"', 1, "N", spec=TALK
    ),
    "content of a wrong type": Case(
        CHAT + '{"messages": [{"role": "user", "content": 3}]}\n', ":2: message 1", 1, "is int",
        spec=TALK,
    ),
}  # fmt: skip


def bad_file(folder, case: Case) -> str:
    """Writes the file of a case; returns its path."""
    path = folder / case.name
    content = case.content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture
def options(tmp_path):
    cache = str(tmp_path / "cache")
    return DataOptions(sequence_len=512, dataset_prepared_path=cache, max_bad_rows=0.5)


def test_the_corpus_is_whole():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_is_refused_by_file_line_and_reason_within_seconds(
    tokenizer, tmp_path, options, name
):
    case = CASES[name]
    path = bad_file(tmp_path, case)
    start = time.monotonic()
    with pytest.raises(UserError, match=case.error) as error:
        prepare([DatasetSpec(path, **case.spec)], [], options, tokenizer)
    assert time.monotonic() - start < 5
    assert path in str(error.value)
    assert "\n" not in str(error.value)
    assert not os.path.exists(tmp_path / "cache")


@pytest.mark.parametrize("name", CASES)
def test_skipping_counts_every_bad_row_or_refuses_the_file(tokenizer, tmp_path, options, name):
    case = CASES[name]
    path = bad_file(tmp_path, case)
    specs = [DatasetSpec(path, **case.spec)]
    options = dataclasses.replace(options, on_bad_row="skip")
    if case.kept is None:
        with pytest.raises(UserError) as error:
            prepare(specs, [], options, tokenizer)
        assert path in str(error.value)
        return
    [source] = prepare(specs, [], options, tokenizer).report.train_sources
    [(reason, count)] = source.dropped.items()
    assert count == 1
    assert reason.startswith("bad row: ")
    assert case.reason in reason
    assert source.first[reason].startswith(f"{path}:")
    assert source.kept == case.kept == source.read - 1


GOOD_FILES = {
    "BOM": b"\xef\xbb\xbf" + GOOD.encode(),
    "CRLF": GOOD.replace("\n", "\r\n").encode(),
    "blank lines": f"\n{GOOD}\n \n".encode(),
    "no newline at the end": GOOD.rstrip().encode(),
    "more columns": row(instruction="i", output="o", score=1.5, tags=["x"], note=None).encode(),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_what_is_unusual_but_right_is_read(tokenizer, tmp_path, options, name):
    (tmp_path / "a.jsonl").write_bytes(GOOD_FILES[name])
    prepared = prepare([DatasetSpec(str(tmp_path / "a.jsonl"))], [], options, tokenizer)
    assert prepared.report.train.examples == 1
    assert prepared.train.trained.sum() == 2  # "o" and the end


def test_a_line_of_12_mb_is_one_row(tokenizer, tmp_path, options):
    case = Case(GOOD + row(instruction="i", output="o", note="word " * 2_400_000) + "{}", "")
    with pytest.raises(UserError, match=r"a\.jsonl:3: "):
        prepare([DatasetSpec(bad_file(tmp_path, case))], [], options, tokenizer)


def test_too_many_bad_rows_stop_the_run_with_counts(tokenizer, tmp_path, options):
    case = Case(GOOD * 97 + "{}\n[]\n{}\n", "")
    spec = DatasetSpec(bad_file(tmp_path, case))
    options = dataclasses.replace(options, on_bad_row="skip", max_bad_rows=0.03)
    [source] = prepare([spec], [], options, tokenizer).report.train_sources
    assert (source.read, source.kept, sum(source.dropped.values())) == (100, 97, 3)
    options = dataclasses.replace(options, max_bad_rows=0.029)
    with pytest.raises(UserError, match=r"3 of 100 rows .* 0.029 .*: 2 bad .* \(first .*:98\), 1"):
        prepare([spec], [], options, tokenizer)


def test_mistakes_of_the_settings_are_never_skipped(tokenizer, tmp_path, options):
    options = dataclasses.replace(options, on_bad_row="skip", max_bad_rows=1.0)
    spec = DatasetSpec(bad_file(tmp_path, Case(CHAT, "")), "chat_template", chat_template="{% if")
    with pytest.raises(UserError, match="template"):
        prepare([spec], [], options, tokenizer)


def test_special_files_are_refused_at_once(tokenizer, tmp_path, options):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    # Opens, but reading fails, as root too.
    (tmp_path / "unreadable.jsonl").symlink_to("/proc/self/mem")
    expected = {
        "empty": "holds no data file",
        "pipe.jsonl": "not a regular file",
        "loop.jsonl": "leads nowhere",
        "unreadable.jsonl": "cannot be read",
        "absent.jsonl": "does not exist",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            prepare([DatasetSpec(str(tmp_path / name))], [], options, tokenizer)


BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
TEMPLATES = {
    "without an end token": BARE,
    "with a start token of its own": "{{ bos_token }}" + BARE,
    "with an end token": BARE.replace("'\\n'", "eos_token"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_has_one_start_at_most_and_a_trained_end_whatever_the_template_writes(
    tokenizer, tmp_path, options, name
):
    path = bad_file(tmp_path, Case(CHAT, ""))
    spec = DatasetSpec(path, "chat_template", chat_template=TEMPLATES[name])
    tokens, trained = prepare([spec], [], options, tokenizer).train[0]
    assert (tokens == tokenizer.bos_token_id).sum() <= 1
    assert (tokens == tokenizer.eos_token_id).sum() >= 1
    assert trained[tokens == tokenizer.eos_token_id][-1] == 1


@pytest.mark.parametrize("kind", ["alpaca", "chat"])
def test_the_text_of_a_special_token_in_a_row_stays_text(tokenizer, tmp_path, options, kind):
    text = "a </s> b <|im_end|> c"
    content = (
        row(instruction=text, output="o") if kind == "alpaca" else CHAT.replace('"q"', f'"{text}"')
    )
    spec = DatasetSpec(bad_file(tmp_path, Case(content, "")), **({} if kind == "alpaca" else TALK))
    tokens, _ = prepare([spec], [], options, tokenizer).train[0]
    assert text in tokenizer.decode(tokens)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    turns = 1 if kind == "alpaca" else 2
    assert sum(token in ends for token in tokens.tolist()) == turns


def test_an_empty_evaluation_set_is_refused(tokenizer, tmp_path, options):
    train = DatasetSpec(bad_file(tmp_path, Case(GOOD, "")))
    test = DatasetSpec(bad_file(tmp_path, Case("", "", name="test.jsonl")))
    with pytest.raises(UserError, match=r"test\.jsonl .* holds no row"):
        prepare([train], [test], options, tokenizer)


def test_tokens_beyond_the_embedding_are_refused(tokenizer, tmp_path, options):
    from jaxlora.data.table import check_vocabulary

    table = prepare([DatasetSpec(bad_file(tmp_path, Case(GOOD, "")))], [], options, tokenizer).train
    check_vocabulary(table, len(tokenizer))
    with pytest.raises(UserError, match=r"token id \d+, but .* 50 rows"):
        check_vocabulary(table, 50)

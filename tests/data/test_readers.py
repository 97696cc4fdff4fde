import gzip
import json

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.readers import read_rows

ROWS = [{"a": "one", "b": "x, y"}, {"a": "zwei \u00e9", "b": 'say "hi"'}]


def write(path, content: bytes | str):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("r.jsonl", jsonl(ROWS), ["1", "2"]),
        ("r.jsonl", "\ufeff" + jsonl(ROWS).replace("\n", "\r\n\r\n"), ["1", "3"]),
        ("r.jsonl.gz", gzip.compress(jsonl(ROWS).encode()), ["1", "2"]),
        ("r.json", jsonl(ROWS), ["1", "2"]),
        ("r.json", json.dumps(ROWS), ["1", "1"]),
        ("r.json", json.dumps(ROWS, indent=1), ["2", "6"]),
        ("r.csv", 'a,b\none,"x, y"\nzwei \u00e9,"say ""hi"""\n', ["2", "3"]),
    ],
)
def test_every_format_gives_the_same_rows_with_their_lines(tmp_path, name, content, places):
    path = write(tmp_path / name, content)
    assert list(read_rows(path)) == [
        (f"{path}:{place}", row) for place, row in zip(places, ROWS, strict=True)
    ]


def test_a_csv_field_of_several_lines_is_named_by_its_first(tmp_path):
    path = write(tmp_path / "r.csv", 'a,b\n"1\n2",3\n4,5\n')
    assert [origin for origin, _ in read_rows(path)] == [f"{path}:2", f"{path}:4"]


def test_txt_rows_are_its_lines(tmp_path):
    path = write(tmp_path / "r.txt", "one\n\n two \r\nthree")
    assert [row["text"] for _, row in read_rows(path)] == ["one", " two ", "three"]


@pytest.mark.parametrize("stream", [True, False])
def test_parquet_and_arrow(tmp_path, stream):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    kind = pa.ipc.new_stream if stream else pa.ipc.new_file
    with kind(tmp_path / "r.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("r.parquet", "r.arrow"):
        path = tmp_path / name
        assert list(read_rows(path)) == [(f"{path}:row {i + 1}", ROWS[i]) for i in range(2)]


GOOD = '{"a": "x"}\n'
BAD = {
    "broken line": ("r.jsonl", GOOD + '{"a": "x"\n', ":2: is not valid JSON"),
    "truncated last line": ("r.jsonl", GOOD * 3 + '{"a": "', ":4: is not valid JSON"),
    "trailing garbage": ("r.jsonl", '{"a": 1} x\n', ":1: is not valid JSON: Extra data"),
    "list row": ("r.jsonl", GOOD + "[1]\n", ":2: a row must be an object"),
    "null row": ("r.jsonl", GOOD + "null\n", ":2: a row must be an object .* got null"),
    "NaN": ("r.jsonl", '{"a": NaN}\n', ":1: is not valid JSON: NaN"),
    "duplicate key": ("r.jsonl", '{"a": 1, "a": 2}\n', ':1: .*"a" appears twice'),
    "NUL": ("r.jsonl", b'{"a": "\0"}\n', ":1: is not valid JSON"),
    "deep nesting": ("r.jsonl", "[" * 100_000 + "\n", ":1: is not valid JSON"),
    "bad UTF-8": ("r.jsonl", GOOD.encode() + b'{"a": "\xff"}\n', ":2: byte 8 .*not UTF-8"),
    "UTF-16": ("r.jsonl", GOOD.encode("utf-16"), ":1: the file is UTF-16"),
    "binary": ("r.jsonl", bytes(range(128, 256)), ":1: byte 1 .* not UTF-8"),
    "cut gzip": ("r.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-9], "cannot be read"),
    "not gzip": ("r.jsonl.gz", GOOD, "cannot be read"),
    "cut array": ("r.json", '[\n{"a": 1},\n{"a": ', ":3: is not valid JSON"),
    "open array": ("r.json", '[\n{"a": 1}\n', ":3: .* expected ',' or ']'"),
    "missing comma": ("r.json", '[{"a": 1}\n{"a": 2}]', ":2: .* expected ',' or ']'"),
    "array then text": ("r.json", '[{"a": 1}]\nx', ":2: .* after the closing"),
    "array of texts": ("r.json", '[{"a": 1},\n"b"]', ":2: a row must be an object"),
    "bad UTF-8 in array": ("r.json", b'[{"a":\n"\xff"}]', ":2: is not UTF-8"),
    "short csv row": ("r.csv", "a,b\n1,2\n3\n", r":3: has 1 fields, the header has 2 \(a, b\)"),
    "long csv row": ("r.csv", "a,b\n1,2,3\n", ":2: has 3 fields"),
    "open csv quote": ("r.csv", 'a,b\n1,2\n"3,4\n', ":3: is not valid CSV"),
    "csv header twice": ("r.csv", "a,a\n1,2\n", ":1: a column name appears twice"),
    "not parquet": ("r.parquet", "hello", "r.parquet: cannot be read"),
    "not arrow": ("r.arrow", "hello", "r.arrow: cannot be read"),
    "unknown suffix": ("r.xls", "hello", "data files end in .json"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_naming_file_line_and_reason(tmp_path, case):
    name, content, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(write(tmp_path / name, content)))
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipe_is_refused_instead_of_waiting(tmp_path):
    import os

    os.mkfifo(tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        list(read_rows(tmp_path / "r.jsonl"))

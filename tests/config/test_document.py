import sys

import pytest
import yaml

from jaxlora.config.document import Dumper, parse_yaml, read
from jaxlora.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("5E6", 5e6),
        ("1.5e-4", 1.5e-4),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("0", 0),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        ("'2e-5'", "2e-5"),
        ("yes", True),
        ("~", None),
        ("1e", "1e"),
    ],
)
def test_plain_scalars_read_as_yaml_1_2_numbers(text, value):
    read_value = parse_yaml(f"key: {text}", "run.yml")[0]["key"]
    assert read_value == value
    assert type(read_value) is type(value)


@pytest.mark.parametrize("value", ["2e-5", "2.0e-5", "1:30", "no", "2024-01-01", "1_0", 2e-5, 1e16])
def test_dumped_scalar_reads_back_with_its_type(value):
    again = parse_yaml(yaml.dump({"key": value}, Dumper=Dumper), "run.yml")[0]["key"]
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yml:3: a is already set in line 1"),
        ("a:\n  b: 1\n  b: 2\n", "run.yml:3: b is already set in line 2"),
        ("a: [1\nb: 2\n", "run.yml:2: not valid YAML"),
        ("a: \x00\n", "run.yml:1: not valid YAML: control character"),
        ("a: !!python/object/apply:os.getcwd []\n", "run.yml:1: not valid YAML"),
        ("[" * 5000, "run.yml: nested too deeply"),
    ],
)
def test_bad_yaml_is_refused_with_file_and_line(text, message):
    with pytest.raises(UserError) as error:
        parse_yaml(text, "run.yml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_lines_follow_keys_and_list_entries():
    _, lines = parse_yaml("a: 1\n\nlist:\n  - x: 1\n    y: 2\n", "run.yml")
    assert lines[("a",)] == 1
    assert lines[("list", 0, "y")] == 5


def test_merge_keys_and_aliases_are_read_once():
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nd: &d {k: 1}\ne: {<<: *d, l: 2}\n"
    assert parse_yaml(bomb, "run.yml")[0]["e"] == {"k": 1, "l": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yml", b"", ":1: is empty"),
        ("a.yml", b"- 1\n", ":1: holds list"),
        ("a.yml", b"\xff\xfe\x00", ": is not UTF-8 text"),
        ("a.py", b"x = = 1\n", ":1: not valid Python"),
        ("a.py", b"x = 1\n", ": has no function get_config()"),
        ("a.py", b"def get_config():\n    return {}['lr']\n", ":2: KeyError"),
        ("a.py", b"def get_config():\n    return 3\n", ": get_config() returned int"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(str(path))
    assert str(error.value).startswith(f"{path}{message}")


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.yml"):
        with pytest.raises(UserError, match=str(path)):
            read(str(path))


def test_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "a.yml"
    path.write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read(str(path)).values == {"seed": 1}


def test_python_file_leaves_no_trace(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(seed=1, mesh=dict(fsdp=2), datasets=({'path': 'x'},)))\n"
    )
    before = list(sys.path)
    values = read(str(path)).values
    assert values == {"seed": 1, "mesh": {"fsdp": 2}, "datasets": [{"path": "x"}]}
    assert sys.path == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.py"]

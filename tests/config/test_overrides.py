import pytest

from jaxlora.config.overrides import apply_overrides, parse_overrides
from jaxlora.core.errors import UserError


@pytest.mark.parametrize(
    "arguments", [["--lora_r=32"], ["--lora_r", "32"], ["--lora-r=32"], ["--lora-r", "32"]]
)
def test_spellings_of_a_flag_mean_the_same(arguments):
    assert parse_overrides(arguments) == {("lora_r",): 32}


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-5", 2e-5), ("-1", -1), ("", None), ("[a, b]", ["a", "b"]), ("a=b", "a=b")],
)
def test_values_are_yaml(text, value):
    assert parse_overrides([f"--key={text}"]) == {("key",): value}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["32"], "stray argument"),
        (["--lora_r=8", "more"], "more: stray argument"),
        (["--"], "stray argument"),
        (["--lora_r"], "needs a value"),
        (["--lora_r", "--seed=1"], "--lora_r: needs a value"),
        (["--lora_r=1", "--lora-r=2"], "given twice"),
        (["--mesh={fsdp: 2}", "--mesh.fsdp=2"], "given twice"),
        (["--a=[1"], "--a:1: not valid YAML"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_overrides(arguments)


def test_overrides_reach_into_lists_and_new_mappings_and_leave_the_source():
    source = {"datasets": [{"path": "a"}]}
    changed = apply_overrides(source, {("datasets", 0, "path"): "b", ("mesh", "fsdp"): 2})
    assert changed == {"datasets": [{"path": "b"}], "mesh": {"fsdp": 2}}
    assert source == {"datasets": [{"path": "a"}]}


@pytest.mark.parametrize("path", [("datasets", 1, "path"), ("seed", "x"), ("datasets", "path")])
def test_override_of_nothing_is_refused(path):
    with pytest.raises(UserError, match="--"):
        apply_overrides({"datasets": [{"path": "a"}], "seed": 1}, {path: 0})

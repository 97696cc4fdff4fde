import pytest

from jaxlora.core.errors import UserError, did_you_mean


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("lora_rank", "lora_r"), ("sed", "seed"), ("q_prj", "q_proj")],
)
def test_nearest_known_word_is_suggested(word, nearest):
    assert did_you_mean(word, iter(["lora_r", "seed", "q_proj"])) == f' Did you mean "{nearest}"?'


def test_nothing_is_suggested_for_a_word_like_none():
    assert did_you_mean("zzz", ["lora_r", "seed"]) == ""
    assert did_you_mean("seed", []) == ""


def test_user_error_is_no_kind_of_another_error():
    # `except ValueError` somewhere in between must not swallow a message for the user.
    assert UserError.__bases__ == (Exception,)

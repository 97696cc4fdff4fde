import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.spec import DataOptions, DatasetSpec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "alpacca"}, 'type "alpacca" of f is not known.*Did you mean "alpaca"'),
        ({"train_on_eos": "always"}, "expected all, turn, last or none"),
    ],
)
def test_a_wrong_data_set_entry_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DatasetSpec("f", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_len": 1}, "sequence_len: 1 is too short"),
        ({"val_set_size": -0.1}, "val_set_size: -0.1 is negative"),
        ({"val_set_size": 1.5}, "neither a share below 1 nor a whole number"),
        ({"excess_length_strategy": "cut"}, "expected drop, truncate, split or raise"),
    ],
)
def test_wrong_options_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DataOptions(**{"sequence_len": 8, **settings})

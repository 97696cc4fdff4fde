from jaxlora.core import axes


def test_axis_names_are_distinct():
    names = [value for name, value in vars(axes).items() if name.isupper()]
    assert len(names) == len(set(names)) > 8

from jaxlora.core.tree import flatten, replace, unflatten

TREE = {"layers": {"q": {"kernel": 1, "bias": 2}}, "norm": {"scale": 3}, "step": 4}


def test_flatten_and_unflatten_are_inverse():
    flat = flatten(TREE)
    assert flat == {
        "layers/q/kernel": 1,
        "layers/q/bias": 2,
        "norm/scale": 3,
        "step": 4,
    }
    assert unflatten(flat) == TREE


def test_anything_but_a_mapping_is_a_leaf():
    leaves = {"a": [1, {"b": 2}], "c": (3,), "d": None}
    assert flatten(leaves) == leaves


def test_replace_changes_and_adds_leaves_and_leaves_its_argument_alone():
    changed = replace(TREE, {"norm/scale": 30, "norm/bias": 5, "new/leaf": 6})
    assert changed == {
        "layers": {"q": {"kernel": 1, "bias": 2}},
        "norm": {"scale": 30, "bias": 5},
        "step": 4,
        "new": {"leaf": 6},
    }
    assert TREE["norm"] == {"scale": 3}


def test_replace_shares_untouched_leaves():
    leaf = object()
    assert replace({"a": leaf, "b": 1}, {"b": 2})["a"] is leaf


def test_replace_keeps_keys_that_are_numbers():
    layers = {"layers": {number: {"w": number} for number in range(12)}}
    changed = replace(layers, {"layers/10/w": "new"})
    assert list(changed["layers"]) == list(range(12))
    assert changed["layers"][10] == {"w": "new"}
    assert changed["layers"][2] == {"w": 2}


def test_replace_keeps_empty_branches():
    assert replace({"params": {"w": 1}, "stats": {}}, {"params/w": 2}) == {
        "params": {"w": 2},
        "stats": {},
    }

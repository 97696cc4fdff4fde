"""A deeper model is the same program: layers are scanned, also where they are not alike."""

import compile_time
import pytest

# The shallower of the two has every kind of layer: gemma 3's first layer without a window is its
# sixth; experts in every other layer need four layers to repeat.
DEPTHS = {
    "llama (layers alike)": (2, 8),
    "gemma 3 (windows in 5 of 6 layers)": (6, 12),
    "qwen2-moe (experts in every other layer)": (4, 8),
    "deepseek-v2 (first layer dense)": (3, 8),
}


@pytest.mark.parametrize("name", compile_time.MODELS)
def test_the_train_step_does_not_grow_with_depth(name):
    shallow, deep = (
        # Lines, not characters: a number of layers may have more digits.
        len(compile_time.lower(compile_time.make_config(name, layers)).as_text().splitlines())
        for layers in DEPTHS[name]
    )
    assert shallow == deep

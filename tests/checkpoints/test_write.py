import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxlora.checkpoints.write import write_tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_reads_what_was_streamed(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((3, 5)).astype(dtype),
        "transposed": rng.standard_normal((7, 2)).astype(dtype).T,
        "empty": np.zeros((0, 4), dtype),
        "number": np.ones((), dtype),
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    write_tensors(path, shapes, tensors.__getitem__, dtype=np.dtype(dtype), metadata={"who": "us"})
    for name, tensor in load_file(path).items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor, tensors[name])
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"who": "us"}
        assert set(file.keys()) == set(tensors)


def test_one_tensor_is_asked_for_at_a_time(tmp_path):
    asked = []

    def tensor(name):
        asked.append(name)
        return np.zeros(2, np.float32)

    shapes = {"b": (2,), "a": (2,)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, shapes, tensor, dtype=np.dtype(np.float32), metadata={})
    assert asked == ["b", "a"]

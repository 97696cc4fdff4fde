import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.errors import UserError


def write_shards(folder, shards, weight_map=None):
    """Writes ``{file: {name: array}}`` with an index."""
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    names = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def two_shards(folder, weight_map=None):
    one = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    two = {"b": np.arange(4).astype(ml_dtypes.bfloat16), "c": np.ones((2, 2), np.float16)}
    write_shards(folder, {"model-1.safetensors": one, "model-2.safetensors": two}, weight_map)


@pytest.fixture
def message(tmp_path):
    """Returns the one-line complaint about the folder."""

    def get():
        with pytest.raises(UserError) as caught:
            TensorFiles(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return get


def test_shards_read_as_one_folder_in_their_own_dtypes(tmp_path):
    two_shards(tmp_path)
    files = TensorFiles(tmp_path)
    assert {name: (info.dtype, info.shape) for name, info in files.info.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c": ("F16", (2, 2)),
    }
    assert files.metadata == {"format": "pt"}
    np.testing.assert_array_equal(files.read("a"), np.arange(6).reshape(2, 3))
    assert files.read("b").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(files.read("b").astype(int), range(4))
    np.testing.assert_array_equal(files.read("a", slice(1, 2)), [[3, 4, 5]])


def test_missing_shard_is_named_with_a_tensor_of_it(tmp_path, message):
    two_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    assert "model-2.safetensors: shard is missing" in message()
    assert "expects b" in message()


@pytest.mark.parametrize(("keep", "cut"), [(0.99, "last"), (0.3, "first")])
def test_truncated_file_names_the_first_tensor_that_is_cut(tmp_path, message, keep, cut):
    tensors = {"first": np.ones((50, 50), np.float32), "last": np.ones((50, 50), np.float32)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = header + int(keep * 20000)
    file.write_bytes(file.read_bytes()[:size])
    assert f"model.safetensors: truncated, {cut} goes beyond" in message()
    assert f"({size} bytes)" in message()


@pytest.mark.parametrize("content", [b"", b"\x10", b"<html>not found</html>", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path, message, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors: not a whole safetensors file" in message()


def test_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path, message):
    two_shards(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors"})
    assert "model-1.safetensors: b is not in this shard" in message()


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "model.bin", 3]
)
def test_index_that_leaves_the_folder_is_refused(tmp_path, message, file):
    two_shards(tmp_path, {"a": file})
    assert f"weight_map sends a to {file!r}" in message()


def test_tensor_stored_twice_is_refused(tmp_path, message):
    two_shards(tmp_path)
    save_file(
        {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, tmp_path / "x.safetensors"
    )
    two = {"a": "model-1.safetensors", "b": "x.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": two}))
    assert "x.safetensors: a is also in model-1.safetensors" in message()
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}'
    )
    assert "index.json: a is listed twice" in message()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_bad_index_is_refused(tmp_path, message, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in message()


def test_pickles_are_refused_and_never_opened(tmp_path, message):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "only pytorch_model.bin found, and jaxlora never unpickles" in message()


def test_empty_or_missing_folder_is_refused(tmp_path, message):
    assert "no safetensors file is there" in message()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    assert "found only consolidated.safetensors" in message()
    with pytest.raises(UserError, match="no such folder"):
        TensorFiles(tmp_path / "nowhere")


def test_dtype_that_is_no_float_is_refused_when_read(tmp_path):
    save_file({"q": np.ones(2, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="q has dtype I8; expected F64, F32, F16, BF16"):
        TensorFiles(tmp_path).read("q")


def test_file_that_vanishes_between_open_and_read_is_a_clear_error(tmp_path):
    two_shards(tmp_path)
    files = TensorFiles(tmp_path)
    shutil.move(tmp_path / "model-1.safetensors", tmp_path / "moved")
    with pytest.raises(UserError, match=r"model-1.safetensors: not a whole safetensors file"):
        files.read("a")

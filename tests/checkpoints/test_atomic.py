import pytest

from jaxlora.checkpoints.atomic import staged
from jaxlora.core.errors import UserError


def write_and_fail(folder):
    with staged(folder) as stage:
        (stage / "config.json").write_text("new")
        raise RuntimeError


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError):
        write_and_fail(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_files_of_an_existing_folder_as_they_were(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    with pytest.raises(RuntimeError):
        write_and_fail(folder)
    assert (folder / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_parents_are_made_and_the_folder_appears_under_its_name(tmp_path):
    with staged(tmp_path / "a" / "b") as stage:
        (stage / "x").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match="file/out: cannot be written"),
        staged(tmp_path / "file" / "out"),
    ):
        pass

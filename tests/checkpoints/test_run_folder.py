"""An output folder belongs to one run and to one live process; refusing writes nothing."""

import functools
import json
import os
import signal
import subprocess
import sys

import pytest

from jaxlora.checkpoints import run_folder
from jaxlora.core.errors import UserError

CLAIM_AND_HOLD = """
import sys, time
from jaxlora.checkpoints import run_folder
run = run_folder.claim(sys.argv[1], config_text="a: 1", resume=False)
print(run.run_id, flush=True)
time.sleep(60)
"""


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def hold(folder):
    """Starts a process that owns `folder`; returns it and its run id."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_fresh_folder_is_claimed_with_an_id_and_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run_folder.claim("out put/\u00e9t\u00e9", config_text="a: 1", resume=False) as run:
        assert run.path == tmp_path / "out put" / "\u00e9t\u00e9"
        assert not run.resumed
        assert json.loads((run.path / run_folder.MARKER).read_text())["run_id"] == run.run_id
        assert run_folder.holds_run(run.path)


def test_check_writes_nothing(tmp_path):
    assert run_folder.check(tmp_path / "new" / "run", resume=False) == tmp_path / "new" / "run"
    assert tree(tmp_path) == []


def test_resuming_keeps_the_run_id_and_tells_a_changed_config(tmp_path):
    first = run_folder.claim(tmp_path / "run", config_text="a: 1", resume=False)
    first.release()
    with run_folder.claim(tmp_path / "run", config_text="a: 1", resume=True) as again:
        assert (again.run_id, again.resumed, again.config_changed) == (first.run_id, True, False)
    with run_folder.claim(tmp_path / "run", config_text="a: 2", resume=True) as changed:
        assert (changed.run_id, changed.config_changed) == (first.run_id, True)


def test_claim_killed_before_its_marker_leaves_a_folder_that_can_be_claimed(tmp_path):
    (tmp_path / run_folder.LOCK).write_text('{"pid"')
    (tmp_path / f"{run_folder.MARKER}.temporary").write_text("{")
    run_folder.claim(tmp_path, config_text="", resume=False).release()


def _file(path):
    path.write_text("x")


def _foreign(path):
    path.mkdir()
    (path / "thesis.tex").write_text("x")


def _used(path):
    run_folder.claim(path, config_text="a: 1", resume=False).release()


def _damaged(path):
    _used(path)
    (path / run_folder.MARKER).write_text("{")


def _dangling(path):
    path.symlink_to(path.parent / "nowhere")


def _nothing(path):
    pass


@pytest.mark.parametrize(
    ("make", "resume", "words"),
    [
        (_file, False, "not a folder"),
        (_file, True, "not a folder"),
        (_dangling, False, "not a folder"),
        (_foreign, False, "thesis.tex"),
        (_foreign, True, "thesis.tex"),
        (_used, False, "set resume_from_checkpoint: true or another output_dir"),
        (_damaged, True, "is damaged"),
        (_nothing, True, "no run to resume"),
    ],
)
@pytest.mark.parametrize(
    "refuse", [run_folder.check, functools.partial(run_folder.claim, config_text="")]
)
def test_unfit_folder_is_refused_in_one_line_and_left_as_it_was(
    tmp_path, make, resume, words, refuse
):
    make(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        refuse(tmp_path / "run", resume=resume)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_text_that_is_no_path_is_refused(name):
    with pytest.raises(UserError, match="is not a path"):
        run_folder.check(name, resume=False)


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is not a folder"):
        run_folder.check(tmp_path / "file" / "run", resume=False)


def test_folder_of_a_live_process_is_refused_and_free_after_kill_9(tmp_path):
    folder = tmp_path / "run"
    process, run_id = hold(folder)
    try:
        before = tree(tmp_path)
        for refuse in (
            lambda: run_folder.check(folder, resume=True),
            lambda: run_folder.claim(folder, config_text="a: 1", resume=True),
        ):
            with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
                refuse()
        assert tree(tmp_path) == before
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with run_folder.claim(folder, config_text="a: 1", resume=True) as run:
        assert run.run_id == run_id


def test_claim_in_this_process_lasts_until_released(tmp_path):
    run = run_folder.claim(tmp_path / "run", config_text="", resume=False)
    with pytest.raises(UserError, match="in use by process"):
        run_folder.claim(tmp_path / "run", config_text="", resume=True)
    run.release()
    run.release()
    run_folder.claim(tmp_path / "run", config_text="", resume=True).release()

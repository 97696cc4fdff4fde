"""Runs on object storage: what is there counts or does not, wherever an upload was cut off."""

import contextlib
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxlora.checkpoints import remote, run_folder
from jaxlora.checkpoints.remote import Mirror
from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.core.errors import UserError

ADDRESS = "memory://bucket/runs/one"


@pytest.fixture
def storage(monkeypatch):
    """The memory file system, which all "machines" of a test share."""
    found = fsspec.filesystem("memory")
    found.store.clear()
    found.pseudo_dirs[:] = [""]
    monkeypatch.setattr(remote, "_ATTEMPTS", 1)
    yield found
    found.store.clear()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns ``machine(name)``: from then on the cache is that machine's."""

    def turn_to(name: str) -> None:
        monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / name))

    turn_to("a")
    return turn_to


def state(step: int) -> dict:
    return {"w": np.full(5, step, np.float32), "b": np.arange(3) + step}


class Run:
    """The files of a run on one machine."""

    def __init__(self, *, keep: int = 2):
        self.mirror = Mirror(ADDRESS, keep=keep)
        self.mirror.pull()
        self.folder = self.mirror.folder
        self.resumed = (self.folder / run_folder.MARKER).exists()
        run_folder.claim(self.folder, config_text="", resume=self.resumed).release()
        self.store = CheckpointStore(self.folder / "checkpoints", keep=keep)
        self.step = 0
        if self.store.steps():
            found, _ = self.store.restore(None, state(0))
            self.step = self.store.latest() or 0
            for name, leaf in state(self.step).items():
                np.testing.assert_array_equal(found[name], leaf)

    def save(self, step: int) -> None:
        self.store.save(step, state(step), {})
        self.store.wait()
        (self.folder / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        self.mirror.push()


def names(storage) -> set[str]:
    return {path.removeprefix("/bucket/runs/one/") for path in storage.find("/bucket/runs/one")}


def committed(storage) -> set[int]:
    manifests = (name.split("/") for name in names(storage) if name.endswith("manifest.json"))
    return {int(part[1].removeprefix("checkpoint-")) for part in manifests}


def test_another_machine_continues_from_the_newest_checkpoint(storage, machine):
    first = Run()
    for step in (10, 20, 30):
        first.save(step)
    assert committed(storage) == {20, 30}
    machine("b")
    second = Run()
    assert (second.resumed, second.step) == (True, 30)
    assert (second.folder / "metrics.jsonl").read_text() == '{"step": 30}\n'
    assert second.store.steps() == [30], "older ones stay where they are"
    second.save(40)
    assert committed(storage) == {30, 40}


def test_what_is_on_the_storage_is_the_run_even_where_more_is_left_here(storage, machine, made):
    run = Run()
    run.save(10)
    place(made, run.mirror, 30)  # was saved, and did not go up
    machine("b")
    Run().save(20)
    machine("a")
    assert Run().step == 20


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[int, Path]:
    """Checkpoints to place in a run's folder: a store is slow beside the uploads under test."""
    store = CheckpointStore(tmp_path_factory.mktemp("made"), keep=None)
    for step in (10, 20, 30, 40):
        store.save(step, state(step), {})
        store.wait()
    return {step: store.path(step) for step in store.steps()}


def test_wherever_an_upload_is_cut_off_a_whole_checkpoint_is_there(storage, machine, made):
    """Each operation in turn fails while step 30 goes up over {10, 20}, and all after it."""
    mirror = Mirror(ADDRESS, keep=2)
    mirror.pull()
    run_folder.claim(mirror.folder, config_text="", resume=False).release()
    for step in (10, 20):
        place(made, mirror, step)
        mirror.push()
    before = {path: file.getvalue() for path, file in storage.store.items()}
    place(made, mirror, 30)
    seen: list[int] = []
    for cut in range(100):
        storage.store.clear()
        for path, content in before.items():
            storage.pipe_file(path, content)
        mirror._sent = {name: sent for name, sent in mirror._sent.items() if "-30/" not in name}
        operations = Operations(type(storage), fails_at=cut)
        with operations, contextlib.suppress(UserError):
            mirror.push()
        for step in committed(storage):
            assert_whole_if_sealed(storage, made, step)
        machine(f"after-{cut}")
        after = Mirror(ADDRESS, keep=2)
        after.pull()
        (found,) = (after.folder / "checkpoints").iterdir()
        assert same_files(found, made[int(found.name.removeprefix("checkpoint-"))])
        seen.append(int(found.name.removeprefix("checkpoint-")))
        place(made, after, 40)
        after.push()
        whole = {name.split("/")[1] for name in names(storage) if name.startswith("checkpoints/")}
        assert whole == {f"checkpoint-{step}" for step in committed(storage)}, "a half is left"
        assert committed(storage) == {seen[-1], 40}
        machine("a")
        if operations.done <= cut:
            break
    assert seen == sorted(seen)
    assert seen[0] == 20
    assert seen[-1] == 30
    assert 10 < len(seen) < 100


def place(made: dict[int, Path], mirror: Mirror, step: int) -> None:
    shutil.copytree(made[step], mirror.folder / "checkpoints" / f"checkpoint-{step}")


def assert_whole_if_sealed(storage, made: dict[int, Path], step: int) -> None:
    """Where a whole manifest is, all that it names is: it comes last and goes first."""
    there = f"/bucket/runs/one/checkpoints/checkpoint-{step}"
    contents = {
        path.relative_to(made[step]).as_posix(): path.read_bytes()
        for path in made[step].rglob("*")
        if path.is_file()
    }
    if storage.cat_file(f"{there}/manifest.json") == contents["manifest.json"]:
        for name, content in contents.items():
            assert storage.cat_file(f"{there}/{name}") == content


def same_files(one: Path, other: Path) -> bool:
    def contents(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return contents(one) == contents(other)


class Operations:
    """Counts uploads and removals; fails from one on, which leaves half of an upload."""

    def __init__(self, kind, *, fails_at: int):
        self.done, self._at, self._kind = 0, fails_at, kind
        self._patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name in ("put_file", "rm_file"):
            self._patch.setattr(self._kind, name, self._counted(getattr(self._kind, name)))
        return self

    def __exit__(self, *error):
        self._patch.undo()

    def _counted(self, work):
        def counted(storage, *paths, **options):
            self.done += 1
            if self.done - 1 == self._at and len(paths) == 2:
                content = Path(paths[0]).read_bytes()
                storage.pipe_file(paths[1], content[: len(content) // 2])
            if self.done > self._at:
                raise OSError("the line is dead")
            return work(storage, *paths, **options)

        return counted


def test_a_checkpoint_that_is_damaged_there_is_passed_over_and_replaced(storage, machine):
    run = Run(keep=3)
    run.save(10)
    run.save(20)
    (victim,) = [path for path in storage.store if path.endswith("-20/manifest.json")]
    storage.pipe_file(victim, storage.cat_file(victim)[:-20])
    machine("b")
    again = Run(keep=3)
    assert again.step == 10
    again.save(20)
    machine("c")
    assert Run(keep=3).step == 20


def test_later_checkpoints_are_gone_once_a_run_that_went_back_commits(storage, machine):
    run = Run(keep=4)
    for step in (10, 20, 30):
        run.save(step)
    back = Mirror(ADDRESS, keep=4)
    back.pull(10)
    store = CheckpointStore(back.folder / "checkpoints", keep=4)
    store.restore(10, state(0))
    store.save(15, state(15), {})
    store.wait()
    back.push()
    assert committed(storage) == {10, 15}


def test_only_what_has_changed_goes_up(storage, machine, monkeypatch):
    run = Run()
    run.save(10)
    sent: list[str] = []
    put = type(storage).put_file
    monkeypatch.setattr(
        type(storage), "put_file", lambda s, a, b, **o: (sent.append(b), put(s, a, b, **o))
    )
    run.mirror.push()
    assert sent == []
    (run.folder / "metrics.jsonl").write_text("{}\n")
    (run.folder / ".jaxlora.lock").write_text("x")
    (run.folder / "metrics.temporary").write_text("x")
    run.mirror.push()
    assert sent == ["/bucket/runs/one/metrics.jsonl"]


def test_a_configuration_goes_up_after_the_weights(storage, machine, monkeypatch):
    run = Run()
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.json", "z.json"):
        (run.folder / name).write_text(name)
    sent: list[str] = []
    put = type(storage).put_file
    monkeypatch.setattr(
        type(storage), "put_file", lambda s, a, b, **o: (sent.append(b), put(s, a, b, **o))
    )
    run.mirror.push()
    order = [name.rpartition("/")[2] for name in sent]
    assert set(order[-2:]) == {"adapter_config.json", "config.json"}


def test_storage_that_fails_now_and_then_is_tried_again(storage, machine, monkeypatch):
    monkeypatch.setattr(remote, "_ATTEMPTS", 4)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    put, failures = type(storage).put_file, [3, 3, 3]

    def sometimes(self, *paths, **options):
        if failures and failures[-1]:
            failures[-1] -= 1
            raise ConnectionError("reset by peer")
        if failures:
            failures.pop()
        return put(self, *paths, **options)

    run = Run()
    monkeypatch.setattr(type(storage), "put_file", sometimes)
    run.save(10)
    assert committed(storage) == {10}


def test_storage_that_stays_away_is_said_in_one_line_with_where_the_files_are(
    storage, machine, monkeypatch
):
    run = Run()

    def never(self, *paths, **options):
        raise PermissionError("denied\nby policy")

    monkeypatch.setattr(type(storage), "put_file", never)
    with pytest.raises(UserError, match=r"memory://bucket/runs/one: denied by policy; .* are in"):
        run.save(10)
    assert run.store.steps() == [10]


def test_a_bucket_that_is_not_there_is_an_error(storage, machine, monkeypatch):
    run = Run()

    def put_file(self, *paths, **options):  # as s3fs and gcsfs say it
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(type(storage), "put_file", put_file)
    with pytest.raises(UserError, match=r"runs/one: cannot be written: The specified bucket"):
        run.mirror.push()


def test_a_file_that_is_replaced_while_others_go_up_goes_up_the_next_time(storage, machine):
    run = Run()
    listed = run.mirror._files
    run.mirror._files = lambda: listed() | {"gone.json": run.folder / "gone.json"}
    run.mirror.push()
    assert "gone.json" not in names(storage)
    (run.folder / "gone.json").write_text("{}")
    run.mirror.push()
    assert "gone.json" in names(storage)


def test_somebody_elses_files_are_left_alone(storage, machine):
    storage.pipe_file("/bucket/runs/one/theirs.txt", b"x")
    with pytest.raises(UserError, match=r"not a jaxlora run's \(e\.g\. theirs\.txt\)"):
        Mirror(ADDRESS).pull()
    assert names(storage) == {"theirs.txt"}


def test_a_run_at_an_address_below_is_not_touched(storage, machine):
    run = Run()
    run.save(10)
    storage.store.clear()
    above = Mirror(ADDRESS.rpartition("/")[0])
    above.pull()
    assert run.store.steps() == [10]
    with pytest.raises(UserError, match="has files that are not a jaxlora run's"):
        run_folder.check(above.folder, resume=False)


def test_what_a_killed_pull_left_is_cleared(storage, machine):
    run = Run()
    run.save(10)
    for left in ([".fetching-1"], [run_folder.MARKER, "metrics.jsonl", ".fetching-2"]):
        machine(f"killed-{len(left)}")
        folder = Mirror(ADDRESS).folder
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).write_text("half")
        assert Run().step == 10


def test_a_folder_in_which_a_process_is_at_work_is_not_touched(storage, machine):
    run = Run()
    run.save(10)
    with (
        run_folder.claim(run.folder, config_text="", resume=True),
        pytest.raises(UserError, match="is in use by process"),
    ):
        Mirror(ADDRESS).pull()
    assert run.store.steps() == [10]

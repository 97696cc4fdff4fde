"""`--profile`: a trace that Perfetto and TensorBoard open, of a run that it does not change."""

import gzip
import json

import pytest

from jaxlora.config.load import load_config
from jaxlora.training import trace
from jaxlora.training.loop import train

ADAPTER = "adapter_model.safetensors"


def test_warm_steps_are_recorded_and_the_run_is_the_same(run, keys, tmp_path):
    plain = run("plain").output_dir
    config = load_config({**keys, "output_dir": str(tmp_path / "traced")})
    traced = train(config, quiet=True, profile=True).output_dir
    assert (traced / ADAPTER).read_bytes() == (plain / ADAPTER).read_bytes()
    assert not (plain / "profile").exists()
    (folder,) = (traced / "profile/plugins/profile").iterdir()
    assert list(folder.glob("*.xplane.pb")), "what TensorBoard reads"
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(steps) == ["2", "3", "4"], "numbers from 0: the first two are not warm"


@pytest.mark.parametrize(
    ("steps", "recorded"), [(6, [2, 3, 4]), (4, [2, 3]), (3, [2]), (2, [1]), (1, [0]), (0, [])]
)
def test_short_runs_are_recorded_as_far_as_they_go(tmp_path, monkeypatch, steps, recorded):
    seen: list[int] = []
    open_ = [False]
    monkeypatch.setattr(
        trace.jax.profiler, "start_trace", lambda *a, **o: open_.__setitem__(0, True)
    )
    monkeypatch.setattr(trace.jax.profiler, "stop_trace", lambda: open_.__setitem__(0, False))
    recorder = trace.StepTrace(tmp_path, steps)
    for number in range(steps):
        with recorder.step(number):
            seen += [number] if open_[0] else []
    assert seen == recorded
    assert not open_[0]


@pytest.mark.parametrize(("first", "recorded"), [(2, [4, 5]), (3, [5]), (4, [5]), (5, [5])])
def test_a_run_that_continues_is_recorded_from_where_it_is_warm(
    tmp_path, monkeypatch, first, recorded
):
    calls: list[str] = []
    monkeypatch.setattr(trace.jax.profiler, "start_trace", lambda *a, **o: calls.append("start"))
    monkeypatch.setattr(trace.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    recorder, seen = trace.StepTrace(tmp_path, 6), []
    for number in range(first, 6):
        with recorder.step(number):
            seen += [number] if calls == ["start"] else []
    assert seen == recorded
    assert calls == ["start", "stop"]


def test_an_error_in_a_step_closes_the_trace(tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(trace.jax.profiler, "start_trace", lambda *a, **o: calls.append("start"))
    monkeypatch.setattr(trace.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    recorder = trace.StepTrace(tmp_path, 1)
    with pytest.raises(RuntimeError, match="deliberate"), recorder.step(0):
        raise RuntimeError("deliberate")
    recorder.close()
    assert calls == ["start", "stop"]

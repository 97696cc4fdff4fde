"""A run of several processes is the run of one: losses, adapter, checkpoints; only one writes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import loopback
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.core.errors import UserError
from jaxlora.data.batches import Batches
from jaxlora.data.table import TokenTable
from jaxlora.training.evaluation import held_out

PROGRAM = """
import json, sys
from jaxlora.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
RUN = {"batch_size": 4, "max_steps": 3, "save_steps": 2, "save_strategy": "steps"}
HELD_OUT = {"val_set_size": 0.2, "eval_steps": 2}
# Losses near 6 in float32; sums of rows are added in another order.
TOLERANCE = 2e-5


def start(folder, keys, count, devices=1, **options):
    """Runs `jaxlora train` in `count` processes of so many devices."""
    folder.mkdir(exist_ok=True)
    file = folder / "run.yml"
    file.write_text(json.dumps(keys))
    where = ["--coordinator", "{coordinator}", "--num-processes", str(count), "--process-id"]
    commands = [["-c", PROGRAM, str(file), *where, str(i)] for i in range(count)]
    return loopback.run(commands, devices=[devices] * count, **options)


def losses_of(records):
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


def check(tmp_path, name, metrics_of, done):
    assert [each.returncode for each in done] == [0] * len(done), done[0].stderr[-2000:]
    assert "adapter, loss curve and model card" in done[0].stdout
    said = [line for each in done[1:] for line in each.stdout.splitlines()]
    assert all(line.startswith("[Gloo]") for line in said), "only process 0 prints"
    ours, theirs = metrics_of(tmp_path / "one"), metrics_of(tmp_path / name)
    np.testing.assert_allclose(losses_of(theirs), losses_of(ours), rtol=0, atol=TOLERANCE)
    held_out = [
        [r[name] for r in records for name in ("eval_loss", "exact_match") if name in r]
        for records in (ours, theirs)
    ]
    np.testing.assert_allclose(*held_out, rtol=0, atol=TOLERANCE)
    steps = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
    assert steps == ["checkpoint-2", "checkpoint-3"]
    adapters = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", name)]
    assert adapters[0].keys() == adapters[1].keys()
    for key, values in adapters[0].items():
        assert np.ptp(values) > 0, "nothing was trained"
        np.testing.assert_allclose(values, adapters[1][key], atol=2e-4, err_msg=key)


@pytest.mark.parametrize("own", [{1, 2}, None])
def test_evaluation_makes_the_rows_of_its_process(own):
    table = TokenTable.of([([i, i + 1, i + 2], [0, 1, 1]) for i in range(1, 11)])
    batches = Batches(table, sequence_len=8, rows=4, shuffle=False)
    seen = []
    placement = SimpleNamespace(own_rows=lambda rows: own, batch=lambda batch: batch)
    model = SimpleNamespace(placement=placement)
    plan = SimpleNamespace(eval_batches=batches, model=model, labels=None)

    def eval_step(trainable, frozen, batch):
        seen.append(batch)
        return 3.0, 2.0, 0

    assert held_out(eval_step, {}, {}, plan).loss == 1.5
    made = np.concatenate([batch["segment_ids"][0].any(-1) for batch in seen])
    every = np.arange(12) < 10  # ten rows, and two empty ones that fill the last batch
    mine = np.isin(np.arange(12) % 4, list(own or range(4)))
    np.testing.assert_array_equal(made, every & mine)


def test_two_processes_are_one(run, keys, metrics_of, tmp_path, cache):
    run("one", **RUN)
    theirs = {**keys, **RUN, "micro_batch_size": 2, "output_dir": str(tmp_path / "two")}
    done = start(tmp_path / "two-run", theirs, 2, env=cache)
    check(tmp_path, "two", metrics_of, done)
    # One process continues where two were.
    there = str(tmp_path / "two" / "checkpoints" / "checkpoint-2")
    run("continued", **RUN, resume_from_checkpoint=there)
    whole, rest = (losses_of(metrics_of(tmp_path / name)) for name in ("one", "continued"))
    np.testing.assert_allclose(rest, whole[2:], rtol=0, atol=TOLERANCE)
    with pytest.raises(UserError, match=r"rows_per_step was 4 .* is 8 now; set batch_size to"):
        run("other", **RUN | {"batch_size": 8}, resume_from_checkpoint=there)


def runs_of(folder, keys, cache, count, devices, *runs):
    """What `topology_runs.py` prints of these runs, in so many processes of so many devices."""
    program, file = str(Path(__file__).with_name("topology_runs.py")), folder / "keys.json"
    file.write_text(json.dumps(keys))
    where = [str(file), str(folder), "{coordinator}", str(count)]
    commands = [[program, *where, str(i), *runs] for i in range(count)]
    done = loopback.run(commands, devices=[devices] * count, env=cache)
    assert [each.returncode for each in done] == [0] * count, done[0].stderr[-3000:]
    lines = [line for line in done[0].stdout.splitlines() if line.startswith("{")]
    return {name: found for line in lines for name, found in json.loads(line).items()}


@pytest.mark.reliability
def test_a_run_continues_on_other_devices_and_processes(keys, tmp_path, cache):
    """n to m devices, n and m in {1, 2, 4, 8}, and 1, 2 and 4 processes from each other."""
    keys = {**keys, **RUN, "batch_size": 8, "micro_batch_size": 1, "max_steps": 4}
    cache = {**cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    sizes = (1, 2, 4, 8)
    pairs = [f"{n}-{m}:{m}:{n}" for n in sizes for m in sizes]

    def run(count, devices, *runs):
        return runs_of(tmp_path, keys, cache, count, devices, *runs)

    # Names of runs of several processes say how many of how many devices: 2x2.
    found = run(1, 8, *(f"{n}:{n}" for n in sizes), *pairs)
    found |= run(2, 2, "2x2:4", "1-2x2:4:1", "8-2x2:4:8", "2x2-2x2:4:2x2")
    found |= run(4, 2, "4x2:8", "1-4x2:8:1", "4-4x2:8:4", "2x2-4x2:8:2x2", "4x2-4x2:8:4x2")
    found |= run(2, 2, "4x2-2x2:4:4x2")
    found |= run(1, 8, "2x2-1:1:2x2", "2x2-8:8:2x2", "4x2-1:1:4x2", "4x2-2:2:4x2")
    assert len(found) == 4 + 16 + 4 + 5 + 1 + 4
    alone = found["1"]
    for name, run_ in found.items():
        first, _, _ = name.partition("-")
        if "-" in name:
            assert run_["restored"] == found[first]["saved"]["2"], (name, "other bits")
        assert run_["data"] == {s: alone["data"][s] for s in run_["data"]}, (name, "other rows")
        assert list(run_["losses"]) == (["3", "4"] if "-" in name else ["1", "2", "3", "4"])
        for step, loss in run_["losses"].items():
            assert abs(loss - alone["losses"][step]) <= TOLERANCE, (name, step)
    assert len({run_["saved"]["2"] for run_ in found.values() if "2" in run_["saved"]}) > 1


@pytest.mark.oracle
@pytest.mark.parametrize("storage", [{}, {"adapter": "qlora", "quantization": "int4"}])
@pytest.mark.parametrize("count", [2, 4])
def test_a_process_reads_its_part_of_the_base_and_its_rows(
    keys, write_base, tmp_path, count, storage
):
    base = write_base(tmp_path / "base", hidden_size=256, intermediate_size=512)
    values = {**keys, **storage, "base_model": str(base), "batch_size": 8, "micro_batch_size": 1}
    (tmp_path / "keys.json").write_text(json.dumps(values))
    program = [str(Path(__file__).with_name("reading_processes.py")), str(tmp_path / "keys.json")]
    done = loopback.run([[*program, "{coordinator}", str(count), str(i)] for i in range(count)])
    assert [each.returncode for each in done] == [0] * count, done[0].stderr[-2000:]
    read = [json.loads(each.stdout.splitlines()[-1]) for each in done]
    whole = sum(x.nbytes for x in load_file(base / "model.safetensors").values())
    assert [each["bytes"] for each in read] == [whole // count] * count
    assert sum(each["tokens"] for each in read) == read[0]["all_tokens"]
    assert max(each["tokens"] for each in read) < 2 * read[0]["all_tokens"] / count


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("count", "devices", "changes"),
    [
        (4, 1, {"adapter": "qlora", "quantization": "nf4"}),
        (2, 2, {"mesh": {"tensor": 2, "data": 2}}),
        (2, 1, {"eval_exact_match": True, "eval_max_new_tokens": 4}),
        (2, 2, {"mesh": {"fsdp": 2, "context": 2}}),
        (2, 1, {"adapter": None, "learning_rate": 1e-3}),
        (4, 2, {"peft_use_dora": True, "mesh": {"fsdp": 4, "tensor": 2}}),
    ],
)
def test_more_processes_and_devices_are_one(
    run, keys, metrics_of, tmp_path, cache, count, devices, changes
):
    keys = {**keys, **RUN, **HELD_OUT, **changes}
    alone = {key: value for key, value in changes.items() if key != "mesh"}
    run("one", **RUN, **HELD_OUT, **alone)
    rows = {"micro_batch_size": 1, "output_dir": str(tmp_path / "many")}
    done = start(tmp_path / "many-run", {**keys, **rows}, count, devices, env=cache)
    if keys["adapter"] is not None:
        check(tmp_path, "many", metrics_of, done)
    else:
        losses = [losses_of(metrics_of(tmp_path / name)) for name in ("one", "many")]
        np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE)
    shutil.rmtree(tmp_path / "many")

"""A run that was stopped and continued is, bit for bit, the run that was not."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.training import evaluation, loop, shared_folder
from jaxlora.training.interrupt import Interrupted

FULL = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None}
METHODS = {
    "lora": {"lora_dropout": 0.2},
    "int4": {"adapter": "qlora", "quantization": "int4", "lora_dropout": 0.2},
    "full": FULL,
    "pissa": {"adapter": "qlora", "quantization": "nf4", "peft_init_lora_weights": "pissa"},
}
# Held-out rows, packing, accumulation and two epochs: all that could fall out of step.
RUN = {
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "val_set_size": 4,
    "eval_steps": 3,
    "max_steps": 8,
    "warmup_steps": 2,
    "save_strategy": None,
    "save_steps": 2,
}


@pytest.fixture
def final_state(monkeypatch):
    """``final_state()``: the trainable arrays and the optimizer's, as last saved."""
    last = []

    def saved(state):
        tree = save(state)
        last[:] = [jax.tree.map(np.array, tree)]
        return tree

    save = shared_folder.saved
    monkeypatch.setattr(shared_folder, "saved", saved)
    return lambda: last[0]


def weights_of(folder):
    (file,) = (path for path in folder.glob("*.safetensors") if path.name != "base")
    return load_file(file)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for was, now in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert was.dtype == now.dtype
        assert was.tobytes() == now.tobytes()


# Checkpoints are after steps 2, 4, 6 and 8; a crash at batch k loses what came after them.
@pytest.mark.parametrize(
    ("method", "crashes"),
    [("lora", (1, 5)), ("lora", (2, 3, 7)), ("int4", (5,)), ("full", (5,))],
)
def test_a_continued_run_is_bit_identical(run, crash_at, metrics_of, final_state, method, crashes):
    options = {**RUN, **METHODS[method]}
    whole = run("whole", **options)
    wanted = final_state()
    for number, step in enumerate(crashes):
        crash_at(step)
        with pytest.raises(RuntimeError, match="deliberate"):
            run("broken", **options, resume_from_checkpoint=number > 0)
    crash_at(None)
    resumed = run("broken", **options, resume_from_checkpoint=True)
    assert_same_bits(final_state(), wanted)
    assert_same_bits(weights_of(resumed.output_dir), weights_of(whole.output_dir))
    assert metrics_of(resumed.output_dir) == metrics_of(whole.output_dir)
    assert resumed.loss == whole.loss
    assert resumed.eval_loss_before == whole.eval_loss_before
    assert resumed.eval_loss == whole.eval_loss


def test_a_finished_run_can_be_continued_and_stays_what_it_is(run):
    done = run(**RUN)
    metrics = (done.output_dir / "metrics.jsonl").read_bytes()
    weights = (done.output_dir / "adapter_model.safetensors").read_bytes()
    again = run(**RUN, resume_from_checkpoint=True)
    assert (done.output_dir / "metrics.jsonl").read_bytes() == metrics
    assert (done.output_dir / "adapter_model.safetensors").read_bytes() == weights
    assert (again.steps, again.loss, again.eval_loss, again.eval_loss_before) == (
        done.steps,
        done.loss,
        done.eval_loss,
        done.eval_loss_before,
    )


def test_an_older_checkpoint_can_be_named(run, whole, metrics_of, tmp_path):
    own = shutil.copytree(whole, tmp_path / "own")
    older = str(own / "checkpoints" / "checkpoint-4")
    elsewhere = run("elsewhere", **RUN, resume_from_checkpoint=older)
    assert_same_bits(weights_of(elsewhere.output_dir), weights_of(whole))
    before = metrics_of(whole)
    later = [record for record in metrics_of(elsewhere.output_dir) if "loss" in record]
    assert later == [record for record in before if "loss" in record and record["step"] > 4]
    run("own", **RUN, resume_from_checkpoint=older)
    assert metrics_of(own) == before


def test_a_run_that_continues_another_has_all_it_needs_at_once(
    run, whole, crash_at, metrics_of, tmp_path
):
    older = str(whole / "checkpoints" / "checkpoint-4")
    crash_at(4)  # its first batch
    with pytest.raises(RuntimeError, match="deliberate"):
        run("elsewhere", **RUN, resume_from_checkpoint=older)
    crash_at(None)
    assert (tmp_path / "elsewhere" / "checkpoints" / "checkpoint-4").is_dir()
    resumed = run("elsewhere", **RUN, resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.output_dir), weights_of(whole))


def test_auto_resume_starts_anew_or_continues(run, whole, crash_at, metrics_of):
    crash_at(5)
    with pytest.raises(RuntimeError, match="deliberate"):
        run("auto", **RUN, auto_resume_from_checkpoints=True)
    crash_at(None)
    resumed = run("auto", **RUN, auto_resume_from_checkpoints=True)
    assert metrics_of(resumed.output_dir) == metrics_of(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "seed"),
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"sequence_len": 48}, "sequence_len"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"lora_alpha": 16}, "lora_alpha"),
        ({"optimizer": "adamw_torch"}, None),
        ({"adapter": "qlora", "quantization": "int4"}, "quantization"),
        ({"datasets": "other"}, "data"),
    ],
)
def test_a_changed_run_is_refused_by_name(finished, change, named):
    run, other = finished
    if "datasets" in change:
        change = {"datasets": [{**run.keys["datasets"][0], "path": str(other)}]}
    before = contents(run.folder)
    if named is None:
        run(**change)
        return
    with pytest.raises(UserError, match=f"resume_from_checkpoint: {named} was") as refusal:
        run(**change)
    assert "\n" not in str(refusal.value)
    assert contents(run.folder) == before


def test_nothing_to_resume_is_refused_and_makes_no_folder(run, tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        run(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="no checkpoint there"):
        run(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [3, 4, 0])
def test_ctrl_c_saves_the_step_it_falls_into(run, whole, monkeypatch, metrics_of, tmp_path, at):
    """The fourth step ends in a checkpoint anyway; before the first there is none."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit "ignore"
    prepare = loop.np.count_nonzero

    def press(array):
        presses.append(1)
        if len(presses) == at + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return prepare(array)

    presses = []
    monkeypatch.setattr(loop.np, "count_nonzero", press)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", **RUN)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "stopped" / "checkpoints" / f"checkpoint-{at + 1}").is_dir()
    resumed = run("stopped", **RUN, resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.output_dir), weights_of(whole))
    assert metrics_of(resumed.output_dir) == metrics_of(whole)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_sigterm_in_an_evaluation_loses_neither_a_step_nor_its_numbers(
    run, whole, monkeypatch, metrics_of, tmp_path, call
):
    """Evaluations are before training, after the steps 3 and 6, and at the end."""
    evaluate, calls = evaluation.held_out, []

    def press(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "held_out", press)
    with pytest.raises(Interrupted) as raised:
        run("stopped", **RUN)
    monkeypatch.undo()
    assert raised.value.exit_code == 143
    saved = [path.name for path in (tmp_path / "stopped").glob("checkpoints/checkpoint-*")]
    assert (f"checkpoint-{[0, 3, 6, 8][call - 1]}" in saved) is (call > 1)
    resumed = run("stopped", **RUN, resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.output_dir), weights_of(whole))
    assert metrics_of(resumed.output_dir) == metrics_of(whole)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(run, whole, tmp_path):
    own = shutil.copytree(whole, tmp_path / "own")
    for manifest in own.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(UserError, match="no good checkpoint to resume from"):
        run("own", **RUN, resume_from_checkpoint=True)


def test_an_interrupt_in_the_middle_of_a_step_keeps_the_last_checkpoint(run, monkeypatch):
    def deleted(trainable, opt_state, *arguments):
        step(trainable, opt_state, *arguments)
        raise KeyboardInterrupt

    make, step = loop.make_train_step, None

    def make_train_step(*arguments):
        nonlocal step
        step = make(*arguments)
        calls = []

        def maybe(*arguments):
            calls.append(1)
            return (deleted if len(calls) == 4 else step)(*arguments)

        maybe.lower = step.lower
        return maybe

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    with pytest.raises(KeyboardInterrupt):
        run(**RUN)
    monkeypatch.undo()
    assert run(**RUN, resume_from_checkpoint=True).steps == 8


def contents(folder):
    skipped = (".jaxlora.lock",)
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped}


class Finished:
    """Starts the same finished run again, with changes."""

    def __init__(self, keys, folder, train):
        self.keys, self.folder, self._train = keys, folder, train

    def __call__(self, **changes):
        values = {**self.keys, "resume_from_checkpoint": True, **changes}
        return self._train(values)


def train(values):
    return loop.train(load_config(values), quiet=True)


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    """The folder of `RUN`, never interrupted; do not write into it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train({**keys, **RUN, "output_dir": str(folder)})
    return folder


@pytest.fixture(scope="module")
def finished(keys, tmp_path_factory, write_rows):
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = {**keys, "output_dir": str(folder), "max_steps": 3, "warmup_steps": 1}
    train(values)
    other = write_rows(folder.parent / "other.jsonl", 30, seed=1)
    return Finished(values, folder, train), other

"""What is not finite never reaches a weight or a checkpoint; the rows it came from are named."""

import json
import re
import shutil

import numpy as np
import pytest

from jaxlora.checkpoints import space
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.data.batches import Batches
from jaxlora.training.nonfinite import NonFiniteError
from jaxlora.training.setup import make_plan


def poison(monkeypatch, steps, value=np.nan):
    """Makes the loss of these training batches (from 0) not finite."""
    make = Batches.batch

    def batch(self, step, rows=None):
        arrays = make(self, step, rows)
        if step in steps and self.shuffle:
            arrays["weights"] = np.where(arrays["weights"], np.float32(value), 0)
        return arrays

    monkeypatch.setattr(Batches, "batch", batch)


def weights(result):
    return (result.output_dir / "adapter_model.safetensors").read_bytes()


def test_a_run_stops_before_the_update_with_its_state_saved(run, metrics_of, tmp_path, monkeypatch):
    poison(monkeypatch, {3})
    with pytest.raises(NonFiniteError, match=r"^step 4: loss nan.*not finite") as refusal:
        run(save_strategy=None, save_steps=2)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 3
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()
    monkeypatch.undo()
    resumed = run(save_strategy=None, save_steps=2, resume_from_checkpoint=True)
    assert weights(resumed) == weights(run("whole"))


def test_the_rows_of_the_step_are_named(run, rows, monkeypatch, keys):
    poison(monkeypatch, {1})
    with pytest.raises(NonFiniteError) as refusal:
        run(val_set_size=5)
    monkeypatch.undo()
    plan = make_plan(load_config({**keys, "val_set_size": 5, "output_dir": "unused"}))
    wanted = sorted(decode(plan, number) for number in plan.batches.examples(1))
    named = re.findall(rf"{re.escape(str(rows))}:(\d+)", str(refusal.value))
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    found = [lines[int(number) - 1] for number in named]
    texts = sorted(f"{row['question']}\n{row['answer']}" for row in found)
    assert len(named) == 4
    assert [text.replace(" ", "") for text in texts] == [text.replace(" ", "") for text in wanted]


def decode(plan, number):
    tokens, _ = plan.data.train[number]
    return plan.model.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_skipped_counts_nowhere(run, metrics_of, monkeypatch, value):
    whole = metrics_of(run("whole", warmup_steps=3).output_dir)
    poison(monkeypatch, {2}, value)
    result = run(nonfinite="skip", warmup_steps=3)
    records = metrics_of(result.output_dir)
    assert result.steps == 6
    assert records[:2] == whole[:2]
    assert records[2].keys() == {"step", "skipped", "epoch", "learning_rate"}
    assert records[2]["skipped"] == 1
    # The update after it is made with the rate that was due.
    rates = [record["learning_rate"] for record in whole]
    assert [record["learning_rate"] for record in records[3:]] == rates[2:5]


def test_skipped_steps_in_a_row_are_limited_and_a_continued_run_goes_on_counting(
    run, monkeypatch, crash_at
):
    options = {"nonfinite": "skip", "nonfinite_limit": 2, "save_strategy": None, "save_steps": 1}
    crash_at(4)
    poison(monkeypatch, {2, 3, 4})
    with pytest.raises(RuntimeError, match="deliberate"):
        run(**options)
    crash_at(None)
    poison(monkeypatch, {2, 3, 4})
    with pytest.raises(NonFiniteError, match=r"^step 5: .* 3 steps in a row, more than nonf"):
        run(**options, resume_from_checkpoint=True)
    monkeypatch.undo()
    assert run(**options, resume_from_checkpoint=True).steps == 6


def test_a_disk_without_room_for_the_run_is_refused_before_anything_is_written(
    run, tmp_path, monkeypatch
):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(UserError, match=r"output_dir .*: needs .* MiB \(3 checkpoints") as refusal:
        run(save_strategy=None, save_steps=3, save_total_limit=4)
    assert "0.1 MiB are free" in str(refusal.value)
    assert not (tmp_path / "run").exists()

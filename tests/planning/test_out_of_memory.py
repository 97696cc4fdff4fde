"""Running out of device memory is one line, exit status 4, and a folder that can be resumed."""

import json

import jax
import pytest
from tiny_runs import PROMPT, write_base, write_rows

from jaxlora.cli import main
from jaxlora.planning import out_of_memory
from jaxlora.training import loop

ERROR = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\n"
    "Allocation type: HLO temp"
)


@pytest.fixture
def run(tmp_path, write_tiny_llama):
    """A configuration file of two short steps."""
    base = write_base(write_tiny_llama, tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    keys = {
        "base_model": str(base),
        "datasets": [{"path": str(rows), "type": PROMPT}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "run"),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "sequence_len": 64,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 2,
    }
    file = tmp_path / "run.yml"
    file.write_text(json.dumps(keys))
    return file


def break_step(monkeypatch, text):
    def make(*arguments):
        def step(*arguments):
            raise jax.errors.JaxRuntimeError(text)

        step.lower = jax.jit(lambda *arguments: 0).lower  # it compiles
        return step

    monkeypatch.setattr(loop, "make_train_step", make)


def test_out_of_memory_in_the_first_step_is_one_line(run, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        break_step(broken, ERROR)
        assert main(["train", str(run)]) == 4
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("jaxlora: error: ")]
    assert len(errors) == 1, said
    assert "Traceback" not in "\n".join(said)
    assert "out of memory: a step needs " in errors[0]
    assert " MiB of " in errors[0]
    assert "weights " in errors[0]
    assert "activations " in errors[0]
    assert "cheapest change: --remat=attention (saves about " in errors[0]
    # The folder is as a run that was interrupted leaves it.
    assert main(["train", str(run), "--resume_from_checkpoint=true", "--remat=attention"]) == 0


def test_without_a_plan_the_line_still_says_what_to_do(run, monkeypatch, capsys):
    def fail(*arguments):
        raise ValueError("no plan")

    monkeypatch.setattr(out_of_memory, "account", fail)
    break_step(monkeypatch, ERROR)
    assert main(["train", str(run)]) == 4
    assert "lower micro_batch_size" in capsys.readouterr().err


def test_other_errors_of_the_device_stay_what_they_are(run, monkeypatch):
    break_step(monkeypatch, "INTERNAL: the device is gone")
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"):
        main(["train", str(run)])

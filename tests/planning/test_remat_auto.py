"""`remat: auto`: the first policy whose compiled step fits, found once, compiled once."""

import doctest
import json

import jax
import loopback
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from test_leaves import KEYS, QLORA
from tiny_runs import PROMPT, write_base, write_rows

from jaxlora import api
from jaxlora.config import derived
from jaxlora.config.load import load_config
from jaxlora.parallel import processes
from jaxlora.planning import account as accounts
from jaxlora.planning import answers, compiled, ladder
from jaxlora.planning.hardware import HARDWARE, Hardware
from jaxlora.planning.ladder import (
    LADDER,
    Choice,
    Rung,
    climb_down,
    ladder_of,
    obvious,
    room_bytes,
)
from jaxlora.planning.program import program_of
from jaxlora.planning.remat import choose
from jaxlora.planning.topology import parse
from jaxlora.training.setup import make_plan

NEEDED = {"none": 80, "matmuls": 50, "attention": 30, "full": 20}


@pytest.mark.parametrize(
    ("room", "taken", "programs"),
    [(80, "none", 1), (79, "matmuls", 2), (49, "attention", 3), (20, "full", 4), (19, "full", 4)],
)
def test_the_first_policy_that_fits_is_taken_and_none_below_it_compiled(room, taken, programs):
    compiled_, least = [], lambda remat: 0
    choice = climb_down(least, lambda remat: compiled_.append(remat) or NEEDED[remat], room, LADDER)
    assert choice.remat == taken
    assert compiled_ == list(LADDER[:programs])
    assert ("though" in choice.words) == (room < NEEDED["full"])


def test_what_cannot_fit_by_formula_is_not_compiled_but_the_last_is():
    compiled_ = []
    choice = climb_down(NEEDED.get, lambda remat: compiled_.append(remat) or 90, 25, LADDER)
    assert compiled_ == ["full"]
    assert [each.method for each in choice.rungs] == ["formula"] * 3 + ["compiled"]
    assert choice.words.endswith("over 0.0 MiB)")
    compiled_.clear()
    assert climb_down(lambda remat: 30, lambda remat: None, 25, LADDER).remat == "full"


def test_a_compiler_without_room_for_a_policy_is_no_error():
    choice = climb_down(
        lambda remat: 0, lambda remat: None if remat == "none" else NEEDED[remat], 60, LADDER
    )
    assert choice.remat == "matmuls"
    assert "none more than its compiler has" in choice.words


def test_nothing_is_compiled_where_a_quarter_of_the_room_is_enough():
    assert obvious(NEEDED.get, 320, "none") == Choice((Rung("none", 80, "formula"),), 320)
    assert obvious(NEEDED.get, 319, "none") is None
    assert obvious(NEEDED.get, 0, "none").remat == "none", "unknown memory"


def test_a_cpu_never_keeps_everything(run):
    assert ladder_of("cpu") == ("matmuls", "attention", "full")
    assert ladder_of("gpu") == ladder_of("tpu") == LADDER
    plan = make_plan(load_config({**run, "remat": None}))
    choose(plan, lambda text: pytest.fail(f"as ever, and yet it says {text}"))
    assert plan.model.transformer.remat == "matmuls"
    for room in (0, 80):
        assert climb_down(lambda remat: 0, NEEDED.get, room, ladder_of("cpu")).remat == "matmuls"


def test_devices_of_one_host_share_its_memory_and_an_accelerator_says_what_it_has():
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000}

    host = Hardware("CPU", "cpu", 1 << 30)
    assert room_bytes(host) == int(0.75 * 2**30) // jax.local_device_count()
    assert room_bytes(HARDWARE["v5e"], [Device()]) == 950
    assert room_bytes(HARDWARE["v5e"]) == int(0.95 * HARDWARE["v5e"].memory_bytes)


@pytest.fixture
def run(tmp_path, write_tiny_llama, monkeypatch):
    """Keys of two short steps; compiled programs and answers are kept beside it."""
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    base = write_base(write_tiny_llama, tmp_path / "base", vocab_size=1024, num_hidden_layers=2)
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    before = {name: jax.config.values[name] for name in _CACHE}
    for name, value in {**_CACHE, "jax_compilation_cache_dir": str(tmp_path / "jax")}.items():
        jax.config.update(name, value)
    reset_cache()
    yield {
        **QLORA,
        "base_model": str(base),
        "datasets": [{"path": str(rows), "type": PROMPT}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "run"),
        "quantization": "int4",
        "sequence_len": 64,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "remat": "auto",
    }
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


_CACHE = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


def steps_compiled(folder):
    return len(list((folder / "jax").glob("jit_step-*-cache")))


def test_what_fits_is_compiled_once_and_the_answer_is_kept(run, tmp_path, monkeypatch, capsys):
    config = load_config(run)
    plan = make_plan(config)
    plan.model.transformer.remat = "matmuls"
    most = compiled.needed_bytes(program_of(plan))
    assert steps_compiled(tmp_path) == 1, "a base in 4 bits, what is cheap recomputed"
    monkeypatch.setattr(ladder, "room_bytes", lambda *devices: most - 1)

    api.train(config)
    assert "remat: auto takes attention: it needs " in capsys.readouterr().out
    assert steps_compiled(tmp_path) == 2, "the run has found the program of the choice"

    def never(program):
        raise AssertionError("compiled again to choose")

    def chosen(**keys):
        plan, said = make_plan(load_config({**run, **keys})), []
        choose(plan, said.append)
        return plan.model.transformer.remat, said

    monkeypatch.setattr(compiled, "needed_bytes", never)
    remat, said = chosen(learning_rate=2e-3, output_dir=str(tmp_path / "again"))
    assert remat == "attention"
    assert said[0].startswith("remat: auto takes attention: it needs ")
    for other in ({"micro_batch_size": 2}, {"lora_dropout": 0.1}, {"optimizer": "lion"}):
        with pytest.raises(AssertionError, match="compiled again"):
            chosen(**other)


def test_process_0_decides_for_all(run, monkeypatch):
    monkeypatch.setattr(ladder, "room_bytes", lambda *devices: 10**9)
    monkeypatch.setattr(ladder, "_SURELY", 0)
    monkeypatch.setattr(compiled, "needed_bytes", lambda program: 1)
    plan = make_plan(load_config(run))
    of_process_0 = {"matmuls": 10**9 + 1, "attention": 10**9}

    def exchange(name, value):
        return [of_process_0[plan.model.transformer.remat], value]

    monkeypatch.setattr(processes, "exchange", exchange)
    said = []
    choose(plan, said.append)
    assert plan.model.transformer.remat == "attention", "though matmuls would fit here"
    assert said == [
        "remat: auto takes attention: it needs 0.93 GiB of 0.93 GiB on each device "
        "(matmuls 0.93 GiB)"
    ]


# Process 1 believes that nothing fits, process 0 that all does but `matmuls`.
OF_PROCESS = """
import os, sys, time
from jaxlora.config.load import load_config
from jaxlora.parallel import processes
from jaxlora.planning import compiled, ladder, remat
from jaxlora.training.setup import make_plan

number, file, coordinator = sys.argv[1:]
processes.join(coordinator, 2, int(number))
needed = compiled.needed_bytes
ladder._SURELY = 0

def measured(program):
    nbytes, policy = needed(program), program.shape.transformer.remat
    print("compiled", policy, nbytes > 0)
    return 10**15 if number == "1" or policy == "matmuls" else nbytes

compiled.needed_bytes = measured
plan = make_plan(load_config(file))
remat.choose(plan, print if number == "0" else lambda text: None)
print("takes", plan.model.transformer.remat, flush=True)
processes.exchange("done", True)
time.sleep(5 * (number == "0"))  # the first holds the store of both
os._exit(0)
"""


@pytest.mark.reliability
def test_two_processes_compile_together_and_take_the_same(run, tmp_path):
    file = tmp_path / "run.yml"
    file.write_text(json.dumps(run))
    commands = [["-c", OF_PROCESS, str(i), str(file), "{coordinator}"] for i in range(2)]
    done = loopback.run(commands, env={"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")})
    assert [each.returncode for each in done] == [0, 0], done[0].stderr[-2000:]
    for each in done:
        said = each.stdout.splitlines()
        compiled_ = [line for line in said if line.startswith("compiled ")]
        assert compiled_ == ["compiled matmuls True", "compiled attention True"]
        assert "takes attention" in said
    assert "remat: auto takes attention: it needs " in done[0].stdout


def test_an_answer_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path))
    choice = Choice((Rung("none", 3, "compiled"), Rung("full", 2, "compiled")), 2)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            answers.remember("key", choice)
    assert answers.recall("key") is None
    answers.remember("key", choice)
    assert answers.recall("key") == choice
    file = tmp_path / "remat" / "key.json"
    for damaged in (file.read_text()[:-9], "[]", json.dumps({"rungs": [], "room": 1})):
        file.write_text(damaged)
        assert answers.recall("key") is None
    text = json.dumps(choice.to_dict()).replace('"full"', '"offload"')
    file.write_text(text)
    assert answers.recall("key") is None, "not on the ladder"


def test_a_plan_says_what_auto_takes_and_advises_from_there(monkeypatch):
    config = load_config({**KEYS, **QLORA, "quantization": "int4", "gradient_checkpointing": True})
    here, devices = parse(None), jax.devices()

    def planned(config, room):
        monkeypatch.setattr(accounts, "room_bytes", lambda *devices: room)
        return accounts.account(config, devices, here, compiles=False)[0]

    auto = config.model_copy(update={"remat": "auto"})
    full, top = (planned(config.model_copy(update={"remat": r}), 0) for r in ("full", "matmuls"))
    assert planned(auto, top.memory.total).remat == "matmuls"
    tight = planned(auto, full.memory.total)
    assert tight.remat == "full"
    assert tight.remat_choice.startswith("remat: auto takes full: it needs")
    assert tight.memory == full.memory
    assert not full.remat_choice
    assert derived.remat_policy(load_config(KEYS)) == "auto", "the default"


def test_examples_in_docstrings_hold():
    assert doctest.testmod(ladder).failed == 0

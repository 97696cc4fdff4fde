"""`jaxlora plan`: what it adds up, says, and finds."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from test_leaves import KEYS, QLORA
from test_slices import MODELS

from jaxlora.cli import main
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.ops.layout import MESH_AXES
from jaxlora.planning import compiled, formula
from jaxlora.planning.advice import changes
from jaxlora.planning.estimate import Estimate, Memory
from jaxlora.planning.flops import flops_per_token
from jaxlora.planning.hardware import HARDWARE, usable_bytes
from jaxlora.planning.leaves import note
from jaxlora.planning.plan import plan, write_program
from jaxlora.planning.program import make_program
from jaxlora.planning.report import _plural
from jaxlora.planning.search import largest
from jaxlora.planning.topology import environment, parse

INT4 = {**KEYS, **QLORA, "quantization": "int4", "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def here():
    """A plan for this machine, compiled once."""
    return plan(load_config(INT4), parse(None))


def test_a_plan_adds_up_what_the_compiler_says(here):
    program = make_program(load_config(INT4), jax.devices())
    stats = program.lower().compile().memory_analysis()
    unaliased = stats.output_size_in_bytes - stats.alias_size_in_bytes
    wanted = stats.argument_size_in_bytes + stats.temp_size_in_bytes + unaliased
    assert here.memory.total == wanted + stats.generated_code_size_in_bytes
    # A layer's input for each layer, row and token; dtype float32.
    cfg = program.shape.cfg
    assert here.memory.activations == cfg.num_layers * 2 * 64 * cfg.embed_dim * 4
    assert here.memory.gradients == here.memory.trained


def test_on_a_tpu_the_moment_of_the_peak_must_fit():
    program = make_program(load_config(INT4), jax.devices())
    known = {"topology": "v5e:1x1", "hardware": HARDWARE["v5e"]}
    made, _ = compiled.estimate(program, **known)
    stats = program.lower().compile().memory_analysis()
    assert made.memory.total - made.memory.program == stats.peak_memory_in_bytes == made.peak_bytes
    listed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    listed += stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert made.listed_bytes - made.memory.program == listed
    assert made.peak_bytes < listed


def test_what_a_tpu_s_compiler_refuses_counts_the_arguments_too():
    class Refused:
        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (17.85G) exceeds available HBM (15.75G)."
            )

    program = dataclasses.replace(make_program(load_config(INT4), jax.devices()), step=Refused())
    known = {"topology": "v5e:1x1", "hardware": HARDWARE["v5e"]}
    made, text = compiled.estimate(program, **known)
    assert (made.fits, text) == (False, "")
    assert made.memory.total == made.peak_bytes == int(17.85 * 2**30)


def test_donated_state_is_not_there_twice(here):
    stats = make_program(load_config(INT4), jax.devices()).lower().compile().memory_analysis()
    state = here.memory.trained + here.memory.optimizer
    assert stats.alias_size_in_bytes >= 0.99 * state


def test_offload_is_for_devices_whose_memory_is_not_the_host_s():
    keys = {**INT4, "gradient_checkpointing": "offload"}
    here, there = (make_program(load_config(keys), jax.devices(), p) for p in (None, "tpu"))
    assert here.shape.transformer.remat == "full"
    assert any("offload is full on a CPU" in note for note in here.shape.notes)
    assert there.shape.transformer.remat == "offload"
    on_host = formula.estimate(there, topology="", hardware=HARDWARE["v5e"])
    kept = formula.estimate(here, topology="", hardware=HARDWARE["v5e"]).memory.activations
    # A CPU computes in float32, a TPU in bfloat16.
    assert on_host.host_bytes == kept // 2
    assert on_host.memory.activations == 2 * on_host.host_bytes // here.shape.cfg.num_layers
    assert not there.shape.notes


def test_an_estimate_survives_json(here):
    assert Estimate.from_dict(json.loads(json.dumps(here.to_dict()))) == here


def test_the_command_prints_memory_arithmetic_and_a_verdict(tmp_path, capsys):
    file = tmp_path / "run.yml"
    file.write_text(json.dumps({**INT4, "datasets": [{"path": "nowhere.jsonl", "type": "alpaca"}]}))
    assert main(["plan", str(file), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"]
    assert made["memory"]["total"] == sum(
        made["memory"][part] for part in Memory.__dataclass_fields__
    )
    assert not list(tmp_path.glob("out*")), "planning wrote something"


@pytest.mark.parametrize(
    ("file", "words"),
    [("", "is a folder"), ("nowhere/it.hlo", "there is no folder .*nowhere")],
)
def test_a_program_that_could_not_be_written_is_refused_before_it_is_compiled(
    tmp_path, monkeypatch, file, words
):
    monkeypatch.setattr("jaxlora.planning.plan.account", lambda *a: pytest.fail("compiled"))
    with pytest.raises(UserError, match=f"^--hlo: .*{words}"):
        plan(load_config(INT4), parse("cpu"), hlo=tmp_path / file)


def test_a_disk_that_is_full_is_one_line():
    with pytest.raises(UserError, match=r"^--hlo: /dev/full cannot be written: No space left"):
        write_program(Path("/dev/full"), "HloModule")


@pytest.mark.parametrize("text", ["0,9", "0", "1.5", "nan", "-1"])
def test_a_share_of_a_gpu_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
    with pytest.raises(UserError, match=r"^XLA_PYTHON_CLIENT_MEM_FRACTION: '.*expected a share"):
        usable_bytes(HARDWARE["h100"])
    assert usable_bytes(HARDWARE["v5e"]) == HARDWARE["v5e"].memory_bytes


def test_a_transfer_that_is_made_once_is_one_time():
    assert [_plural(n, "time") for n in (1, 2, 1500)] == ["1 time", "2 times", "1,500 times"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5x:2x2", "Did you mean"),
        ("v5e:4", "expected 2 numbers, e.g. v5e:4x4"),
        ("h100:2x2", "expected 1 numbers"),
        ("v5p:0x2x2", "expected 3"),
        ("2xh100:8", "expected slices of a TPU"),
        ("0xv5e:4x4", "expected slices of a TPU"),
    ],
)
def test_topologies_that_do_not_exist_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse(text)


def test_a_topology_elsewhere_is_compiled_in_a_process_of_its_own():
    flags = environment(parse("cpu:8"), {"PATH": "/bin", "XLA_FLAGS": "--a=1"})
    assert flags["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=8"
    assert flags["PATH"] == "/bin"
    made = plan(load_config(INT4), parse("cpu:2"))
    assert (made.devices, made.mesh["fsdp"], made.rows) == (2, 2, 2)
    gathered = {t.dtype for t in made.traffic if t.kind == "all-gather"}
    assert "s4" in gathered or "u4" in gathered or "s8" in gathered, made.traffic
    one = memory_on_one(made)
    assert made.memory.weights < 0.7 * one.weights
    assert made.memory.trained < one.trained


def memory_on_one(made):
    """Memory of the same run on one device, by formula."""
    program = make_program(load_config(INT4), jax.devices()[:1])
    return formula.estimate(program, topology="", hardware=made.hardware).memory


def test_frozen_weights_cost_four_flops_a_token_and_trained_ones_six():
    lora, full = (
        formula.estimate(
            make_program(load_config(keys), jax.devices()), topology="", hardware=HARDWARE["v5e"]
        )
        for keys in (INT4, KEYS)
    )
    cfg = make_program(load_config(INT4), jax.devices()).shape.cfg
    layer = cfg.embed_dim * (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    layer += 3 * cfg.embed_dim * cfg.mlp_dim
    weights = cfg.num_layers * layer + cfg.vocab_size * cfg.embed_dim
    scores = 3 * 2 * cfg.num_layers * cfg.num_heads * cfg.head_dim * 64
    assert full.model_flops / full.tokens == 6 * weights + scores
    pairs = lora.memory.trained / 4
    assert lora.model_flops / lora.tokens == 4 * weights + scores + 6 * pairs
    assert lora.executed_flops > lora.model_flops
    assert set(lora.limits_s()) == {"compute", "memory"}
    assert lora.tokens_per_s(0.5) == pytest.approx(0.5 * lora.tokens_per_s(1.0))


def test_arithmetic_for_nothing_over_context_is_counted():
    program = make_program(load_config(INT4), jax.devices())
    cfg, length = program.shape.cfg, 64

    def over(context, heads):
        placement: Any = SimpleNamespace(mesh=AbstractMesh((1, 1, 1, context, 1), MESH_AXES))
        each = dataclasses.replace(cfg, num_heads=heads, num_kv_heads=1)
        shape = dataclasses.replace(program.shape, cfg=each, placement=placement)
        return flops_per_token(dataclasses.replace(program, shape=shape), length)

    passes = 4 if program.shape.transformer.remat == "full" else 3

    def scores(heads):  # causal: half of the row
        return passes * 2 * cfg.num_layers * heads * cfg.head_dim * length

    assert over(1, 6).wasted == over(2, 6).wasted == over(6, 6).wasted == 0
    assert over(4, 6).wasted == scores(2)  # two heads of zeros
    assert over(13, 6).wasted == scores(6)  # gathered: every score, half of them for nothing
    assert over(4, 6).executed - over(1, 6).executed == scores(2)


def test_heads_over_context_are_in_a_formula_as_in_a_program():
    """What `test_context.py` reads of a compiled one: 16 and 4 heads over 8 devices."""
    program = make_program(load_config(INT4), jax.devices())
    cfg = dataclasses.replace(program.shape.cfg, num_heads=16, num_kv_heads=4)
    mesh = AbstractMesh((1, 1, 1, 8, 1), MESH_AXES)
    placement: Any = SimpleNamespace(mesh=mesh)
    tokens = program.batch["tokens"]
    batch = {"tokens": note(tokens, NamedSharding(mesh, PartitionSpec(None, None, "context")))}
    shape = dataclasses.replace(program.shape, cfg=cfg, placement=placement)
    program = dataclasses.replace(program, shape=shape, batch=batch)
    made = formula.estimate(program, topology="", hardware=HARDWARE["v5e"])
    (sent,) = (each for each in made.traffic if each.kind == "all-to-all")
    assert (sent.dtype, sent.times) == ("f32", 3 * 4 * cfg.num_layers)
    # Two query heads and a key-value head, twice (results and values), in three passes.
    heads = 3 * 2 * (2 + 1) * cfg.head_dim * 4
    assert sent.payload_bytes == cfg.num_layers * tokens.size * heads
    assert sent.sent_bytes == sent.payload_bytes * 7 / 8


def test_a_head_over_fsdp_stays_split_in_a_formula_as_in_a_program(tmp_path):
    """Of a vocabulary whose head would be most of the workspace."""
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 16384}
    published = json.loads((MODELS / "llama3-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | sizes))
    keys = {**INT4, "base_model": str(tmp_path)}
    program = make_program(load_config(keys | {"micro_batch_size": 8}), jax.devices())
    mesh = AbstractMesh((1, 4, 1, 1, 1), MESH_AXES)
    rows = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    batch = {"tokens": note(program.batch["tokens"], rows)}
    placement: Any = SimpleNamespace(mesh=mesh)
    shape = dataclasses.replace(program.shape, placement=placement)
    program = dataclasses.replace(program, shape=shape, batch=batch)
    made = formula.estimate(program, topology="", hardware=HARDWARE["v5e"]).memory
    split = plan(load_config(keys | {"mesh": {"fsdp": 4}}), parse("cpu:4")).memory
    # 27 and 25 MiB; the head alone has 32.
    assert made.workspace == pytest.approx(split.workspace, rel=0.2)


def test_changes_make_room_the_cheapest_first():
    config = load_config(
        {**KEYS, **QLORA, "adapter": "lora", "micro_batch_size": 8, "sequence_len": 256}
    )
    program = make_program(config, jax.devices())
    made = formula.estimate(program, topology="", hardware=HARDWARE["v5e"])

    def tight(share):
        limit = int(share * made.memory.total)
        return Estimate(**{**vars(made), "limit_bytes": limit})

    one = changes(config, jax.devices(), tight(0.9), "cpu")
    assert one[0].keys == {"remat": "matmuls"}, "remat costs least"
    assert one[-1].enough
    assert not any(change.enough for change in one[:-1])
    more = changes(config, jax.devices(), tight(0.15), "cpu")
    assert len(more) > len(one)
    assert any("micro_batch_size" in change.keys for change in more)
    assert sum(change.saves_bytes for change in more) >= 0.85 * made.memory.total
    none = changes(config, jax.devices(), tight(0.001), "cpu")
    assert not none[-1].enough


@pytest.mark.parametrize(("limit", "value"), [(1000, 9), (1099, 9), (150, 0), (10**9, 64)])
def test_the_largest_that_fits_is_found_with_few_programs(here, limit, value):
    """Memory of ``100 + 100 n``, which is a line as it is for real programs."""
    asked = []

    def measure(keys):
        asked.append(keys["n"])
        memory = Memory(100 + 100 * keys["n"], 0, 0, 0, 0, 0, 0)
        return Estimate(**{**vars(here), "memory": memory, "limit_bytes": limit})

    found = largest(measure, "n", 1, most=64)
    assert found.value == value
    assert found.compiled == len(asked) <= 4
    assert found.estimate.fits == (value > 0)

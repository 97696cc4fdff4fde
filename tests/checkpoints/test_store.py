"""What is listed restores bit for bit, into the structure and sharding asked for, or is refused."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import same_bits, state_of

from jaxlora.checkpoints import store
from jaxlora.checkpoints.manifest import leaf_paths
from jaxlora.checkpoints.store import CheckpointStore, locate
from jaxlora.core.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def restored_bits(store, step, target):
    return leaf_paths(store.restore(step, target)[0])


def test_every_dtype_round_trips_bit_for_bit_with_its_meta(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        store.save(3, state_of(3), {"loss": 0.1, "tokens": 2**60})
    state, meta = CheckpointStore(tmp_path / "run").restore(None, state_of(0))
    assert same_bits(leaf_paths(state), leaf_paths(state_of(3)))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(3))
    assert meta == {"loss": 0.1, "tokens": 2**60, "step": 3}


def test_optax_state_round_trips_through_its_shapes_alone(tmp_path):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = {"w": jnp.arange(6.0).reshape(2, 3), "empty": jnp.zeros((0, 3))}
    _, state = optimizer.update(params, optimizer.init(params), params)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {})
        restored, _ = store.restore(1, jax.eval_shape(optimizer.init, params))
    assert same_bits(leaf_paths(restored), leaf_paths(state))
    assert all(isinstance(x, jax.Array) and not x.committed for x in jax.tree.leaves(restored))


def test_arrays_may_change_as_soon_as_save_returns(tmp_path):
    array, donated = np.ones(1 << 20, np.float32), jnp.ones(1 << 20)
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"array": array, "donated": donated}, {})
        array[:] = 7
        double(donated).block_until_ready()
    state, _ = store.restore(1, {"array": array, "donated": jax.ShapeDtypeStruct((1 << 20,), "f4")})
    assert np.all(state["array"] == 1)
    assert np.all(state["donated"] == 1)


def test_arrays_that_nobody_changes_are_not_copied(tmp_path, monkeypatch):
    array, written = np.arange(3.0), []
    save = store.save_arrays
    monkeypatch.setattr(store, "save_arrays", lambda p, a: (written.append(a), save(p, a)))
    with CheckpointStore(tmp_path) as opened:
        opened.save(1, {"w": array}, {}, owned=True)
        opened.save(2, {"w": array}, {})
    assert [a["['w']"] is array for a in written] == [True, False]


def test_only_the_newest_are_kept_and_nothing_else_lies_about(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 2, 10, 9 + 2):
            store.save(step, state_of(step), {})
            assert store.latest() != step or store.steps()  # listed only once committed
    assert store.steps() == [10, 11]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_leftovers_of_killed_processes_go_with_the_first_save_not_before(tmp_path):
    for leftover in (".temporary-7", ".trash/3-1", "checkpoint-x", "notes"):
        (tmp_path / leftover).mkdir(parents=True)
    store = CheckpointStore(tmp_path)
    assert store.steps() == []
    assert names(tmp_path) == [".temporary-7", ".trash", "checkpoint-x", "notes"]
    with store:
        store.save(1, state_of(1), {})
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-x", "notes"]


def test_going_on_from_an_older_step_drops_the_later_ones_when_the_next_is_committed(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for step in (10, 20, 30):
            store.save(step, state_of(step), {})
    with CheckpointStore(tmp_path) as store:
        store.restore(10, state_of(0))
        assert store.steps() == [10, 20, 30]
        store.save(20, state_of(21), {})
    assert store.steps() == [10, 20]
    assert same_bits(restored_bits(store, 20, state_of(0)), leaf_paths(state_of(21)))


def test_saving_beside_checkpoints_that_were_not_restored_is_refused(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(10, state_of(10), {})
    with pytest.raises(UserError, match="already holds checkpoints up to step 10"):
        CheckpointStore(tmp_path).save(11, state_of(11), {})
    with pytest.raises(ValueError, match="not beyond 10"):
        store.save(10, state_of(10), {})
    assert store.steps() == [10]


def test_restore_without_a_checkpoint_says_so(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert (store.steps(), store.latest()) == ([], None)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        store.restore(None, state_of(0))
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        store.restore(4, state_of(0))
    assert not (tmp_path / "none").exists()


TARGETS = {
    "shape": {"w": np.zeros((3, 2), np.float32), "n": np.zeros(2, np.int32)},
    "dtype": {"w": np.zeros((2, 3), np.float16), "n": np.zeros(2, np.int32)},
    "missing": {"w": np.zeros((2, 3), np.float32)},
    "extra": {"w": np.zeros((2, 3), np.float32), "n": np.zeros(2, np.int32), "x": np.zeros(1)},
    "structure": [np.zeros((2, 3), np.float32), np.zeros(2, np.int32)],
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("step", [2, None])
def test_another_target_is_refused_never_cast_and_never_a_reason_to_fall_back(
    tmp_path, target, step, caplog
):
    with CheckpointStore(tmp_path) as store:
        for number in (1, 2):
            store.save(number, {"w": np.ones((2, 3), np.float32), "n": np.ones(2, np.int32)}, {})
    with pytest.raises(UserError, match=r"leaf .* is .* in the checkpoint and .* in this run"):
        store.restore(step, target)
    assert not caplog.records


@pytest.mark.parametrize(
    ("leaf", "words"), [(1.5, "not an array"), (jax.random.key(0), "typed PRNG key")]
)
def test_leaf_that_cannot_be_saved_is_refused_by_name(tmp_path, leaf, words):
    with pytest.raises(TypeError, match=rf"\['w'\] is a .*{words}"):
        CheckpointStore(tmp_path / "run").save(1, {"w": leaf}, {})
    assert not (tmp_path / "run").exists()


def test_path_of_a_checkpoint_is_split_into_store_and_step(tmp_path):
    assert locate(tmp_path / "checkpoint-40") == (tmp_path, 40)
    assert locate(tmp_path) == (tmp_path, None)


FILE_LIMIT = """
import resource, signal, sys
import numpy as np
from jaxlora.checkpoints.store import CheckpointStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = CheckpointStore(sys.argv[1])
store.save(1, {"w": np.ones(1000)}, {})
store.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store.save(2, {"w": np.random.rand(1 << 20)}, {})
if sys.argv[2] == "close":
    store.close()
"""


@pytest.mark.parametrize("end", ["close", "fall off"])
def test_failed_save_fails_the_run_and_leaves_the_good_one_alone(tmp_path, end):
    script = [sys.executable, "-c", FILE_LIMIT, str(tmp_path), end]
    result = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "saving step 2 failed: File too large; free space" in result.stderr
    assert "_SignalingThread" not in result.stderr, "pages of orbax"
    assert names(tmp_path) == ["checkpoint-1"]
    CheckpointStore(tmp_path).restore(1, {"w": np.zeros(1000)})


RESHARD = """
import sys, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxlora.checkpoints.store import CheckpointStore
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
placed = lambda *axes: NamedSharding(mesh, P(*axes))
values = {"w": np.arange(64 * 8.0, dtype="f4").reshape(64, 8), "q": jnp.arange(-8, 8, dtype="int4"),
          "h": jnp.arange(16, dtype="bfloat16"), "count": jnp.int32(5)}
before = {"w": placed("fsdp"), "q": placed(), "h": placed("data"), "count": placed()}
after = {"w": placed("data", "fsdp"), "q": placed(("data", "fsdp")), "h": placed("fsdp"),
         "count": placed()}
with CheckpointStore(sys.argv[1]) as store:
    store.save(1, jax.device_put(values, before), {})
target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=after[k]) for k, v in values.items()}
state, _ = store.restore(None, target)
for name, array in state.items():
    assert array.sharding == after[name], name
    assert array.dtype == values[name].dtype
    assert np.asarray(array).tobytes() == np.asarray(values[name]).tobytes(), name
print(len(state["w"].addressable_shards))
"""


def test_state_sharded_over_8_devices_restores_onto_another_layout(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    result = subprocess.run(
        [sys.executable, "-c", RESHARD, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == 8

"""Whole runs on some devices that continue on others, one after another in these processes.

    python topology_runs.py KEYS FOLDER ADDRESS COUNT NUMBER RUN [RUN ...]

KEYS is a JSON file; COUNT processes join at ADDRESS where there are several. RUN is
``NAME:DEVICES`` or ``NAME:DEVICES:ORIGIN``, which continues from step 2 of another run; with one
process on the first so many devices. Process 0 prints ``{NAME: what happened}`` as JSON, a line
a run.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] += (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)

import jax
import numpy as np

from jaxlora.config.load import load_config
from jaxlora.data.batches import Batches
from jaxlora.parallel import processes
from jaxlora.parallel.arrays import fetch
from jaxlora.training import resume
from jaxlora.training.loop import train
from jaxlora.training.saving import Saver
from jaxlora.training.state import saved

DEVICES = jax.devices  # not called before the processes have joined
MESHES = {1: {}, 2: {"fsdp": 2}, 4: {"data": 2, "fsdp": 2}, 8: {"fsdp": 4, "tensor": 2}}
happened = {}


def digest(arrays):
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()


def digest_of(state):
    """Of all that a checkpoint holds; every process must call it."""
    whole = fetch(saved(state))
    return digest(jax.tree.leaves(whole)) if processes.is_first() else None


def watch():
    """Notes the bits of every state that is saved or restored, and of every batch."""
    save, restore, make = Saver._save, resume.restore, Batches.batch

    def saving(self, state):
        happened["saved"][state.step] = digest_of(state)
        save(self, state)

    def restoring(*arguments):
        state = restore(*arguments)
        happened["restored"] = digest_of(state)
        return state

    def batch(self, step, rows=None):
        if self.shuffle:  # only training shuffles; whole, and however it is cut up
            whole = make(self, step)
            flat = [x.reshape(-1, x.shape[-1]) for _, x in sorted(whole.items())]
            happened["data"][step] = digest(flat)
        return make(self, step, rows)

    Saver._save, resume.restore, Batches.batch = saving, restoring, batch


keys, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
address, count, number = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
if count > 1:
    processes.join(address, count, number)
watch()
for run in sys.argv[6:]:
    name, devices, *origin = run.split(":")
    happened.update(saved={}, restored=None, data={})
    values = {**keys, "output_dir": str(folder / name), "mesh": MESHES[int(devices)]}
    if origin:
        there = folder / origin[0] / "checkpoints" / "checkpoint-2"
        values["resume_from_checkpoint"] = str(there)
    if count == 1:
        jax.devices = lambda n=int(devices): DEVICES()[:n]
    train(load_config(values), quiet=True)
    if processes.is_first():
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses = {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}
        print(json.dumps({name: {**happened, "losses": losses}}), flush=True)

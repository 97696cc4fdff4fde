"""What one process of a run reads of the base and of the data, as a JSON line.

python reading_processes.py KEYS ADDRESS COUNT NUMBER
"""

import json
import sys
from pathlib import Path

import numpy as np

from jaxlora.checkpoints.matrices import Reader
from jaxlora.checkpoints.tensors import FLOAT_DTYPES
from jaxlora.config.load import load_config
from jaxlora.data.table import TokenTable
from jaxlora.parallel import processes
from jaxlora.training.setup import make_plan
from jaxlora.training.state import load_weights

STEPS = 3
matrix, get = Reader.matrix, TokenTable.__getitem__
read = {"bytes": 0, "tokens": 0}


def reading(self, names, spec, *, region=None, **options):
    """The file is mapped: what is copied out of it is what is read."""
    infos = [self.files.info[name] for name in names]
    size = sum(info.size for info in infos)
    if region is not None:
        box = np.broadcast_to(np.zeros((), np.int8), spec.shape[-len(region.shape) :])
        size = region.of(box).size
    read["bytes"] += size * np.dtype(FLOAT_DTYPES[infos[0].dtype]).itemsize
    return matrix(self, names, spec, region=region, **options)


def row(self, number):
    tokens, trained = get(self, number)
    read["tokens"] += len(tokens)
    return tokens, trained


processes.join(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
config = load_config(json.loads(Path(sys.argv[1]).read_text()))
plan = make_plan(config)
Reader.matrix, TokenTable.__getitem__ = reading, row
load_weights(config, plan.model)
for step in range(STEPS):
    plan.batches.batch(step, plan.model.placement.own_rows(plan.batches.rows))
whole = sum(plan.batches.num_tokens(step) for step in range(STEPS))
print(json.dumps({**read, "all_tokens": whole}), flush=True)

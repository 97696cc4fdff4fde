"""A program of several processes that differ: prints what each of the start-up checks says.

python mismatches.py ADDRESS COUNT NUMBER
"""

import json
import sys
import types

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.parallel import processes
from jaxlora.training import agreement


def message(check, *arguments):
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return None


address, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
processes.join(address, count, number)
keys = {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}], "learning_rate": 1e-4}
same, other = load_config(keys), load_config(keys | {"learning_rate": (number + 1) * 1e-4})
said = {"config": message(agreement.check_start, other)}

digest = agreement.code_digest
agreement.code_digest = lambda: f"code {number}"
said["code"] = message(agreement.check_start, same)
agreement.code_digest = digest

version = agreement.version
agreement.version = lambda name: f"0.{number}" if name == "jax" else version(name)
said["jax"] = message(agreement.check_start, same)
agreement.version = version

said["devices"] = message(agreement.check_start, same)  # the program is started with 1 and 2

plan = types.SimpleNamespace(
    eval_batches=None,
    total_steps=10,
    model=types.SimpleNamespace(fingerprint="weights"),
    data=types.SimpleNamespace(fingerprint=f"tokens {number}"),
)
said["data"] = message(agreement.check_plan, plan)
print(json.dumps(said), flush=True)

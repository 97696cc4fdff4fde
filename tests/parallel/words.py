"""A program of several processes: what they say to each other, as a JSON line.

python words.py ADDRESS COUNT NUMBER
"""

import json
import sys

from jaxlora.core.errors import UserError
from jaxlora.parallel import processes


def message(work):
    try:
        work()
    except UserError as error:
        return str(error)
    return None


def refuse():
    raise UserError("the first has no file.")


def refuse_unless_first():
    with processes.together("block"):
        if not processes.is_first():
            raise UserError("the second has no file.")


address, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
processes.join(address, count, number)
called = []
facts = {"jax": "1", "learning_rate": 1e-3 * (number + 1), "seed": number}
said = {
    "numbers": [processes.count(), processes.number(), processes.is_first()],
    "exchanged": processes.exchange("mine", {"n": number}),
    "first": processes.on_first("file", lambda: called.append(number) or ["a", 1]),
    "called": called,
    "order": processes.first_then_others("cache", lambda: number),
    "highest": processes.highest(10 + number),
    "same": message(lambda: processes.require_same({"jax": "1"})),
    "differs": message(lambda: processes.require_same(facts)),
    "on_first": message(lambda: processes.on_first("bad", refuse)),
}
print(json.dumps(said | {"together": message(refuse_unless_first)}), flush=True)

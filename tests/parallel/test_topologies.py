"""A state saved on n devices is the same bits on m."""

import json
from pathlib import Path

import loopback


def test_states_have_the_same_bits_on_other_devices(tmp_path):
    program = str(Path(__file__).with_name("topologies.py"))
    (done,) = loopback.run([[program, str(tmp_path)]], devices=[8])
    assert done.returncode == 0, done.stderr[-2000:]
    changed = json.loads(done.stdout.splitlines()[-1])
    assert len(changed) == 49
    assert set(changed.values()) == {0}, {pair: n for pair, n in changed.items() if n}

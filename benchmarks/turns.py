"""Programs that wait for each other: each in a process of its own, one at work at a time."""

import json
import os
import subprocess
import sys
from typing import Any

# Answers, as JSON, every line of arguments with what `turn` returns and the time it took.
_LOOP = """
import json as _json, time as _time
for _line in sys.stdin:
    _wall, _cpu = _time.perf_counter(), _time.process_time()
    _result = turn(*_json.loads(_line))
    _wall, _cpu = _time.perf_counter() - _wall, _time.process_time() - _cpu
    print("\\n" + _json.dumps({"wall_s": _wall, "cpu_s": _cpu, "result": _result}), flush=True)
"""


class Program:
    """A Python program that defines `turn` and imports `sys`.

    Args:
      text: of the program.
      arguments: its command line.
    """

    def __init__(self, text: str, *arguments: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", text + _LOOP, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        )

    def turn(self, *arguments: Any) -> dict[str, Any]:
        """Returns ``wall_s``, ``cpu_s`` and ``result`` of one call of `turn`.

        Raises:
          RuntimeError: the program ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a program ended with status {self._process.wait()}")

    def close(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

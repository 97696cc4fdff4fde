"""Real processes on this machine, joined over the loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

TIMEOUT_S = 600


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    commands: Sequence[Sequence[str]],
    *,
    devices: Sequence[int] | None = None,
    cwd: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    each: Sequence[Mapping[str, str]] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs one Python process for each list of arguments, all at once, and waits for them.

    Args:
      commands: arguments after ``python``; ``{coordinator}`` stands for the address to join at.
      devices: CPU devices of each; default one.
      cwd, env, each: working folder of each, environment of all, and more of it for each.
    """
    address = f"127.0.0.1:{free_port()}"
    started = []
    for number, command in enumerate(commands):
        count = 1 if devices is None else devices[number]
        flags = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, *(word.format(coordinator=address) for word in command)],
                env={**os.environ, **flags, **(env or {}), **(each[number] if each else {})},
                cwd=None if cwd is None else cwd[number],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]

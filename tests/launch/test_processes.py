"""Processes side by side: output, failures, signals. The workers are small programs of our own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxlora.core.errors import UserError
from jaxlora.launch.processes import run_together, train_commands

# Says that it is ready, then waits; at SIGTERM or SIGINT it "saves" and ends with 128 + n.
WORKER = """
import os, signal, sys, time
def stop(number, frame):
    print("saved", number, flush=True)
    time.sleep(float(*sys.argv[1:]))
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
signal.signal(signal.SIGUSR1, lambda *_: print("noted", flush=True))
print("ready", os.getpgrp() == os.getpid(), flush=True)
time.sleep(60)
"""


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def run(commands, **options) -> tuple[int, list[str]]:
    lines: list[str] = []
    return run_together(commands, write=lines.append, **options), lines


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_line_comes_whole_and_with_its_number():
    program = "import sys; [print(sys.argv[1], n) for n in range(200)]; print('end', end='')"
    status, lines = run([python(program, name) for name in ("a", "b")])
    assert status == 0
    for number, name in enumerate("ab"):
        own = [line for line in lines if line.startswith(f"[{number}] ")]
        assert own == [f"[{number}] {name} {n}\n" for n in range(200)] + [f"[{number}] end\n"]
    assert len(lines) == 402


def test_errors_are_shown_as_output_is():
    _, lines = run([python("import sys; print('bad', file=sys.stderr)")])
    assert lines == ["[0] bad\n"]


def test_the_first_failure_ends_the_others_and_gives_the_status():
    failing = "import time; time.sleep(0.5); raise SystemExit(7)"
    started = time.monotonic()
    status, lines = run([python(WORKER), python(failing), python(WORKER)])
    assert status == 7
    assert time.monotonic() - started < 20
    assert {"[0] saved 15\n", "[2] saved 15\n"} <= set(lines)


def test_a_process_that_is_killed_counts_as_a_failure():
    status, _ = run([python(WORKER), python("import os; os.kill(os.getpid(), 9)")])
    assert status == 128 + 9


def test_what_does_not_end_when_told_is_killed():
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    status, _ = run([python(stubborn), python("raise SystemExit(3)")], grace_s=0.5)
    assert status == 3
    assert time.monotonic() - started < 20


def test_one_that_is_done_does_not_end_the_others():
    late = "import time; time.sleep(0.5); print('late')"
    assert run([python("pass"), python(late)]) == (0, ["[1] late\n"])


LAUNCHER = """
import sys
from jaxlora.launch.processes import run_together
worker = [sys.executable, "-c", sys.argv[1]]
sys.exit(run_together([[*worker, "0.1"], [*worker, "1.0"]], grace_s=30))
"""


def launcher() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        python(LAUNCHER, WORKER), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {
        "[0] ready True\n",  # in a group of its own: Ctrl-C reaches the launcher alone
        "[1] ready True\n",
    }
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_all_may_finish(number):
    process = launcher()
    os.killpg(process.pid, number)  # as a terminal does: to the whole group
    output, _ = process.communicate(timeout=30)
    assert sorted(output.splitlines()) == [f"[0] saved {number:d}", f"[1] saved {number:d}"]
    assert process.returncode == 128 + number


def test_other_signals_are_passed_on_and_end_nothing():
    process = launcher()
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"[0] noted\n", "[1] noted\n"}
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=30)


def test_a_launcher_that_raises_leaves_no_process_behind():
    pids: list[int] = []

    def write(line: str) -> None:
        pids.append(int(line.split()[1]))

    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(UserError, match="no-such-program: cannot be started"):
        run_together([python(program), ["no-such-program"]], write=write)
    deadline = time.monotonic() + 5
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))


def test_commands_name_one_coordinator_and_number_the_processes():
    commands = train_commands("my run.yml", ["--lora_r=4"], 3)
    assert all(
        command[:4] == [sys.executable, "-m", "jaxlora.cli", "train"] for command in commands
    )
    assert all(command[4:6] == ["my run.yml", "--lora_r=4"] for command in commands)
    assert len({command[6] for command in commands}) == 1
    assert commands[0][6].startswith("--coordinator=127.0.0.1:")
    assert [command[7:] for command in commands] == [
        ["--num-processes=3", f"--process-id={number}"] for number in range(3)
    ]
    assert len(train_commands("x.yml", [], 1)[0]) == 5
    with pytest.raises(UserError, match="--processes: 0"):
        train_commands("x.yml", [], 0)


def test_a_reader_that_is_gone_ends_all_after_they_have_saved(tmp_path):
    ready: list[str] = []

    def closed(text: str) -> None:
        ready.append(text)
        if len(ready) > 1:  # both hear signals now
            raise BrokenPipeError

    saves = f'open({str(tmp_path / "saved")!r}, "a").write("x")'
    worker = WORKER.replace('print("saved", number, flush=True)', saves)
    status = run_together([python(worker, "0.1"), python(worker, "0.1")], write=closed)
    assert status == 128 + signal.SIGPIPE
    assert (tmp_path / "saved").read_text() == "xx"

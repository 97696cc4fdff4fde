"""Kills, signals, damage, full disks and standstills, many of each (`make reliability`).

python benchmarks/reliability                  everything; writes the result and docs/reliability.md
python benchmarks/reliability --only signals   one kind; its rows of the last result are replaced
python benchmarks/reliability --slice          a few of each, as the tests run them; writes nothing
"""

import argparse
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from damage import damage_checkpoints
from disk import estimate_sizes, fill_disk, use_folders
from kills import kill_runs, kill_store
from outcome import Outcome, Progress
from page import replace_rows, write_page, write_results
from signalled import signal_runs
from standstill import leave_the_finite, stand_still
from subject import Subject

SLICE = {"runs": 4, "store": 8, "damage": 40, "signals": 0, "disk": 3, "folders": 3, "nan": 1}
WHOLE = {
    "runs": 50,
    "store": 200,
    "damage": 400,
    "signals": 50,
    "disk": 20,
    "folders": 20,
    "nan": 8,
}


def main() -> int:
    """Runs the trials; returns 1 if one of the laws did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--slice", action="store_true", help="a few of each; write nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=WHOLE, help="one kind of trial")
    options = parser.parse_args()
    counts = SLICE if options.slice else WHOLE
    if options.only:
        counts = {name: count * (name == options.only) for name, count in counts.items()}
    say, started, outcomes = Progress(), time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="jaxlora-reliability-") as root:
        subject = Subject(Path(root), options.seed)
        say("the run that nothing disturbs is done")
        for outcome in _until_stopped(_trials(subject, counts, say, whole=not options.slice)):
            outcomes.append(outcome)
            say(
                f"{'held' if outcome.held else 'BROKEN'}: {outcome.law}: {outcome.good} of "
                f"{outcome.trials} ({outcome.detail})"
            )
            for failure in outcome.failures:
                print(f"    {failure}")
        starts = subject.starts
    if not options.slice:
        about = {
            "seed": options.seed,
            "starts": starts,
            "seconds": time.monotonic() - started,
            "command": "make reliability",
        }
        if options.only:
            about["command"] = f"python benchmarks/reliability --only {options.only}"
            path = replace_rows(outcomes, **about)
        else:
            path = write_results(outcomes, **about)
        write_page(path)
        say(f"written: {path}, docs/reliability.md")
    return 0 if all(outcome.held or not outcome.trials for outcome in outcomes) else 1


def _until_stopped(trials: Iterator[Outcome]) -> Iterator[Outcome]:
    """Ctrl-C or SIGTERM ends the trials; what was found by then is written."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield from trials
    except KeyboardInterrupt:
        print("stopped: what follows was not tried", flush=True)


def _trials(
    subject: Subject, counts: dict[str, int], say: Progress, *, whole: bool
) -> Iterator[Outcome]:
    if counts["runs"]:
        yield from kill_runs(subject, counts["runs"], say)
    if counts["damage"]:
        yield damage_checkpoints(subject, counts["damage"], say)
    if counts["disk"]:
        yield from fill_disk(subject, counts["disk"], say)
        yield estimate_sizes(subject, say)
    if counts["folders"]:
        yield use_folders(subject, counts["folders"], say)
    if counts["nan"]:
        yield leave_the_finite(subject, counts["nan"], say)
    if whole and counts["nan"]:
        yield stand_still(subject, say)
    if counts["store"]:
        yield kill_store(subject, counts["store"], say)
    if counts["signals"]:
        yield signal_runs(subject, counts["signals"], say)


if __name__ == "__main__":
    raise SystemExit(main())

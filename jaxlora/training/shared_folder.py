"""The output folder of a run, which process 0 checks, holds and writes to for all."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.checkpoints import run_folder
from jaxlora.checkpoints.space import check_space
from jaxlora.config.load import dump_config
from jaxlora.config.schema import Config
from jaxlora.parallel import processes
from jaxlora.parallel.arrays import fetch
from jaxlora.training.export import export_weights
from jaxlora.training.metrics import METRICS_FILE, Sink, open_sinks, read_lines
from jaxlora.training.remote_output import named_by_address, working_folder
from jaxlora.training.results import TrainResult, write_report
from jaxlora.training.setup import Plan
from jaxlora.training.state import TrainState, saved


def check(config: Config, *, continues: bool) -> None:
    """Refuses, before anything is read, a folder that could not be claimed."""
    with named_by_address(config):
        processes.on_first(
            "check", lambda: str(run_folder.check(working_folder(config), resume=continues))
        )


def claim(
    config: Config, stack: contextlib.ExitStack, *, continues: bool, needed_bytes: Mapping[str, int]
) -> Path:
    """Returns the folder, held by process 0 until `stack` ends.

    Raises:
      UserError: as `run_folder.claim`, or too little space for what the run will write.
    """

    def held() -> str:
        wanted, text = working_folder(config), dump_config(config)
        check_space(run_folder.check(wanted, resume=continues), needed_bytes)
        folder = run_folder.claim(wanted, config_text=text, resume=continues)
        return str(stack.enter_context(folder).path)

    with named_by_address(config):
        return Path(processes.on_first("output_dir", held))


def open_metrics(
    config: Config, folder: Path, *, after: int
) -> tuple[list[dict[str, Any]], list[Sink]]:
    """Writes the configuration; returns the metrics up to step `after`, and where new ones go."""
    lines = processes.on_first("metrics", lambda: read_lines(folder / METRICS_FILE))
    records = [line for line in lines if line["step"] <= after]
    if not processes.is_first():
        return records, []
    (folder / "config.yml").write_text(dump_config(config))
    return records, list(open_sinks(config, folder, after=after))


def write_results(plan: Plan, state: TrainState, result: TrainResult) -> None:
    """Writes adapter or model, curve and card."""
    weights = saved(state) if processes.count() == 1 else fetch(saved(state))
    with processes.together("export"):
        if processes.is_first():
            names = plan.labels and plan.labels.names
            export_weights(plan.config, plan.model, weights, result.output_dir, names)
            write_report(plan, result)

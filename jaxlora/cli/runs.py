"""Commands on a configuration: train, evaluate, preprocess."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from jaxlora.cli.command import add_command


def add_commands(commands: Any) -> None:
    """Adds the commands of this module."""

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        return add_command(commands, name, run, text, config=name)

    train = add("train", _train, "Fine-tune as a configuration says.")
    train.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="open model and data, say what would be done, write nothing",
    )
    train.add_argument(
        "--profile",
        action="store_true",
        help="record some steps in output_dir/profile, for Perfetto and TensorBoard",
    )
    _add_process_flags(train)
    evaluate = add("evaluate", _evaluate, "Score on the held-out data.")
    evaluate.add_argument("--adapter", help="adapter to score; default: the one in output_dir")
    preprocess = add("preprocess", _preprocess, "Tokenize the data and show it.")
    preprocess.add_argument("--preview", type=int, default=1, help="examples to show (default 1)")
    preprocess.add_argument("--output", help="PNG file for the histogram of the lengths")
    preprocess.add_argument(
        "--explain", action="store_true", help="say why earlier tokens could not be used"
    )


def _add_process_flags(train: argparse.ArgumentParser) -> None:
    """One run over several processes, each with devices of its own."""
    group = train.add_argument_group("several processes, each started with the same configuration")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0; auto: as SLURM or the TPU says"
    )
    group.add_argument(
        "--num-processes", "--num_processes", type=int, metavar="N", help="how many there are"
    )
    group.add_argument(
        "--process-id", "--process_id", type=int, metavar="I", help="which one this is, from 0"
    )


def _train(options: argparse.Namespace) -> int | None:
    from jaxlora import api
    from jaxlora.parallel import processes

    processes.join(options.coordinator, options.num_processes, options.process_id)
    if options.dry_run:
        from jaxlora.cli.configuration import print_report
        from jaxlora.training.rehearsal import rehearse

        return print_report(options.config, options.overrides, rehearse)
    api.train(options.config, *options.overrides, profile=options.profile)
    return None


def _evaluate(options: argparse.Namespace) -> None:
    from jaxlora import api
    from jaxlora.remote.location import exists

    config = api.load_config(options.config, options.overrides)
    adapter = options.adapter
    if adapter is None and exists(f"{config.output_dir}/adapter_config.json"):
        adapter = config.output_dir
    result = api.evaluate(config, adapter=adapter)
    print(f"evaluated: {config.base_model}" + (f" + {adapter}" if adapter else ""))
    print(result)


def _preprocess(options: argparse.Namespace) -> None:
    from jaxlora import api
    from jaxlora.data.lengths import as_text, histogram
    from jaxlora.training.describe import describe_report, explain, preview
    from jaxlora.training.plot import plot_lengths

    prepared, tokenizer = api.preprocess(options.config, *options.overrides)
    lengths = histogram(prepared.train.lengths)
    print(f"{describe_report(prepared.report)}\n{as_text(lengths)}")
    if options.output:
        plot_lengths(lengths, Path(options.output), "Lengths of the training examples")
        print(f"histogram: {options.output}")
    print(f"cache: {prepared.report.folder}")
    if options.explain:
        print(explain(prepared.report))
    # https://no-color.org
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    marks = ("\033[32m", "\033[0m") if colour else ("[", "]")
    where = "green" if colour else "between [ and ]"
    labels = list(prepared.report.train.labels or ())
    for number in range(min(options.preview, len(prepared.train))):
        print(f"\nexample {number + 1}; trained text is {where}:")
        print(preview(prepared.train, number, tokenizer, labels, marks))

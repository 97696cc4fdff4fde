"""The `jaxlora` command: parses flags, calls the API, prints."""

import argparse
import gc
import os
import select
import signal
import sys
from collections.abc import Sequence

from jaxlora.cli import configuration, launching, measuring, models, planning, runs
from jaxlora.cli.compilation import use_compilation_cache
from jaxlora.cli.environment import check_environment
from jaxlora.core.errors import UserError
from jaxlora.core.version import __version__

_EPILOG = """examples:
  jaxlora init my.yml                                  write a configuration: three questions
  jaxlora train configs/quickstart.yml                 fine-tune; the output folder tells the rest
  jaxlora train my.yml --lora_r=32 --max_steps=100     any key of the file can be overridden
  jaxlora plan my.yml --topology v5e:2x2               memory and time of a run on devices elsewhere
  jaxlora chat outputs/quickstart                      talk to a model or adapter
  jaxlora merge outputs/quickstart --output merged     one folder that transformers loads

Every MODEL is a folder or a Hugging Face hub id. An adapter folder knows its base model.
Exit status: 0 done, 1 verification failed or a plan does not fit, 2 a mistake to mend (one line
says which), 3 a loss that is not finite, 4 a device's memory is too small, 75 stood still,
130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1 (a run saves its state first).
"""

# New objects between two searches for cycles, instead of 700. Importing and tracing make half a
# million that stay: searching them again and again was a sixth of the CPU seconds to a first step.
_OBJECTS_PER_SEARCH = 100_000

_COMPILING = ("train", "evaluate", "generate", "chat", "classify", "merge", "verify", "bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    gc.set_threshold(_OBJECTS_PER_SEARCH)
    # Advice about frameworks that jaxlora does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    parser = _parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = parser.parse_known_args(words)
    if options.command == "generate":  # argparse gives up on prompts that come after an option
        options.prompts += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest and not options.takes_overrides:
        parser.error(f"unknown argument {rest[0]}; see jaxlora {options.command} --help")
    if again := _repeated(words):
        parser.error(f"{again}: given twice; keep one")
    options.overrides = rest
    if options.command in _COMPILING and not getattr(options, "dry_run", False):
        use_compilation_cache()
    try:
        check_environment(os.environ)
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        for line in str(error).splitlines():
            print(f"jaxlora: error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print("jaxlora: interrupted", file=sys.stderr)
        return getattr(interrupt, "exit_code", 130)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python has left
        return 128 + signal.SIGPIPE


def _nobody_reads() -> bool:
    """Returns whether the reader of a pipe, such as `head`, has gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxlora",
        description="Fine-tune LLMs with LoRA and QLoRA in JAX, on CPU, GPU or TPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (runs, launching, planning, measuring, configuration, models):
        group.add_commands(commands)
    return parser


def _repeated(words: Sequence[str]) -> str | None:
    """Returns a flag that stands twice; argparse would take the last."""
    flags = [word.partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    flags = flags[: flags.index("__")] if "__" in flags else flags
    twice = next((flag for i, flag in enumerate(flags) if flag in flags[:i]), None)
    return twice and twice.replace("_", "-", 2)

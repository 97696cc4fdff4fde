"""Bash that carries any text unharmed: quoting, files from here-documents, the worker's script."""

import shlex

from jaxlora.launch.job import Job, requirement, storage_packages

PORT = 8476
"""On which process 0 listens for the others."""

HEADER = """#!/usr/bin/env bash
# {what}
set -euo pipefail
"""

quote = shlex.quote


def here_document(target: str, text: str) -> str:
    r"""Returns bash that writes a text to a file, byte for byte.

    Args:
      target: the file, as it stands in the script.
      text: any text; a last line without an end gets one.

    >>> print(here_document("run.yml", "a: $b\n"), end="")
    cat > run.yml <<'END_OF_FILE'
    a: $b
    END_OF_FILE
    """
    delimiter = "END_OF_FILE"
    lines = text.split("\n")
    while delimiter in lines:
        delimiter += "_"
    body = text if text.endswith("\n") else f"{text}\n"
    return f"cat > {target} <<'{delimiter}'\n{body}{delimiter}\n"


def install_lines(job: Job) -> str:
    """Bash that makes a virtual environment in ``$PWD/venv`` with jaxlora in it.

    Through uv, which brings its own Python: images of Cloud TPU VMs have an older one than jaxlora
    needs.
    """
    wanted = " ".join(map(quote, (requirement(job), *storage_packages(job))))
    return (
        "python3 -m pip install --quiet --user --break-system-packages uv 2>/dev/null"
        " || python3 -m pip install --quiet --user uv\n"
        "[ -x venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 venv\n"
        f"python3 -m uv pip install --quiet --python venv/bin/python {wanted}\n"
    )


def train_line(job: Job, config: str, python: str = "venv/bin/python") -> str:
    """Bash that trains in place of the shell, so that signals reach the process.

    Args:
      job: what is launched; with several machines ``$coordinator`` and ``$process_id`` must be set.
      config: the configuration file, as it stands in the script.
      python: the interpreter, as it stands in the script.
    """
    line = f"exec {python} -m jaxlora.cli train {config}"
    if job.hosts > 1:
        line += (
            f' \\\n  --coordinator="$coordinator" --num-processes={job.hosts}'
            ' --process-id="$process_id"'
        )
    return line + "\n"

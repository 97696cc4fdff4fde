"""What is launched: one configuration, the machines it wants, and what they need to know."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from importlib import metadata

from jaxlora.config import settings
from jaxlora.config.load import DATASET_PATHS, PATHS, dump_config, load_config
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.launch.topology import Topology
from jaxlora.remote.location import is_storage, package_for

# What may stand in a flag, a directive of sbatch or a manifest without a question of quoting.
_PLAIN = re.compile(r"[\w./:@%=+,-]+", re.ASCII)
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run on other machines.

    Attributes:
      config: the run's keys; `text` is the YAML that the machines get.
      name: of the job and of the machines, a DNS label.
      topology: chips of one TPU slice, or of one machine with GPUs.
      nodes: machines with GPUs.
      slices: TPU slices of that topology, joined by the data-centre network.
      spot: machines may vanish; the run is taken up again where it was.
      install: what pip installs on the machines.
      variables: names of environment variables to pass on; values are never written down.
      zone, project: of Google Cloud.
      image: container, for GKE.
      partition, account, time_limit, python: of a SLURM cluster.
    """

    config: Config
    name: str
    topology: Topology
    nodes: int = 1
    slices: int = 1
    spot: bool = False
    install: str | None = None
    variables: tuple[str, ...] = ()
    zone: str | None = None
    project: str | None = None
    image: str = "python:3.12"
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    python: str = "python"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"--name: {self.name!r} cannot name a machine; expected at most 40 lower-case "
                "letters, digits and hyphens, a letter first."
            )
        for name in ("zone", "project", "image", "partition", "account", "time_limit"):
            value = getattr(self, name)
            if value is not None and not _PLAIN.fullmatch(value):
                raise UserError(
                    f"--{name.replace('_', '-')}: {value!r} has characters that do not belong "
                    "there; expected letters, digits and . / : @ % = + , - _"
                )
        for name in self.variables:
            if not _VARIABLE.fullmatch(name):
                raise UserError(
                    f"--env: {name!r} is not the name of a variable; give the name alone, its "
                    "value is taken from the environment when the job starts."
                )
        if self.nodes < 1 or (self.nodes > 1 and self.topology.is_tpu):
            raise UserError(
                f"--nodes: {self.nodes}; expected 1 or more machines with GPUs (a TPU topology "
                "says its machines itself)."
            )
        if self.slices < 1 or (self.slices > 1 and not self.topology.is_tpu):
            raise UserError(
                f"--slices: {self.slices}; expected 1 or more, of a TPU topology (--nodes counts "
                "machines with GPUs)."
            )
        if self.slices > 1:
            from jaxlora.parallel.mesh import check_slices  # imports JAX

            sizes = settings.mesh_sizes(self.config)
            check_slices(sizes, self.topology.chips * self.slices, self.slices)

    @property
    def text(self) -> str:
        """The YAML that the machines get."""
        return dump_config(self.config)

    @property
    def hosts(self) -> int:
        """Machines, with one process each."""
        return self.topology.hosts * self.nodes * self.slices

    def need(self, name: str, target: str, example: str) -> str:
        """Returns an attribute that a target cannot do without.

        Raises:
          UserError: it was not given.
        """
        value = getattr(self, name)
        if value is None:
            raise UserError(f"--{name}: missing; --on {target} needs it, such as {example}.")
        return value


def run_config(source: str, overrides: Sequence[str]) -> Config:
    """Returns the configuration of a run that may be stopped and started again."""
    config = load_config(source, overrides)
    if config.resume_from_checkpoint is None and not config.auto_resume_from_checkpoints:
        return load_config(source, [*overrides, "--auto_resume_from_checkpoints=true"])
    return config


def default_name(source: str) -> str:
    """Returns a name for the job of a configuration file.

    >>> default_name("configs/llama-3_8B.yml"), default_name("7b.yml")
    ('llama-3-8b', 'run-7b')
    """
    stem = os.path.splitext(os.path.basename(source))[0]
    words = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "run"
    return (words if words[0].isalpha() else f"run-{words}")[:40].rstrip("-")


def check_reachable(job: Job, target: str) -> None:
    """Refuses a run whose files the machines do not have, or whose results would vanish with them.

    Raises:
      UserError: a path of this machine, or an output folder on a machine that may go.
    """
    for key, path in _paths(job.config):
        if os.path.exists(os.path.expanduser(path)):
            raise UserError(
                f"{key}: {path} is on this machine, and --on {target} runs elsewhere; give a hub "
                "id or an address of object storage (gs://, s3://)."
            )
    if not is_storage(job.config.output_dir) and (job.spot or target == "gke"):
        raise UserError(
            f"output_dir: {job.config.output_dir} would lie on a machine that vanishes; give an "
            "address of object storage (gs://, s3://)."
        )


def _paths(config: Config) -> list[tuple[str, str]]:
    """What may name a file, with its key."""
    found = [(key, getattr(config, key)) for key in PATHS]
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        for number, entry in enumerate(getattr(config, key)):
            for name in DATASET_PATHS:
                value = getattr(entry, name, None)
                values = value if isinstance(value, list | tuple) else [value]
                found += [(f"{key}.{number}.{name}", each) for each in values]
    return [(key, value) for key, value in found if isinstance(value, str)]


def storage_packages(job: Job) -> list[str]:
    """Returns the pip packages for the object storage that the run names."""
    texts = [path for _, path in _paths(job.config)] + [job.config.output_dir]
    return sorted({package for text in texts if (package := package_for(text))})


def requirement(job: Job) -> str:
    """Returns what pip installs on the machines.

    Raises:
      UserError: it was not given, and jaxlora was not installed from an address here.
    """
    if job.install is not None:
        return job.install
    extra = "tpu" if job.topology.is_tpu else "cuda"
    try:
        origin = json.loads(metadata.distribution("jaxlora").read_text("direct_url.json") or "")
        vcs = origin["vcs_info"]
        return f"jaxlora[{extra}] @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    except (metadata.PackageNotFoundError, ValueError, KeyError):
        raise UserError(
            "--install: missing; jaxlora was installed here from a folder, which other machines "
            f'do not have. Give what pip installs there, such as "jaxlora[{extra}] @ '
            'git+https://..." or the address of a wheel.'
        ) from None

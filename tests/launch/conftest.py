"""Jobs to launch, and a machine whose clients (gcloud, srun, pip) only note what they are told."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from jaxlora.launch.job import Job, run_config
from jaxlora.launch.topology import parse

# What a shell, YAML or a directive of sbatch could trip over, and what would show that one did.
HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "$(touch canary)",
    "`touch canary`",
    "; touch canary;",
    "&& touch canary",
    "$HOME ${PATH}",
    "back\\slash",
    "END_OF_FILE",
    "x' ; touch canary ; '",
    "line\nEND_OF_FILE\ntouch canary\n",
    "#SBATCH --x: {y} | > -",
    "$$(HOME)",
]

# Each of these notes its name and arguments, NUL between them, and does what the test needs of it.
_NOTE = (
    '#!/bin/bash\nprintf "%s\\0" "$(basename "$0")" "$@" >> "$NOTES"; printf "\\n" >> "$NOTES"\n'
)
_CLIENTS = {
    "gcloud": """case "$4" in
  describe) [ -n "${STATE:-}" ] && echo "$STATE" ;;
  scp) shift 4; for word in "$@"; do [ -f "$word" ] && cp -p "$word" "$REMOTE/"; done
       stat -c %a "$REMOTE/jaxlora-env" > "$SEEN.mode" 2> /dev/null; true ;;
  ssh) for word in "$@"; do
         case "$word" in --command=*) cd "$REMOTE" && bash -c "${word#--command=}" ;; esac
       done ;;
  create) for word in "$@"; do
            case "$word" in *startup-script=*) cp "${word##*=}" "$REMOTE/" ;; esac
          done; true ;;
esac""",
    # The interpreter of the machine: makes a virtual environment whose Python notes its arguments.
    "python3": """case "$*" in
  *" venv "*) mkdir -p venv/bin; cp "$BIN/train" venv/bin/python ;;
esac""",
    "train": """for word in "$@"; do case "$word" in *.yml) cp "$word" "$SEEN" ;; esac; done
env > "$SEEN.env"
exit "${TRAIN_STATUS:-0}\"""",
    "curl": """case "$*" in
  *agent-worker-number*) echo "${NUMBER:-2}" ;;
  *tpu-env*) printf "%b" "${TPU_ENV:-ZONE: 'us-west4-a'\\n}" ;;
  *worker-network-endpoints*) echo "${PEERS:-n:1:10.0.0.7,n:2:10.0.0.8}" ;;
esac""",
    "srun": 'shift; SLURM_PROCID=1 SLURM_LOCALID=0 "$@"',
    "scontrol": '[ "$1" = show ] && printf "node-a\\nnode-b\\n"; true',
}


@dataclasses.dataclass
class Machine:
    """A folder in which scripts run; `env` is all that they see."""

    root: Path
    env: dict[str, str]

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a script with bash, after bash has checked its syntax."""
        (self.root / "script.sh").write_text(script)
        command = ["bash", str(self.root / "script.sh")]
        checked = subprocess.run([command[0], "-n", command[1]], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        return subprocess.run(
            command, cwd=self.root, env={**self.env, **variables}, capture_output=True, text=True
        )

    @property
    def calls(self) -> list[list[str]]:
        """Names and arguments of the clients that were called."""
        notes = self.root / "notes"
        lines = notes.read_text().split("\0\n") if notes.exists() else []
        return [line.split("\0") for line in lines if line]

    def called(self, *words: str) -> list[str]:
        """The one call that has these words."""
        found = [call for call in self.calls if set(words) <= set(call)]
        assert len(found) == 1, (words, self.calls)
        return found[0]

    @property
    def canaries(self) -> list[Path]:
        return list(self.root.rglob("canary*"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    root = tmp_path / "a machine"
    (root / "bin").mkdir(parents=True)
    (root / "remote").mkdir()
    for name, body in _CLIENTS.items():
        file = root / "bin" / name
        file.write_text(_NOTE + body + "\n")
        file.chmod(0o755)
    paths = {"NOTES": "notes", "REMOTE": "remote", "SEEN": "seen", "BIN": "bin", "HOME": "remote"}
    env = {name: str(root / value) for name, value in paths.items()}
    return Machine(root, {**env, "PATH": f"{root / 'bin'}:{os.defpath}"})


@pytest.fixture
def job(tmp_path: Path):
    """Returns ``job(topology, keys, **attributes) -> Job``."""

    def make(topology: str = "v5e:4x4", keys: dict | None = None, **attributes) -> Job:
        values = {
            "base_model": "meta-llama/Llama-3.1-8B",
            "datasets": [{"path": "gs://bucket/rows.jsonl", "type": "alpaca"}],
            "adapter": "lora",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_linear": True,
            "learning_rate": 2e-4,
            "output_dir": "gs://bucket/runs/one",
            **(keys or {}),
        }
        file = tmp_path / "my run.yml"
        file.write_text(json.dumps(values))
        shared = {"zone": "us-west4-a", "install": "jaxlora[tpu]==0.1.0"}
        return Job(run_config(str(file), []), "one", parse(topology), **{**shared, **attributes})

    return make


@pytest.fixture(params=HOSTILE)
def hostile(request) -> str:
    return request.param

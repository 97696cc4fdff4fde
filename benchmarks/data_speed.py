"""Tokenizing and packing beside `datasets.map`, packing efficiency, and memory as a file grows.

    python benchmarks/data_speed.py --data PATH [--rounds 5] [--memory-gb 1] [--allow-busy]

PATH holds `gsm8k/train.jsonl`, `e2e/e2e-dataset.zip`, `instructions/alpaca_en_demo.json` and
`tokenizers/llama2`. Both sides read the same two files, write the same prompts, encode prompt and
answer apart with the same fast tokenizer and mask the prompt; ours also checks every row, packs and
hashes. Each measurement is a process of its own with an empty cache, A B A B, on one core and on
two (ours: threads of the tokenizer; theirs: `num_proc=2`). Writes
`benchmarks/results/<date>-data-speed.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import machine

from jaxlora.core.errors import UserError

# Column of the prompt, column of the answer.
SETS = {"gsm8k": ("question", "answer"), "e2e": ("mr", "ref")}
LENGTH = 2048

COMMON = """
import json, os, resource, sys, tempfile, time
from pathlib import Path
work, tokenizer_folder, cores = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
files = json.loads(sys.argv[4])
from jaxlora.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(Path(tokenizer_folder))
def cpu():
    used = [resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
"""
OURS = """
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec
def kind(prompt, answer):
    return {"field_instruction": prompt, "field_output": answer, "format": "{instruction}\\n"}
specs = [DatasetSpec(path, kind(*columns)) for path, columns in files]
options = DataOptions(LENGTH, sample_packing=True, dataset_prepared_path=str(work / "cache"))
started, before = time.monotonic(), cpu()
report = prepare(specs, [], options, tokenizer).report.train
print(json.dumps({"s": time.monotonic() - started, "cpu_s": cpu() - before,
    "tokens": report.tokens, "packed": report.packing_efficiency}))
"""
THEIRS = """
import datasets
datasets.disable_progress_bars()
def tokenize(batch, prompt, answer):
    asked = tokenizer([text + "\\n" for text in batch[prompt]])["input_ids"]
    said = tokenizer(batch[answer], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return {"input_ids": [a + b + end for a, b in zip(asked, said)],
            "labels": [[-100] * len(a) + b + end for a, b in zip(asked, said)]}
started, before = time.monotonic(), cpu()
made = []
for path, (prompt, answer) in files:
    kind = "csv" if path.endswith("csv") else "json"
    data = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=str(work / "hf"))
    data = data.map(tokenize, batched=True, remove_columns=data.column_names,
        fn_kwargs={"prompt": prompt, "answer": answer}, num_proc=cores if cores > 1 else None)
    made.append(data)
spent = {"s": time.monotonic() - started, "cpu_s": cpu() - before}
print(json.dumps(spent | {"tokens": sum(len(x) for data in made for x in data["input_ids"])}))
"""
GROWTH = """
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec
options = DataOptions(512, dataset_prepared_path=str(work / "cache"))
[[path, _]] = files
kind = {"field_instruction": "question", "field_output": "answer", "format": "{instruction}\\n"}
peaks = []
def watch(rows, tokens):
    peaks.append(resident())
started = time.monotonic()
report = prepare([DatasetSpec(path, kind)], [], options, tokenizer, progress=watch).report
print(json.dumps({"s": time.monotonic() - started, "rows": report.train_sources[0].read,
    "tokens": report.train.tokens, "after_20_chunks_mib": peaks[min(19, len(peaks) - 1)] / 2**20,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}))
"""


def run(program: str, work: Path, tokenizer: Path, cores: int, files: Any) -> dict[str, Any]:
    """Runs one measurement in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory(dir=work) as fresh:
        code = COMMON + program.replace("LENGTH", str(LENGTH))
        threads = {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": str(cores > 1)}
        environment = os.environ | threads | {"HF_HOME": fresh, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, fresh, str(tokenizer), str(cores), json.dumps(files)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a measurement failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    work: Path, tokenizer: Path, files: Any, cores: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Ours and theirs in turns; ratios are theirs / ours, so above 1 ours is the faster.

    Raises:
      UserError: the two sides do not make the same number of tokens.
    """
    pairs = []
    for _ in range(rounds):
        pairs.append([run(each, work, tokenizer, cores, files) for each in (OURS, THEIRS)])
    counts = {side["tokens"] for pair in pairs for side in pair}
    if len(counts) != 1:
        raise UserError(f"the two sides made {sorted(counts)} tokens; nothing is reported.")
    found = {}
    for name in ("s", "cpu_s"):
        ratios = [theirs[name] / ours[name] for ours, theirs in pairs]
        found[name] = {
            "ours": statistics.median(ours[name] for ours, _ in pairs),
            "theirs": statistics.median(theirs[name] for _, theirs in pairs),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return found


def grown_file(source: Path, target: Path, gigabytes: float) -> Path:
    """The rows of a JSON lines file, each made different, again and again up to a size."""
    rows = source.read_text(encoding="utf-8").splitlines()
    with target.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < gigabytes * 1e9:
            for row in rows:
                number += 1
                file.write(row.replace('{"question": "', f'{{"question": "{number}: ', 1) + "\n")
    return target


def check_data(data: Path) -> None:
    """Refuses a folder without the inputs.

    Raises:
      UserError: a file is missing.
    """
    for name in ("gsm8k/train.jsonl", "e2e/e2e-dataset.zip", "tokenizers/llama2"):
        if not (data / name).exists():
            raise UserError(f"--data: {data / name} is missing; see the top of this file.")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns all measurements of this file.

    Raises:
      UserError: an input is missing, or a measurement failed.
    """
    check_data(options.data)
    with tempfile.TemporaryDirectory() as work:
        return {"measured": _measured(options, Path(work))}


def _measured(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    tokenizer = options.data / "tokenizers" / "llama2"
    with zipfile.ZipFile(options.data / "e2e" / "e2e-dataset.zip") as archive:
        name = next(each for each in archive.namelist() if each.endswith("trainset.csv"))
        (work / "e2e.csv").write_bytes(archive.read(name))
    paths = {"gsm8k": options.data / "gsm8k" / "train.jsonl", "e2e": work / "e2e.csv"}
    files = [(str(path), SETS[name]) for name, path in paths.items()]
    result: dict[str, Any] = {
        "packed": {
            name: run(OURS, work, tokenizer, 1, [(str(path), SETS[name])])["packed"]
            for name, path in paths.items()
        }
    }
    for cores in (1, 2):
        result[f"cores {cores}"] = compare(work, tokenizer, files, cores, options.rounds)
    for gigabytes in (options.memory_gb / 10, options.memory_gb) if options.memory_gb else ():
        grown = grown_file(paths["gsm8k"], work / "grown.jsonl", gigabytes)
        rows = [(str(grown), SETS["gsm8k"])]
        result[f"memory {gigabytes:g} GB"] = run(GROWTH, work, tokenizer, 2, rows)
        grown.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-gb", type=float, default=0, help="size of the large file")

    def table(result: dict[str, Any]) -> str:
        return json.dumps(result["measured"], indent=1)

    machine.run("data-speed", parser, measure, table)


if __name__ == "__main__":
    main()

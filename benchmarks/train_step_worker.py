"""A learner of `train_step.py` in a process of its own.

`Worker` starts it and asks for turns; run as a program it is the learner: a line with a number of
steps comes in, a line of JSON goes out.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_step_cells import Cell


class Worker:
    """A learner's process.

    Args:
      name: "jaxlora", or the peer and its threads.
      cell: what it trains.
      work: folder with the inputs.
    """

    def __init__(self, name: str, cell: Cell, work: Path):
        self.name = name
        self.turns: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.first_turn_s = self.peak_rss_mib = 0.0
        self.process = subprocess.Popen(
            [sys.executable, __file__, name, json.dumps(dataclasses.asdict(cell)), str(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        )

    def turn(self, steps: int) -> None:
        """Has it take steps, and notes what they took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        found = json.loads(line)
        self.losses += found.pop("losses")
        self.peak_rss_mib = found.pop("peak_rss_mib")
        self.first_turn_s = self.first_turn_s or found["wall_s"] * steps
        self.turns.append(found)

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def _ours(cell: Cell, work: Path) -> Callable[[], float]:
    from speed import Ours

    from jaxlora.config.load import load_config
    from jaxlora.training.setup import make_plan

    plan = make_plan(load_config(cell.run_config(work)))
    learner = Ours(plan)
    return lambda: learner.step(plan.batches.batch(learner.run.state.step))


def _theirs(cell: Cell, work: Path, threads: int, float32_adapter: bool) -> Callable[[], float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from jaxlora.config.load import load_config
    from jaxlora.training.setup import make_plan

    torch.set_num_threads(threads)
    dtype = getattr(torch, cell.dtype)
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=dtype, use_cache=False)
    if cell.remat:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cell.method == "lora":
        model = PeftModel.from_pretrained(
            model, str(work / "start"), is_trainable=True, autocast_adapter_dtype=float32_adapter
        )
    model.train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    batches = make_plan(load_config(cell.run_config(work))).batches
    done = 0

    def step() -> float:
        nonlocal done
        tokens = torch.from_numpy(batches.batch(done)["tokens"][0].astype("int64"))
        done += 1
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _serve(name: str, cell: Cell, work: Path) -> None:
    threads = 1 if "1 thread" in name else os.cpu_count() or 1
    if name == "jaxlora":
        step = _ours(cell, work)
    else:
        step = _theirs(cell, work, threads, "bfloat16 adapter" not in name)
    for line in sys.stdin:
        steps = int(line)
        wall, cpu = time.monotonic(), time.process_time()
        losses = [step() for _ in range(steps)]
        found: dict[str, Any] = {
            "wall_s": (time.monotonic() - wall) / steps,
            "cpu_s": (time.process_time() - cpu) / steps,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "losses": losses,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], Cell(**json.loads(sys.argv[2])), Path(sys.argv[3]))

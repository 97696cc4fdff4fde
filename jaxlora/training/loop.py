"""`train`: from a configuration to an adapter, top to bottom."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints import run_folder
from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.config import derived
from jaxlora.config.load import dump_config
from jaxlora.config.notes import notes
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.training import resume
from jaxlora.training.describe import describe_data, describe_result, describe_weights
from jaxlora.training.evaluation import held_out, held_out_score
from jaxlora.training.export import export_weights
from jaxlora.training.interrupt import Interrupts
from jaxlora.training.metrics import (
    METRICS_FILE,
    Sink,
    open_sinks,
    read_lines,
    record_at,
    write_all,
)
from jaxlora.training.progress import Display
from jaxlora.training.results import TrainResult, write_report
from jaxlora.training.setup import Plan, make_plan
from jaxlora.training.state import (
    TrainState,
    init_optimizer,
    load_weights,
    make_tx,
    saved,
    split_pairs,
)
from jaxlora.training.step import make_eval_step, make_train_step
from jaxlora.training.watchdog import LossWatchdog


def train(config: Config, *, quiet: bool = False) -> TrainResult:
    """Runs a configuration and returns its outcome.

    Everything the user can get wrong is checked before the output folder is touched.

    Args:
      config: from `jaxlora.load_config`.
      quiet: print nothing.

    Raises:
      UserError: a mistake in the configuration, the model, the data or the folder; a loss that is
        not finite.
    """
    with contextlib.ExitStack() as stack:
        precision = derived.matmul_precision(config)
        stack.enter_context(jax.default_matmul_precision(precision or "default"))
        display = Display(1, quiet=quiet)
        for note in notes(config):
            display.say(f"note: {note}")
        origin = resume.find_origin(config)
        run_folder.check(config.output_dir, resume=origin.continues)
        plan = make_plan(config, display.say)
        display.say(describe_data(plan))
        trainable, frozen = load_weights(config, plan.model)
        display.say(describe_weights(plan, trainable, frozen))
        run = Run(plan, trainable, frozen, origin)
        folder = stack.enter_context(
            run_folder.claim(
                config.output_dir, config_text=dump_config(config), resume=origin.continues
            )
        )
        return run.execute(folder.path, stack, quiet)


class Run:
    """One run: its state, its compiled steps and what it has measured.

    Args:
      plan: the checked run.
      trainable, frozen: from `load_weights`.
      origin: where it starts.
    """

    def __init__(self, plan: Plan, trainable: Any, frozen: Any, origin: resume.Origin):
        config, model = plan.config, plan.model
        self.plan, self.origin = plan, origin
        optimizer, self.schedule = make_tx(config, trainable, model.specs, plan.total_steps)
        self.state = TrainState(
            trainable,
            init_optimizer(optimizer, trainable, model.placement),
            frozen,
            initial=split_pairs(model, trainable["adapter"]),
        )
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        like = (self.state.trainable, self.state.opt_state)
        self.train_step = make_train_step(model.transformer, model.targets, optimizer, key, like)
        self.eval_step = make_eval_step(model.transformer, model.targets)
        self.eval_every = derived.eval_every(config, plan.steps_per_epoch)
        self.save_every = derived.save_every(config, plan.steps_per_epoch)
        self.log_every = derived.logging_steps(config, plan.total_steps)
        self.watchdog = LossWatchdog(
            config.loss_watchdog_threshold, patience=config.loss_watchdog_patience
        )
        self.failed = False
        self.last_loss = math.nan
        self.saved_step: int | None = None

    def execute(self, folder: Path, stack: contextlib.ExitStack, quiet: bool) -> TrainResult:
        """Restores, trains, evaluates, saves and exports."""
        plan, config = self.plan, self.plan.config
        store = CheckpointStore(folder / resume.CHECKPOINTS, keep=config.save_total_limit)
        stack.enter_context(store)
        if self.origin.store is not None:
            self.state = resume.restore(self.origin, plan, self.state, store)
            self.saved_step = self.state.step if self.origin.continues else None
        # Not before: a continuation that is refused leaves the folder as it was.
        (folder / "config.yml").write_text(dump_config(config))
        records = read_lines(folder / METRICS_FILE)
        sinks = open_sinks(config, folder, after=self.state.step)
        stack.callback(lambda: [sink.close() for sink in sinks])
        display = stack.enter_context(Display(plan.total_steps, first=self.state.step, quiet=quiet))
        if self.state.step:
            display.say(f"continuing from the checkpoint of step {self.state.step}")
            self.last_loss = record_at(records, self.state.step).get("loss", math.nan)
        before = self._evaluate_before(display, sinks, record_at(records, 0))
        try:
            with Interrupts() as interrupts:
                while self.state.step < plan.total_steps and not self.failed:
                    interrupts.check()
                    self._step(display, sinks, store)
        except KeyboardInterrupt:
            self._stop(display, store)
            raise
        self._save(store)
        after = self._evaluate(display, "after training", sinks)
        export_weights(
            config, plan.model, saved(self.state), folder, plan.labels and plan.labels.names
        )
        result = TrainResult(
            folder,
            self.state.step,
            self.last_loss,
            after.get("eval_loss"),
            before.get("eval_loss"),
            after.get("exact_match"),
            before.get("exact_match"),
            display.tokens_per_s,
            after.get("eval_accuracy"),
            before.get("eval_accuracy"),
        )
        write_report(plan, result)
        store.wait()
        display.say(describe_result(plan))
        return result

    def _step(self, display: Display, sinks: Sequence[Sink], store: CheckpointStore) -> None:
        plan, state = self.plan, self.state
        batch = plan.batches.batch(state.step)
        tokens = int(np.count_nonzero(batch["segment_ids"]))
        trainable, opt_state, metrics = self.train_step(
            state.trainable,
            state.opt_state,
            state.frozen,
            plan.model.placement.batch(batch),
            jnp.int32(state.step),
        )
        # In one go: an interrupt finds the state before the step, or the one after it.
        self.state = dataclasses.replace(
            state, trainable=trainable, opt_state=opt_state, step=state.step + 1
        )
        step, values = self.state.step, self._checked(metrics)
        self.failed = self.watchdog.barks(values["loss"])
        last = step == plan.total_steps or self.failed
        display.advance(tokens)
        log = step % self.log_every == 0 or last
        display.update(values, log=log)
        if log:
            rate = {"tokens_per_s": round(display.tokens_per_s, 1)}
            write_all(sinks, step, values | rate)
        if self.failed:
            display.say(
                f"stopped: {self.watchdog.patience} losses in a row above loss_watchdog_threshold "
                f"{self.watchdog.threshold:g}; lower learning_rate or look at the data"
            )
        store.check()
        # Evaluated before it is saved: what continues from a checkpoint has its numbers.
        if self.eval_every and step % self.eval_every == 0 and not last:
            self._evaluate_loss(display, sinks)
        if self.save_every and step % self.save_every == 0 and not last:
            self._save(store)

    def _checked(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Numbers of the step just done; stops a run that has left the finite numbers."""
        step = self.state.step
        values = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise UserError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: not "
                "finite, the update was not applied; lower learning_rate or check the data, and "
                "continue with resume_from_checkpoint: true."
            )
        self.last_loss = values["loss"]
        return values | {
            "epoch": step / self.plan.steps_per_epoch,
            "learning_rate": float(jnp.asarray(self.schedule(step - 1))),
        }

    def _evaluate_loss(self, display: Display, sinks: Sequence[Sink]) -> dict[str, float]:
        plan, state = self.plan, self.state
        if plan.eval_batches is None:
            return {}
        started = time.monotonic()
        found = held_out(self.eval_step, state.trainable, state.frozen, plan)
        display.pause(time.monotonic() - started)
        display.say(str(found))
        write_all(sinks, state.step, found.metrics)
        return found.metrics

    def _evaluate_before(
        self, display: Display, sinks: Sequence[Sink], first: dict[str, float]
    ) -> dict[str, float]:
        """Numbers from before training; a run that continues has them in its metrics."""
        if "eval_loss" in first and (
            "exact_match" in first or not self.plan.config.eval_exact_match
        ):
            return first
        return self._evaluate(display, "before training", sinks)

    def _evaluate(self, display: Display, when: str, sinks: Sequence[Sink]) -> dict[str, float]:
        found = self._evaluate_loss(display, sinks)
        if not self.plan.config.eval_exact_match:
            return found
        started = time.monotonic()
        score = held_out_score(self.plan, self.state.trainable, self.state.frozen)
        display.pause(time.monotonic() - started)
        display.say(
            f"held-out exact match {when}: {score.rate:.1%} ({score.correct} of {score.total})"
        )
        write_all(sinks, self.state.step, {"exact_match": score.rate})
        return found | {"exact_match": score.rate}

    def _save(self, store: CheckpointStore) -> None:
        if self.state.step != self.saved_step:
            labels = self.plan.labels and self.plan.labels.names
            meta = {"identity": resume.identity(self.plan), "labels": labels}
            store.save(self.state.step, saved(self.state), meta)
            self.saved_step = self.state.step

    def _stop(self, display: Display, store: CheckpointStore) -> None:
        """Saves what Ctrl-C left, unless it came in the middle of a step."""
        whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(saved(self.state)))
        if whole:
            self._save(store)
        store.wait()
        saved_step = "saved" if whole else "last save:"
        display.say(f"stopped; {saved_step} step {self.saved_step} (resume_from_checkpoint: true)")

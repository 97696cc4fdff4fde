"""`train`: from a configuration to an adapter, top to bottom."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlora.checkpoints.remote import Mirror
from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.config import derived
from jaxlora.config.notes import notes
from jaxlora.config.schema import Config
from jaxlora.parallel import processes
from jaxlora.parallel.stopping import shared_stop
from jaxlora.training import agreement, resume, shared_folder
from jaxlora.training.describe import (
    describe_data,
    describe_result,
    describe_rows,
    describe_time,
    describe_weights,
)
from jaxlora.training.evaluation import Evaluator
from jaxlora.training.host_memory import keep_freed_blocks
from jaxlora.training.interrupt import Interrupts
from jaxlora.training.metrics import Sink, record_at, write_all
from jaxlora.training.nonfinite import NonFiniteError, is_finite, skip_or_stop
from jaxlora.training.phases import Phases
from jaxlora.training.progress import Display
from jaxlora.training.remote_output import open_mirror, push_all
from jaxlora.training.results import TrainResult
from jaxlora.training.saving import Saver
from jaxlora.training.setup import Plan, Settle, leave, make_plan
from jaxlora.training.shared_store import open_store
from jaxlora.training.stall import StallGuard
from jaxlora.training.state import (
    TrainState,
    init_optimizer,
    load_weights,
    make_tx,
    needed_bytes,
    split_pairs,
)
from jaxlora.training.step import make_eval_step, make_train_step
from jaxlora.training.trace import StepTrace
from jaxlora.training.watchdog import LossWatchdog


def train(
    config: Config, *, quiet: bool = False, profile: bool = False, settle: Settle = leave
) -> TrainResult:
    """Runs a configuration and returns its outcome.

    Everything the user can get wrong is checked before the output folder is touched.

    Args:
      config: from `jaxlora.load_config`.
      quiet: print nothing.
      profile: record some steps in ``output_dir/profile``.
      settle: decides what `remat: auto` leaves open.

    Raises:
      UserError: a mistake in the configuration, the model, the data or the folder.
      NonFiniteError: a loss or gradient that is not finite; the state before it is saved.
      Interrupted: a signal; the state is saved.
    """
    with contextlib.ExitStack() as stack:
        phases, interrupts = Phases(), stack.enter_context(Interrupts())
        interrupts.agree = shared_stop()
        precision = derived.matmul_precision(config)
        stack.enter_context(jax.default_matmul_precision(precision or "default"))
        agreement.check_start(config)
        quiet = quiet or not processes.is_first()
        display = Display(1, quiet=quiet)
        for note in notes(config):
            display.say(f"note: {note}")
        mirror = open_mirror(config)
        origin = resume.find_origin(config)
        shared_folder.check(config, continues=origin.continues)
        with processes.together("plan"):
            plan = make_plan(config, display.say)
        agreement.check_plan(plan)
        display.say(describe_data(plan))
        settle(plan, display.say)
        with processes.together("weights"):
            trainable, frozen = load_weights(config, plan.model)
        display.say(describe_weights(plan, trainable, frozen))
        run = Run(plan, trainable, frozen, origin, phases, interrupts)
        needed = needed_bytes(config, run.state, plan.total_steps, run.save_every)
        folder = shared_folder.claim(config, stack, continues=origin.continues, needed_bytes=needed)
        if not origin.continues:
            push_all(config, mirror)  # what cannot be written is told now
        trace = StepTrace(folder if profile else None, plan.total_steps)
        run.trace = stack.enter_context(contextlib.closing(trace))
        run.mirror = mirror
        return run.execute(folder, stack, quiet)


class Run:
    """One run: its state, its compiled steps and what it has measured.

    Args:
      plan: the checked run.
      trainable, frozen: from `load_weights`.
      origin: where it starts.
      phases: of its time.
      interrupts: what may end it.
    """

    def __init__(
        self,
        plan: Plan,
        trainable: Any,
        frozen: Any,
        origin: resume.Origin,
        phases: Phases,
        interrupts: Interrupts,
    ):
        config, model = plan.config, plan.model
        self.plan, self.origin, self.phases, self.interrupts = plan, origin, phases, interrupts
        optimizer, schedule = make_tx(config, trainable, model.specs, plan.total_steps)
        self.schedule = jax.jit(schedule)
        self.state = TrainState(
            trainable,
            init_optimizer(optimizer, trainable, model.placement),
            frozen,
            initial=split_pairs(model, trainable["adapter"]),
        )
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        like = (self.state.trainable, self.state.opt_state)
        training = make_train_step(model.transformer, model.targets, optimizer, key, like)
        self.train_step = phases.compiling(training)
        evaluating = make_eval_step(model.transformer, model.targets, trainable)
        self.eval_step = phases.compiling(evaluating)
        self.eval_every = derived.eval_every(config, plan.steps_per_epoch)
        self.save_every = derived.save_every(config, plan.steps_per_epoch)
        self.log_every = derived.logging_steps(config, plan.total_steps)
        self.watchdog = LossWatchdog(
            config.loss_watchdog_threshold, patience=config.loss_watchdog_patience
        )
        self.failed = self.stepped = False
        self.trace = StepTrace(None, plan.total_steps)
        self.mirror: Mirror | None = None
        keep_freed_blocks(model.placement.mesh.devices.flat[0].platform)
        self.last_loss = math.nan

    def execute(self, folder: Path, stack: contextlib.ExitStack, quiet: bool) -> TrainResult:
        """Restores, trains, evaluates, saves and exports."""
        plan, config = self.plan, self.plan.config
        checkpoints, keep = folder / resume.CHECKPOINTS, config.save_total_limit
        store = stack.enter_context(open_store(checkpoints, keep=keep, mirror=self.mirror))
        if self.origin.store is not None:
            self.state = resume.restore(self.origin, plan, self.state, store)
        own = self.state.step if self.origin.store is not None and self.origin.continues else None
        saver = Saver(plan, store, self.phases, self.interrupts, own)
        # Not before: a continuation that is refused leaves the folder as it was.
        records, sinks = shared_folder.open_metrics(config, folder, after=self.state.step)
        stack.callback(lambda: [sink.close() for sink in sinks])
        display = stack.enter_context(Display(plan.total_steps, first=self.state.step, quiet=quiet))
        self.phases.begin("other")
        guard = StallGuard(self.phases, config.stall_timeout, folder, lambda: store.settle(10))
        stack.enter_context(guard)
        if here := self.state.step:
            display.say(f"continuing from the checkpoint of step {here}")
            self.last_loss = record_at(records, here).get("loss", math.nan)
            # Of another run's folder: from now on this one has all it takes to continue.
            saver.save(self.state)
        evaluator = Evaluator(plan, self.eval_step, display, sinks, self._between, records)
        self.interrupts.rescue = lambda: saver.rescue(self.state)
        try:
            with self.phases("eval"):
                before = evaluator.before(self.state, record_at(records, 0))
                # An interrupt in an evaluation saves the state without its numbers.
                if self._evaluates(here) and "eval_loss" not in record_at(records, here):
                    evaluator.loss(self.state)
            with self.interrupts.held():
                while self.state.step < plan.total_steps and not (self.failed or evaluator.stale):
                    self.interrupts.check()
                    self._step(display, sinks, store, saver, evaluator)
                saver.save(self.state)
            processes.exchange("trained", True)  # they meet between this check and the next
            if evaluator.stale:
                display.say("stopped: the held-out loss falls no more (early_stopping_patience)")
            with self.phases("eval"):
                after = evaluator.everything(self.state, "after training")
            with self.phases("export"):
                result = self._result(folder, display, before, after)
                shared_folder.write_results(plan, self.state, result)
            with self.phases("save"):
                store.wait()
                push_all(config, self.mirror)
        except (KeyboardInterrupt, NonFiniteError):
            saver.stop(self.state, display)
            raise
        display.say(describe_result(plan))
        display.say(describe_time(seconds := self.phases.seconds()))
        return dataclasses.replace(result, seconds=seconds)

    def _result(
        self, folder: Path, display: Display, before: dict[str, float], after: dict[str, float]
    ) -> TrainResult:
        def scores(name: str) -> tuple[float | None, float | None]:
            return after.get(name), before.get(name)

        numbers = (self.state.step, self.last_loss, *scores("eval_loss"), *scores("exact_match"))
        return TrainResult(folder, *numbers, display.tokens_per_s, *scores("eval_accuracy"))

    def _evaluates(self, step: int) -> bool:
        """Whether there is an evaluation in the middle of the run after that step."""
        return bool(self.eval_every) and step % self.eval_every == 0 < step < self.plan.total_steps

    def _between(self) -> None:
        """Between two batches of an evaluation."""
        self.phases.beat()
        self.interrupts.check()

    def _step(
        self,
        display: Display,
        sinks: Sequence[Sink],
        store: CheckpointStore,
        saver: Saver,
        evaluator: Evaluator,
    ) -> None:
        with self.trace.step(self.state.step):
            values, tokens = self._advance(display)
        step = self.state.step
        self.failed = self.watchdog.barks(values.get("loss"))
        last = step == self.plan.total_steps or self.failed
        display.advance(tokens)
        log = step % self.log_every == 0 or last or "loss" not in values
        display.update({"loss": math.nan, "grad_norm": math.nan} | values, log=log)
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
        if self._evaluates(step) and not last:
            with self.phases("eval"):
                evaluator.loss(self.state)
        if self.save_every and step % self.save_every == 0 and not last:
            saver.save(self.state)

    def _advance(self, display: Display) -> tuple[dict[str, float], int]:
        """Does one step; returns its numbers and how many tokens it had."""
        plan, state = self.plan, self.state
        with self.phases("data"):
            rows = plan.model.placement.own_rows(plan.batches.rows)
            batch = plan.batches.batch(state.step, rows)
            tokens = int(np.count_nonzero(batch["segment_ids"]))
            if rows is not None:
                tokens = plan.batches.num_tokens(state.step)
        # The first call compiles, and then there is nothing that is not saved.
        with self.phases("step"), self.interrupts.unsaved(when=self.stepped):
            trainable, opt_state, metrics = self.train_step(
                state.trainable,
                state.opt_state,
                state.frozen,
                plan.model.placement.batch(batch),
                np.int32(state.step),
            )
            # In one go: who saves finds the state before the step, or the one after it.
            self.state = dataclasses.replace(
                state, trainable=trainable, opt_state=opt_state, step=state.step + 1
            )
            values = {name: float(value) for name, value in metrics.items()}
        self.stepped = True
        return self._judged(values, state, display), tokens

    def _judged(
        self, values: dict[str, float], before: TrainState, display: Display
    ) -> dict[str, float]:
        """Numbers of the step just done; stops a run that has left the finite numbers."""
        step, finite, config = self.state.step, is_finite(values), self.plan.config
        skipped = before.skipped.ended() if finite else before.skipped.another()
        if finite:
            self.last_loss = values["loss"]
        else:
            # The arrays are those of the step before: that is where this may stop.
            self.state = dataclasses.replace(self.state, step=before.step)
            limit, rows = config.nonfinite_limit, lambda: describe_rows(self.plan, step - 1)
            display.say(skip_or_stop(config.nonfinite, limit, skipped, step, values, rows))
            values = {"skipped": float(skipped.total)}
        self.state = dataclasses.replace(self.state, step=step, skipped=skipped)
        rate = self.schedule(max(step - 1 - skipped.total, 0))
        return values | {
            "epoch": step / self.plan.steps_per_epoch,
            "learning_rate": float(rate),
        }

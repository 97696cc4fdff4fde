"""Saves the states of a run, each of them once, and what there is of one that ends early."""

import jax

from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.training import resume
from jaxlora.training.interrupt import Interrupts
from jaxlora.training.phases import Phases
from jaxlora.training.progress import Display
from jaxlora.training.setup import Plan
from jaxlora.training.state import TrainState, saved


class Saver:
    """Writes states of one run to its store.

    Args:
      plan: the run.
      store: where to.
      phases: of its time.
      interrupts: told while the state is being copied.
      saved_step: what the store holds already, None for nothing.
    """

    def __init__(
        self,
        plan: Plan,
        store: CheckpointStore,
        phases: Phases,
        interrupts: Interrupts,
        saved_step: int | None,
    ):
        self._plan, self._store, self._phases = plan, store, phases
        self._interrupts, self._saved_step = interrupts, saved_step

    def save(self, state: TrainState) -> None:
        """Copies the state and starts writing it, unless it is there."""
        with self._phases("save"), self._interrupts.unsaved():
            self._save(state)

    def stop(self, state: TrainState, display: Display) -> None:
        """Saves what an interrupt or an error left, unless it came in the middle of a step."""
        with self._phases("save"):
            if _whole(state) and state.step:
                self._save(state)
            self._store.wait()
        step = "before the first step" if self._saved_step is None else f"step {self._saved_step}"
        display.say(f"stopped; saved: {step} (resume_from_checkpoint: true continues)")

    def rescue(self, state: TrainState) -> None:
        """The same for another thread, while the main one is inside a long call."""
        if state.step and state.step != self._saved_step:
            self._save(state)
        self._store.wait()

    def _save(self, state: TrainState) -> None:
        if state.step == self._saved_step:
            return
        labels = self._plan.labels and self._plan.labels.names
        meta = {
            "identity": resume.identity(self._plan),
            "labels": labels,
            "skipped": [state.skipped.total, state.skipped.in_a_row],
        }
        self._store.save(state.step, saved(state), meta)
        self._saved_step = state.step


def _whole(state: TrainState) -> bool:
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(saved(state)))

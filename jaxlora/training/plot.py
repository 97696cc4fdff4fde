"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOSS_PLOT = "loss.png"


def plot_losses(
    records: Sequence[dict[str, Any]], path: Path, title: str, *, unit: str = "token"
) -> None:
    """Draws training and held-out loss, and accuracy if measured, against the step into a PNG.

    Args:
      records: lines of metrics.jsonl.
      path: file to write.
      title: above the picture.
      unit: of what a loss is the mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        if points := _points(records, name):
            axes.plot(*points, style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})", title=title)
    axes.grid(alpha=0.3)
    if points := _points(records, "eval_accuracy"):
        right = axes.twinx()
        right.plot(*points, "s--", color="tab:green", label="held-out accuracy", markersize=4)
        right.set(ylabel="accuracy", ylim=(0, 1.02))
    figure.legend(loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=120)


def _points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, ...]]:
    """Steps and values of one number, empty where it was never measured."""
    found = [(line["step"], line[name]) for line in records if name in line]
    return list(zip(*found, strict=True))

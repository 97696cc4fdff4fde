"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOSS_PLOT = "loss.png"


def plot_losses(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and held-out loss against the step into a PNG.

    Args:
      records: lines of metrics.jsonl.
      path: file to write.
      title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [(line["step"], line[name]) for line in records if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)

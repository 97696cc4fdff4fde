"""Pictures: the loss curve, the lengths of the examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.data.lengths import Histogram

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
    figure, axes = _figure()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        if points := _points(records, name):
            axes.plot(*points, style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})", title=title)
    if points := _points(records, "eval_accuracy"):
        right = axes.twinx()
        right.plot(*points, "s--", color="tab:green", label="held-out accuracy", markersize=4)
        right.set(ylabel="accuracy", ylim=(0, 1.02))
    figure.legend(loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=120)


def plot_lengths(found: Histogram, path: Path, title: str) -> None:
    """Draws a histogram of the examples' lengths into a PNG.

    Args:
      found: the histogram.
      path: file to write.
      title: above the picture.

    Raises:
      UserError: the file cannot be written.
    """
    figure, axes = _figure()
    axes.stairs(found.counts, found.edges, fill=True)
    axes.set(xlabel="tokens", ylabel="examples", title=title)
    write_png(figure, path)


def blank_figure(height: float) -> Any:
    """Returns a figure 8 inches wide that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, path: Path) -> None:
    """Writes the figure of a command's --output.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}.") from error


def _figure() -> tuple[Any, Any]:
    figure = blank_figure(4.5)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, ...]]:
    """Steps and values of one number, empty where it was never measured."""
    found = [(line["step"], line[name]) for line in records if name in line]
    return list(zip(*found, strict=True))

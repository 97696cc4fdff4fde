"""A measurement as text and as a picture."""

from pathlib import Path
from typing import Any

from jaxlora.config.report import table
from jaxlora.measuring.bench import Measured
from jaxlora.planning.report import size
from jaxlora.training.plot import blank_figure, write_png


def describe(found: Measured) -> str:
    """Returns a table of two columns."""
    where = f"{found.devices} x {found.device}" if found.devices > 1 else found.device
    peak = "peak unknown for this device"
    if found.mfu is not None:
        peak = f"{found.mfu:.1%} of the data sheet's {_flops(found.peak_flops_per_s)}"
    share = f"{found.matmul_share:.1%} of the {_flops(found.matmul_flops_per_s)} of one large"
    whole = sum(found.seconds.values())
    rows = [
        ("device", f"{where}, {found.dtype}"),
        ("tokens/s", f"{found.tokens_per_s:,.0f} ({found.trained_per_s:,.0f} with a loss)"),
        (
            "step",
            f"{_time(found.step_s)} (median of {found.steps}; worst {_time(found.step_worst_s)})",
        ),
        ("arithmetic", f"{_flops(found.flops_per_s)} useful ({found.flops_per_token:.3g} a token)"),
        ("MFU", f"{peak}; {share} product here"),
        ("loading, once", _time(found.load_s)),
        ("compiling, once", _time(found.compile_s)),
        (
            "memory, planned",
            f"{size(found.memory.arguments)} arrays + {size(found.memory.temporaries)} in the step",
        ),
        ("memory, peak", size(found.memory.peak) if found.memory.peak else "unknown"),
        ("", ""),
    ]
    rows += [
        (
            f"  {name}",
            f"{_time(seconds):>10}  {seconds / whole:6.1%}  {'#' * round(40 * seconds / whole)}",
        )
        for name, seconds in found.seconds.items()
    ]
    return "\n".join(line.rstrip() for line in table(rows).splitlines())


def plot(found: Measured, path: Path, title: str) -> None:
    """Draws where the time and the memory go into a PNG.

    Raises:
      UserError: the file cannot be written.
    """
    figure = blank_figure(3.6)
    above, below = figure.subplots(2)
    milliseconds = {name: 1e3 * seconds for name, seconds in found.seconds.items()}
    _bar(above, milliseconds, "ms a step")
    mfu = f", MFU {found.mfu:.1%}" if found.mfu is not None else ""
    above.set_title(f"{title}: {found.tokens_per_s:,.0f} tokens/s{mfu} on {found.device}")
    memory = {"arrays": found.memory.arguments, "in the step": found.memory.temporaries}
    _bar(below, {name: count / 2**30 for name, count in memory.items()}, "GiB planned")
    write_png(figure, path)


def _bar(axes: Any, parts: dict[str, float], unit: str) -> None:
    """One bar cut into its parts."""
    left = 0.0
    for name, value in parts.items():
        axes.barh([0], [value], left=left, label=f"{name} ({value:.3g})")
        left += value
    axes.set(xlabel=unit, yticks=[])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False)


def _time(seconds: float) -> str:
    """
    >>> _time(0.0123), _time(12.3)
    ('12.3 ms', '12.30 s')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _flops(rate: float) -> str:
    """
    >>> _flops(2.5e12), _flops(3.1e9)
    ('2.5 TFLOP/s', '3.1 GFLOP/s')
    """
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"

"""A plan in words."""

from collections.abc import Sequence

from jaxlora.planning.estimate import Estimate
from jaxlora.planning.hardware import GIB
from jaxlora.planning.hlo import BETWEEN_SLICES
from jaxlora.planning.search import Found

_BAR = 30
_MEMORY = {
    "weights": "weights ({base})",
    "trained": "adapter or trained weights",
    "optimizer": "optimizer",
    "activations": "activations (remat {remat})",
    "gradients": "gradients",
    "workspace": "workspace",
    "batch": "batch",
    "program": "program",
    "padding": "padding of layouts",
}


def describe(made: Estimate, efficiency: float, found: Sequence[Found] = ()) -> str:
    """Returns an estimate as text.

    Args:
      made: the estimate.
      efficiency: share of the limit that is reached, for tokens a second.
      found: what a search found.
    """
    parts = [_head(made), _memory(made), _traffic(made), _time(made, efficiency)]
    if made.changes:
        parts.append(_changes(made))
    if found:
        parts.append("\n".join(["largest that fit:", *map(_found, found)]))
    return "\n\n".join(part for part in parts if part)


def size(count: float) -> str:
    """Returns bytes in the unit they are read best in.

    >>> size(3 * 2**30), size(200_000)
    ('3.00 GiB', '0.2 MiB')
    """
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def verdict(made: Estimate) -> str:
    """Returns in one line whether it fits and by how much."""
    need = f"{size(made.memory.total)} of one {made.hardware.name}"
    if not made.limit_bytes:
        return f"needs {need}"
    has = f"{size(made.limit_bytes)} that programs can have"
    if made.fits:
        return f"fits: {need}, {size(made.spare_bytes)} to spare of the {has}"
    return f"does not fit: {need}, {size(-made.spare_bytes)} more than the {has}"


def _head(made: Estimate) -> str:
    mesh = " x ".join(f"{axis} {n}" for axis, n in made.mesh.items() if n > 1) or "one device"
    how = {
        "compiled": f"the train step, compiled in {made.compile_s:.0f} s",
        "formula": "an analytic model: nothing could be compiled for it here",
    }[made.method]
    rows, times = _plural(made.rows, "row"), _plural(made.accumulation, "time")
    return (
        f"{verdict(made)}\n"
        f"{made.devices} x {made.hardware.name}, {mesh}; {made.tokens:,} tokens a step: {rows} x "
        f"{made.length:,} on each device, {times}\n"
        f"from: {how}" + (f"\n{made.remat_choice}" if made.remat_choice else "")
    )


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _memory(made: Estimate) -> str:
    lines = ["memory of one device:"]
    whole = max(made.memory.total, made.limit_bytes if made.hardware.platform != "cpu" else 0)
    for name, words in _MEMORY.items():
        count = getattr(made.memory, name)
        if count:
            bar = "#" * round(_BAR * count / whole)
            words = words.format(base=made.base, remat=made.remat)
            lines.append(f"  {words:<32}{size(count):>12}  {bar}".rstrip())
    lines.append(f"  {'total':<32}{size(made.memory.total):>12}")
    if made.listed_bytes > made.memory.total:
        lines.append(f"  {'were all temporaries there at once':<32}{size(made.listed_bytes):>10}")
    if made.host_bytes:
        lines.append(f"  {'and in the memory of the host':<32}{size(made.host_bytes):>12}")
    return "\n".join(lines)


def _traffic(made: Estimate) -> str:
    if not made.traffic:
        return ""
    lines = ["between devices, a step (what one of them receives):"]
    lines += [
        f"  {each.kind + ' ' + each.dtype:<32}{size(each.payload_bytes):>12}  "
        f"{_plural(each.times, 'time')}"
        for each in made.traffic
        if each.payload_bytes >= 1e-3 * made.traffic[0].payload_bytes or each.kind == BETWEEN_SLICES
    ]
    return "\n".join(lines)


def _time(made: Estimate, efficiency: float) -> str:
    needed, wasted = made.model_flops, made.wasted_flops
    repeated = made.executed_flops - needed - wasted
    text = f"arithmetic, a step: {needed:.3g} FLOP, and {repeated:.3g} repeated to save memory"
    if wasted:
        text += f", and {wasted:.3g} for nothing over context"
    limits = made.limits_s()
    if not limits:
        return f"{text}\ntime: unknown, for want of {made.hardware.name}'s peak figures"
    least = max(limits.values())
    each = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in limits.items())
    rate = made.tokens_per_s(efficiency)
    used = efficiency * needed / made.devices / made.hardware.flops_per_s / least
    return (
        f"{text}\ntime, a step: at least {least:.3g} s ({each})\n"
        f"at {efficiency:.0%} of that limit: {rate:,.0f} tokens/s, {rate / made.devices:,.0f} a "
        f"device (MFU {used:.0%})"
    )


def _changes(made: Estimate) -> str:
    lines = ["to make it fit, the cheapest first (savings by formula):"]
    for change in made.changes:
        saved = f"saves about {size(change.saves_bytes)}"
        enough = "; this is enough" if change.enough else ""
        lines.append(f"  {change.words}\n      {saved}; {change.price}{enough}")
    if not made.changes[-1].enough:
        lines.append("  that is not enough: plan for more devices")
    return "\n".join(lines)


def _found(each: Found) -> str:
    compiled = f"{_plural(each.compiled, 'program')} compiled"
    if not each.value:
        need = size(each.estimate.memory.total)
        return f"  {each.key}: none, the smallest needs {need} ({compiled})"
    return (
        f"  {each.key}: {each.value:,} ({size(each.estimate.memory.total)}, "
        f"{size(each.estimate.spare_bytes)} to spare; {compiled})"
    )

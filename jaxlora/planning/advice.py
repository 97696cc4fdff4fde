"""When a run does not fit: the cheapest changes, and what each saves."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxlora.config import derived
from jaxlora.config.load import load_config
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.planning import formula
from jaxlora.planning.estimate import Change, Estimate
from jaxlora.planning.hardware import Hardware
from jaxlora.planning.program import make_program

# From most speed to least memory, as in `models.transformer.REMAT_POLICIES`.
_REMAT = ("none", "matmuls", "attention", "full")


def changes(config: Config, devices: Sequence[Any], made: Estimate, platform: str) -> list[Change]:
    """Returns changes that together make room, the cheapest first; all there are if that is not
    enough.

    What a change saves is the difference of two formulas, so an estimate by the compiler and its
    changes agree in the size of what they are about.

    Args:
      config: the run that does not fit.
      devices, platform: as for `make_program`.
      made: its estimate.
    """
    found: list[Change] = []
    missing = -made.spare_bytes
    before = _total(config, devices, platform)
    for keys, price in _candidates(config, made.remat):
        together = {key: value for change in found for key, value in change.keys.items()} | keys
        after = _total(_changed(config, together), devices, platform) if before else None
        if after is None or before is None or after >= before:
            continue
        missing -= before - after
        found.append(Change(keys, price, before - after, missing <= 0))
        before = after
        if missing <= 0:
            break
    return found


def _total(config: Config | None, devices: Sequence[Any], platform: str) -> int | None:
    """Bytes of one device by formula; None for a configuration that no run would have."""
    if config is None:
        return None
    try:
        program = make_program(config, devices, platform)
    except UserError:
        return None
    nothing = Hardware("", "", 0)  # only memory is asked for
    return formula.estimate(program, topology="", hardware=nothing).memory.total


def _changed(config: Config, keys: dict[str, Any]) -> Config | None:
    values = config.model_dump(mode="json", exclude_unset=True)
    foreign = values.pop("foreign", {})
    try:
        return load_config({**values, **foreign, **keys})
    except UserError:
        return None


def _candidates(config: Config, remat: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes from the cheapest: first what costs nothing but time."""
    prices = {
        "matmuls": "about no time",
        "attention": "the step takes about a sixth longer",
        "full": "the step takes about a third longer",
    }
    for policy in _REMAT[_REMAT.index(remat) + 1 :] if remat in _REMAT else ():
        yield {"remat": policy}, prices[policy]
    rows, accumulation = config.micro_batch_size, config.gradient_accumulation_steps or 1
    while rows > 1:
        half = rows // 2
        accumulation *= rows // half
        rows = half
        keys: dict[str, Any] = {"micro_batch_size": rows}
        if config.batch_size is None:
            keys["gradient_accumulation_steps"] = accumulation
        yield keys, "the same steps in more pieces"
    stored = derived.quantization(config)
    if config.adapter is not None and (stored is None or stored.format == "int8"):
        quantized = {"adapter": "qlora", "quantization": "int4"}
        drop: dict[str, Any] = {"load_in_8bit": False} if config.load_in_8bit else {}
        yield quantized | drop, "the base in 4 bits"
    if derived.optimizer(config) == "adamw":
        yield {"optimizer": "adamw_bnb_8bit"}, "moments in 8 bits"
    if config.adapter is None and derived.optimizer(config) in ("adamw", "adamw_8bit", "muon"):
        yield {"optimizer": "adafactor"}, "another optimizer: try its learning rate"
    if remat != "offload":
        yield {"remat": "offload"}, "every layer's input crosses to the host's memory and back"
    length = config.sequence_len
    while length > 512:
        length //= 2
        yield {"sequence_len": length}, "shorter rows: longer examples are dropped or cut"
    if config.adapter is None:
        yield (
            {"adapter": "qlora", "quantization": "int4", "lora_r": 16, "lora_alpha": 32},
            "an adapter instead of every weight",
        )

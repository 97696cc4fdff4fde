"""Adapters of weights that no linear module holds: PEFT's ``target_parameters``."""

from collections.abc import Mapping, Sequence

from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.targets import Target, is_suffix, ranks_and_scales


def match_parameters(
    parameters: Mapping[str, Sequence[str]],
    config: LoraConfig,
    *,
    stacked: Sequence[str] = (),
    experts: Mapping[str, int] | None = None,
) -> dict[str, Target]:
    """Returns the target of every leaf that ``config.target_parameters`` selects in some layer.

    Args:
      parameters: ``{leaf path: parameter path of each layer}``, those of one module in the order in
        which it holds them: PEFT wraps the module once for each that it adapts, and names tensors
        by how deep they lie.
      config: the rules.
      stacked: leaf paths with a leading layer axis.
      experts: number of experts of the leaves that have an axis for them.

    Raises:
      UserError: a rule that matches nothing.

    >>> targets = match_parameters(
    ...     {"up": ["h.0.experts.up"], "down": ["h.0.experts.down"]},
    ...     LoraConfig(r=4, target_parameters=("up", "experts.down")), experts={"up": 8, "down": 8})
    >>> {path: target.nested for path, target in targets.items()}
    {'up': (1,), 'down': (0,)}
    """
    rules = config.target_parameters

    def selected(name: str) -> bool:
        return any(is_suffix(rule, name) for rule in rules)

    every = [name for names in parameters.values() for name in names]
    for rule in rules:
        if not any(is_suffix(rule, name) for name in every):
            known = sorted({".".join(name.split(".")[-2:]) for name in every})
            raise UserError(
                f"lora_target_parameters: {rule!r} matches no parameter; expected experts or a "
                f"router: {', '.join(known) or 'this model has none'}."
            )
    targets: dict[str, Target] = {}
    around: dict[str, int] = {}  # wrapped so far, by module; the last of them is the outermost
    for path, names in reversed(list(parameters.items())):
        ranks, scales = ranks_and_scales(names, config, selected)
        modules = [name.rpartition(".")[0] for name in names]
        nested = tuple(around.get(module, 0) for module in modules)
        for module, rank in zip(modules, ranks, strict=True):
            around[module] = around.get(module, 0) + bool(rank)
        if any(ranks):
            count = (experts or {}).get(path, 0)
            targets[path] = Target(
                tuple(names), ranks, scales, path in stacked, experts=count, nested=nested
            )
    return dict(reversed(list(targets.items())))

"""Which weights get an adapter: PEFT's matching rules over module paths."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.core.tree import flatten
from jaxlora.lora.config import LoraConfig

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight leaf that gets an adapter.

    A stacked leaf holds one matrix per layer; layers the rule leaves out have rank 0. All layers
    share arrays of the largest rank: the surplus columns start at zero and, having a zero partner
    on the other side, never get a gradient.

    Attributes:
      modules: module path of each layer, one path if not stacked.
      ranks: rank in each layer, 0 where the rule does not match.
      scales: what multiplies ``a @ b`` in each layer.
      stacked: whether the leaf has a leading layer axis.
      dropout: dropout probability of the low-rank path.
      dora: whether a magnitude vector is trained too.
      bias: whether B has a bias.
      experts: experts of a mixture, which are an axis of the leaf after the layers'; 0 for none.
      nested: for a weight that no linear module holds (`LoraConfig.target_parameters`): how many
        other such weights of its module were wrapped after it, in each layer; else empty.
      embedding: whether it is a table that token numbers look rows up in: A starts at zero then, B
        random, and PEFT calls them by other names.
      in_axes: leading axes (after the layer axis) of the leaf that are contracted with the input.
      vector: whether the leaf is a bias, which trains itself instead (`jaxlora.lora.biases`); ranks
        and scales are 1 where it does.
      wrapped: of a bias: whether its layer has a low-rank pair too.
    """

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stacked: bool
    dropout: float = 0.0
    dora: bool = False
    in_axes: int = 1
    bias: bool = False
    vector: bool = False
    wrapped: tuple[bool, ...] = ()
    experts: int = 0
    nested: tuple[int, ...] = ()
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Largest rank over the layers, the size of the arrays."""
        return max(self.ranks)

    def doubled(self, scales: Sequence[float]) -> "Target":
        """Returns the target of an adapter of twice the rank with these scales."""
        ranks = tuple(2 * rank for rank in self.ranks)
        return dataclasses.replace(self, ranks=ranks, scales=tuple(scales))


def match(
    modules: Mapping[str, Sequence[str]],
    config: LoraConfig,
    stacked: Iterable[str] = (),
    parameters: Iterable[str] = (),
    tables: Mapping[str, str] | None = None,
) -> dict[str, Target]:
    """Returns the target of every leaf of which `config` selects at least one layer.

    Args:
      modules: ``{leaf path: module path of each layer}`` of the weights that may be adapted.
      config: the rules.
      stacked: leaf paths with a leading layer axis.
      parameters: paths of what may be adapted besides, which patterns of ranks may mean.
      tables: ``"head"`` or ``"embedding"`` for leaf paths that are one; ``"all-linear"`` leaves
        both out, as PEFT does.

    Raises:
      UserError: a rule that matches nothing, naming the nearest module.

    >>> targets = match({"wq": ["h.0.q_proj", "h.1.q_proj"], "wo": ["h.0.o_proj", "h.1.o_proj"]},
    ...     LoraConfig(r=4, target_modules=("q_proj",)), stacked=["wq", "wo"])
    >>> {path: target.ranks for path, target in targets.items()}
    {'wq': (4, 4)}
    """
    tables = tables or {}
    if config.target_modules == ALL_LINEAR:
        modules = {path: names for path, names in modules.items() if path not in tables}
    every = [module for names in modules.values() for module in names]
    _refuse_unmatched(every, config, parameters)
    stacked = set(stacked)
    targets = {}
    for path, names in modules.items():
        ranks, scales = ranks_and_scales(names, config, lambda name: _selected(name, config))
        if not any(ranks):
            continue
        targets[path] = Target(
            tuple(names),
            ranks,
            scales,
            path in stacked,
            config.dropout,
            config.use_dora,
            bias=config.lora_bias,
            embedding=tables.get(path) == "embedding",
        )
    if not targets and not config.target_parameters:
        raise UserError("lora_target_modules: every matching module is excluded; nothing to train.")
    return targets


def ranks_and_scales(
    names: Sequence[str], config: LoraConfig, selected: Callable[[str], bool]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Returns rank and scale of each layer of a leaf, both 0 where it is not selected."""
    ranks = tuple(
        _by_pattern(config.rank_pattern, name, config.r) if selected(name) else 0 for name in names
    )
    scales = tuple(
        config.scale(rank, _by_pattern(config.alpha_pattern, name, config.alpha)) if rank else 0.0
        for name, rank in zip(names, ranks, strict=True)
    )
    return ranks, scales


def selects(config: LoraConfig, module: str) -> bool:
    """Returns whether an embedding or head of that path gets a pair, or trains whole.

    >>> selects(LoraConfig(modules_to_save=("lm_head",)), "lm_head"), selects(LoraConfig(), "wte")
    (True, False)
    """
    if any(module.endswith(name) for name in config.modules_to_save):
        return True
    return config.target_modules != ALL_LINEAR and _selected(module, config)


def targets_of_tree(
    params: Mapping[str, Any], config: LoraConfig, *, in_axes: Mapping[str, int] | None = None
) -> dict[str, Target]:
    """Returns targets in a third-party tree of nested dicts, whatever library made it.

    A leaf with two axes or more may be adapted (``"all-linear"`` takes those with exactly two that
    are not embeddings); its module path is its keys joined by dots, less a last ``kernel``,
    ``weight`` or ``embedding``.

    Args:
      params: nested dict of arrays.
      config: the rules, over those module paths.
      in_axes: for kernels that contract more than their first axis (an attention output
        projection ``[heads, head_dim, embed]`` contracts 2), how many, by module-path suffix.
    """
    modules = {}
    for path, leaf in flatten(params).items():
        *parents, last = path.split("/")
        axes = getattr(leaf, "ndim", 0)
        if last in ("bias", "scale"):  # may have several axes too, but is no matrix
            continue
        linear = axes == 2 and last != "embedding"
        if linear or (axes >= 2 and config.target_modules != ALL_LINEAR):
            named = parents if last in ("kernel", "weight", "embedding") else [*parents, last]
            modules[path] = [".".join(named)]
    targets = match(modules, config)
    for suffix, count in (in_axes or {}).items():
        paths = [path for path, t in targets.items() if is_suffix(suffix, t.modules[0])]
        if not paths:
            raise UserError(f"in_axes: {suffix!r} matches no module that is adapted.")
        for path in paths:
            targets[path] = dataclasses.replace(targets[path], in_axes=count)
    return targets


def _selected(module: str, config: LoraConfig) -> bool:
    # PEFT reads modules_to_save as suffixes where it trains them, and as expressions here.
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.modules_to_save):
        return False
    if config.exclude_modules and _matches(config.exclude_modules, module):
        return False
    rule = config.target_modules
    # As in PEFT, a module named by its whole path is taken whatever its layer.
    named = not isinstance(rule, str) and module in rule
    layers = config.layers_to_transform
    if layers and not named and _layer_number(module, config) not in layers:
        return False
    return _matches(rule, module)


def _matches(rule: tuple[str, ...] | str, module: str) -> bool:
    if rule == ALL_LINEAR:
        return True
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return any(is_suffix(suffix, module) for suffix in rule)


def is_suffix(suffix: str, module: str) -> bool:
    """Returns whether a path ends with these of its names."""
    return module == suffix or module.endswith("." + suffix)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"^(.*\.)?({pattern})$", module):
            return value
    return default


def _layer_number(module: str, config: LoraConfig) -> int | None:
    for pattern in config.layers_pattern or ("[^.]*",):
        if found := re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", module):
            return int(found[1])
    return None


def _refuse_unmatched(
    modules: Sequence[str], config: LoraConfig, parameters: Iterable[str]
) -> None:
    _refuse_unmatched_rule("lora_target_modules", config.target_modules, modules)
    if config.exclude_modules:
        _refuse_unmatched_rule("exclude_modules", config.exclude_modules, modules)
    numbers = {_layer_number(module, config) for module in modules}
    layers = sorted(number for number in numbers if number is not None)
    for layer in config.layers_to_transform:
        if layer not in layers:
            have = f"from {layers[0]} to {layers[-1]}" if layers else "none with a number"
            raise UserError(f"layers_to_transform: no layer {layer}; the model has {have}.")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name):
            paths = (*modules, *parameters)
            if not any(re.match(rf"^(.*\.)?({pattern})$", path) for path in paths):
                raise UserError(
                    f"{name}: {pattern!r} matches no module; modules: {_last_names(modules)}."
                )


def _refuse_unmatched_rule(key: str, rule: tuple[str, ...] | str, modules: Sequence[str]) -> None:
    if isinstance(rule, str):
        try:
            if any(_matches(rule, module) for module in modules):
                return
        except re.error as error:
            raise UserError(f"{key}: bad regular expression {rule!r}: {error}.") from None
        raise UserError(
            f"{key}: regular expression {rule!r} matches no module path such as "
            f"{modules[0]!r}; modules: {_last_names(modules)}."
        )
    for suffix in rule:
        if not any(is_suffix(suffix, module) for module in modules):
            names = _last_names(modules)
            raise UserError(
                f"{key}: {suffix!r} matches no module."
                f"{did_you_mean(suffix.rpartition('.')[2], names.split(', '))} Modules: {names}."
            )


def _last_names(modules: Sequence[str]) -> str:
    return ", ".join(sorted({module.rpartition(".")[2] for module in modules}))

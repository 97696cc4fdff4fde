"""What a LoRA adapter is, in PEFT's words."""

import dataclasses
from collections.abc import Mapping

from jaxlora.core.errors import UserError
from jaxlora.lora.initializers import changes_base, check_init


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The options of an adapter; names and meaning are PEFT's ``LoraConfig``.

    Attributes:
      r: rank, >= 1.
      alpha: scale numerator; the update is ``alpha / r * B A`` (``alpha / sqrt(r)`` with rsLoRA).
      dropout: probability in [0, 1) of dropping an input of the low-rank path while training.
      target_modules: suffixes of module paths, or one regular expression for whole paths, or
        ``"all-linear"``.
      target_parameters: suffixes of the paths of weights that no linear module holds: experts, such
        as ``experts.down_proj``, and their router, ``gate.weight``.
      exclude_modules: the same rules as for modules, for what to leave out.
      layers_to_transform: layer numbers; empty means all.
      layers_pattern: what comes before the layer number in a module path, such as ``layers``;
        empty means anything.
      rank_pattern, alpha_pattern: r or alpha by module-path pattern, first match wins.
      modules_to_save: modules that train with all their numbers, by the end of their path.
      trainable_token_indices: tokens whose rows of the embedding train, or by module name.
      use_rslora: rank-stabilised scale (Kalajdzievski 2023).
      use_dora: weight-decomposed LoRA (Liu et al. 2024).
      lora_bias: whether B has a bias, zero at first; PEFT uses it for adapters that are extracted
        from fully trained weights.
      train_bias: which biases of the base train too, PEFT's ``bias``: none, lora_only or all.
      init: how A and B start, PEFT's ``init_lora_weights``; see `jaxlora.lora.initializers`.
      loftq_iter: rounds of quantizing and decomposing of ``init="loftq"``.
      task_type: PEFT's name of what the model is for; None for masked-language modelling, which has
        none there.

    Raises:
      UserError: a value out of range.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    train_bias: str = "none"
    init: bool | str = True
    loftq_iter: int = 1
    task_type: str | None = "CAUSAL_LM"

    def __post_init__(self):
        for r in (self.r, *self.rank_pattern.values()):
            if r < 1:
                raise UserError(f"lora_r: {r} is not a rank; expected 1 or more.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora_dropout: {self.dropout} is out of range; expected 0 <= p < 1.")
        self._check_parameters()
        check_init(self.init, [self.r, *self.rank_pattern.values()])
        if self.lora_bias and (self.use_dora or not isinstance(self.init, bool)):
            other = "DoRA" if self.use_dora else f"init {self.init}"
            raise UserError(f"peft_lora_bias: true does not go with {other}; remove one of them.")
        if self.train_bias not in ("none", "lora_only", "all"):
            raise UserError(
                f"peft_bias: {self.train_bias!r} is unknown; expected none, lora_only or all."
            )
        if self.train_bias != "none" and changes_base(self.init):
            raise UserError(
                f"peft_bias: {self.train_bias} does not go with init {self.init}; remove one."
            )

    def _check_parameters(self) -> None:
        """PEFT's limits of adapters on experts."""
        unfit = {
            "lora_dropout": self.dropout > 0,
            "peft_use_dora": self.use_dora,
            "peft_lora_bias": self.lora_bias,
            "peft_bias": self.train_bias != "none",
            "peft_init_lora_weights": self.init not in (True, False, "gaussian"),
        }
        for key, present in unfit.items():
            if self.target_parameters and present:
                raise UserError(
                    f"{key}: does not go with lora_target_parameters, as in PEFT; remove it."
                )

    def scale(self, rank: int, alpha: float) -> float:
        """Returns what multiplies ``B A``.

        >>> LoraConfig().scale(16, 32), LoraConfig(use_rslora=True).scale(16, 32)
        (2.0, 8.0)
        """
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    def alpha_of(self, scale: float, rank: int) -> float:
        """Returns the alpha that a scale was made from: dividing back would round."""
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if self.scale(rank, alpha) == scale:
                return alpha
        raise ValueError(f"scale {scale} at rank {rank} does not come from {self}")

    def doubled(self, longer: float) -> "LoraConfig":
        """Returns the options of an adapter of twice the rank and `longer` times the alpha.

        >>> LoraConfig(r=4, alpha=8, rank_pattern={"q_proj": 2}, init="pissa").doubled(2).r
        8
        """
        return dataclasses.replace(
            self,
            r=2 * self.r,
            alpha=longer * self.alpha,
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: longer * alpha for name, alpha in self.alpha_pattern.items()},
            init=True,
        )

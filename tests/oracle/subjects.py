"""What the columns of the family matrix share: one model with its adapter, everything made once."""

import copy
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.load import QuantSpec, load_params
from jaxlora.checkpoints.peft import load_adapter, save_adapter
from jaxlora.checkpoints.save import save_model
from jaxlora.lora import LoraConfig, apply
from jaxlora.models.families import FAMILIES
from jaxlora.models.parameters import describe
from jaxlora.models.targets import targets_of_specs
from jaxlora.models.transformer import Transformer, bind, empty_cache
from jaxlora.ops.loss import chunked_cross_entropy

RANK, ALPHA = 4, 8
# Tokens read at once before the rest are read one by one; beyond 16, the shortest original context
# among the cases, where scalings of rotary positions switch.
PREFIX = 19
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 29))


class Subject:
    """One case of `family_cases`, as a torch module with PEFT's adapter and as ours.

    Args:
      pair: from ``make_case(case, folder=folder)``.
      folder: holds the model as transformers saved it; adapters and merged models go beside it.
    """

    def __init__(self, pair: Any, folder: Path):
        self.pair, self.cfg, self.params, self.folder = pair, pair.cfg, pair.params, folder
        self.specs = describe(pair.cfg)

    @functools.cached_property
    def peft(self) -> Any:
        """PEFT's model with an adapter on all linear modules, every value random."""
        import peft
        import torch

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        model = peft.get_peft_model(copy.deepcopy(self.pair.torch_model), config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """``(adapter, targets)``: PEFT's own file, read by us."""
        return self._read_from_peft(self.peft, "peft-adapter")

    def _read_from_peft(self, model: Any, name: str) -> tuple[Any, Any]:
        folder = self.folder.parent / name
        model.save_pretrained(folder)
        return load_adapter(folder, self.specs)[:2]

    @property
    def our_config(self) -> LoraConfig:
        # PEFT's wrapper of that task wants a model that can generate.
        task = "CAUSAL_LM" if self.cfg.causal else None
        # PEFT takes fused experts for linear too: it writes them down as parameters, with a rank
        # and an alpha of their own where two matrices are fused, and leaves out dense MLPs beside
        # them (`test_linear_layers_beside_experts_go_to_peft` has those).
        theirs = self.peft.peft_config["default"]
        fused = bool(theirs.target_parameters)
        return LoraConfig(
            r=RANK,
            alpha=ALPHA,
            target_modules=tuple(sorted(theirs.target_modules)) if fused else "all-linear",
            target_parameters=tuple(sorted(theirs.target_parameters or ())),
            rank_pattern=dict(theirs.rank_pattern or {}),
            alpha_pattern=dict(theirs.alpha_pattern or {}),
            task_type=task,
        )

    @property
    def our_targets(self) -> Any:
        """The targets that our own rules find."""
        return targets_of_specs(self.specs, self.our_config)

    def exported(self) -> Path:
        """Returns the folder of the adapter as we write it."""
        folder, (adapter, _) = self.folder.parent / "our-adapter", self.loaded
        targets = self.our_targets
        save_adapter(
            folder,
            adapter,
            targets,
            self.our_config,
            base_name=str(self.folder),
            specs=self.specs,
        )
        return folder

    def saved(self, params: Any, name: str) -> Path:
        """Returns the folder of a whole model with these leaves, made plain."""
        folder = self.folder.parent / name
        save_model(params, self.cfg, folder, source_folder=self.folder)
        return folder

    @functools.cached_property
    def merged(self) -> Path:
        """The folder of the model with the adapter merged."""
        return self.saved(apply(self.params, *self.loaded), "merged")

    @functools.cached_property
    def quantized(self) -> Any:
        """``quantized(format) -> (leaves, the same as plain leaves, folder of the plain ones)``."""

        @functools.cache
        def load(format: str) -> tuple[Any, Any, Path]:
            spec = QuantSpec(format)
            leaves = load_params(self.folder, self.cfg, dtype="float32", quantization=spec)
            folder = self.saved(leaves, format)
            return leaves, load_params(folder, self.cfg, dtype="float32"), folder

        return load

    def load_in_transformers(self, folder: Path) -> Any:
        """Returns transformers' model of a folder, which must hold its tensors and no others.

        Those that the family's row leaves out knowingly may be missing: they have no effect.
        """
        model, loading = type(self.pair.torch_model).from_pretrained(
            folder,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        unused = FAMILIES[self.cfg.family].buffers
        missing = [name for name in loading.pop("missing_keys") if not name.endswith(unused)]
        assert not missing
        assert not any(loading.values()), loading
        return model.eval().float()

    @functools.cached_property
    def evaluate(self) -> Any:
        """``evaluate(adapter, params) -> ((mean loss, logits), gradient)`` at `TOKENS`."""
        targets, transformer = self.loaded[1], Transformer(self.cfg)
        tokens = jnp.asarray(TOKENS)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        weights, wanted = jnp.ones(tokens.shape), tokens
        if self.cfg.causal:
            weights, wanted = weights.at[:, -1].set(0.0), jnp.roll(tokens, -1, axis=1)

        def loss(adapter, params):
            model = bind(transformer, apply(params, adapter, targets))
            hidden, _ = model(tokens, positions, jnp.ones_like(tokens))
            total = chunked_cross_entropy(
                model.logits, hidden, wanted, weights, chunk_tokens=tokens.size
            )
            return total / weights.sum(), model.logits(hidden)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def logits(self, params: Any, *, adapted: bool = True) -> np.ndarray:
        """Returns our logits, with the adapter or with a zero one."""
        adapter = self.loaded[0]
        if not adapted:
            adapter = jax.tree.map(jnp.zeros_like, adapter)
        return np.asarray(self.evaluate(adapter, params)[0][1])

    def cached_logits(self) -> np.ndarray:
        """Returns our logits at the tokens after `PREFIX`, each read on its own."""
        rows, length = TOKENS.shape
        positions = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
        transformer = Transformer(self.cfg)

        @jax.jit
        def read(params):
            model = bind(transformer, params)
            tokens, cache = jnp.asarray(TOKENS), empty_cache(self.cfg, rows, length, "float32")
            ones = jnp.ones_like(tokens)
            start = slice(None), slice(PREFIX)
            _, cache = model(tokens[start], positions[start], ones[start], cache)

            def one(cache, column):
                hidden, cache = model(*(each[:, None] for each in column), cache)
                return cache, model.logits(hidden[:, 0])

            rest = tuple(each[:, PREFIX:].T for each in (tokens, positions, ones))
            return jax.lax.scan(one, cache, rest)[1]

        return np.asarray(read(self.params)).swapaxes(0, 1)

    def peft_gradient(self) -> tuple[float, Any]:
        """Returns PEFT's ``(mean loss, gradient as an adapter of ours)``."""
        import torch

        model = copy.deepcopy(self.peft)
        logits, tokens = model(torch.tensor(TOKENS)).logits, torch.tensor(TOKENS)
        if self.cfg.causal:
            logits, tokens = logits[:, :-1], tokens[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        with torch.no_grad():  # written and read as if it were the adapter
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.grad)
        return loss.item(), self._read_from_peft(model, "peft-gradient")[0]


def torch_logits(model: Any) -> np.ndarray:
    """Returns a torch model's logits at `TOKENS`, computed in float64.

    In float32 its own rounding would take up to the whole tolerance.
    """
    import torch

    with torch.no_grad():
        return copy.deepcopy(model).double()(torch.tensor(TOKENS)).logits.numpy()

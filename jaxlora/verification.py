"""`verify`: does PEFT, on a CPU, compute from the exported adapter what jaxlora computes?"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.adapter import read_adapter
from jaxlora.checkpoints.adapter_files import open_adapter
from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.fitted import load_base
from jaxlora.checkpoints.gguf_files import gguf_file
from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.checkpoints.load import read_model_config, storage_of
from jaxlora.checkpoints.peft_config import CONFIG_FILE
from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.errors import UserError
from jaxlora.generation.model import locate
from jaxlora.generation.probe import probe_logits, probe_tokens
from jaxlora.models.config import ModelConfig
from jaxlora.models.task import task_of
from jaxlora.ops.arrays import CODED

TOLERANCE = 1e-4  # float32 on both sides; a few layers of summation order


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the comparison found.

    Attributes:
      max_difference: largest absolute logit difference to PEFT, both in float32.
      logit_std: standard deviation of PEFT's logits, to read the difference against.
      adapter_effect: largest absolute logit change the adapter makes, so that an adapter that does
        nothing is seen.
      missing, extra: adapter tensors that PEFT wants and the file lacks, and the reverse.
    """

    max_difference: float
    logit_std: float
    adapter_effect: float
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether PEFT loads every tensor and gives the same logits."""
        close = self.max_difference <= TOLERANCE * max(1.0, self.logit_std)
        return close and not self.missing and not self.extra


def verify(
    model: str | Path, adapter: str | Path | None = None, *, revision: str | None = None
) -> Verdict:
    """Loads an exported adapter with PEFT and compares keys and logits.

    Args:
      model: folder or hub id of the base, or of an adapter that names its base.
      adapter: PEFT adapter folder or hub id.
      revision: branch, tag or commit of a hub base.

    Raises:
      UserError: torch or peft are not installed; anything missing or damaged.
    """
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"verify: {error.name} is missing; pip install torch peft (jaxlora's extra: verify)."
        ) from None
    base, folder = locate(model, adapter, revision)
    if folder is None:
        raise UserError(f"{model}: is no adapter; give one with --adapter.")
    if gguf_file(base) is not None:
        raise UserError(
            f"{base}: PEFT cannot be compared on a GGUF file; give the original model's folder and "
            "--adapter."
        )
    layout = open_adapter(folder).made_by
    if layout != "PEFT":
        raise UserError(
            f"{folder}: is in {layout}'s layout, which PEFT does not read; write it in PEFT's with "
            "jaxlora export first."
        )
    storage = storage_of(base)
    if storage is not None and storage.format not in CODED:
        raise UserError(
            f"{base}: is quantized ({storage.name}), and PEFT has no exact arithmetic for such "
            "weights on a CPU to compare with; verify needs a plain base, or one in nf4 or fp4."
        )
    stored, _ = read_model_config(base)
    made = read_adapter(folder, stored, fingerprint=base_fingerprint(base))
    params = load_base(base, stored, made.cfg, dtype=jnp.float32, trained=made.parts)
    plain = probe_logits(made.cfg, params)
    adapted = probe_logits(made.cfg, made.on(params))
    reference, missing, extra = _peft_logits(base, folder, made.cfg)
    return Verdict(
        float(np.abs(adapted - reference).max()),
        float(reference.std()),
        float(np.abs(adapted - plain).max()),
        missing,
        extra,
    )


def _peft_logits(
    base: Path, folder: Path, cfg: ModelConfig
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model_state_dict
    from peft import PeftModel as Peft

    hf: Any = getattr(transformers, task_of(cfg).auto_class).from_pretrained(
        base,
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        **({"num_labels": cfg.num_labels} if cfg.num_labels else {}),
    )
    if hf.get_input_embeddings().weight.shape[0] != cfg.vocab_size:  # the adapter has the new rows
        hf.resize_token_embeddings(cfg.vocab_size, mean_resizing=False)
    if cfg.num_labels and cfg.pooling == "last":
        hf.config.pad_token_id = None  # or a probe that ends with it would be shorter
    known = LoraConfig().to_dict().keys()
    written = read_json_object(folder / CONFIG_FILE, "expected an adapter folder")
    config = LoraConfig(**{key: value for key, value in written.items() if key in known})
    model = Peft.from_pretrained(hf, str(folder), config=config, torch_device="cpu").eval()
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # PEFT may add the untouched tables below adapters; it loads as well without.
    tables = set(get_peft_model_state_dict(model, save_embedding_layers=True)) - wanted
    stored = set(TensorFiles(folder, "adapter_model").info)
    with torch.no_grad():
        rows = torch.from_numpy(probe_tokens(cfg)).split(1)  # without a padding token, one by one
        logits = torch.cat([model(row).logits for row in rows]).numpy()
    return logits, tuple(sorted(wanted - stored)), tuple(sorted(stored - wanted - tables))

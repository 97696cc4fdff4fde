"""`merge`: base + adapter as one model that anything reading Hugging Face folders can load."""

from pathlib import Path

import jax.numpy as jnp

from jaxlora import lora
from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.load import QuantSpec, load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter
from jaxlora.checkpoints.save import save_model
from jaxlora.checkpoints.tensors import FLOAT_DTYPES, TensorFiles
from jaxlora.core.errors import UserError
from jaxlora.generation.model import locate
from jaxlora.models.parameters import describe


def merge(
    model: str | Path,
    adapter: str | Path | None,
    output: str | Path,
    *,
    revision: str | None = None,
    quantization: QuantSpec | None = None,
    dtype: str | None = None,
) -> Path:
    """Writes ``base + scale * B A`` in Hugging Face's layout and returns the folder.

    Sums are taken in float32, one tensor at a time, and rounded once to `dtype`.

    Args:
      model: folder or hub id of the base, or of an adapter that names its base.
      adapter: PEFT adapter folder or hub id.
      output: new folder.
      revision: branch, tag or commit of a hub base.
      quantization: add the adapter to the base as QLoRA saw it (quantized and back); None adds it
        to the base as it is.
      dtype: of the files; default the base's own.

    Raises:
      UserError: anything missing, damaged or unfitting; an output folder that holds a model.
    """
    base, folder = locate(model, adapter, revision)
    if folder is None:
        raise UserError(f"{model}: is no adapter; give one with --adapter.")
    cfg, _ = read_model_config(base)
    specs = describe(cfg)
    arrays, targets, _ = load_adapter(folder, specs, fingerprint=base_fingerprint(base))
    own = _stored_dtype(base)
    params = load_params(
        base, cfg, dtype=jnp.dtype(own), quantization=quantization, place=lambda path, leaf: leaf
    )
    save_model(
        lora.apply(params, arrays, targets),
        cfg,
        Path(output),
        source_folder=base,
        dtype=jnp.dtype(dtype or own),
    )
    return Path(output)


def _stored_dtype(base: Path) -> str:
    first = next(iter(TensorFiles(base).info.values()))
    return jnp.dtype(FLOAT_DTYPES[first.dtype]).name

"""An adapter folder, whoever made it, as options and tensors in PEFT's terms."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlora.checkpoints import mlx, torchtune
from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.checkpoints.peft_config import CONFIG_FILE, read_config
from jaxlora.checkpoints.single_experts import has_single_experts, open_single_experts
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig
from jaxlora.models.parameters import ParamSpec

_STEM = "adapter_model"
# Older torchtune numbers its adapters by epoch.
_NUMBERED = re.compile(r"adapter_\d+")


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What is in an adapter folder.

    Attributes:
      made_by: ``PEFT``, ``MLX`` or ``torchtune``: whose layout it is.
      config: its options.
      tensors: by PEFT's names, in PEFT's layout.
      content: of its adapter_config.json.
      file: name of the weights file, for messages.
    """

    made_by: str
    config: LoraConfig
    tensors: Tensors
    content: Mapping[str, Any]
    file: Path

    @property
    def base_name(self) -> str | None:
        """Folder or hub id of the base model, if the adapter tells."""
        return base_name(self.content)


def base_name(content: Mapping[str, Any]) -> str | None:
    """Returns the base model that an adapter_config.json names; mlx-lm calls it `model`."""
    key = "model" if mlx.is_mlx(content) else "base_model_name_or_path"
    return content.get(key)


def open_adapter(
    folder: Path,
    *,
    specs: Mapping[str, ParamSpec] | None = None,
    head_dim: int | None = None,
) -> AdapterFiles:
    """Opens an adapter made by PEFT, mlx-lm or torchtune; reads headers only.

    Args:
      folder: holds adapter_config.json and the weights.
      specs: `describe` of the base model; None to look only at what the folder says.
      head_dim: size of the base model's attention heads, to read torchtune's values.

    Raises:
      UserError: a missing or damaged file, a pickle, no LoRA, a feature jaxlora does not have.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    content = read_json_object(path, "expected an adapter folder of PEFT, mlx-lm or torchtune")
    if mlx.is_mlx(content):
        with _blaming(path):
            config, view = mlx.open_mlx(folder, content)
            if specs is not None:
                mlx.check_layers(content, config.target_modules, _modules(specs))
        return AdapterFiles("MLX", config, view, content, folder / f"{mlx.STEM}.safetensors")
    stem = _stem(folder)
    files = TensorFiles(folder, stem)
    file = folder / f"{stem}.safetensors"
    if not torchtune.is_torchtune(files.info):
        config, tensors = read_config(path), files
        if has_single_experts(files.info):
            with _blaming(path):
                config, tensors = open_single_experts(files, config)
        return AdapterFiles("PEFT", config, tensors, content, file)
    with _blaming(path):
        if specs is not None:
            torchtune.check_model(specs)
        config, view = torchtune.open_torchtune(files, content, head_dim)
    return AdapterFiles("torchtune", config, view, content, file)


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Says which file's content could not be used."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing; copy the adapter again.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a field has a value of the wrong kind ({error}).") from error


def _modules(specs: Mapping[str, ParamSpec]) -> list[str]:
    return [module for spec in specs.values() for module in spec.modules()]


def _stem(folder: Path) -> str:
    """The weights file's name less its ending: `adapter_model`, or the latest of the numbered."""
    if any((folder / f"{_STEM}.safetensors{end}").is_file() for end in ("", ".index.json")):
        return _STEM
    numbered = [p.stem for p in folder.glob("*.safetensors") if _NUMBERED.fullmatch(p.stem)]
    if numbered:
        return max(numbered, key=lambda stem: int(stem.rpartition("_")[2]))
    pickled = sorted(p.name for p in folder.glob("adapter_*.pt"))
    if pickled:
        name = pickled[-1]
        raise UserError(
            f"{folder / name}: is a pickle, and jaxlora never unpickles files; convert it once: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'adapter_0.safetensors'), or train with torchtune's safe_serialization: True."
        )
    return _STEM

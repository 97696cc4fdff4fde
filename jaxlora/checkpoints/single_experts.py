"""PEFT's adapters with a pair for every expert, as transformers 4 had experts, seen as of now.

There each expert was three linear modules (``experts.3.gate_proj``; Mixtral's ``w1``, ``w3`` and
``w2``). Now a layer's experts are two parameters, ``experts.gate_up_proj`` and
``experts.down_proj``, and the pairs of gate and up are one of twice the rank: A is both, one below
the other, B has them as blocks on its diagonal. PEFT on transformers 5 reads such files so too.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlora.checkpoints.peft_tensors import PREFIX
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.tensors import TensorInfo
from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig

_EXPERT = re.compile(
    r"(?P<holder>.+\.experts)\.(?P<expert>\d+)\.(?P<name>\w+)\.(?P<part>lora_[AB])"
)
_ROLES = {
    **{"w1": "gate", "w3": "up", "w2": "down"},
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
}
# What is adapted of a layer's experts, and the parameter that it is now.
_WHOLE = {("down",): "down_proj", ("gate", "up"): "gate_up_proj"}
_OLD_HOLDER, _HOLDER = ".block_sparse_moe.", ".mlp."


def has_single_experts(info: Mapping[str, TensorInfo]) -> bool:
    """Whether an adapter has a pair for every expert by itself."""
    return any(_EXPERT.match(key) for key in info)


def open_single_experts(files: Tensors, config: LoraConfig) -> tuple[LoraConfig, Tensors]:
    """Returns the adapter's options and its tensors as PEFT would name them now.

    Args:
      files: the adapter's.
      config: its options, of which the rules are replaced by what is in the file.

    Raises:
      UserError: an expert without a pair, gate without up, ranks that differ.
    """
    view = StackedExperts(files, config.r)
    if config.alpha_pattern:
        raise UserError(
            "alpha_pattern: with a pair for every expert, as transformers 4 made them, it is not "
            "read; load the adapter with PEFT on transformers 5 and save it again."
        )
    modules = {key.partition(".lora_")[0].removeprefix(PREFIX) for key in view.others}
    gates = {module for module in modules if f"{module}.".endswith(".mlp.gate.")}
    longer = 2**0.5 if config.use_rslora else 2
    fused = [name for name in view.parameters if name.endswith("gate_up_proj")]
    return (
        dataclasses.replace(
            config,
            dropout=0.0,  # PEFT has none for parameters
            target_modules=tuple(sorted(modules - gates)),
            target_parameters=tuple(sorted({*view.parameters, *(f"{g}.weight" for g in gates)})),
            exclude_modules=(),
            layers_to_transform=(),
            rank_pattern=dict.fromkeys(fused, 2 * config.r),
            alpha_pattern=dict.fromkeys(fused, longer * config.alpha),
        ),
        view,
    )


class StackedExperts:
    """The tensors of such an adapter, the pairs of a layer's experts as one.

    Attributes:
      folder, info, metadata: as of `jaxlora.checkpoints.tensors.TensorFiles`.
      parameters: module paths of the parameters that the experts' pairs are for.
      others: names of the remaining tensors.

    Raises:
      UserError: as `open_single_experts`.
    """

    def __init__(self, files: Tensors, rank: int):
        self.folder: Path = files.folder
        self.metadata = files.metadata
        self.info: dict[str, TensorInfo] = {}
        self.parameters: list[str] = []
        self.others: list[str] = []
        self._files = files
        self._plain: dict[str, str] = {}
        # By name: the experts' tensors, gate's beside up's.
        self._stacks: dict[str, list[tuple[str, ...]]] = {}
        for holder, roles in self._holders(rank).items():
            self._stack(holder, roles)

    def _holders(self, rank: int) -> dict[str, dict[str, dict[int, str]]]:
        """``{holder: {role: {expert: module}}}``; the other tensors keep their names."""
        found: dict[str, dict[str, dict[int, str]]] = {}
        for key, info in self._files.info.items():
            match = _EXPERT.match(key)
            if match is None:
                name = key.replace(_OLD_HOLDER, _HOLDER)
                self.info[name], self._plain[name] = info, key
                self.others.append(name)
                continue
            role = _ROLES.get(match["name"])
            given = info.shape[0 if match["part"] == "lora_A" else -1]
            if role is None or given != rank:
                raise UserError(
                    f"{info.file}: {key} of shape {list(info.shape)} is no part of an expert's "
                    f"adapter of rank {rank}; expected {', '.join(_ROLES)}, all of that rank."
                )
            experts = found.setdefault(match["holder"], {}).setdefault(role, {})
            experts[int(match["expert"])] = key.partition(".lora_")[0]
        return found

    def _stack(self, holder: str, roles: Mapping[str, Mapping[int, str]]) -> None:
        present = [key for key in _WHOLE if set(key) & roles.keys()]
        count = 1 + max(max(experts) for experts in roles.values())
        for key in present:
            for role in key:
                missing = sorted(set(range(count)) - roles.get(role, {}).keys())
                if missing:
                    raise UserError(
                        f"{self.folder}: {holder}.{missing[0]} has no adapter of its {role} "
                        f"matrix; expected one for each of the {count} experts."
                    )
        new = holder.replace(_OLD_HOLDER, _HOLDER)
        # PEFT wraps the module that holds both once for each, down_proj last.
        for depth, key in enumerate(present):
            self.parameters.append(f"{new}.{_WHOLE[key]}".removeprefix(PREFIX))
            modules = [tuple(roles[role][expert] for role in key) for expert in range(count)]
            for part in ("lora_A", "lora_B"):
                name = f"{new}{'.base_layer' * depth}.{part}.weight"
                self._stacks[name] = [
                    tuple(f"{module}.{part}.weight" for module in each) for each in modules
                ]
                self.info[name] = self._info(name, part == "lora_A")

    def _info(self, name: str, is_a: bool) -> TensorInfo:
        first, count = self._stacks[name][0], len(self._stacks[name])
        infos = [self._files.info[key] for key in first]
        rows, columns = (sum(info.shape[axis] for info in infos) for axis in (0, 1))
        shape = (rows * count, infos[0].shape[1]) if is_a else (rows, columns * count)
        return dataclasses.replace(infos[0], shape=shape)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a tensor, or only `rows` of its first axis."""
        if name in self._plain:
            return self._files.read(self._plain[name], rows)
        each = [[self._files.read(key) for key in keys] for keys in self._stacks[name]]
        if ".lora_A." in name:  # expert by expert
            values = np.concatenate([matrix for pair in each for matrix in pair])
        else:  # rank by rank, and within it expert by expert
            blocks = np.stack([_block_diagonal(pair) for pair in each], axis=-1)
            values = blocks.reshape(len(blocks), -1)
        return values if rows is None else values[rows]


def _block_diagonal(matrices: list[np.ndarray]) -> np.ndarray:
    rows, columns = (sum(matrix.shape[axis] for matrix in matrices) for axis in (0, 1))
    whole = np.zeros((rows, columns), matrices[0].dtype)
    row = column = 0
    for matrix in matrices:
        whole[row : row + matrix.shape[0], column : column + matrix.shape[1]] = matrix
        row, column = row + matrix.shape[0], column + matrix.shape[1]
    return whole

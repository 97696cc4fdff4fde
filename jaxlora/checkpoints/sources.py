"""Which tensors of a model folder make up each parameter, found and checked by the headers."""

from collections.abc import Collection, Mapping

import numpy as np

from jaxlora.checkpoints.storage import Shape, Storage
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.tensors import FLOAT_DTYPES
from jaxlora.core.errors import UserError
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import FAMILIES
from jaxlora.models.parameters import ParamSpec, head_tensor

# Where in a leaf each group of tensors goes; see `ParamSpec.sources`.
Sources = dict[tuple[int, ...], tuple[str, ...]]
# The kinds of parameter that may be quantized in the files.
_QUANTIZED = ("linear", "experts", "head")
_COMPARED_ROWS = 4096


def find_sources(
    files: Tensors,
    specs: Mapping[str, ParamSpec],
    cfg: ModelConfig,
    storage: Storage | None = None,
    optional: Collection[str] = (),
) -> dict[str, Sources]:
    """Compares names, shapes and dtypes with the model before anything is read.

    Args:
      files: the headers.
      specs: `describe(cfg)`.
      cfg: the model the files should hold.
      storage: how quantized weights lie in the files, None where there are none.
      optional: paths of leaves that the files may lack.

    Returns:
      where every leaf comes from: as its spec says, but for a tied head and a left-out prefix;
      nothing for the optional ones that are not there.

    Raises:
      UserError: missing, leftover or misshapen tensors, tied ones that differ.
    """
    sources = {path: spec.sources() for path, spec in specs.items()}
    head, tied = head_tensor(cfg), []
    prefix = FAMILIES[cfg.family].prefix
    if not any(name.startswith(prefix) for name in files.info):
        sources = {path: _without(prefix, each) for path, each in sources.items()}
    for ending, older in FAMILIES[cfg.family].older:
        sources = {path: _renamed(files, each, ending, older) for path, each in sources.items()}
    for path in optional:
        if not _is_there(files, sources[path], storage):
            del sources[path]
    if cfg.tie_embedding and head in files.info:
        tied = [head]
        _settle_tied_head(files, sources, head)
    plain: dict[str, tuple[int, ...]] = {}
    stored: dict[str, list[str]] = {}  # the tensors of each quantized weight
    for path, each in sources.items():
        for name in (name for names in each.values() for name in names):
            if storage is not None and storage.holds(name, files.info):
                shape = _matrix_shape(specs[path], name, files, storage)
                stored[name] = list(storage.tensors(name, shape, files.info).values())
            else:
                plain[name] = specs[path].tensor_shape
    _check_missing(files, list(plain), head)
    _check_shapes(files, plain)
    known = {*plain, *tied, *(part for parts in stored.values() for part in parts)}
    inert, beyond = FAMILIES[cfg.family].buffers, _beyond(specs, cfg)
    _check_leftover(
        files,
        known | {name for name in files.info if name.endswith(inert) or name.startswith(beyond)},
        stored,
    )
    return sources


def _is_there(files: Tensors, sources: Sources, storage: Storage | None) -> bool:
    return any(
        name in files.info or (storage is not None and storage.holds(name, files.info))
        for names in sources.values()
        for name in names
    )


def _matrix_shape(spec: ParamSpec, name: str, files: Tensors, storage: Storage) -> Shape:
    shape = spec.matrix_shape
    if spec.kind not in _QUANTIZED or len(shape) != storage.axes:
        file = files.info[storage.marker_of(name)].file
        raise UserError(
            f"{file}: {name} is quantized ({storage.name}), which is not supported "
            f"for this parameter ({spec.kind} of {len(shape)} axes); use the unquantized model."
        )
    return shape


def _beyond(specs: Mapping[str, ParamSpec], cfg: ModelConfig) -> tuple[str, ...]:
    """What the names of tensors in `ModelConfig.extra_layers` begin with."""
    layers = range(cfg.num_layers, cfg.num_layers + cfg.extra_layers)
    stacked = (spec.hf_names[0] for spec in specs.values() if spec.layers is not None)
    starts = {name.partition("{layer}")[0] for name in stacked}
    return tuple(f"{start}{number}." for start in starts for number in layers)


def _check_leftover(files: Tensors, known: set[str], stored: Mapping[str, list[str]]) -> None:
    # The first GPTQ tools wrote a bias for every layer they had quantized, of zeros.
    biases = {f"{name.removesuffix('.weight')}.bias" for name in stored}
    leftover = [
        name
        for name in files.info
        if name not in known and not (name in biases and not files.read(name).any())
    ]
    if leftover:
        raise UserError(
            f"{files.info[leftover[0]].file}: {_listed(leftover)} has no place in the model that "
            "config.json describes; use the config.json that belongs to these weights."
        )


def _without(prefix: str, sources: Sources) -> Sources:
    return {at: tuple(name.removeprefix(prefix) for name in names) for at, names in sources.items()}


def _renamed(files: Tensors, sources: Sources, ending: str, older: str) -> Sources:
    """`sources` with the older names of tensors that the files have under those only."""

    def found(name: str) -> str:
        old = name.removesuffix(ending) + older
        return (
            old if name.endswith(ending) and name not in files.info and old in files.info else name
        )

    return {at: tuple(map(found, names)) for at, names in sources.items()}


def _check_missing(files: Tensors, expected: list[str], head: str) -> None:
    missing = [name for name in expected if name not in files.info]
    if missing:
        hint = "" if missing != [head] else " (tie_word_embeddings: true, if it shares them)"
        raise UserError(
            f"{files.folder}: config.json asks for {_listed(missing)}, which no safetensors file "
            f"there holds; use the config.json that belongs to these weights{hint}."
        )


def _check_shapes(files: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        info = files.info[name]
        if info.shape != shape:
            raise UserError(
                f"{info.file}: {name} has shape {list(info.shape)}; expected {list(shape)} by "
                "config.json; use the config.json that belongs to these weights."
            )
        if info.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{info.file}: {name} has dtype {info.dtype}; expected {', '.join(FLOAT_DTYPES)}; "
                "use the repository of the unquantized model."
            )


def _settle_tied_head(files: Tensors, sources: dict[str, Sources], head: str) -> None:
    """A tied model may be stored as the embedding, as the head, or as both, which must agree."""
    ((embedding,),) = sources["embed/embedding"].values()
    if embedding not in files.info:
        sources["embed/embedding"] = {(): (head,)}
        return
    first, second = files.info[head], files.info[embedding]
    same = first.shape == second.shape and all(
        np.array_equal(files.read(head, rows), files.read(embedding, rows))
        for rows in (
            slice(start, start + _COMPARED_ROWS)
            for start in range(0, first.shape[0], _COMPARED_ROWS)
        )
    )
    if not same:
        raise UserError(
            f"{first.file}: {head} differs from {embedding}, though config.json ties them; set "
            "tie_word_embeddings: false there."
        )


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more tensors" if len(names) > most else ""
    return ", ".join(names[:most]) + more

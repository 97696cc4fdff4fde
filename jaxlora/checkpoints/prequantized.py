"""What ``quantization_config`` in a config.json says of a repository's weights."""

from collections.abc import Mapping
from typing import Any

from jaxlora.checkpoints import bitsandbytes_files, mxfp4_files, packed_files
from jaxlora.checkpoints.storage import Storage
from jaxlora.core.errors import UserError

# Fields of config.json that say how weights are quantized.
STORAGE_KEYS = ("quantization_config", "compression_config")
_WHERE = "config.json: quantization_config"


def read_storage(raw: Mapping[str, Any]) -> Storage | None:
    """Returns how the weights of a model are quantized, None if they are not.

    Args:
      raw: content of config.json.

    Raises:
      UserError: a method, or a setting of one, that is not supported; named.

    >>> read_storage({"quantization_config": {"quant_method": "awq", "bits": 4}}).name
    'AWQ 4-bit, group size 128'
    """
    given = next((raw[key] for key in STORAGE_KEYS if raw.get(key)), None)
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"{_WHERE}: expected an object, got {given!r}.")
    method = str(given.get("quant_method", "bitsandbytes" if _is_bitsandbytes(given) else None))
    if method not in _METHODS:
        raise UserError(
            f"{_WHERE}: quant_method {method} is not supported; supported: "
            f"{', '.join(_METHODS)}; give the unquantized model and set load_in_4bit: true."
        )
    try:
        return _METHODS[method](given)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{_WHERE}: a field of {method} has a value of the wrong kind ({error})."
        ) from error


def _is_bitsandbytes(given: Mapping[str, Any]) -> bool:
    # The first repositories were saved before quant_method was written.
    return "load_in_4bit" in given or "load_in_8bit" in given


def _bitsandbytes(given: Mapping[str, Any]) -> Storage:
    if given.get("load_in_8bit") or given.get("_load_in_8bit"):
        return bitsandbytes_files.LLM_INT8
    # What transformers assumes where the file is silent.
    return bitsandbytes_files.four_bit(
        _one_of(given, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4", "bitsandbytes")
    )


def _gptq(given: Mapping[str, Any]) -> Storage:
    bits = _one_of(given, "bits", (4, 8), None, "gptq")
    kind = "marlin" if given.get("is_marlin_format") else given.get("checkpoint_format", "gptq")
    kind = _one_of(
        {"checkpoint_format": kind}, "checkpoint_format", ("gptq", "gptq_v2"), "", "gptq"
    )
    return packed_files.gptq(
        bits,
        int(given.get("group_size", -1)),
        desc_act=bool(given.get("desc_act", False)),
        zero_offset=1 if kind == "gptq" else 0,
    )


def _awq(given: Mapping[str, Any]) -> Storage:
    _one_of(given, "bits", (4,), 4, "awq")
    version = str(given.get("version", "gemm")).lower()
    _one_of({"version": version}, "version", ("gemm",), "gemm", "awq")
    return packed_files.awq(int(given.get("group_size", given.get("q_group_size", 128))))


def _compressed_tensors(given: Mapping[str, Any]) -> Storage:
    method = "compressed-tensors"
    _one_of(given, "format", ("pack-quantized",), "", method)
    groups = list(given["config_groups"].values())
    weights = groups[0]["weights"]
    if any(group["weights"] != weights or group.get("input_activations") for group in groups):
        raise UserError(
            f"{_WHERE}: config_groups of unlike weights, or with quantized activations, are not "
            "supported; give the unquantized model and set load_in_4bit: true."
        )
    _one_of(weights, "type", ("int",), "int", method)
    strategy = _one_of(weights, "strategy", ("group", "channel"), "group", method)
    return packed_files.compressed_tensors(
        _one_of(weights, "num_bits", (4, 8), None, method),
        int(weights["group_size"]) if strategy == "group" else -1,
        symmetric=bool(weights.get("symmetric", True)),
        ordered=weights.get("actorder") in ("group", True),
    )


def _one_of(
    given: Mapping[str, Any], key: str, supported: tuple[Any, ...], default: Any, method: str
) -> Any:
    value = given.get(key, default)
    if value not in supported:
        raise UserError(
            f"{_WHERE}: {method} with {key} {value} is not supported; supported: "
            f"{', '.join(map(str, supported))}; give the unquantized model and set "
            "load_in_4bit: true."
        )
    return value


_METHODS = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": lambda given: mxfp4_files.MXFP4,
}

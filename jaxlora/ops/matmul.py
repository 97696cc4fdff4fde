"""`matmul` and `embed`: the two words through which a model touches its weights.

They dispatch on the leaf (plain, `QuantizedArray`, `LoraArray`), so a model is written once and
full fine-tuning, LoRA, DoRA and QLoRA are the same forward pass over different leaves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Float, Int

from jaxlora.core.errors import UserError
from jaxlora.ops.arrays import LoraArray, PatchedArray, QuantizedArray, Weight
from jaxlora.ops.dots import contract, matrix_product
from jaxlora.ops.quantize import dequantize, gather, multiplies, multiply


def matmul(
    x: Float[Array, "*batch I"], weight: Weight, *, out_dtype: DType | None = None
) -> Float[Array, "*batch O"]:
    """Returns ``x @ weight`` for any weight leaf, in the dtype of `x` unless `out_dtype` says else.

    Gradients reach `x` and, for a `LoraArray`, `a`, `b` and `magnitude`; a quantized matrix and
    the base of a LoRA pair are frozen.
    """
    y: Any
    if isinstance(weight, LoraArray):
        y = _lora_matmul(x, weight)
    elif isinstance(weight, QuantizedArray):
        if out_dtype is not None and _scales_of_outputs(weight):
            y = _coded_matmul(x, weight, _HEAD)
        else:
            y = _quantized_matmul(x, weight)
    elif isinstance(weight, PatchedArray):
        y = matmul(x, weight.base, out_dtype=out_dtype)
        return y.at[..., weight.index].set(matmul(x, weight.patch, out_dtype=out_dtype))
    else:
        return matrix_product(x, weight.astype(x.dtype), jnp.dtype(out_dtype or x.dtype))
    return y if out_dtype is None else y.astype(out_dtype)


def embed(tokens: Int[Array, "B T"], table: Weight) -> Float[Array, "B T D"]:
    """Returns the rows of a ``[vocab, embed]`` table; ids are range-checked on the host.

    A LoRA pair or a patch of rows is looked up as the table is: its sum with it is never formed.
    Of a table in int8 only the rows taken are dequantized.
    """
    if isinstance(table, PatchedArray):
        index = jnp.asarray(table.index)
        slot = jnp.searchsorted(index, tokens).clip(max=len(index) - 1)
        patched = (index[slot] == tokens)[..., None]
        return jnp.where(patched, table.patch[slot], embed(tokens, table.base))
    if isinstance(table, QuantizedArray) and _scales_of_rows(table):
        leaf: Any = table
        rows = leaf.values[tokens].astype(jnp.float32) * leaf.scales[tokens]
        return rows.astype(leaf.dtype)
    if not isinstance(table, LoraArray):
        return materialize(table)[tokens]
    rows = embed(tokens, table.base)
    # No dropout: it drops inputs, and those of a table are token numbers.
    rows = rows + table.scale * jnp.matmul(table.a[tokens], table.b)
    if table.magnitude is None:
        return rows
    return rows * _dora_gain(table, _merged(table, materialize(table.base)))


def unembed(x: Float[Array, "*batch D"], table: Weight) -> Float[Array, "*batch V"]:
    """Returns float32 logits against a tied ``[vocab, embed]`` table."""
    if isinstance(table, PatchedArray):
        logits = unembed(x, table.base)
        return logits.at[..., table.index].set(unembed(x, table.patch))
    if isinstance(table, QuantizedArray) and _scales_of_rows(table):
        return _coded_matmul(x, table, _TABLE)
    table = materialize(table).astype(x.dtype)
    if x.dtype == jnp.float32:
        return jnp.einsum("...D,VD->...V", x, table)
    return matrix_product(x, table.T, jnp.dtype(jnp.float32))


def materialize(weight: Weight, dtype: DType | None = None) -> Float[Array, "*lead I O"]:
    """Returns the matrix a leaf stands for: dequantized, patched, LoRA added (in float32)."""
    if isinstance(weight, QuantizedArray):
        return dequantize(weight, dtype)
    if isinstance(weight, PatchedArray):
        base = weight.base.astype(dtype or weight.base.dtype)
        at = (slice(None),) * (weight.axis % base.ndim) + (weight.index,)
        return base.at[at].set(weight.patch.astype(base.dtype))
    if not isinstance(weight, LoraArray):
        return weight if dtype is None else weight.astype(dtype)
    if weight.bias is not None:
        raise UserError(
            "lora_bias: the layer has no bias of its own to add it to; such an adapter cannot be "
            "merged, only loaded beside its base."
        )
    base = materialize(weight.base)
    merged = _merged(weight, base)
    if weight.magnitude is not None:
        merged = merged * _dora_gain(weight, merged)[..., None, :]
    return merged.astype(dtype or base.dtype)


def _merged(weight: LoraArray, base: Float[Array, "*lead I O"]) -> Float[Array, "*lead I O"]:
    low_rank = jnp.matmul(weight.a, weight.b, precision="highest")
    return base.astype(jnp.float32) + weight.scale[..., None, None] * low_rank


def _dora_gain(weight: LoraArray, merged: Float[Array, "*lead I O"]) -> Float[Array, "*lead O"]:
    assert weight.magnitude is not None
    # The norm is a constant for the gradient (DoRA paper, section 4.3).
    norm = jnp.linalg.norm(jax.lax.stop_gradient(merged), axis=-2)
    # A layer that the rules leave out has scale 0: it must not train a magnitude either. A column
    # of zeros has no direction yet: the gain 1 lets B give it one, where PEFT divides 0 by 0.
    alone = (weight.scale[..., None] == 0) | (norm == 0)
    return jnp.where(alone, 1.0, weight.magnitude / jnp.where(alone, 1.0, norm))


@jax.custom_vjp
def _quantized_matmul(x, weight):
    if multiplies(x, weight):
        return multiply(x, weight)
    return contract("...I,IO->...O", x, dequantize(weight, x.dtype))


def _quantized_forward(x, weight):
    # The packed matrix is the only residual: autodiff would keep the dequantized one alive from
    # forward to backward, and a "4-bit" model would hold all its weights in 16 bits at the peak.
    return _quantized_matmul(x, weight), weight


def _quantized_backward(weight, dy):
    if multiplies(dy, weight):
        return multiply(dy, weight, turned=True), None
    return contract("...O,IO->...I", dy, dequantize(weight, dy.dtype)), None


_quantized_matmul.defvjp(_quantized_forward, _quantized_backward)


# The products of `_coded_matmul`, forward and for the gradient, by how the weight lies.
_HEAD = ("...D,DV->...V", "...V,DV->...D")
_TABLE = ("...D,VD->...V", "...V,VD->...D")


def _scales_of_outputs(weight: QuantizedArray) -> bool:
    """Whether a product can be scaled after it is taken: int8, one scale for each column."""
    leaf: Any = weight
    plain = leaf.format == "int8" and leaf.zeros is None and leaf.groups is None
    return plain and leaf.scales.shape == (1, leaf.shape[-1])


def _scales_of_rows(table: QuantizedArray) -> bool:
    leaf: Any = table
    return leaf.format == "int8" and leaf.scales.shape == (leaf.shape[0], 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _coded_matmul(x, weight, products):
    # Codes are numbers of bfloat16 too, so the product is that of the float32 numbers they stand
    # for, and no dequantized matrix is formed where the compiler can widen codes as it reads them.
    leaf: Any = gather(weight)
    codes = leaf.values.astype(x.dtype)
    y = jnp.einsum(products[0], x, codes, preferred_element_type=jnp.float32)
    return y * leaf.scales.reshape(-1)


def _coded_forward(x, weight, products):
    return _coded_matmul(x, weight, products), (weight, jnp.zeros((), x.dtype))


def _coded_backward(products, residuals, dy):
    weight, like = residuals
    leaf: Any = gather(weight)
    dy = (dy * leaf.scales.reshape(-1)).astype(like.dtype)
    return jnp.einsum(products[1], dy, leaf.values.astype(like.dtype)), None


_coded_matmul.defvjp(_coded_forward, _coded_backward)


def _lora_matmul(x, w: LoraArray):
    bias = None if w.bias is None else (w.scale * w.bias).astype(x.dtype)
    if w.key is None and isinstance(w.base, QuantizedArray) and _together(x, w):
        y: Any = _joint_matmul(x, w.base, w.a, w.b, w.scale, w.gathered)
        y = y if bias is None else y + bias
        return y if w.magnitude is None else _gain(w, x.dtype) * y
    base = matmul(x, w.base)
    dropped = x if w.key is None else _dropout(x, w.key, w.dropout)
    low_rank: Any = _low_rank_matmul(dropped, w.a, w.b, w.scale, w.gathered)
    low_rank = low_rank if bias is None else low_rank + bias
    if w.magnitude is None:
        return base + low_rank
    gain = _gain(w, x.dtype)
    if w.key is None:
        return gain * (base + low_rank)
    # With dropout PEFT drops the input of the rescaled base too; so do we, to train the same model.
    return base + (gain - 1) * matmul(dropped, w.base) + gain * low_rank


def _gain(w: LoraArray, dtype):
    return _dora_gain(w, _merged(w, materialize(w.base))).astype(dtype)


def _dropout(x, key, rate):
    keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _low_rank_matmul(x, a, b, scale, gathered):
    return _low_rank_forward(x, a, b, scale, gathered)[0]


def _pinned(a: jax.Array, b: jax.Array, gathered: Any) -> tuple[jax.Array, jax.Array]:
    if gathered is None:
        return a, b
    for_a, for_b = gathered
    constrain = jax.lax.with_sharding_constraint
    return constrain(a, for_a), constrain(b, for_b)


def _low_rank_forward(x, a, b, scale, gathered):
    h, out = _narrow(x, a, b, scale, gathered)
    return contract("...R,RO->...O", h, out), (x, h, a, b, scale)


def _narrow(x, a, b, scale, gathered):
    # The scale goes to the narrow sides, so that a device can add the product up with the base's.
    wide, out = _pinned(a.astype(x.dtype), b.astype(x.dtype), gathered)
    return contract("...I,IR->...R", x, wide) * scale.astype(x.dtype), out


def _low_rank_backward(gathered, residuals, dy):
    dh, wide, da, db = _pair_gradients(gathered, residuals, dy)
    return contract("...R,IR->...I", dh, wide), da, db, None


def _pair_gradients(gathered, residuals, dy):
    # Contractions over tokens: autodiff's (dy^T h)^T makes XLA transpose the large dy instead
    # (1.5 to 1.7 times slower steps on a CPU, equal losses).
    x, h, a, b, scale = residuals
    wide, out = _pinned(a.astype(dy.dtype), b.astype(dy.dtype), gathered)
    dh = contract("...O,RO->...R", dy, out) * scale.astype(dy.dtype)
    db = jnp.einsum("...R,...O->RO", h, dy, preferred_element_type=jnp.float32)
    da = jnp.einsum("...R,...I->RI", dh, x, preferred_element_type=jnp.float32)
    # XLA would fold the transposition into the product; that form is slower on a CPU, which for
    # 16-bit factors has no kernel for it at all.
    da = jax.lax.optimization_barrier(da).T
    da, db = _pinned(da, db, gathered)
    return dh, wide, da.astype(a.dtype), db.astype(b.dtype)


_low_rank_matmul.defvjp(_low_rank_forward, _low_rank_backward)


def _together(x, w: LoraArray) -> bool:
    """Whether base and pair are multiplied in one sum: by a TPU kernel, else XLA does as well."""
    return w.a.ndim == 2 and multiplies(x, w.base, w.a.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _joint_matmul(x, weight, a, b, scale, gathered):
    return _joint_forward(x, weight, a, b, scale, gathered)[0]


def _joint_forward(x, weight, a, b, scale, gathered):
    pair = _narrow(x, a, b, scale, gathered)
    return multiply(x, weight, pair), (weight, (x, pair[0], a, b, scale))


def _joint_backward(gathered, residuals, dy):
    weight, of_pair = residuals
    dh, wide, da, db = _pair_gradients(gathered, of_pair, dy)
    return multiply(dy, weight, (dh, wide), turned=True), None, da, db, None


_joint_matmul.defvjp(_joint_forward, _joint_backward)

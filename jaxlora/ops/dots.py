"""Products that are summed in float32 and rounded once, by the form that each platform has."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float

# A dot whose 16-bit result XLA's CPU compiler takes for a float32 product: it converts both
# matrices first (of a stack of frozen weights the whole stack, before the loop over layers). With
# a float32 result the factors stay as they are, twice as fast where the processor has AVX512_BF16.
# Every other platform rounds as it writes, and is given the plain dot.
_narrow_dot = Primitive("narrow_dot")


def contract(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``einsum(equation, x, y)`` in the dtype that both have. It has no gradient: it is for
    functions that have one of their own.

    >>> contract("ij,jk->ik", jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
    [[3.0], [3.0]]
    """
    if x.dtype.itemsize != 2:
        return jnp.einsum(equation, x, y)
    return _narrow_dot.bind(x, y, equation=equation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matrix_product(
    x: Float[Array, "*batch I"], weight: Float[Array, "I O"], out_dtype: Any
) -> Float[Array, "*batch O"]:
    """Returns ``x @ weight`` of two arrays of one dtype, in `out_dtype`: theirs or float32.

    The gradient of a wider result is rounded as the hidden states are: autodiff would multiply it
    in float32, with a copy of the weight as large.
    """
    equation = "...I,IO->...O"
    if out_dtype == x.dtype:
        return contract(equation, x, weight)
    return jnp.einsum(equation, x, weight, preferred_element_type=out_dtype)


def _forward(x, weight, out_dtype):
    # Only what a gradient will ask for: a frozen weight needs no input, and no product of its size.
    kept = x.value if weight.perturbed else None, weight.value if x.perturbed else None
    return matrix_product(x.value, weight.value, out_dtype), kept


def _backward(out_dtype, residuals, dy):
    x, weight = residuals
    dtype = (weight if x is None else x).dtype
    dy = dy.astype(dtype)
    dx = None if weight is None else contract("...O,IO->...I", dy, weight)
    if x is None:
        return dx, None
    dw = jnp.einsum("...I,...O->IO", x, dy, preferred_element_type=jnp.float32)
    return dx, dw.astype(dtype)


matrix_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _plain(x, y, *, equation):
    return jnp.einsum(equation, x, y)


def _widened(x, y, *, equation):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def _shape(x, y, *, equation):
    found = jax.eval_shape(functools.partial(_plain, equation=equation), x, y)
    return ShapedArray(found.shape, found.dtype)


def _batched(operands, axes, *, equation):
    plain = functools.partial(_plain, equation=equation)
    return jax.vmap(plain, in_axes=tuple(axes))(*operands), 0


_narrow_dot.def_impl(jax.jit(_plain, static_argnames="equation"))
_narrow_dot.def_abstract_eval(_shape)
mlir.register_lowering(_narrow_dot, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(
    _narrow_dot, mlir.lower_fun(_widened, multiple_results=False), platform="cpu"
)
batching.primitive_batchers[_narrow_dot] = _batched

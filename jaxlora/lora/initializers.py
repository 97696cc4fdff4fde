"""How A and B start: at random beside an untouched base, or as a part split off the base.

PEFT's names for ``init_lora_weights``:

- ``True``: A Kaiming uniform (a = sqrt 5), B zero (LoRA, Hu et al. 2021); ``"gaussian"``: A normal
  with standard deviation 1 / r, B zero; ``False``: both uniform, so the model starts perturbed;
  ``"orthogonal"``: neither is zero, their product is;
- ``"pissa"``, ``"pissa_niter_N"``: the r largest singular triplets of the weight train, the rest is
  frozen (PiSSA, Meng et al. 2024); with N, by N rounds of a randomized SVD, in seconds;
- ``"olora"``: the first r columns of its QR decomposition (OLoRA, Buyukakyuz 2024);
- ``"loftq"``: the r largest singular triplets of what quantization loses (LoftQ, Li et al. 2023).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.ops.matmul import materialize

Pair = tuple[Float[Array, "*lead I R"], Float[Array, "*lead R O"]]
HostPair = tuple[Float[np.ndarray, "I R"], Float[np.ndarray, "R O"]]
Store = Callable[[np.ndarray], Any]

# Columns beyond the rank that a randomized SVD works with (Halko et al. 2009, section 4.2).
_OVERSAMPLING = 8


def check_init(init: bool | str, ranks: Sequence[int]) -> None:
    """Refuses a name that is none, and ranks that it cannot have.

    Raises:
      UserError: with the names there are.
    """
    known = [*_RANDOM, *_SPLITTING, "pissa_niter_N"]
    if init not in known[:-1] and not re.fullmatch(r"pissa_niter_\d+", str(init)):
        names = ", ".join(str(name).lower() for name in known)
        raise UserError(
            f"peft_init_lora_weights: {init!r} is unknown; expected {names}."
            f"{did_you_mean(str(init), [name for name in known if isinstance(name, str)])}"
        )
    if init == "orthogonal" and any(rank % 2 for rank in ranks):
        raise UserError("peft_init_lora_weights: orthogonal needs even ranks; change lora_r.")


def changes_base(init: bool | str) -> bool:
    """Returns whether `init` takes something away from the base weights.

    >>> changes_base("pissa_niter_4"), changes_base("gaussian")
    (True, False)
    """
    return _method(init) in _SPLITTING


def _method(init: bool | str) -> bool | str:
    return "pissa" if str(init).startswith("pissa") else init


def random_pair(
    init: bool | str,
    key: jax.Array,
    in_dim: int,
    out_dim: int,
    ranks: Sequence[int],
    lead: tuple[int, ...],
) -> Pair:
    """Returns A and B of one leaf; columns beyond a layer's own rank are zero.

    Args:
      init: one that leaves the base alone.
      key: typed PRNG key.
      in_dim, out_dim: sizes of each layer's matrix.
      ranks: rank of each layer, the largest being that of the arrays.
      lead: leading axes, of layers and experts.
    """
    rank = np.array(ranks).reshape((len(ranks),) + (1,) * (len(lead) + 1) if lead else (1, 1))
    a, b = _RANDOM[init](key, (*lead, in_dim, max(ranks)), (*lead, max(ranks), out_dim), rank)
    if min(ranks) == max(ranks):
        return a, b
    used = np.arange(max(ranks))
    return jnp.where(used < rank, a, 0.0), jnp.where(used[:, None] < rank, b, 0.0)


def table_pair(init: bool | str, key: jax.Array, rows: int, out_dim: int, rank: int) -> Pair:
    """Returns A and B of an embedding, as in PEFT: A zero and B normal, both normal with False.

    Args:
      init: any; but for False it makes no difference.
      key: typed PRNG key.
      rows, out_dim: sizes of the table.
      rank: columns of A.
    """
    key_a, key_b = jax.random.split(key)
    a = jax.random.normal(key_a, (rows, rank), jnp.float32)
    return a * (init is False), jax.random.normal(key_b, (rank, out_dim), jnp.float32)


def _kaiming(key, a_shape, b_shape, rank):
    bound = a_shape[-2] ** -0.5
    a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
    return a, jnp.zeros(b_shape, jnp.float32)


def _gaussian(key, a_shape, b_shape, rank):
    a = jax.random.normal(key, a_shape, jnp.float32) / np.maximum(rank, 1)
    return a, jnp.zeros(b_shape, jnp.float32)


def _both_uniform(key, a_shape, b_shape, rank):
    a, _ = _kaiming(key, a_shape, b_shape, rank)
    b = jax.random.uniform(jax.random.fold_in(key, 1), b_shape, jnp.float32, -1.0, 1.0)
    return a, b / np.sqrt(np.maximum(rank, 1))


def _orthogonal(key, a_shape, b_shape, rank):
    """Rows of one orthogonal matrix, even ones for A and odd ones for B, so that A B = 0."""
    *_, in_dim, largest = a_shape
    a, b = [], []
    for layer, r in enumerate(rank.ravel()):
        keys = jax.random.split(jax.random.fold_in(key, layer), 3)
        q = jnp.linalg.qr(jax.random.normal(keys[0], (r, r)))[0]
        pad = (0, largest - r)
        left = jax.random.normal(keys[1], (in_dim, r // 2)) @ q[0::2] / 10
        right = q[1::2].T @ jax.random.normal(keys[2], (r // 2, b_shape[-1])) / 10
        a.append(jnp.pad(left, ((0, 0), pad)))
        b.append(jnp.pad(right, (pad, (0, 0))))
    return jnp.stack(a).reshape(a_shape), jnp.stack(b).reshape(b_shape)


_RANDOM: dict[bool | str, Callable[..., Pair]] = {
    True: _kaiming,
    False: _both_uniform,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}


def split(
    init: str,
    matrix: Float[np.ndarray, "I O"],
    rank: int,
    scale: float,
    store: Store,
    key: jax.Array,
    *,
    loftq_iter: int = 1,
) -> tuple[Any, HostPair]:
    """Returns what the base keeps of a weight, stored, and A and B: their sum is the weight.

    Computed on the host in float32. Ranks beyond the smaller side of the matrix stay zero.

    Args:
      init: one that changes the base.
      matrix: the weight as loaded.
      rank: columns of A.
      scale: what multiplies A B.
      store: makes the leaf of a matrix: quantizes it, or nothing.
      key: for the randomized SVD.
      loftq_iter: rounds of LoftQ.

    Raises:
      UserError: a weight that is not finite.
    """
    weight = np.asarray(matrix, np.float32)
    try:
        return _SPLITTING[_method(init)](init, weight, rank, scale, store, key, loftq_iter)
    except np.linalg.LinAlgError:
        raise UserError(
            f"peft_init_lora_weights: {init}: a weight has NaN or infinity; mend the model."
        ) from None


def _pissa(init, weight, rank, scale, store, key, loftq_iter):
    rounds = None if init == "pissa" else int(init.rpartition("_")[2])
    a, b = _principal(weight, rank, scale, rounds, key)
    return store(weight - scale * (a @ b)), (a, b)


def _olora(init, weight, rank, scale, store, key, loftq_iter):
    # PEFT decomposes [out, in]: B is orthonormal.
    q, r = np.linalg.qr(weight.T)
    a, b = r[:rank].T, q[:, :rank].T
    return store(weight - scale * (a @ b)), (a, b)


def _loftq(init, weight, rank, scale, store, key, loftq_iter):
    kept = weight
    for _ in range(loftq_iter):
        leaf = store(kept)
        lost = weight - np.asarray(materialize(leaf, jnp.float32))
        a, b = _principal(lost, rank, scale, None, key)
        kept = weight - scale * (a @ b)
    return leaf, (a, b)


_SPLITTING: dict[bool | str, Callable[..., tuple[Any, HostPair]]] = {
    "pissa": _pissa,
    "olora": _olora,
    "loftq": _loftq,
}


def _principal(
    weight: np.ndarray, rank: int, scale: float, rounds: int | None, key: jax.Array
) -> HostPair:
    """A and B with ``scale * A B`` the best approximation of rank `rank`, equally long."""
    if rounds is None:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
    else:
        basis = _basis(weight, rank, rounds, key)
        u, s, v = np.linalg.svd(basis.T @ weight, full_matrices=False)
        u = basis @ u
    root = np.sqrt(s[:rank] / np.float32(scale))
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _basis(weight: np.ndarray, rank: int, rounds: int, key: jax.Array) -> np.ndarray:
    """Orthonormal columns that nearly span its largest singular vectors (Halko et al., 4.4)."""
    columns = min(rank + _OVERSAMPLING, *weight.shape)
    noise = np.asarray(jax.random.normal(key, (weight.shape[1], columns), jnp.float32))
    basis = np.linalg.qr(weight @ noise)[0]
    for _ in range(rounds):
        basis = np.linalg.qr(weight.T @ basis)[0]
        basis = np.linalg.qr(weight @ basis)[0]
    return basis

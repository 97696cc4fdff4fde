"""Where arrays live: parameters, adapters and batches on the devices of a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlora.core import axes
from jaxlora.ops import dequantize_tpu, integer, nf4, product_tpu
from jaxlora.ops.arrays import CODED, DoubleQuantized, QuantizedArray
from jaxlora.ops.layout import partition, ways
from jaxlora.parallel import processes
from jaxlora.parallel.arrays import place


def undivided(mesh: Mesh, logical: Sequence[str], shape: Sequence[int]) -> list[str]:
    """Returns a note for every dimension that the rules would split but that does not divide."""
    notes = []
    for name, size in zip(logical, shape, strict=True):
        parts = ways(mesh, name)
        if parts > 1 and size % parts:
            notes.append(f"{name} of {size} does not divide by {parts} devices: kept whole")
    return notes


class Placement:
    """Puts parameters, adapters and batches on a mesh.

    Args:
      mesh: the device mesh.
      put: puts an array where a sharding says; a planner gives one that only notes it.
    """

    def __init__(self, mesh: Mesh, put: Callable[[Any, NamedSharding], Any] | None = None):
        self.mesh = mesh
        self._to = put or place

    @functools.cached_property
    def chip(self) -> str:
        """The kind of its devices."""
        return self.mesh.devices.flat[0].device_kind

    def sharding(self, logical: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """Returns the sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, partition(self.mesh, logical, shape))

    def constrain(self, x: jax.Array, logical: Sequence[str | None]) -> jax.Array:
        """Pins an activation's sharding inside jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(logical, x.shape))

    def weight(self, leaf: Any, logical: Sequence[str | None], *, stacked: bool) -> Any:
        """Returns a parameter leaf on the devices, quantized leaves with their gather pinned.

        Args:
          leaf: plain or quantized, host or device arrays.
          logical: logical axis names of one layer's parameter.
          stacked: whether a layer axis comes first; it is never split.
        """
        lead = (None,) if stacked else ()
        if not isinstance(leaf, QuantizedArray):
            return self._put(leaf, (*lead, *logical))
        kernel = self.kernel_for(leaf, logical, self.chip)
        # The compiler cannot split the kernel of a product as it splits the product.
        product = bool(kernel) and self.mesh.size == 1 and product_tpu.earns(self.chip)
        # Coded formats keep bitsandbytes' [out, in] order; scales and values split alike.
        coded = leaf.format in CODED
        stored = (*logical[:-2], logical[-1], logical[-2]) if coded else tuple(logical)
        # A group whose inputs lie anywhere is needed wherever any of the inputs is.
        per_group = stored if leaf.groups is None else (*stored[:-2], None, stored[-1])

        def put(part: Any, layout: tuple[str | None, ...]) -> Any:
            whole = (None,) * part.ndim
            return self._put(part, (*lead, *layout) if part.ndim == ndim else whole)

        ndim = leaf.values.ndim
        values = self._int4(leaf, (*lead, *stored)) if leaf.packed else put(leaf.values, stored)
        scales, zeros = jax.tree.map(lambda x: put(x, per_group), (leaf.scales, leaf.zeros))
        # Whole everywhere, small as they are: split, they would split the scales taken by them.
        groups = jax.tree.map(lambda x: self._put(x, (None,) * x.ndim), leaf.groups)
        gathered = None
        if kernel and coded:
            values = self._by_input(values, (*lead, *logical))
        if self.mesh.size > 1 and kernel and coded:
            gathered = (
                self._gathered(logical, values.shape[len(lead) :]),
                self._gathered(stored, _block_scales(scales).shape[len(lead) :]),
            )
        elif self.mesh.size > 1:
            # Codes are unpacked as one flat row of blocks, so their inner axis cannot stay split
            # over `tensor`: it is gathered in bytes, or XLA gathers the unpacked float32 numbers.
            kept = (*stored[:-1], None) if coded else stored
            gathered = tuple(
                self._gathered(layout, part.shape[len(lead) :])
                for layout, part in (
                    (kept, values),
                    (kept if leaf.groups is None else per_group, _block_scales(scales)),
                )
            )
        put_there = (values, scales, leaf.format, leaf.dtype, gathered, zeros, groups)
        return QuantizedArray(*put_there, kernel=kernel, product=product)

    def kernel_for(self, leaf: QuantizedArray, logical: Sequence[str | None], chip: str) -> str:
        """Returns what dequantizes a leaf on a kind of device, see `QuantizedArray.kernel`."""
        groups = dequantize_tpu.groups_of(leaf)
        if groups is None or len(logical) > 2:  # three axes: experts
            return ""
        if not dequantize_tpu.earns(leaf.format, chip):
            return ""
        # On a mesh each device unpacks its part of the values by its part of the scales.
        shapes = leaf.shape[-2:], (groups, leaf.shape[-1])
        splits = {partition(self.mesh, logical, shape, without="fsdp") for shape in shapes}
        return "tpu" if len(splits) == 1 else ""

    def _by_input(self, codes: Any, layout: Sequence[str | None]) -> Any:
        """Codes in the order and the type that a kernel reads; the host has no such type."""
        shaped = jax.eval_shape(nf4.by_input, codes)
        sharding = self.sharding(layout, shaped.shape)
        if isinstance(codes, jax.ShapeDtypeStruct):
            return self._to(shaped, sharding)
        return jax.jit(nf4.by_input, out_shardings=sharding)(codes)

    def _int4(self, leaf: QuantizedArray, layout: Sequence[str | None]) -> jax.Array:
        """Packed values on the devices as their own int4; the host never holds a byte for each."""
        packed = self._put(leaf.values, layout)
        sharding = self.sharding(layout, leaf.shape)
        return jax.jit(integer.unpack, out_shardings=sharding)(packed)

    def _gathered(self, stored: Sequence[str | None], shape: Sequence[int]) -> NamedSharding | None:
        """Split over `tensor` only: what a layer's matrix looks like once `fsdp` is gathered.

        A head is not gathered, see `parallel.head`: it comes to be split along the vocabulary.
        """
        if len(shape) != len(stored):
            return None
        also = "fsdp" if stored[-1] == axes.VOCAB else ""
        split = partition(self.mesh, stored, shape, without="fsdp", also=also)
        return NamedSharding(self.mesh, split)

    def _put(self, x: Any, logical: Sequence[str | None], also: str = "") -> jax.Array:
        return self._to(
            x, NamedSharding(self.mesh, partition(self.mesh, logical, x.shape, also=also))
        )

    def adapter(self, pair: dict[str, Any], logical: Sequence[str], *, stacked: bool) -> dict:
        """Returns an adapter's arrays on the devices, split like the matrix they belong to.

        A or B, whichever has the side that the rules do not split over `fsdp`, is split over it
        along that side: with its gradient and its moments it would be whole on every device.
        """
        if len(logical) == 1:  # a bias
            layout = (None, *logical) if stacked else tuple(logical)
            return {name: self._put(x, layout) for name, x in pair.items()}
        *outer, into, out = logical
        lead = (None, *outer) if stacked else tuple(outer)
        layout = {"a": (*lead, into, None), "b": (*lead, None, out)}
        vector = (*lead, out)  # magnitude, bias
        return {
            name: self._put(x, layout[name], also="fsdp")
            if name in layout
            else self._put(x, vector)
            for name, x in pair.items()
        }

    def batch(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns ``[accumulation, rows, T]`` arrays, rows and tokens split over the devices.

        Every process hands over its own rows (`own_rows`); the others are not looked at.
        """

        def put(x):
            sharding = self.batch_sharding(x.shape)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return {name: put(x) for name, x in arrays.items()}

    def own_box(
        self, logical: Sequence[str | None], shape: Sequence[int]
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]] | None:
        """Returns which box of an array the devices of this process need, None for all of it.

        Start and stop of each dimension, and into how many parts it is split over all devices.
        """
        if processes.count() == 1:
            return None
        split = self.sharding(logical, shape).addressable_devices_indices_map(tuple(shape))
        own = [index for index in split.values() if index is not None]
        box = []
        for dimension, size in enumerate(shape):
            bounds = [index[dimension].indices(size) for index in own]
            box.append((min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds)))
        return tuple(box), tuple(ways(self.mesh, name) for name in logical)

    def own_rows(self, rows: int) -> frozenset[int] | None:
        """Returns which rows of a micro-batch this process hands over; None for all."""
        if processes.count() == 1:
            return None
        split = self.sharding((axes.BATCH,), (rows,)).addressable_devices_indices_map((rows,))
        return frozenset(row for index in split.values() if index for row in range(rows)[index[0]])

    def batch_sharding(self, shape: Sequence[int]) -> NamedSharding:
        """Returns how ``[accumulation, rows, T]`` arrays are split."""
        return self.sharding((None, axes.BATCH, axes.SEQUENCE), shape)


def _block_scales(scales: Any) -> Any:
    return scales.codes if isinstance(scales, DoubleQuantized) else scales

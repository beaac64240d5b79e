"""One seed's work split over devices: each plays its part of the environments and learns from its part of every batch.

What is learned and stored is the same on all of them. A device works on its own part of arrays, and exchanges sums (of gradients, losses
and counts) and rollouts with the others; drawing is done for all parts everywhere, so that a run has the draws of one that is not split.
All this is inside `jax.shard_map`, over an axis of the mesh that is called `PARTS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

PARTS = "parts"
"""The name of the axis of devices that share a seed."""


class Split(NamedTuple):
    """Over how many devices a seed is split; by itself it is not."""

    parts: int = 1

    def of(self, number: int) -> "Split":
        """How so many environments, episodes or sequences are split: not at all, but done by every device, if that would not be even."""
        return self if number % self.parts == 0 else WHOLE

    def own(self, tree: Any, axis: int = 0) -> Any:
        """This device's part of arrays along an axis, whose length is a multiple of `parts`."""
        if self.parts == 1:
            return tree

        def part(leaf: Array) -> Array:
            size = leaf.shape[axis] // self.parts
            return jax.lax.dynamic_slice_in_dim(leaf, jax.lax.axis_index(PARTS) * size, size, axis)

        return jax.tree.map(part, tree)

    def summed(self, tree: Any) -> Any:
        """Sums over the devices, the same on each. Not for what is differentiated."""
        if self.parts == 1:
            return tree
        return _packed(lambda vector: jax.lax.psum(vector, PARTS), lambda summed, shape: summed.reshape(shape), tree)

    def gathered(self, tree: Any, axis: int = 0) -> Any:
        """What `own` would be given to get these parts."""
        if self.parts == 1:
            return tree

        def side_by_side(parts: Array, shape: tuple[int, ...]) -> Array:
            parts = jnp.moveaxis(parts.reshape(self.parts, *shape), 0, axis)
            return parts.reshape(*shape[:axis], self.parts * shape[axis], *shape[axis + 1 :])

        return _packed(lambda vector: jax.lax.all_gather(vector, PARTS), side_by_side, tree)

    def drawn(self, draw: Callable[..., Array], *arguments: Array) -> Array:
        """What `draw` gives for this device's rows, if what it draws for a row depends on the row's place among those of all devices."""
        if self.parts == 1:
            return draw(*arguments)
        return self.own(draw(*(jnp.concatenate([argument] * self.parts) for argument in arguments)))


WHOLE = Split()
"""Not split."""


def _packed(exchange: Callable[[Array], Array], unpack: Callable[[Array, tuple[int, ...]], Array], tree: Any) -> Any:
    """Exchanges all arrays of a type as one vector: an exchange takes tens of microseconds, however little it carries.

    Args:
        exchange: `[n]` to `[..., n]`.
        unpack: makes an array of its part of that, `[..., k]`, and of its shape before.
        tree: arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    exchanged: dict[int, Array] = {}
    for kind in sorted({str(leaf.dtype) for leaf in leaves}):
        own = [index for index, leaf in enumerate(leaves) if str(leaf.dtype) == kind]
        vector = exchange(jnp.concatenate([leaves[index].reshape(-1) for index in own]))
        pieces = jnp.split(vector, np.cumsum([leaves[index].size for index in own])[:-1], axis=-1)
        exchanged |= {index: unpack(piece, leaves[index].shape) for index, piece in zip(own, pieces, strict=True)}
    return jax.tree.unflatten(structure, [exchanged[index] for index in range(len(leaves))])

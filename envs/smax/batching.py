"""Functions written with the batch axis last, seen as functions of a single environment.

With the batch on the last axis every elementwise operation runs over contiguous memory, whatever the number of units. A plain `custom_vmap`
rule loses that layout as soon as a second `vmap` (over seeds) goes over the first (over environments): the rule here is itself
`custom_vmap` and merges all outer axes into one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from envs.apart import apart
from envs.context import in_one_context


def batch_last(function: Callable[..., Any], is_apart: bool = False) -> Callable[..., Any]:
    """The single-environment view of a function of whole batches.

    Args:
        function: takes pytrees of arrays `[..., B]`, and as its last argument parameters `[..., B]` or, if the whole batch shares them,
            `[..., 1]`; returns pytrees of arrays `[..., B]`.
        is_apart: whether it keeps what it computes from being fused into others by itself; otherwise it is compiled `apart`.

    Returns:
        The same function of pytrees without the batch axis. Under any number of `vmap`s it runs `function` once, on all of them.
    """
    settled = function if is_apart else apart(function)

    @custom_vmap
    def many(*args: Any) -> Any:
        size = _size(args, [0] * len(jax.tree.leaves(args)))
        *own, params = jax.tree.map(_turned, args)
        outputs = settled(*jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*leaf.shape[:-1], size)), own), params)
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), outputs)

    @many.def_vmap
    def merging(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        inner = _size(args, [int(batched) for batched in jax.tree.leaves(in_batched)])
        outputs = many(*jax.tree.map(lambda leaf, batched: _merged(leaf, batched, axis_size, inner), args, tuple(in_batched)))
        outputs = jax.tree.map(lambda leaf: leaf.reshape(axis_size, inner, *leaf.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    @in_one_context
    def single(*args: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], many(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], args)))

    return single


def _size(args: Any, axes: list[int]) -> int:
    """The size of the batch, which some leaves have as 1."""
    return max(leaf.shape[axis] for leaf, axis in zip(jax.tree.leaves(args), axes, strict=True))


def _turned(leaf: Array) -> Array:
    """The first axis last; by a reshape, which costs nothing, if it is of size 1."""
    return leaf.reshape(*leaf.shape[1:], 1) if leaf.shape[0] == 1 else jnp.moveaxis(leaf, 0, -1)


def _merged(leaf: Array, batched: bool, outer: int, inner: int) -> Array:
    """A leaf `[outer, inner or 1, ...]`, or without the outer axis, with both axes in one; what all share stays of size 1."""
    if not batched:
        if leaf.shape[0] == 1:
            return leaf
        leaf = leaf[None]
    shape = leaf.shape[2:]
    return jnp.broadcast_to(leaf, (outer, inner, *shape)).reshape(outer * inner, *shape)

"""Functions compiled as computations of their own, so that XLA's fusion on processors does not compute them more than once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, compiled on processors as a computation of its own.

    XLA otherwise fuses whatever makes the arguments into every loop over pairs, and computes it anew for each pair.
    """
    traced_once = jax.jit(function)

    def call(*args: Any) -> Any:
        return jax.tree.map(partial(set_xla_metadata, inlineable="false"), traced_once(*args))

    return lambda *args: jax.lax.platform_dependent(*args, cpu=call, default=traced_once)


def apart_under_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """`apart` for functions that are vmapped from outside: whatever number of axes that adds, it is one computation.

    Args:
        function: of pytrees of arrays, without closing over anything that is traced; it must be possible to vmap it.
    """

    @custom_vmap
    def whole(*args: Any) -> Any:
        return apart(function)(*args)

    @whole.def_vmap
    def merged(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        outputs = apart_under_vmap(jax.vmap(function, in_axes=axes, axis_size=axis_size))(*args)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return whole


def apart_over_rows(
    function: Callable[..., Any], finish: Callable[..., Any] = lambda rows, outputs: outputs, at_once: int | None = None
) -> Callable[..., Any]:
    """`apart` for a function of many rows, each of which it looks at by itself: what is vmapped from outside becomes more rows.

    Args:
        function: of a pytree of arrays `[N, ...]` and one that all rows share, neither closing over anything that is traced; returns a
            pytree of arrays `[N, ...]`. Where what is shared differs over the vmapped axis, it is vmapped as it is.
        finish: what is made, row by row, of the rows and what the function gave; the latter's rows follow one another in memory.
        at_once: on processors, many more rows than these are taken in blocks of at most so many, which caches hold. On accelerators, and
            where no number of blocks divides the rows, all are taken at once.
    """

    def finished(rows: Any, shared: Any) -> Any:
        return finish(rows, function(rows, shared))

    def in_order(rows: Any, shared: Any) -> Any:
        return _in_order(apart(function)(rows, shared))

    def together(rows: Any, shared: Any) -> Any:
        return finish(rows, in_order(rows, shared))

    @custom_vmap
    def whole(rows: Any, shared: Any) -> Any:
        blocks = _number_of_blocks(len(jax.tree.leaves(rows)[0]), at_once)
        if blocks == 1:
            return apart(finish)(rows, in_order(rows, shared))  # or each of its readers would finish the rows anew
        return jax.lax.platform_dependent(rows, shared, cpu=partial(_by_blocks, together, blocks), default=together)

    @whole.def_vmap
    def merged(axis_size: int, in_batched: Any, rows: Any, shared: Any) -> tuple[Any, Any]:
        if any(jax.tree.leaves(in_batched[1])):
            axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
            outputs = jax.vmap(apart_under_vmap(finished), in_axes=axes, axis_size=axis_size)(rows, shared)
        else:
            outputs = whole(jax.tree.map(partial(_all_rows, axis_size), rows, in_batched[0]), shared)
            outputs = _in_parts(axis_size, outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return whole


def _number_of_blocks(rows: int, at_once: int | None) -> int:
    """The least number of equal blocks of at most `at_once` rows, but of more than a quarter of that; 1 if there is none, or few rows."""
    if at_once is None or rows <= 4 * at_once:
        return 1
    return next((blocks for blocks in range(-(-rows // at_once), 4 * rows // at_once) if rows % blocks == 0), 1)


def _by_blocks(function: Callable[..., Any], blocks: int, rows: Any, shared: Any) -> Any:
    """What a function of rows gives, one block of them after the other."""
    outputs = jax.lax.map(lambda part: function(part, shared), _in_parts(blocks, rows))
    return jax.tree.map(lambda leaf: _all_rows(blocks, leaf, batched=True), outputs)


def _in_parts(parts: int, tree: Any) -> Any:
    """Rows `[parts N, ...]` as `[parts, N, ...]`."""
    return jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), tree)


def _all_rows(axis_size: int, leaf: jax.Array, batched: bool) -> jax.Array:
    """Rows `[axis_size N, ...]` of `[axis_size, N, ...]`, or of `[N, ...]` that are the same for all."""
    many = leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
    return many.reshape(many.shape[0] * many.shape[1], *many.shape[2:])


def _in_order(tree: Any) -> Any:
    """The same arrays, on processors with their rows one after another in memory: whatever reads them would otherwise turn them itself.

    Apart from all else, this is a copy by blocks; in one loop with what makes or reads the numbers it takes twice the time.
    """
    return jax.lax.platform_dependent(tree, cpu=apart(_row_by_row), default=lambda same: same)


def _row_by_row(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: with_layout_constraint(leaf, Layout(major_to_minor=tuple(range(leaf.ndim)))), tree)

"""Sequences worked through in blocks that the caches of processors hold."""

from collections.abc import Callable
from typing import Any

import jax

State = Any


def in_blocks(function: Callable[[State, Any], tuple[State, Any]], state: State, sequence: Any, at_once: int) -> Any:
    """What a function gives for every slot of a sequence, on processors for some of the slots after the others.

    Args:
        function: of a state and slots `[T, ...]`, to the state after them and outputs `[T, ...]`, whatever the number of slots is; the
            types of the state must stay as they are.
        state: before the first slot.
        sequence: a pytree of arrays `[T, ...]`.
        at_once: the most slots of a block. On accelerators, and where no equal blocks of two slots or more are that small, all at once.

    Returns:
        The outputs.
    """
    length = len(jax.tree.leaves(sequence)[0])
    size = next((size for size in range(at_once, 1, -1) if length % size == 0), length)

    def whole(state: State, sequence: Any) -> Any:
        return function(state, sequence)[1]

    def by_blocks(state: State, sequence: Any) -> Any:
        parts = jax.tree.map(lambda leaf: leaf.reshape(length // size, size, *leaf.shape[1:]), sequence)
        _, outputs = jax.lax.scan(function, state, parts)
        return jax.tree.map(lambda leaf: leaf.reshape(length, *leaf.shape[2:]), outputs)

    if size >= length:
        return whole(state, sequence)
    return jax.lax.platform_dependent(state, sequence, cpu=by_blocks, default=whole)

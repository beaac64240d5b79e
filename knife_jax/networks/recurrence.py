"""Gated recurrent units over time: the equations, and their gradient written out.

What depends on the inputs alone is one product for all steps before the scan, and the gradient of the recurrent kernel is made of products
for all steps after it; inside, forward and backward, a step is the product with the state and what belongs to single units.
Forward, what the inputs give to the gates r, z and n travels in three arrays: slices of a joint one inside the loop keep XLA from
vectorising it on processors. Backward, a step puts together what goes back to them, which spares a pass through memory.

Shapes: T steps, *N any batch axes, H units.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

Gates = tuple[Array, Array, Array]


def unroll_gates(
    read: Callable[[Array], Array], projected: Float[Array, "T *N G"], starts: Bool[Array, "T *N"], hidden: Float[Array, "*N S"]
) -> tuple[Float[Array, "T *N S"], Float[Array, "*N S"]]:
    """Scans gated units over time, whatever reads their state.

    Args:
        read: what a state `[*N, S]` gives to the gates of all units, `[*N, 3 S]`.
        projected: what the inputs give to them, `[T, *N, 3 S]`.
        starts: where the state is zero before the step.
        hidden: the state before the first step.

    Returns:
        The states after every step, and the last one.
    """

    def one_step(state: Array, step: tuple[Gates, Array]) -> tuple[Array, Array]:
        projections, start = step
        state = jnp.where(start[..., None], 0.0, state)
        _, update, candidate, _ = _gates(projections, _by_gate(read(state)))
        state = (1 - update) * candidate + update * state
        return state, state

    hidden, outputs = jax.lax.scan(one_step, hidden, (_by_gate(projected), starts))
    return outputs, hidden


@jax.custom_vjp
def recur(
    projected: Float[Array, "T N G"],
    starts: Bool[Array, "T N"],
    hidden: Float[Array, "N H"],
    kernel: Float[Array, "H G"],
    bias: Float[Array, " G"],
) -> Float[Array, "T N H"]:
    """The states of a plain GRU after every step, `unroll_gates` with `state @ kernel + bias`, with a gradient of its own.

    Args:
        projected: what the inputs give to the gates r, z and n, one after another on the last axis.
        starts: where the state is zero before the step.
        hidden: the state before the first step.
        kernel: the recurrent weights of the three gates.
        bias: their biases.
    """
    return _forward(projected, starts, hidden, kernel, bias)[0]


def _forward(projected: Array, starts: Array, hidden: Array, kernel: Array, bias: Array) -> tuple[Array, Gates, Array]:
    """States, gates and what the state gave to the candidate, all `[T, N, H]`.

    A gate takes the place of what the inputs gave to it, which saves a pass through memory that makes room for it.
    """

    def one_step(carry: tuple[Array, Gates], step: tuple[Array, Array]) -> tuple[tuple[Array, Gates], tuple[Array, Array]]:
        state, (reset, update, candidate) = carry
        index, start = step

        def at(gate: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(gate, index, keepdims=False)

        def put(gate: Array, values: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(gate, values, index, 0)

        state = jnp.where(start[:, None], 0.0, state)
        r, z, n, recalled = _gates((at(reset), at(update), at(candidate)), _by_gate(state @ kernel + bias[None]))
        state = (1 - z) * n + z * state
        return (state, (put(reset, r), put(update, z), put(candidate, n))), (state, recalled)

    (_, gates), (states, recalled) = jax.lax.scan(one_step, (hidden, _by_gate(projected)), (jnp.arange(starts.shape[0]), starts))
    return states, gates, recalled


def _saved(projected: Array, starts: Array, hidden: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    states, gates, recalled = _forward(projected, starts, hidden, kernel, bias)
    return states, (states, *gates, recalled, starts, hidden, kernel)


def _backward(saved: tuple[Array, ...], cotangents: Array) -> tuple[Array | None, ...]:
    states, reset, update, candidate, recalled, starts, hidden, kernel = saved
    size = kernel.shape[0]
    before = jnp.where(starts[..., None], 0.0, jnp.concatenate([hidden[None], states[:-1]]))
    to_state = _by_gate(kernel)

    def one_step(later: Array, step: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        cotangent, r, z, n, m, state, start = step
        total = cotangent + later
        to_z = total * (state - n) * z * (1 - z)
        to_n = total * (1 - z) * (1 - n * n)
        to_m = to_n * r
        to_r = to_m * m * (1 - r)
        earlier = total * z + to_r @ to_state[0].T + to_z @ to_state[1].T + to_m @ to_state[2].T
        return jnp.where(start[:, None], 0.0, earlier), (jnp.concatenate([to_r, to_z, to_n], axis=-1), to_m)

    steps = (cotangents, reset, update, candidate, recalled, before, starts)
    first, (to_projected, to_m) = jax.lax.scan(one_step, jnp.zeros_like(hidden), steps, reverse=True)
    from_state = to_projected.reshape(-1, 3 * size)[:, : 2 * size], to_m.reshape(-1, size)
    to_kernel = jnp.concatenate([before.reshape(-1, size).T @ gates for gates in from_state], axis=-1)
    to_bias = jnp.concatenate([gates.sum(axis=0) for gates in from_state])
    return to_projected, None, first, to_kernel, to_bias


recur.defvjp(_saved, _backward)


def _by_gate(joint: Float[Array, "*N G"]) -> Gates:
    """What is there for the gates r, z and n."""
    reset, update, candidate = jnp.split(joint, 3, axis=-1)
    return reset, update, candidate


def _gates(from_input: Gates, from_state: Gates) -> tuple[Array, Array, Array, Array]:
    """The gates r, z and n, and what the state gives to n before r."""
    (input_r, input_z, input_n), (state_r, state_z, recalled) = from_input, from_state
    reset, update = jax.nn.sigmoid(input_r + state_r), jax.nn.sigmoid(input_z + state_z)
    return reset, update, jnp.tanh(input_n + reset * recalled), recalled

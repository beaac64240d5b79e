"""Gated recurrent units over time: the equations, and their gradient written out.

What depends on the inputs alone is one product for all steps of each gate before the scan, and the gradients of the kernels are made of
products for all steps after it; inside, forward and backward, a step is the product with the state and what belongs to single units.
What the inputs give to the gates r, z and n, and what goes back to them, travels in an array for each: slices of a joint one inside the
loop keep XLA from vectorising it on processors, and outside of it they are passes through memory. For the same reason their bias is
added inside.

Shapes: T steps, *N any batch axes, H units.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jaxtyping import Bool, Float

Gates = tuple[Array, Array, Array]


class Projected(NamedTuple):
    """What inputs give to the gates r, z and n.

    Attributes:
        gates: without the bias, `[..., H]` each.
        bias: what is to be added, `[3 H]`.
    """

    gates: Gates
    bias: Float[Array, " G"]

    def joint(self) -> Float[Array, "... G"]:
        """With the bias, the gates one after another on the last axis."""
        joint = jnp.concatenate(self.gates, axis=-1)
        return joint + self.bias.reshape((1,) * (joint.ndim - 1) + self.bias.shape)

    def reshape(self, *shape: int) -> "Projected":
        """Every gate in another shape."""
        reset, update, candidate = (gate.reshape(shape) for gate in self.gates)
        return Projected((reset, update, candidate), self.bias)


def projected_from(joint: Float[Array, "... G"]) -> Projected:
    """The parts of what already has its bias."""
    return Projected(_by_gate(joint), jnp.zeros_like(joint, shape=joint.shape[-1:]))


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
    projected: Projected, starts: Bool[Array, "T N"], hidden: Float[Array, "N H"], kernel: Float[Array, "H G"], bias: Float[Array, " G"]
) -> Float[Array, "T N H"]:
    """The states of a plain GRU after every step, `unroll_gates` with `state @ kernel + bias`, with a gradient of its own.

    Args:
        projected: what the inputs give to the gates, `[T, N, H]` each.
        starts: where the state is zero before the step.
        hidden: the state before the first step.
        kernel: the recurrent weights of the three gates r, z and n, one after another on the last axis.
        bias: their biases.
    """
    return _forward(projected, starts, hidden, kernel, bias, keep=False)[0]


def _forward(projected: Projected, starts: Array, hidden: Array, kernel: Array, bias: Array, keep: bool) -> tuple[Array, ...]:
    """States after every step; with `keep` also the gates r, z and n, and what the state gave to n before r. All `[T, N, H]`.

    Gates take the places of what the inputs gave to them, which saves the passes through memory that make room for them, and a step reads
    the state from among those of all steps, which saves its copy: the state before the first step stands in the last one's place until
    then. Nothing is added up in its own place, which XLA's earlier emitters do not vectorise on processors.
    """
    steps = jnp.uint32(starts.shape[0])
    of_inputs = _by_gate(projected.bias[None])
    at, put = _along(0)

    def one_step(carry: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        index, states, *kept = carry
        before = at(states, jnp.where(index == 0, steps, index) - 1)
        state = jnp.where(at(starts, index)[:, None], 0.0, before)
        r, z, n, m = _gates(given(index, kept), _by_gate(state @ kernel + bias[None]))
        states = put(states, (1 - z) * n + z * state, index)
        return (index + 1, states, *map(lambda gate, value: put(gate, value, index), kept, (r, z, n, m))), None

    def given(index: Array, kept: list[Array]) -> Gates:
        r, z, n = (at(gate, index) + bias for gate, bias in zip(kept[:3] or projected.gates, of_inputs, strict=True))
        return r, z, n

    room = jnp.zeros((starts.shape[0], *hidden.shape), hidden.dtype)
    first = jnp.uint32(0), room.at[-1].set(hidden), *((*projected.gates, room) if keep else ())
    last, _ = jax.lax.scan(one_step, first, length=starts.shape[0])
    return last[1:]


@cache
def _along(axis: int) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Reads, and puts, what there is at a step of an axis.

    Under `vmap` JAX makes gathers and scatters of slices, even where all are taken at one place, and XLA checks every number of a scatter.
    """

    @custom_vmap
    def at(steps: Array, index: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(steps, index, axis, keepdims=False)

    @at.def_vmap
    def read(axis_size: int, in_batched: list[bool], steps: Array, index: Array) -> tuple[Array, bool]:
        assert not in_batched[1]
        return _along(axis + 1)[0](steps, index), True

    @custom_vmap
    def put(steps: Array, value: Array, index: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(steps, value, index, axis)

    @put.def_vmap
    def written(axis_size: int, in_batched: list[bool], steps: Array, value: Array, index: Array) -> tuple[Array, bool]:
        assert not in_batched[2]
        both = zip((steps, value), in_batched, strict=False)
        whole = (leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape)) for leaf, batched in both)
        return _along(axis + 1)[1](*whole, index), True

    return at, put


def _saved(projected: Projected, starts: Array, hidden: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    states, *gates = _forward(projected, starts, hidden, kernel, bias, keep=True)
    return states, (states, *gates, starts, hidden, kernel)


def _backward(saved: tuple[Array, ...], cotangents: Array) -> tuple[Projected, None, Array, Array, Array]:
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
        return jnp.where(start[:, None], 0.0, earlier), (to_r, to_z, to_n, to_m)

    steps = (cotangents, reset, update, candidate, recalled, before, starts)
    first, (to_r, to_z, to_n, to_m) = jax.lax.scan(one_step, jnp.zeros_like(hidden), steps, reverse=True)
    sum_r, sum_z, sum_n, sum_m = (gate.reshape(-1, size).sum(axis=0) for gate in (to_r, to_z, to_n, to_m))
    read = before.reshape(-1, size).T
    to_kernel = jnp.concatenate([read @ gate.reshape(-1, size) for gate in (to_r, to_z, to_m)], axis=-1)
    to_projected = Projected((to_r, to_z, to_n), jnp.concatenate([sum_r, sum_z, sum_n]))
    return to_projected, None, first, to_kernel, jnp.concatenate([sum_r, sum_z, sum_m])


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

"""Gated recurrent units over time: the equations, and their gradient written out.

What depends on the inputs alone is one product for all steps of each gate before the scan; inside, a step is the product with the state
and what belongs to single units. What the inputs give to the gates r, z and n travels in an array for each: slices of a joint one inside
the loop keep XLA from vectorising it on processors, and outside of it they are passes through memory. For the same reason their bias is
added inside. Backward, accelerators make the gradients of the kernels of products for all steps after the scan; processors add them up
inside it, where what goes back to the gates is still in caches.

Shapes: T steps, *N any batch axes, H units.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jaxtyping import Bool, Float

Gates = tuple[Array, Array, Array]

FEW_ROWS = 48
"""With fewer rows at a step than this, or than a quarter of the units, adding to the kernels' gradients takes longer than the products."""


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

    def flat(self, length: int) -> "Projected":
        """With all axes between time and units as one."""
        return self.reshape(length, -1, self.gates[0].shape[-1])


class Projection(NamedTuple):
    """What inputs give to the gates, not yet worked out.

    Attributes:
        inputs: `[..., I]`.
        kernel: for the gates r, z and n, one after another on the last axis, `[I, 3 H]`.
        bias: `[3 H]`.
    """

    inputs: Float[Array, "... I"]
    kernel: Float[Array, "I G"]
    bias: Float[Array, " G"]

    def projected(self) -> Projected:
        """A product for each gate."""
        rows = self.inputs.reshape(-1, self.inputs.shape[-1])
        reset, update, candidate = (rows @ kernel for kernel in _by_gate(self.kernel))
        return Projected((reset, update, candidate), self.bias).reshape(*self.inputs.shape[:-1], self.kernel.shape[-1] // 3)

    def joint(self) -> Float[Array, "... G"]:
        """As `Projected.joint`."""
        return self.projected().joint()

    def flat(self, length: int) -> "Projection":
        """With all axes between time and features as one."""
        return self._replace(inputs=self.inputs.reshape(length, -1, self.inputs.shape[-1]))


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
    given: Projected | Projection,
    starts: Bool[Array, "T N"],
    hidden: Float[Array, "N H"],
    kernel: Float[Array, "H G"],
    bias: Float[Array, " G"],
) -> Float[Array, "T N H"]:
    """The states of a plain GRU after every step, `unroll_gates` with `state @ kernel + bias`, with a gradient of its own.

    Args:
        given: what the inputs give to the gates, `[T, N, H]` each, or what is to be worked out of inputs `[T, N, I]`.
        starts: where the state is zero before the step.
        hidden: the state before the first step.
        kernel: the recurrent weights of the three gates r, z and n, one after another on the last axis.
        bias: their biases.
    """
    return _forward(_worked_out(given), starts, hidden, kernel, bias, keep=False)[0]


def _worked_out(given: Projected | Projection) -> Projected:
    return given.projected() if isinstance(given, Projection) else given


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


Gradients = tuple[Projected | Projection, None, Array, Array, Array]
"""Of everything that `recur` takes."""


class _Saved(NamedTuple):
    """What the gradient needs: `Projection` or nothing of the inputs, `[T, N, H]` of states and gates."""

    given: Projection | None
    states: Array
    gates: tuple[Array, Array, Array, Array]
    starts: Array
    hidden: Array
    kernel: Array


def _saved(given: Projected | Projection, starts: Array, hidden: Array, kernel: Array, bias: Array) -> tuple[Array, _Saved]:
    states, r, z, n, m = _forward(_worked_out(given), starts, hidden, kernel, bias, keep=True)
    return states, _Saved(given if isinstance(given, Projection) else None, states, (r, z, n, m), starts, hidden, kernel)


def _backward(saved: _Saved, cotangents: Array) -> Gradients:
    """Kernels are added up in the loop on processors, unless there are so few rows that adding takes longer than the products."""
    _, rows, units = cotangents.shape
    if saved.given is None or rows < max(FEW_ROWS, units // 4):
        return products_after(saved, cotangents)
    return jax.lax.platform_dependent(saved, cotangents, cpu=products_within, default=products_after)


def _to_gates(total: Array, before: Array, gates: tuple[Array, ...]) -> tuple[Array, Array, Array, Array]:
    """What goes from a step's state back to what is squashed to r, z and n, and to what the state gave to n."""
    r, z, n, m = gates
    to_z = total * (before - n) * z * (1 - z)
    to_n = total * (1 - z) * (1 - n * n)
    to_m = to_n * r
    return to_m * m * (1 - r), to_z, to_n, to_m


def products_after(saved: _Saved, cotangents: Array) -> Gradients:
    """Gradients of the kernels from products for all steps, after the loop."""
    given, states, gates, starts, hidden, kernel = saved
    size = kernel.shape[0]
    before = jnp.where(starts[..., None], 0.0, jnp.concatenate([hidden[None], states[:-1]]))
    to_state = _by_gate(kernel)

    def one_step(later: Array, step: tuple[Any, ...]) -> tuple[Array, tuple[Array, ...]]:
        cotangent, kept, state, start = step
        total = cotangent + later
        to_r, to_z, to_n, to_m = _to_gates(total, state, kept)
        earlier = total * kept[1] + to_r @ to_state[0].T + to_z @ to_state[1].T + to_m @ to_state[2].T
        return jnp.where(start[:, None], 0.0, earlier), (to_r, to_z, to_n, to_m)

    first, (to_r, to_z, to_n, to_m) = jax.lax.scan(one_step, jnp.zeros_like(hidden), (cotangents, gates, before, starts), reverse=True)
    sum_r, sum_z, sum_n, sum_m = (gate.reshape(-1, size).sum(axis=0) for gate in (to_r, to_z, to_n, to_m))
    read = before.reshape(-1, size).T
    to_kernel = jnp.concatenate([read @ gate.reshape(-1, size) for gate in (to_r, to_z, to_m)], axis=-1)
    to_given = Projected((to_r, to_z, to_n), jnp.concatenate([sum_r, sum_z, sum_n]))
    if given is not None:
        to_given = _to_projection(given, to_given)
    return to_given, None, first, to_kernel, jnp.concatenate([sum_r, sum_z, sum_m])


def _to_projection(given: Projection, back: Projected) -> Projection:
    """Gradients of a projection, from those of what it gives."""
    rows = given.inputs.reshape(-1, given.inputs.shape[-1])
    gates = [gate.reshape(len(rows), -1) for gate in back.gates]
    to_rows = sum(gate @ kernel.T for gate, kernel in zip(gates, _by_gate(given.kernel), strict=True))
    to_kernel = jnp.concatenate([rows.T @ gate for gate in gates], axis=-1)
    return Projection(jnp.reshape(to_rows, given.inputs.shape), to_kernel, back.bias)


def products_within(saved: _Saved, cotangents: Array) -> Gradients:
    """Gradients of the kernels added up step by step, in the loop; in float32 where the numbers have fewer bits."""
    given, states, gates, starts, hidden, kernel = saved
    assert given is not None
    last = jnp.uint32(len(starts) - 1)
    at, put = _along(0)

    def one_step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        later_steps, later, to_inputs, to_kernels, to_biases = carry
        index = last - later_steps
        start = at(starts, index)[:, None]
        before = jnp.where(start, 0.0, jnp.where(index == 0, hidden, at(states, jnp.maximum(index, 1) - 1)))
        kept = tuple(at(gate, index) for gate in gates)
        total = at(cotangents, index) + later
        to_r, to_z, to_n, to_m = _to_gates(total, before, kept)
        to_input, to_state = jnp.concatenate([to_r, to_z, to_n], axis=-1), jnp.concatenate([to_r, to_z, to_m], axis=-1)
        earlier = jnp.where(start, 0.0, total * kept[1] + to_state @ kernel.T)
        more = _summed_product(at(given.inputs, index), to_input), _summed_product(before, to_state)
        old, new = later_steps % 2, 1 - later_steps % 2  # sums made in their own place are not vectorised
        to_kernels = tuple(put(sums, at(sums, old) + one, new) for sums, one in zip(to_kernels, more, strict=True))
        to_biases = tuple(sums + one.sum(axis=0, dtype=sums.dtype) for sums, one in zip(to_biases, (to_input, to_m), strict=True))
        to_inputs = put(to_inputs, to_input @ given.kernel.T, index)
        return (later_steps + 1, earlier, to_inputs, to_kernels, to_biases), None

    exact = jnp.promote_types(kernel.dtype, jnp.float32)
    to_kernels = tuple(jnp.zeros((2, *weights.shape), exact) for weights in (given.kernel, kernel))
    to_biases = tuple(jnp.zeros(size, exact) for size in (kernel.shape[1], kernel.shape[0]))
    start = jnp.uint32(0), jnp.zeros_like(hidden), jnp.zeros_like(given.inputs), to_kernels, to_biases
    (_, first, to_inputs, to_kernels, to_biases), _ = jax.lax.scan(one_step, start, length=len(starts))
    of_inputs, of_states = (sums[len(starts) % 2].astype(kernel.dtype) for sums in to_kernels)
    to_bias, to_m = (sums.astype(kernel.dtype) for sums in to_biases)
    shared = to_bias[: -kernel.shape[0]]
    return Projection(to_inputs, of_inputs, to_bias), None, first, of_states, jnp.concatenate([shared, to_m])


def _summed_product(inputs: Array, outputs: Array) -> Array:
    """Gradient of a layer's kernel, from what entered and what comes back."""
    return jnp.matmul(inputs.T, outputs, preferred_element_type=jnp.promote_types(outputs.dtype, jnp.float32))


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

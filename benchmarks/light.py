"""The speed-of-light program of a gradient step: the matrix products of one, at the same shapes, and nothing else.

Online and target networks have weights of their own, or the compiler would run them once. What a product gives is used whole (the gates
of a recurrent step are added up where a GRU would squash them), or the compiler would compute less of it. The sizes come from the
parameters of the real networks: recurrent agents, and any mixer that is made of Dense layers on the state.

Shapes: T slots of a sequence, N agents of all sequences, M = slots of all sequences, I inputs, H units, K stacked kernels.
"""

from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Heads = dict[str, list[Array]]


class Weights(NamedTuple):
    """Kernels of one network: of the agents `[inputs, units]`, and the layers of each head of the mixer, `[K, ...]` above the first."""

    hidden: Array
    gates: Array
    recurrent: Array
    output: Array
    heads: Heads


class Data(NamedTuple):
    """Inputs of the agents `[T, N, I]`, and of the mixer's heads `[M, features]` by their number of features."""

    agents: Array
    states: dict[int, Array]


def make_light(key: Array, params: Any, slots: int, sequences: int, num_agents: int) -> tuple[tuple[Weights, Weights], Data]:
    """Random weights of two networks and random data.

    Args:
        key: a key.
        params: `{"agent": ..., "mixer": ...}` of the real network, of which only the shapes are read.
        slots: T.
        sequences: how many there are in a batch.
        num_agents: agents of one sequence.
    """
    key_online, key_target, key_agents, key_states = jax.random.split(key, 4)
    features = params["agent"]["hidden_1"]["kernel"].shape[0]
    weights = _weights(key_online, params), _weights(key_target, params)
    widths = {layers[0].shape[0] for layers in weights[0].heads.values()}
    states = {width: jax.random.normal(jax.random.fold_in(key_states, width), (slots * sequences, width)) for width in sorted(widths)}
    return weights, Data(jax.random.normal(key_agents, (slots, sequences * num_agents, features)), states)


def _weights(key: Array, params: Any) -> Weights:
    """Random kernels of the sizes of the real ones, small enough for the recurrence to stay bounded."""

    def draw(name: str, *shape: int) -> Array:
        number = sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31
        return 0.5 * shape[-2] ** -0.5 * jax.random.normal(jax.random.fold_in(key, number), shape)

    agent, mixer = params["agent"], params.get("mixer") or {}
    size = agent["gru"]["hidden_kernel"].shape[0]
    heads = {
        head: [draw(name, *_layout(mixer[name]["kernel"].shape, first=place == 0)) for place, name in enumerate(names)]
        for head, names in groupby(sorted(mixer), lambda name: name.partition("_")[0])
    }
    return Weights(
        draw("hidden", *agent["hidden_1"]["kernel"].shape),
        draw("gates", agent["gru"]["input"]["kernel"].shape[0], 3 * size),
        draw("recurrent", size, 3 * size),
        draw("output", *agent["output"]["kernel"].shape),
        heads,
    )


def _layout(shape: tuple[int, ...], first: bool) -> tuple[int, ...]:
    """Stacked kernels `[K, I, O]` that all read the same are one kernel `[I, K * O]`."""
    return (shape[1], shape[0] * shape[2]) if first and len(shape) == 3 else shape


def products(networks: tuple[Weights, Weights], data: Data) -> Any:
    """Forward with both networks, backward with the first.

    Returns:
        What gradients there are of each kernel of the first network, and what both networks give out.
    """
    online, target = networks
    steps, rows, features = data.agents.shape
    inputs = data.agents.reshape(steps * rows, features)
    hidden, hidden_target = inputs @ online.hidden, inputs @ target.hidden
    projected = [(each @ network.gates).reshape(steps, rows, -1) for each, network in zip((hidden, hidden_target), networks, strict=True)]
    states, states_target = (each.reshape(steps * rows, -1) for each in _unroll(networks, projected))
    values, values_target = states @ online.output, states_target @ target.output
    to_states = (values @ online.output.T).reshape(steps, rows, -1)
    to_gates = _back(online, to_states).reshape(steps * rows, -1)
    to_hidden = to_gates @ online.gates.T
    gradients = inputs.T @ to_hidden, hidden.T @ to_gates, states.T @ to_gates, states.T @ values
    heads = {name: _head(layers, data) for name, layers in online.heads.items()}
    above = {name: _head(layers, data)[-1] for name, layers in target.heads.items()}
    return gradients, {name: _head_gradients(online.heads[name], given) for name, given in heads.items()}, values_target, above


def _unroll(networks: tuple[Weights, Weights], projected: list[Array]) -> tuple[Array, ...]:
    """States of both networks, in one scan."""

    def one_step(states: tuple[Array, ...], projections: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        given = zip(states, networks, projections, strict=True)
        states = tuple(_added_up(state @ network.recurrent + projection) for state, network, projection in given)
        return states, states

    zeros = jnp.zeros((projected[0].shape[1], networks[0].recurrent.shape[0]))
    return jax.lax.scan(one_step, (zeros, zeros), tuple(projected))[1]


def _back(network: Weights, to_states: Array) -> Array:
    """What reaches the gates, `[T, N, 3 H]`."""

    def one_step(later: Array, to_state: Array) -> tuple[Array, Array]:
        to_gates = jnp.concatenate([later + to_state] * 3, axis=-1)
        return to_gates @ network.recurrent.T, to_gates

    return jax.lax.scan(one_step, jnp.zeros_like(to_states[0]), to_states, reverse=True)[1]


def _added_up(gates: Array) -> Array:
    size = gates.shape[-1] // 3
    return gates[:, :size] + gates[:, size : 2 * size] + gates[:, 2 * size :]


def _head(layers: list[Array], data: Data) -> list[Array]:
    """What goes into each layer of a head, and what comes out of the last one."""
    given = [data.states[layers[0].shape[0]]]
    for kernel in layers:
        stacked = kernel.ndim == 3
        features = given[-1].reshape(len(given[-1]), kernel.shape[0], -1) if stacked else given[-1]
        given.append(jnp.einsum("mki,kio->mko", features, kernel) if stacked else features @ kernel)
    return given


def _head_gradients(layers: list[Array], given: list[Array]) -> list[Array]:
    """Gradients of a head's kernels; the state takes none."""
    back, gradients = given[-1], []
    for index in reversed(range(len(layers))):
        kernel, features = layers[index], given[index]
        if kernel.ndim == 3:
            features = features.reshape(len(features), kernel.shape[0], -1)
            gradients.append(jnp.einsum("mki,mko->kio", features, back))
            back = jnp.einsum("mko,kio->mki", back, kernel)
        else:
            back = back.reshape(len(back), -1)
            gradients.append(features.T @ back)
            back = back @ kernel.T if index else back
    return gradients


def repeated(number: int, networks: tuple[Weights, Weights], data: Data) -> tuple[Weights, Weights]:
    """So many gradient steps' products, one after the other; returns the weights, which stay as they were."""

    def one(networks: tuple[Weights, Weights], _: None) -> tuple[tuple[Weights, Weights], None]:
        made = jax.lax.optimization_barrier(products(networks, data))
        touched = sum(leaf.reshape(-1)[0] for leaf in jax.tree.leaves(made))
        never = jnp.where(touched > 1e30, 1.0, 0.0)  # keeps the steps in a row, and all of their results in use
        return jax.tree.map(lambda leaf: leaf + never, networks), None

    return jax.lax.scan(one, networks, length=number)[0]

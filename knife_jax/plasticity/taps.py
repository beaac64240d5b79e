"""Statistics of activations and their gradients, as the cotangents of dummy inputs.

A tap is the identity. Its statistics come out of `jax.grad` with respect to the tap's inputs, so that nothing is stored, no output is added
to the model, and several calls of one layer add up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from knife_jax.networks.neurons import NeuronLayer
from knife_jax.plasticity.graph import Graph

STATISTICS = ("absolute_gradient", "absolute", "signed", "squared", "fired", "centred", "gram", "saturated", "slope")
"""What a tap may sum over samples: |dL/dh|, |h|, h, h^2, h > 0, |h - c| where c is the value given as `centre`, the outer product h h^T;
and of what an ELU is given, whether it is below `SATURATED_BELOW`, and the ELU's slope there, exp(min(h, 0))."""

SATURATED_BELOW = -3.0
"""Where an ELU lets less than a twentieth of a gradient through."""

Tap = dict[str, Array]


def zeros(graph: Graph, statistics: tuple[str, ...]) -> dict[str, Tap]:
    """Taps for every layer of a graph, `{layer: {statistic: [*K, H] ("gram": [*K, H, H]), "count": [*K, 1]}}`."""

    def blank(layer: NeuronLayer, statistic: str) -> Array:
        return jnp.zeros((*layer.stack, layer.size, layer.size) if statistic == "gram" else (*layer.stack, layer.size))

    count = {layer.name: {"count": jnp.zeros((*layer.stack, 1))} for layer in graph.layers}
    return {layer.name: {name: blank(layer, name) for name in statistics} | count[layer.name] for layer in graph.layers}


def add(sums: dict[str, Tap], taps: dict[str, Any]) -> dict[str, Tap]:
    """Sums over one batch more; statistics that others gathered are left out."""
    return {name: {statistic: total + taps[name][statistic] for statistic, total in own.items()} for name, own in sums.items()}


def means(measured: Tap) -> Tap:
    """Sums over samples divided by their number."""
    number = jnp.maximum(measured["count"], 1.0)
    return {name: values / number for name, values in measured.items() if name != "count"}


def tap(activations: Float[Array, "... H"], measured: Tap, mask: Array | None = None) -> Float[Array, "... H"]:
    """Passes activations on.

    Args:
        activations: `[*N, *K, H]`.
        measured: one layer's taps.
        mask: which samples count, over the first axes of N.
    """
    weight = jnp.ones((1,) * activations.ndim) if mask is None else mask.astype(activations.dtype)
    weight = weight.reshape(weight.shape + (1,) * (activations.ndim - weight.ndim))
    return _tap(activations, measured, jax.lax.stop_gradient(weight))


@jax.custom_vjp
def _tap(activations: Array, measured: Tap, weight: Array) -> Array:
    return activations


def _forward(activations: Array, measured: Tap, weight: Array) -> tuple[Array, Any]:
    return activations, (activations, measured, weight)


def _backward(saved: tuple[Array, Tap, Array], gradient: Array) -> tuple[Array, Tap, None]:
    measured = saved[1]
    activations, weight, gradients = (_at_least_float32(values) for values in (saved[0], saved[2], gradient))
    values = {
        "absolute_gradient": lambda: jnp.abs(gradients) * weight,
        "absolute": lambda: jnp.abs(activations) * weight,
        "signed": lambda: activations * weight,
        "squared": lambda: jnp.square(activations) * weight,
        "fired": lambda: (activations > 0) * weight,
        "centred": lambda: jnp.abs(activations - _align(measured["centre"], activations)) * weight,
        "saturated": lambda: (activations < SATURATED_BELOW) * weight,
        "slope": lambda: jnp.exp(jnp.minimum(activations, 0.0)) * weight,
        "count": lambda: jnp.broadcast_to(weight, (*activations.shape[:-1], 1)),
        "centre": lambda: None,
    }
    summed = {name: _sum_samples(values[name](), like) for name, like in measured.items() if name != "gram"}
    if "gram" in measured:
        stacked = measured["gram"].ndim == 3
        summed["gram"] = jnp.einsum("...ki,...kj->kij" if stacked else "...i,...j->ij", activations * weight, activations)
    return gradient, summed, None


def _at_least_float32(values: Array) -> Array:
    """Sums over many samples in bfloat16 would stop growing."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _align(values: Array, like: Array) -> Array:
    return values.reshape((1,) * (like.ndim - values.ndim) + values.shape)


def _sum_samples(values: Array | None, like: Array) -> Array:
    """Sums over all but the axes of the tap."""
    if values is None:
        return jnp.zeros_like(like)
    return values.sum(axis=tuple(range(values.ndim - like.ndim))).astype(like.dtype)


_tap.defvjp(_forward, _backward)

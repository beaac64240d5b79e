"""Scores of hidden units: who is stagnant, volatile, dormant, inactive.

Every function works over the last axis, the units of one layer. Where a layer's mean is zero nothing is judged, and nothing is NaN.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, incoming_view

EPSILON = 1e-8
Reference = Literal["layer", "network", "history", "error"]


def update_activity(grads: Flat, params: Flat, layer: NeuronLayer) -> Float[Array, "*K H"]:
    """`||dL/dW_in|| / (||W_in|| + 1e-8)` of every unit: raw gradients, incoming weights only, no bias.

    Source: "Stagnant Neuron" (arXiv 2606.25335) as implemented by a third party; the paper's code is not public.
    """
    return incoming_norm(grads, layer) / (incoming_norm(params, layer) + EPSILON)


def incoming_norm(leaves: Flat, layer: NeuronLayer) -> Float[Array, "*K H"]:
    """Euclidean norm of every unit's incoming weights."""
    return jnp.sqrt(sum(jnp.square(incoming_view(leaves[path], layer)).sum(axis=-2) for path in layer.incoming))


class Window(NamedTuple):
    """Running statistics of update activity since the last intervention.

    Attributes:
        total: `{layer: [*K, H]}`, summed (or exponentially averaged) update activity.
        count: how many gradients; with an exponential average, the weight of the sum.
        peak: `{layer: [*K]}`, the largest layer mean of any earlier window, for the reference `history`.
    """

    total: dict[str, Array]
    count: Array
    peak: dict[str, Array]


def new_window(graph: Graph) -> Window:
    """An empty window."""
    total = {layer.name: jnp.zeros((*layer.stack, layer.size)) for layer in graph.layers}
    peak = {layer.name: jnp.zeros(layer.stack) for layer in graph.layers}
    return Window(total, jnp.zeros(()), peak)


def watch(window: Window, graph: Graph, grads: Flat, params: Flat, decay: float | None = None) -> Window:
    """Adds one gradient to a window.

    Args:
        window: so far.
        graph: the layers.
        grads: raw gradients, before clipping.
        params: the weights they were taken at.
        decay: of an exponential average; None for the plain mean.
    """
    keep = 1.0 if decay is None else decay
    total = {layer.name: keep * window.total[layer.name] + update_activity(grads, params, layer) for layer in graph.layers}
    return window._replace(total=total, count=keep * window.count + 1)


def activity(window: Window) -> dict[str, Float[Array, "*K H"]]:
    """Mean update activity of every unit over the window."""
    return {name: total / jnp.maximum(window.count, EPSILON) for name, total in window.total.items()}


def restart(window: Window) -> Window:
    """An empty window that remembers the peaks."""
    means = {name: values.mean(axis=-1) for name, values in activity(window).items()}
    peak = {name: jnp.maximum(window.peak[name], means[name]) for name in means}
    total = {name: jnp.zeros_like(values) for name, values in window.total.items()}
    return Window(total, jnp.zeros_like(window.count), peak)


def relative_activity(
    window: Window, reference: Reference = "layer", error: Float[Array, ""] | None = None
) -> dict[str, Float[Array, "*K H"]]:
    """Relative update activity (RUA) of every unit; NaN for units that the reference cannot judge.

    Args:
        window: update activity.
        reference: what it is divided by: `layer`, the mean over the layer (the paper's); `network`, the mean over all units of all layers;
            `history`, the largest mean the layer ever had; `error`, the root mean square of dL/dQ_tot.
        error: that number.

    Raises:
        ValueError: for the reference `error` without one.
    """
    means = activity(window)
    if reference == "layer":
        return {name: _divide(values, values.mean(axis=-1, keepdims=True)) for name, values in means.items()}
    if reference == "network":
        mean = jnp.concatenate([values.reshape(-1) for values in means.values()]).mean()
        return {name: _divide(values, mean) for name, values in means.items()}
    if reference == "history":
        peaks = {name: jnp.maximum(window.peak[name], values.mean(axis=-1))[..., None] for name, values in means.items()}
        return {name: _divide(values, peaks[name]) for name, values in means.items()}
    if error is None:
        raise ValueError("reference='error' needs the root mean square of dL/dQ_tot")
    return {name: _divide(values, error) for name, values in means.items()}


def _divide(values: Array, reference: Array) -> Array:
    """A quotient that is NaN where the reference is zero, without dividing by it."""
    return jnp.where(reference > 0, values / jnp.where(reference > 0, reference, 1.0), jnp.nan)


def stagnant(relative: Float[Array, "*K H"], threshold: Float[Array, ""] | float = 0.25) -> Bool[Array, "*K H"]:
    """Units below the threshold; those that could not be judged are not."""
    return relative < threshold


def volatile(relative: Float[Array, "*K H"], threshold: Float[Array, ""] | float = 4.0) -> Bool[Array, "*K H"]:
    """Units above the threshold."""
    return relative > threshold


def layer_relative(values: Float[Array, "*K H"]) -> Float[Array, "*K H"]:
    """Values over their layer's mean; NaN in a layer of zeros. ReDo's score of mean |h|, GraMa's of mean |dL/dh|."""
    return _divide(values, values.mean(axis=-1, keepdims=True))


def dormant(absolute: Float[Array, "*K H"], tau: Float[Array, ""] | float = 0.1) -> Bool[Array, "*K H"]:
    """Units whose mean |h| is at most tau times the layer's mean; all of a layer that never fires.

    References:
        Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023, Definition 3.1.
    """
    return ~(layer_relative(absolute) > tau)


def weight_gradient(grads: Flat, layer: NeuronLayer) -> Float[Array, "*K H"]:
    """GraMa's weight form: the mean |dL/dw| over every unit's incoming weights."""
    views = jnp.concatenate([incoming_view(grads[path], layer) for path in layer.incoming], axis=-2)
    return jnp.abs(views).mean(axis=-2)

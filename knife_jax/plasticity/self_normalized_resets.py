"""Self-normalized resets: a unit starts anew when it is silent for longer than it ever is when it is well."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from knife_jax.networks.neurons import NeuronLayer
from knife_jax.plasticity import taps as tapping
from knife_jax.plasticity.checks import check_number, is_relu, keep_layers
from knife_jax.plasticity.graph import Graph
from knife_jax.plasticity.lift import lift
from knife_jax.plasticity.method import Method, Report, Swept, Trees, Variables, method
from knife_jax.plasticity.optimizer import Treatment
from knife_jax.plasticity.recycle import Rule, count, recycle

BINS = 64
"""Bins of every unit's histogram of silences."""

_ROUNDING = 1e-6


class SilenceState(NamedTuple):
    """What is remembered of every unit.

    Attributes:
        age: `{layer: [*K, H]}`, batches since it last fired.
        histogram: `{layer: [*K, H, BINS]}`, how often a silence of each length ended since thresholds were last updated.
        threshold: `{layer: [*K, H]}`, the silence that leads to a reset.
        updates: gradient steps since thresholds were last updated.
    """

    age: dict[str, Array]
    histogram: dict[str, Array]
    threshold: dict[str, Array]
    updates: Int[Array, ""]


class _Settings(NamedTuple):
    eta: Any
    expansion: Any
    max_threshold: float
    threshold_updates: int
    rule: Rule

    @property
    def edges(self) -> Float[np.ndarray, "N"]:
        """The longest silence of every bin: 0, then 1 to `max_threshold` in equal ratios."""
        return np.concatenate([[0.0], self.max_threshold ** np.linspace(0.0, 1.0, BINS - 1)]).astype(np.float32)


def self_normalized_resets(
    graph: Graph,
    eta: Swept = 0.05,
    *,
    layers: str | Sequence[str] = "all",
    threshold_updates: int = 1000,
    max_threshold: float = 10_000.0,
    expansion: Swept = 2.0,
    bias: str = "zeros",
    optimizer_state: Treatment = "fresh",
    target: bool = False,
) -> Method:
    """Resets a unit once it has been silent for as many batches as its own threshold, the (1 - eta) percentile of its silences.

    A unit is silent on a batch if h <= 0 on all of it. Every so many gradient steps its threshold becomes that percentile, over the
    silences since the last time, if this is lower, and `expansion` times what it was if not. The histogram has 64 bins, of equal ratio
    from 1 to `max_threshold`; a percentile is the longest silence of its bin. A silence that a reset ends counts with its length so far.

    Args:
        graph: the layers of a model.
        eta: how rarely a healthy unit is to be this silent.
        layers: which ones, see `Graph.select`; `all` leaves out those that are no ReLU layers.
        threshold_updates: gradient steps between updates of thresholds.
        max_threshold: the largest threshold, in batches, and the first; thresholds are at least one batch.
        expansion: of thresholds that are not lowered.
        bias: of reset units, `zeros` or `drawn` by the model's initializer.
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`; the source's is `zeros`.
        target: whether the target network is given the same fresh weights.

    Raises:
        ValueError: for numbers out of range, an option that does not exist, or layers whose units do not fire or stay silent.

    References:
        Farias, Jozefiak, Self-Normalized Resets for Plasticity in Continual Learning, 2025 (`ajozefiak/SelfNormalizedResets`). There
        silences are counted in samples, whole batches at a time, in a histogram with a bin for each; thresholds are updated at the end of
        tasks. Here the count is of batches, and thresholds are updated on a clock of their own, so that tasks need not be known.
    """
    check_number("eta", eta, above=0, below=1)
    check_number("threshold_updates", threshold_updates, at_least=1)
    check_number("max_threshold", max_threshold, above=1)
    check_number("expansion", expansion, at_least=1)
    chosen = keep_layers(graph, layers, _never_silent, "self-normalized resets")
    rule = Rule("zeros", bias, optimizer_state, target).check()
    settings = _Settings(eta, expansion, max_threshold, threshold_updates, rule)
    return method(
        "self_normalized_resets",
        lift=partial(lift, graph),
        wrap_optimizer=rule.wrap_optimizer,
        taps=lambda state: tapping.zeros(chosen, ("fired",)),
        init=partial(_init, chosen, settings),
        observe=partial(_observe, settings),
        apply=partial(_apply, chosen, settings),
        every_update=True,
    )


def _never_silent(layer: NeuronLayer) -> str | None:
    if layer.kind != "dense" or not is_relu(layer.activation):
        return "only ReLU units fire or stay silent"
    return None


def _init(graph: Graph, settings: _Settings, variables: Variables) -> SilenceState:
    shapes = {layer.name: (*layer.stack, layer.size) for layer in graph.layers}
    return SilenceState(
        {name: jnp.zeros(shape, jnp.int32) for name, shape in shapes.items()},
        {name: jnp.zeros((*shape, BINS)) for name, shape in shapes.items()},
        {name: jnp.full(shape, settings.max_threshold, jnp.float32) for name, shape in shapes.items()},
        jnp.zeros((), jnp.int32),
    )


def _recorded(histogram: Array, age: Array, ended: Array, settings: _Settings) -> Array:
    """The histogram with the silences that ended."""
    place = jnp.searchsorted(jnp.asarray(settings.edges), age.astype(jnp.float32), side="left")
    bins = jax.nn.one_hot(jnp.minimum(place, BINS - 1), BINS, dtype=histogram.dtype)
    return histogram + jnp.where(ended[..., None], bins, 0)


def _observe(settings: _Settings, state: SilenceState, variables: Variables, grads: Any, taps: Any) -> SilenceState:
    age, histogram = {}, {}
    for name, before in state.age.items():
        fired, seen = taps[name]["fired"] > 0, taps[name]["count"] > 0
        histogram[name] = _recorded(state.histogram[name], before, fired, settings)
        age[name] = jnp.where(fired, 0, before + seen)
    return SilenceState(age, histogram, state.threshold, state.updates + 1)


def _apply(
    graph: Graph, settings: _Settings, key: PRNGKeyArray, state: SilenceState, trees: Trees, tx: Any = None
) -> tuple[SilenceState, Trees, Report]:
    masks = {name: age >= state.threshold[name] for name, age in state.age.items()}
    histogram = {name: _recorded(state.histogram[name], state.age[name], mask, settings) for name, mask in masks.items()}
    age = {name: jnp.where(mask, 0, state.age[name]) for name, mask in masks.items()}
    trees = recycle(graph, masks, key, trees, tx, settings.rule)
    updated = partial(_update_thresholds, settings)
    state = SilenceState(age, histogram, state.threshold, state.updates)
    state = jax.lax.cond(state.updates >= settings.threshold_updates, updated, lambda state: state, state)
    return state, trees, {f"{name}/treated": count(mask) for name, mask in masks.items()}


def _update_thresholds(settings: _Settings, state: SilenceState) -> SilenceState:
    threshold = {name: _new_threshold(settings, state.histogram[name], old) for name, old in state.threshold.items()}
    return SilenceState(state.age, jax.tree.map(jnp.zeros_like, state.histogram), threshold, jnp.zeros_like(state.updates))


def _new_threshold(settings: _Settings, histogram: Float[Array, "*K H N"], old: Float[Array, "*K H"]) -> Float[Array, "*K H"]:
    """The percentile of the silences if lower than before, else an expansion; as before for units without any."""
    total = histogram.sum(axis=-1, keepdims=True)
    below = jnp.cumsum(histogram, axis=-1) < (1 - settings.eta - _ROUNDING) * total
    percentile = jnp.asarray(settings.edges)[below.sum(axis=-1)]
    new = jnp.where(percentile < old, percentile, old * settings.expansion)
    return jnp.where(total[..., 0] > 0, jnp.clip(new, 1.0, settings.max_threshold), old)

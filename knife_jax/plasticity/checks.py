"""What every factory of a method refuses, in words."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from numbers import Real
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from envs.base import unknown_name
from knife_jax.networks.neurons import NeuronLayer
from knife_jax.plasticity.graph import Graph


def check_number(
    name: str,
    value: Any,
    *,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Refuses a Python number out of range; arrays, whose values may not be known yet, pass.

    Raises:
        ValueError: if the number is not in the range, or NaN.
    """
    if not isinstance(value, Real):
        return
    number = float(value)
    bounds = {
        "at least": (at_least, at_least is None or number >= at_least),
        "above": (above, above is None or number > above),
        "at most": (at_most, at_most is None or number <= at_most),
        "below": (below, below is None or number < below),
    }
    if not all(kept for _, kept in bounds.values()):
        wanted = " and ".join(f"{word} {bound:g}" for word, (bound, _) in bounds.items() if bound is not None)
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuses an option that does not exist.

    Raises:
        ValueError: with the nearest one that does.
    """
    known = tuple(known)
    if value not in known:
        raise unknown_name(name, value, known)


def keep_layers(graph: Graph, layers: str | Sequence[str], refusal: Any, what: str) -> Graph:
    """The layers that a method can be put on.

    Args:
        graph: all layers.
        layers: which ones, see `Graph.select`.
        refusal: `layer -> reason` why it cannot be, or None.
        what: the method, for the error.

    Raises:
        ValueError: if a layer asked for by name cannot be, or none can.
    """
    wanted = (layers,) if isinstance(layers, str) else tuple(layers)
    chosen = graph.select(layers)
    reasons: dict[str, str | None] = {layer.name: refusal(layer) for layer in chosen.layers}
    for name, reason in reasons.items():
        if reason and name in wanted:
            raise ValueError(f"layers: no {what} on {name}: {reason}")

    def fits(layer: NeuronLayer) -> bool:
        return reasons[layer.name] is None

    kept = chosen.only(fits)
    if not kept.layers:
        raise ValueError(f"layers: no {what} on any of {', '.join(wanted)}")
    return kept


@cache
def is_relu(activation: Callable[[Array], Array]) -> bool:
    """Whether an activation is max(x, 0), tried on a few numbers."""
    inputs = np.array([-50.0, -1.3, -0.1, 0.0, 0.2, 4.0], np.float32)
    return np.array_equal(_evaluated(activation, inputs), np.maximum(inputs, 0))


@cache
def is_positively_homogeneous(activation: Callable[[Array], Array]) -> bool:
    """Whether an activation satisfies f(c x) = c f(x) for every c > 0, tried on a few numbers."""
    inputs, factors = np.array([-3.0, -0.7, 0.0, 0.4, 2.0], np.float32), np.array([[0.3], [1.7], [40.0]], np.float32)
    scaled = _evaluated(activation, factors * inputs[None])
    return np.allclose(scaled, factors * _evaluated(activation, inputs)[None], rtol=1e-4, atol=1e-6)


def _evaluated(activation: Callable[[Array], Array], inputs: np.ndarray) -> np.ndarray:
    """An activation's values, compiled ahead of time: methods are also made while something else is traced."""
    return np.asarray(jax.jit(activation).lower(inputs).compile()(inputs))

"""What composites can be put on: which layers, with how many slots, and what must be there to rewrite them."""

import math
from collections.abc import Sequence

from knife_jax.plasticity.graph import Graph, NeuronLayer
from knife_jax.plasticity.method import Trees

MOST_PAIRS = 3.0
"""The largest reserve that `auto` takes, in pairs per live unit."""


def composable(graph: Graph, layers: str | Sequence[str] = "all", composite: str = "separate") -> Graph:
    """The layers that composites can be put on.

    Raises:
        ValueError: if a layer is asked for by name that cannot carry them, or none can.
    """
    chosen = graph.select(layers)
    wanted = (layers,) if isinstance(layers, str) else tuple(layers)
    for layer in chosen.layers:
        reason = _refusal(layer, composite)
        if reason and layer.name in wanted:
            raise ValueError(f"layers: no composites on {layer.name}: {reason}")
    kept = chosen.only(lambda layer: _refusal(layer, composite) is None)
    if not kept.layers:
        raise ValueError(f"layers: none of {', '.join(wanted)} can carry composites")
    return kept


def _refusal(layer: NeuronLayer, composite: str) -> str | None:
    if layer.kind == "mixing":
        return "a compensation neuron enters with a minus sign and would break the monotone mixing layer's dQ_tot/dq >= 0"
    if layer.kind == "gru" and composite == "shared":
        return "with shared outgoing weights its knowledge neurons would read A's changes through the recurrence; use composite='separate'"
    if layer.normalised:
        return "a normalisation over the layer's units would see the composite's parts"
    if layer.leaks:
        return "its units are read by more than its outgoing kernels, so that compensation cannot reach every reader"
    return None


def reserve_size(graph: Graph, reserve: float | str, max_fraction: float, interventions: int | None, when_full: str | None) -> float:
    """Slots per live unit; enough for the layer that needs most, where at least one unit is always treated.

    Raises:
        ValueError: for a reserve that is not positive or must run out.
    """
    share = max(max(1, math.floor(max_fraction * layer.size)) / layer.size for layer in graph.layers)
    most = None if interventions is None else interventions * share
    if reserve == "auto":
        pairs = min(MOST_PAIRS, most) if most else 1.0
    elif isinstance(reserve, str) or not reserve > 0:
        raise ValueError(f"reserve: a positive number of pairs per live unit, or 'auto'; got {reserve!r}")
    else:
        pairs = float(reserve)
    if most is not None and most > pairs and when_full is None:
        raise ValueError(
            f"reserve: {interventions} interventions of up to {share:g} of a layer need {most:g} pairs per unit, the reserve has "
            f"{pairs:g} and may run out; enlarge it, intervene less often, or choose when_full='skip' or 'recycle'"
        )
    return pairs


def check_states(graph: Graph, trees: Trees) -> None:
    """Refuses to rewrite recurrent units without their running states.

    Raises:
        ValueError: if they are not in `trees.states`.
    """
    for layer in graph.layers:
        if layer.kind == "gru" and layer.name not in (trees.states or {}):
            raise ValueError(
                f"trees.states: no composites on the recurrent units of {layer.name} without their running states; pass "
                f"{{{layer.name!r}: [..., S]}}, S as in Method.state_sizes, or [0, S] where no sequence is under way"
            )

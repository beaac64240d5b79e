"""Plasticity injection: KNIFE's operator on every unit of the last hidden layers at once."""

from collections.abc import Sequence

from knife_jax.plasticity.eligibility import MOST_PAIRS, composable
from knife_jax.plasticity.graph import Graph, NeuronLayer
from knife_jax.plasticity.knife import Settings, composite_method
from knife_jax.plasticity.method import Method
from knife_jax.plasticity.optimizer import Treatment


def plasticity_injection(
    graph: Graph,
    *,
    layers: str | Sequence[str] = "last",
    interventions: int | None = None,
    optimizer_state: Treatment = "keep",
) -> Method:
    """Freezes the last hidden block and head, and adds a fresh trainable copy minus its frozen initial self.

    `Q = h_theta + h_theta1 - h_theta2` with theta and theta2 frozen and theta1 = theta2 at injection, in both networks at the same step.
    The head is linear, so that freezing its weights and adding fresh ones per hidden unit is the composite of `knife` on the whole layer;
    the head's bias stays one trainable number (theta's and theta1's biases only ever enter as a sum).

    Fresh weights are drawn at the injection, where the source takes a draw from the start of the program. "Last hidden" is, for every
    network and every head in it, the last layer of Dense units: for recurrent agents that is the layer before the GRU.

    Args:
        graph: the layers of a model.
        layers: `last`, or names as in `Graph.select`.
        interventions: how many injections are planned, each of which takes one slot per unit; 1 if not given. There is room for three;
            later ones do nothing and are counted as `reserve_full`.
        optimizer_state: what becomes of the optimizer's entries; the source keeps them, having found that resetting hurt.

    Raises:
        ValueError: for layers that cannot carry composites.

    References:
        Nikishin et al., Deep Reinforcement Learning with Plasticity Injection, 2023.
    """
    chosen = composable(graph, "all" if layers == "last" else layers)
    if layers == "last":
        chosen = chosen.only(lambda layer: not _feeds_another(layer, chosen))
    settings = Settings(max_fraction=1.0, optimizer_state=optimizer_state, dead_units=False, choose="all")
    return composite_method("plasticity_injection", chosen, settings, min(MOST_PAIRS, float(interventions or 1)))


def _feeds_another(layer: NeuronLayer, graph: Graph) -> bool:
    made = {other.module for other in graph.layers}
    return any(kernel[:-1] in made for kernel in layer.outgoing)

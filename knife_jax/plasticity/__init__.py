"""Stagnant neurons and their cures: pure functions over parameter dicts and the graph of their neurons.

Works on any Flax model: find its neurons with `discover` (or declare them with `make_graph`), make a method for that graph, and call the
method's functions from a training loop; see `Method`.
"""

from knife_jax.networks.neurons import NeuronLayer
from knife_jax.plasticity.continual_backprop import continual_backprop
from knife_jax.plasticity.discover import discover
from knife_jax.plasticity.graph import Graph, make_graph
from knife_jax.plasticity.injection import plasticity_injection
from knife_jax.plasticity.knife import (
    freeze_and_zero,
    knife,
    knife_without_active,
    knife_without_compensation,
    knife_without_knowledge,
    random_neurons,
)
from knife_jax.plasticity.knife_mixing import knife_mixing
from knife_jax.plasticity.method import Method, Trees, chain, method, none
from knife_jax.plasticity.reborn import reborn
from knife_jax.plasticity.recycle import redo, regrama
from knife_jax.plasticity.registry import METHODS, make
from knife_jax.plasticity.regularisers import l2_init, layer_norm, spectral, weight_decay
from knife_jax.plasticity.resets import reset, shrink_perturb
from knife_jax.plasticity.self_normalized_resets import self_normalized_resets

__all__ = [
    "METHODS",
    "Graph",
    "Method",
    "NeuronLayer",
    "Trees",
    "chain",
    "continual_backprop",
    "discover",
    "freeze_and_zero",
    "knife",
    "knife_mixing",
    "knife_without_active",
    "knife_without_compensation",
    "knife_without_knowledge",
    "l2_init",
    "layer_norm",
    "make",
    "make_graph",
    "method",
    "none",
    "plasticity_injection",
    "random_neurons",
    "reborn",
    "redo",
    "regrama",
    "reset",
    "self_normalized_resets",
    "shrink_perturb",
    "spectral",
    "weight_decay",
]

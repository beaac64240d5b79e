"""Diagnoses of a learner's networks on batches from its replay."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

from knife_jax import learner, replay
from knife_jax.learner import LearnerState, Metrics
from knife_jax.model import Hyper, Networks
from knife_jax.plan import Plan
from knife_jax.plasticity import diagnostics, scores
from knife_jax.plasticity.graph import flat

Masks = dict[str, Bool[Array, "*K H"]]


def blank_masks(networks: Networks) -> Masks:
    """No unit of any layer."""
    return {layer.name: jnp.zeros((*layer.stack, layer.size), bool) for layer in networks.graph.layers}


def names(networks: Networks) -> list[str]:
    """The names of what `diagnose` measures, without computing anything."""
    overlaps = [f"{layer.name}/overlap" for layer in networks.graph.layers]
    return [f"plasticity/{name}" for name in diagnostics.measure_names(networks.graph) + overlaps]


def diagnose(
    key: PRNGKeyArray, learned: LearnerState, networks: Networks, stored: replay.ReplayState, plan: Plan, hyper: Hyper, before: Masks
) -> tuple[Metrics, Masks]:
    """Measures every hidden layer on `plasticity.diagnostic_batches` batches, without a step.

    Activity is averaged over the batches at the present weights, unlike that of KNIFE's own window, whose weights move.

    Args:
        key: draws the batches.
        learned: the learner.
        networks: its networks.
        stored: the replay.
        plan: static sizes.
        hyper: sweepable numbers.
        before: the stagnant units of the diagnosis before.

    Returns:
        `plasticity/<layer>/<measure>` as in `diagnostics.measure`, with `overlap` between `before` and the units now stagnant, and these.
    """
    graph, settings = networks.graph, networks.config.replay
    leaves = flat(learned.params)

    def one_batch(carry: tuple[scores.Window, Any, Any], key: PRNGKeyArray) -> tuple[tuple[scores.Window, Any, Any], None]:
        window, grads_so_far, seen_so_far = carry
        split = networks.split
        batch = replay.sample(key, stored, settings.batch_size, plan.sequence_slots, plan.sequence_stride, settings.burn_in, split)

        def objective(params: Any, taps: Any) -> Array:
            variables = {"params": params, "reserve": learned.reserve, "taps": taps}
            return learner.loss_fn(variables, learned.target_variables, networks, batch, hyper)[0]

        grads, seen = split.summed(jax.grad(objective, argnums=(0, 1))(learned.params, diagnostics.blank_taps(graph)))
        window = scores.watch(window, graph, flat(grads), leaves)
        return (window, diagnostics.add(grads_so_far, grads), diagnostics.add(seen_so_far, seen)), None

    nothing = (scores.new_window(graph), jax.tree.map(jnp.zeros_like, learned.params), diagnostics.blank_taps(graph))
    batches = networks.config.plasticity.diagnostic_batches
    (window, grads, seen), _ = jax.lax.scan(one_batch, nothing, jax.random.split(key, batches))
    grads = jax.tree.map(lambda total: total / batches, grads)
    measures, stagnant = diagnostics.measure(graph, learned.params, grads, window, seen)
    measures |= {f"{name}/overlap": diagnostics.overlap(before[name], mask) for name, mask in stagnant.items()}
    return {f"plasticity/{name}": value for name, value in measures.items()}, stagnant

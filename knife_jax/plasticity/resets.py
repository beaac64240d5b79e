"""Cures that rewrite whole parameters: resets, and the three algorithms called shrink and perturb."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from knife_jax.plasticity.checks import check_choice, check_number
from knife_jax.plasticity.graph import Flat, Graph, Path, flat
from knife_jax.plasticity.method import Method, Report, Swept, Trees, method
from knife_jax.plasticity.optimizer import Treatment
from knife_jax.plasticity.recycle import Rule, fresh_leaves, replace
from knife_jax.plasticity.regularisers import copied_params


def reset(graph: Graph, which: str = "last", *, optimizer_state: Treatment = "fresh", target: bool = True) -> Method:
    """Draws parameters anew.

    A reserve, which others own, stays as it is. The report's `all/treated` counts numbers.

    Args:
        graph: the layers of a model.
        which: `last`, the modules that read hidden units and make none (the heads of agent and hypernetworks); `all`; or
            `except_recurrent`, all but the weights and biases that recurrent units read through.
        optimizer_state: what becomes of the moments, see `optimizer.Treatment`; counters and learning-rate schedules go on.
        target: whether the target network is given the same fresh weights.

    Raises:
        ValueError: for an option that does not exist.

    References:
        Nikishin et al., The Primacy Bias in Deep Reinforcement Learning, 2022 (last layers, or all, with target network and optimizer).
        `except_recurrent` is what the `ReSet` of Qin et al., The Dormant Neuron Phenomenon in Multi-Agent Reinforcement Learning Value
        Factorization, 2024, does in code; their paper says last layers. Both keep optimizer and target network there.
    """
    check_choice("which", which, ("last", "all", "except_recurrent"))
    rule = Rule(optimizer_state=optimizer_state, target=target).check()
    apply = partial(_apply_reset, graph, which, rule)
    return method("reset", wrap_optimizer=rule.wrap_optimizer, apply=apply)


def _apply_reset(
    graph: Graph, which: str, rule: Rule, key: PRNGKeyArray, state: Any, trees: Trees, tx: Any = None
) -> tuple[Any, Trees, Report]:
    leaves = flat(trees.variables["params"])
    recurrent = {path for layer in graph.layers if layer.kind == "gru" for path in (*layer.incoming, *layer.biases)}
    is_reset = {
        "last": lambda path: path[:-1] in graph.heads,
        "all": lambda path: True,
        "except_recurrent": lambda path: path not in recurrent,
    }[which]
    fresh = fresh_leaves(graph, key, leaves)
    chosen = [path for path in leaves if is_reset(path)]
    new = {path: fresh[path] for path in chosen}
    return state, replace(trees, lambda _: new, _whole(leaves, chosen), tx, rule), _numbers(leaves, chosen)


def _whole(leaves: Flat, chosen: list[Path]) -> Flat:
    """Marks all entries of the chosen parameters."""
    return {path: jnp.full(leaf.shape, path in chosen) for path, leaf in leaves.items()}


def _numbers(leaves: Flat, chosen: list[Path]) -> Report:
    return {"all/treated": jnp.asarray(float(sum(leaves[path].size for path in chosen)))}


class _Variant(NamedTuple):
    """One of the algorithms: its default numbers, and whether it works after every gradient step."""

    shrink: float
    perturb: float | None
    every_update: bool = False


_VARIANTS = {"ash_adams": _Variant(0.8, 0.01), "initial": _Variant(0.8, None), "continuous": _Variant(1 - 1e-5, 1e-5, True)}


def shrink_perturb(
    graph: Graph,
    variant: str = "ash_adams",
    shrink: Swept = None,
    perturb: Swept = None,
    *,
    optimizer_state: Treatment = "keep",
    target: bool = False,
) -> Method:
    """Shrinks all parameters and adds something, in one of three different ways that share this name.

    * `ash_adams`: `shrink * theta + perturb * fresh`, with fresh parameters drawn by the model's initializer; on a schedule.
    * `initial`: `shrink * theta + (1 - shrink) * theta_0`, towards the parameters that training began with; on a schedule.
    * `continuous`: `shrink * theta + perturb * N(0, 1)` after every gradient step.

    Args:
        graph: the layers of a model.
        variant: which one.
        shrink: None for the variant's own: .8, .8 and 1 - 1e-5.
        perturb: None for the variant's own: .01, none and 1e-5.
        optimizer_state: what becomes of the moments, see `optimizer.Treatment`; the sources keep them.
        target: whether the target network is shrunk too and given the same addition.

    Raises:
        ValueError: for a variant that does not exist, numbers out of range, a `perturb` for `initial`, or a `continuous` one that does not
            keep the optimizer's state.

    References:
        `ash_adams`: Ash, Adams, On Warm-Starting Neural Network Training, 2020; the noise is the initializer's draw, as in later ports,
        and biases are treated like kernels. `initial`: Yang et al., Sample-Efficient Multiagent Reinforcement Learning with Reset Replay,
        2024. `continuous`: Dohare et al., Loss of plasticity in deep continual learning, 2024; they shrink through the optimizer's weight
        decay, and the default numbers for it are ours.
    """
    check_choice("variant", variant, _VARIANTS)
    known = _VARIANTS[variant]
    if known.perturb is None and perturb is not None:
        raise ValueError(f"perturb: the variant {variant!r} adds the initial parameters and nothing else; leave it out")
    if known.every_update and optimizer_state != "keep":
        raise ValueError(f"optimizer_state: the variant {variant!r} works at every update and would never let moments grow; take 'keep'")
    shrink = known.shrink if shrink is None else shrink
    perturb = known.perturb if perturb is None else perturb
    check_number("shrink", shrink, at_least=0, at_most=1)
    check_number("perturb", perturb, at_least=0)
    rule = Rule(optimizer_state=optimizer_state, target=target).check()
    return method(
        "shrink_perturb",
        wrap_optimizer=rule.wrap_optimizer,
        init=copied_params if variant == "initial" else lambda variables: (),
        apply=partial(_apply_shrink, graph, variant, (shrink, perturb), rule),
        every_update=known.every_update,
    )


def _apply_shrink(
    graph: Graph, variant: str, numbers: tuple[Any, Any], rule: Rule, key: PRNGKeyArray, state: Any, trees: Trees, tx: Any = None
) -> tuple[Any, Trees, Report]:
    leaves, (shrink, perturb) = flat(trees.variables["params"]), numbers
    if variant == "initial":
        added = {path: (1 - shrink) * first for path, first in flat(state).items()}
    elif variant == "ash_adams":
        fresh = fresh_leaves(graph, key, leaves)
        added = {path: perturb * fresh[path] for path in leaves if path in graph.shapes}
    else:
        keys = jax.random.split(key, len(leaves))
        added = {path: perturb * _noise(noise, leaves[path]) for noise, path in zip(keys, leaves, strict=True)}

    def moved(leaves: Flat) -> Flat:
        return {path: (shrink * leaves[path] + values).astype(leaves[path].dtype) for path, values in added.items()}

    return state, replace(trees, moved, _whole(leaves, list(added)), tx, rule), _numbers(leaves, list(added))


def _noise(key: PRNGKeyArray, like: Array) -> Float[Array, "..."]:
    return jax.random.normal(key, like.shape, like.dtype)

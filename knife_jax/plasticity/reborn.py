"""ReBorn: dormant units take a share of the work of over-active ones."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from knife_jax.plasticity import scores
from knife_jax.plasticity import taps as tapping
from knife_jax.plasticity.checks import check_choice, check_number, is_positively_homogeneous, keep_layers
from knife_jax.plasticity.composite import over_stack
from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, Units, flat, read, write
from knife_jax.plasticity.method import Method, Report, Swept, Trees, method
from knife_jax.plasticity.optimizer import Treatment
from knife_jax.plasticity.recycle import Masks, Rule, count, entries, fresh_leaves, replace, watch

MOST_DEPENDANTS = 5
"""So many dormant units at most share the work of one over-active unit."""


class _Shares(NamedTuple):
    """Who shares whose work, in one member of a layer.

    Attributes:
        source: of every unit, the over-active unit whose weights it takes; of an over-active one with dependants, itself; H for others.
        scale: by what incoming weights and bias are multiplied.
        share: what part of the outgoing weights it gets, `[H, O]` or `[H, 1]`.
    """

    source: Int[Array, "H"]
    scale: Float[Array, "H"]
    share: Float[Array, "H O"]


def reborn(
    graph: Graph,
    mode: str = "paper",
    tau: Swept = 0.1,
    beta: Swept = 3.0,
    *,
    layers: str | Sequence[str] = "mixer",
    window: str = "last",
    optimizer_state: Treatment = "keep",
) -> Method:
    """Spreads every over-active unit over itself and a few dormant ones, whose own weights are lost.

    A unit is dormant if its mean |h| is at most `tau` times the layer's mean, over-active if above `beta` times. Dormant units that join
    an over-active one take its incoming weights and bias, scaled, and a share of its outgoing weights, divided by that scale; together they
    give what the one gave. Dormant units that join none get fresh incoming and zero outgoing weights. What the dormant units gave before is
    lost, so the function changes by that much. The target network is left alone.

    Modes: in `paper`, over-active units in random order take 2 to 5 dormant ones each while there are any, scales are U(.5, 1.5), that of
    the over-active unit too, and each unit has one softmax share. In `code`, each dormant unit joins a random over-active one that has less
    than 5, its scale is U(.3, .8), the over-active unit's 1, and there is a share for every output.

    Args:
        graph: the layers of a model.
        mode: `paper` or `code`.
        tau: threshold of dormancy.
        beta: threshold of over-activity.
        layers: which ones, see `Graph.select`; where no network is called `mixer`, that means all.
        window: mean |h| over the most recent batch (`last`) or over all since the last intervention (`window`).
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`; theirs is `keep`.

    Raises:
        ValueError: for thresholds that are negative or overlap, an option that does not exist, or layers whose units cannot be split.

    References:
        Qin et al., The Dormant Neuron Phenomenon in Multi-Agent Reinforcement Learning Value Factorization, 2024. Written from the paper
        and a description of the behaviour of its code. They measure on the 32 latest episodes, padded steps included, and draw fresh
        weights by Xavier (paper) or PyTorch's default (code); here the model's initializer draws, and padded steps do not count.
    """
    check_choice("mode", mode, ("paper", "code"))
    check_choice("window", window, ("last", "window"))
    check_number("tau", tau, at_least=0)
    check_number("beta", beta, at_least=tau if isinstance(tau, float | int) else 0)
    rule = Rule(optimizer_state=optimizer_state).check()
    networks = {layer.network for layer in graph.layers}
    chosen = keep_layers(graph, "all" if layers == "mixer" and "mixer" not in networks else layers, _unsplittable, "ReBorn")
    return method(
        "reborn",
        wrap_optimizer=rule.wrap_optimizer,
        apply=partial(_apply, chosen, mode, (tau, beta), rule),
        **watch(graph, chosen, "absolute", accumulate=window == "window"),
    )


def _unsplittable(layer: NeuronLayer) -> str | None:
    if layer.kind != "dense":
        return "recurrent units cannot be split among several"
    if layer.normalised:
        return "a normalisation over the layer's units would see the dormant ones change"
    if layer.leaks:
        return "its units are read by more than its outgoing kernels, so that a share cannot reach every reader"
    if not is_positively_homogeneous(layer.activation):
        return "its activation must satisfy f(c x) = c f(x) for every c > 0, as ReLU does"
    return None


def _apply(
    graph: Graph, mode: str, thresholds: tuple[Any, Any], rule: Rule, key: PRNGKeyArray, state: Any, trees: Trees, tx: Any = None
) -> tuple[Any, Trees, Report]:
    key, key_draw = jax.random.split(key)
    leaves = flat(trees.variables["params"])
    fresh = fresh_leaves(graph, key_draw, leaves)
    new, treated, report = dict(leaves), {}, {}
    for layer, layer_key in zip(graph.layers, jax.random.split(key, len(graph.layers)), strict=True):
        activity, seen = tapping.means(state[layer.name])["absolute"], state[layer.name]["count"] > 0
        dormant = scores.dormant(activity, thresholds[0]) & seen
        over = (scores.layer_relative(activity) > thresholds[1]) & ~dormant
        new, shared = _share_layer(layer_key, new, fresh, layer, dormant, over, mode)
        treated[layer.name] = (dormant, shared & over)
        said = {"dormant": dormant, "over_active": over, "treated": dormant | shared, "reborn": dormant & shared}
        report |= {f"{layer.name}/{measure}": count(mask) for measure, mask in said.items()}
    trees = replace(trees, lambda _: new, _changed(graph, leaves, treated, mode), tx, rule)
    return jax.tree.map(jnp.zeros_like, state), trees, report


def _changed(graph: Graph, leaves: Flat, treated: dict[str, tuple[Array, Array]], mode: str) -> Flat:
    """Which entries are rewritten: everything of dormant units; of split ones outgoing weights, and in the paper's mode all."""
    everything: Masks = {name: dormant | split for name, (dormant, split) in treated.items()}
    dormant_only = {name: dormant for name, (dormant, _) in treated.items()}
    incoming, _ = entries(graph, everything if mode == "paper" else dormant_only, leaves)
    _, outgoing = entries(graph, everything, leaves)
    return {path: incoming[path] | outgoing[path] for path in leaves}


def _share_layer(
    key: PRNGKeyArray, leaves: Flat, fresh: Flat, layer: NeuronLayer, dormant: Array, over: Array, mode: str
) -> tuple[Flat, Bool[Array, "*K H"]]:
    """Rewrites one layer; says which units share work."""
    keys = jax.random.split(key, layer.stack) if layer.stack else key
    function = over_stack(partial(_share_member, mode), layer)
    units, shared = function(keys, read(leaves, layer), read(fresh, layer), dormant, over)
    return write(leaves, layer, units), shared


def _share_member(
    mode: str, key: PRNGKeyArray, units: Units, fresh: Units, dormant: Bool[Array, "H"], over: Bool[Array, "H"]
) -> tuple[Units, Bool[Array, "H"]]:
    """Rewrites one member of a layer."""
    plan = _divide_work(mode, key, dormant, over, units.outgoing.shape[-1])
    size = dormant.shape[0]
    shared = plan.source < size
    source = jnp.minimum(plan.source, size - 1)

    def incoming(old: Array, new: Array) -> Array:
        taken = old[:, source] * plan.scale[None]
        return jnp.where(shared[None], taken, jnp.where(dormant[None], new, old))

    outgoing = jnp.where(dormant[:, None], 0.0, units.outgoing)
    taken = units.outgoing[source] * plan.share / plan.scale[:, None]
    outgoing = jnp.where(shared[:, None], taken, outgoing)
    return Units(incoming(units.incoming, fresh.incoming), incoming(units.biases, fresh.biases), outgoing), shared


def _divide_work(mode: str, key: PRNGKeyArray, dormant: Bool[Array, "H"], over: Bool[Array, "H"], outputs: int) -> _Shares:
    """Draws who joins whom, and every unit's scale and share."""
    size = dormant.shape[0]
    key_owner, key_scale, key_share = jax.random.split(key, 3)
    owner = (take_in_turn if mode == "paper" else join_at_random)(key_owner, dormant, over)
    helped = jnp.zeros(size, bool).at[owner].set(True, mode="drop")
    source = jnp.where(helped, jnp.arange(size), owner)
    low, high = (0.5, 1.5) if mode == "paper" else (0.3, 0.8)
    scale = jax.random.uniform(key_scale, (size,), minval=low, maxval=high)
    if mode == "code":
        scale = jnp.where(dormant, scale, 1.0)
    weight = jnp.exp(jax.random.normal(key_share, (size, 1 if mode == "paper" else outputs)))
    total = jnp.zeros((size, weight.shape[-1])).at[source].add(weight, mode="drop")
    return _Shares(source, scale, weight / total[jnp.minimum(source, size - 1)])


def take_in_turn(key: PRNGKeyArray, dormant: Bool[Array, "H"], over: Bool[Array, "H"]) -> Int[Array, "H"]:
    """Over-active units in random order take 2 to 5 dormant ones each; of every unit its owner, or H."""
    size = dormant.shape[0]
    key_dormant, key_over, key_wanted = jax.random.split(key, 3)
    turn = _random_order(key_over, over)
    wanted = jnp.where(over[turn], jax.random.randint(key_wanted, (size,), 2, MOST_DEPENDANTS + 1), 0)
    place = jnp.searchsorted(jnp.cumsum(wanted), jnp.arange(size), side="right")
    owner_at = jnp.where(place < size, turn[jnp.minimum(place, size - 1)], size)
    queue = _random_order(key_dormant, dormant)
    return jnp.full(size, size).at[queue].set(jnp.where(dormant[queue], owner_at, size))


def join_at_random(key: PRNGKeyArray, dormant: Bool[Array, "H"], over: Bool[Array, "H"]) -> Int[Array, "H"]:
    """Dormant units in random order join a random over-active one with less than 5; of every unit its owner, or H."""
    size = dormant.shape[0]
    key_order, key_choice = jax.random.split(key)

    def join(dependants: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        unit, preference = step
        free = over & (dependants < MOST_DEPENDANTS)
        joins = dormant[unit] & free.any()
        owner = jnp.where(free, preference, -1.0).argmax()
        return dependants.at[owner].add(joins.astype(dependants.dtype)), jnp.where(joins, owner, size)

    queue = _random_order(key_order, dormant)
    preferences = jax.random.uniform(key_choice, (size, size))
    _, owners = jax.lax.scan(join, jnp.zeros(size, jnp.int32), (queue, preferences))
    return jnp.full(size, size).at[queue].set(owners)


def _random_order(key: PRNGKeyArray, first: Bool[Array, "H"]) -> Int[Array, "H"]:
    """Indices in random order, those of the masked units first."""
    return jnp.argsort(jnp.where(first, jax.random.uniform(key, first.shape), 2.0))

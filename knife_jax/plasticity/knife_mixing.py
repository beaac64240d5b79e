"""KNIFE on the units of QMIX's monotone mixing layer, compensated by an offset that reads the state alone."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from knife_jax.networks.neurons import NeuronLayer
from knife_jax.plasticity import mixing, scores
from knife_jax.plasticity import release as releasing
from knife_jax.plasticity import taps as tapping
from knife_jax.plasticity.checks import check_choice, check_number
from knife_jax.plasticity.composite import Placement, lowest, place_units
from knife_jax.plasticity.eligibility import reserve_size
from knife_jax.plasticity.graph import Flat, Graph, flat, nested
from knife_jax.plasticity.knife import drawn_once
from knife_jax.plasticity.lift import lift
from knife_jax.plasticity.method import Method, Report, Swept, Trees, Variables, method, no_fading
from knife_jax.plasticity.optimizer import Treatment, aged, rewrite

Choice = Literal["saturated", "stagnant", "random"]
MixingReference = Literal["layer", "history", "error"]


class MixingState(NamedTuple):
    """What is remembered between gradients.

    Attributes:
        window: update activity of the units since the last intervention, over the columns of w1 and b1.
        seen: sums over the window, see `mixing.blank_taps`.
        error: summed root mean square of dL/dQ_tot over the window.
        age: gradient steps since a slot was filled, `[R]`.
    """

    window: scores.Window
    seen: dict[str, Any]
    error: Array
    age: Array


class _Settings(NamedTuple):
    threshold: Any
    choose: Choice
    max_fraction: float
    reference: MixingReference
    centred: bool
    optimizer_state: Treatment
    release_updates: float | None


def knife_mixing(
    graph: Graph,
    threshold: Swept = 0.25,
    reserve: float | Literal["auto"] = "auto",
    *,
    choose: Choice = "saturated",
    max_fraction: float = 0.25,
    reference: MixingReference = "layer",
    centred: bool = False,
    optimizer_state: Treatment = "fresh",
    when_full: Literal["skip"] | None = None,
    release_updates: float | None = None,
    interventions: int | None = None,
) -> Method:
    """A variant of KNIFE for the layer that `knife` must leave alone: composites on QMIX's mixing units, monotone in every agent's value.

    At an intervention a chosen unit's columns of the heads w1, b1 and w2 move into a slot of the reserve and are frozen (K), the unit gets
    fresh ones (A), and A's contribution at the mean chosen values of the window is taken away by an offset that reads the state alone (see
    `mixing`). Hence dQ_tot/dq_i >= 0 always, and Q_tot stays what it was where every q_i is its mean, for every state. Elsewhere it
    changes; the report's `change` is what `mixing.change_bound` gives at the window's mean features and one standard deviation of the
    values, summed over interventions. The target network gets the same A and offset and its own K. The features in front of the heads go on
    learning, under K too.

    Args:
        graph: the layers of a model, with a mixing layer.
        threshold: of what `choose` says.
        reserve: slots per unit (rounded up); `auto` takes `interventions * max_fraction`, at most 3.
        choose: `saturated` units, whose ELU's mean slope over the window is below the threshold; `stagnant` ones, whose relative update
            activity is; or as many `random` units as are saturated, a null control.
        max_fraction: of the units, at most so many per intervention (at least one), the lowest first.
        reference: of relative update activity, see `scores.relative_activity`; `error` needs `taps["error"]`.
        centred: whether b1 of fresh units is shifted so that the mean values cancel at the window's mean features. Their ELUs then start
            open however large the values are.
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`.
        when_full: `skip` leaves units alone that find no slot (`reserve_full`).
        release_updates: half-life, in gradient steps, with which K and the offset fade, see `release`; None: they stay.
        interventions: how many are planned; with it, a reserve that must run out is refused unless `when_full` says `skip`.

    Raises:
        ValueError: for networks without a monotone mixing layer, a reserve that is not positive or must run out, or a fraction
            outside (0, 1].

    References:
        A variant of this library, no part of Stagnant Neuron (arXiv 2606.25335). The layer: Rashid et al., QMIX, 2018.
    """
    if graph.mixing is None:
        raise ValueError("knife_mixing: these networks have no monotone mixing layer; QMIX has one (learner.mixer: qmix)")
    check_number("threshold", threshold, at_least=0.0)
    check_number("max_fraction", max_fraction, above=0, at_most=1)
    check_choice("choose", choose, get_args(Choice))
    check_choice("reference", reference, get_args(MixingReference))
    check_choice("optimizer_state", optimizer_state, get_args(Treatment))
    check_choice("when_full", when_full or "skip", ("skip",))
    alone, layer = graph.mixing_alone, graph.mixing
    releasing.check(release_updates)
    slots = math.ceil(reserve_size(alone, reserve, max_fraction, interventions, when_full) * layer.size - 1e-9)
    settings = _Settings(threshold, choose, max_fraction, reference, centred, optimizer_state, release_updates)
    return method(
        "knife_mixing",
        reserved=frozenset("/".join(head.kernel[:-1]) for head in mixing.heads(layer)),
        allocate=partial(_allocate, layer, slots),
        lift=partial(lift, replace(graph, layers=())),
        wrap_optimizer=aged if optimizer_state == "fresh" else lambda tx: tx,
        taps=lambda state: jax.tree.map(jnp.zeros_like, state.seen),
        init=partial(_init, alone, layer, slots),
        observe=partial(_observe, alone),
        apply=partial(_apply, graph, layer, settings),
        fade=no_fading if release_updates is None else partial(_fade, layer, release_updates),
    )


def _allocate(layer: NeuronLayer, slots: int, variables: Variables) -> Variables:
    block = mixing.allocate(layer, flat(variables["params"]), slots)
    return {**variables, "reserve": variables.get("reserve", {}) | {layer.name: block}}


def _init(alone: Graph, layer: NeuronLayer, slots: int, variables: Variables) -> MixingState:
    blank = mixing.blank_taps(layer, flat(variables["params"]))
    return MixingState(scores.new_window(alone), blank, jnp.zeros(()), jnp.zeros(slots))


def _observe(alone: Graph, state: MixingState, variables: Variables, grads: Any, taps: Any) -> MixingState:
    window = scores.watch(state.window, alone, flat(grads), flat(variables["params"]))
    return MixingState(window, tapping.add(state.seen, taps), state.error + taps.get("error", 0.0), state.age + 1)


def _fade(layer: NeuronLayer, half_life: float, reserve: Any) -> Any:
    return reserve | {layer.name: mixing.fade(reserve[layer.name], releasing.decay(half_life))}


def _apply(
    graph: Graph, layer: NeuronLayer, settings: _Settings, key: PRNGKeyArray, state: MixingState, trees: Trees, tx: Any = None
) -> tuple[MixingState, Trees, Report]:
    """One intervention, on the online and the target network."""
    key_draw, key_choose = jax.random.split(key)
    seen = {name: tapping.means(measured) for name, measured in state.seen.items()}
    values, features = seen[f"{layer.name}/q"], {name: seen[f"{layer.name}/{name}"]["signed"] for name in ("w1", "w2")}
    at_q = values["signed"]
    fresh = flat(drawn_once(graph, key_draw))
    if settings.centred:
        fresh = mixing.centred(layer, fresh, features["w1"], at_q)
    used = trees.variables["reserve"][layer.name]["used"]
    freed = jnp.zeros_like(used)
    if settings.release_updates is not None:
        freed = used & releasing.expired(state.age, settings.release_updates)
    place, said = _choose(layer, settings, key_choose, state, used & ~freed)
    done, rewritten = [], {}
    for variables in (trees.variables, trees.target):
        if variables is not None:
            leaves, own = flat(variables["params"]), variables["reserve"]
            block = own[layer.name] if settings.release_updates is None else mixing.release(own[layer.name], freed)
            leaves, made, rewritten = mixing.inject(layer, leaves, block, fresh, place, at_q)
            done.append({**variables, "params": nested(leaves, variables["params"]), "reserve": own | {layer.name: made}})
    spread = jnp.sqrt(jnp.maximum(values["squared"] - jnp.square(at_q), 0.0))
    said["change"] = mixing.change_bound(layer, fresh, features, spread, place.redrawn)
    said["reserve_in_use"] = done[0]["reserve"][layer.name]["used"].sum()
    opt_state = _treat(settings, tx, trees, done[0]["params"], rewritten)
    said |= {} if settings.release_updates is None else {"released": freed.sum()}
    age = jnp.where(place.source < layer.size, 0.0, state.age)
    cleared = MixingState(scores.restart(state.window), jax.tree.map(jnp.zeros_like, state.seen), jnp.zeros_like(state.error), age)
    report = {f"{layer.name}/{name}": value.astype(jnp.float32) for name, value in said.items()}
    return cleared, Trees(done[0], done[1] if len(done) > 1 else None, opt_state, trees.states), report


def _treat(settings: _Settings, tx: Any, trees: Trees, params: Any, rewritten: Flat) -> Any:
    """The optimizer's state after some columns of the heads were rewritten."""
    untouched = {path: jnp.zeros(leaf.shape, bool) for path, leaf in flat(params).items()}
    return rewrite(tx, trees.opt_state, params, nested(untouched | rewritten, params), settings.optimizer_state)


def _choose(
    layer: NeuronLayer, settings: _Settings, key: PRNGKeyArray, state: MixingState, used: Bool[Array, "R"]
) -> tuple[Placement, dict[str, Array]]:
    """Which units are treated, and into which slots they move."""
    measure = _measure(layer, settings, state)
    candidates = (measure < settings.threshold) & (state.window.count > 0)
    what = "stagnant" if settings.choose == "stagnant" else "saturated"
    said = {what: candidates.sum(), f"not_{what}": layer.size - candidates.sum()}
    if settings.choose == "random":
        measure = jax.random.uniform(key, (layer.size,))
        candidates = lowest(jnp.ones_like(candidates), measure, candidates.sum())
    chosen = lowest(candidates, measure, max(1, math.floor(settings.max_fraction * layer.size)))
    nobody = jnp.zeros_like(chosen)
    place, skipped = place_units(chosen, measure, used, nobody, nobody)
    return place, said | {"treated": place.redrawn.sum(), "reserve_full": skipped.sum()}


def _measure(layer: NeuronLayer, settings: _Settings, state: MixingState) -> Float[Array, "E"]:
    """What units are chosen by: the lower, the sooner."""
    if settings.choose != "stagnant":
        return tapping.means(state.seen[layer.name])["slope"]
    error = state.error / jnp.maximum(state.window.count, 1.0)
    return scores.relative_activity(state.window, settings.reference, error)[layer.name]

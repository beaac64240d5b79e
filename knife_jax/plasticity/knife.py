"""KNIFE: each stagnant unit becomes frozen knowledge, a fresh active unit and its compensation, and the function stays what it was.

The neighbours of KNIFE are here too: its null controls, and plasticity injection, which is the same operator on whole layers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from knife_jax.plasticity import release as releasing
from knife_jax.plasticity import reserve as frozen
from knife_jax.plasticity import scores
from knife_jax.plasticity import taps as tapping
from knife_jax.plasticity.checks import check_choice, check_number
from knife_jax.plasticity.composite import (
    WHOLE,
    Parts,
    Placement,
    Side,
    gather,
    inject,
    inject_states,
    lowest,
    over_stack,
    place_units,
    release,
    scatter,
    unmoved,
)
from knife_jax.plasticity.eligibility import check_states, composable, reserve_size
from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, flat, incoming_view, nested, outgoing_view
from knife_jax.plasticity.lift import lift
from knife_jax.plasticity.method import Method, Report, Swept, Trees, Variables, method, no_fading
from knife_jax.plasticity.optimizer import Treatment, aged, rewrite

Select = Literal["stagnant", "dormant", "inactive"]


class KnifeState(NamedTuple):
    """What KNIFE remembers between gradients.

    Attributes:
        window: update activity since the last intervention.
        seen: sums of |h| or |dL/dh| over the window, by tap, as far as the options ask for them.
        error: summed root mean square of dL/dQ_tot over the window.
        age: `{layer: [*K, R]}`, gradient steps since a slot was filled; empty where nothing is released.
    """

    window: scores.Window
    seen: dict[str, dict[str, Array]]
    error: Array
    age: dict[str, Array]


class Settings(NamedTuple):
    """The options of `knife`, see there."""

    threshold: Any = 0.25
    composite: str = "separate"
    max_fraction: float = 0.25
    reference: scores.Reference = "layer"
    window_decay: float | None = None
    optimizer_state: Treatment = "fresh"
    when_full: str = "skip"
    dead_units: bool = True
    repeat: bool = True
    parts: Parts = WHOLE
    choose: str = "stagnant"
    release_updates: float | None = None
    select: str = "stagnant"


def knife(
    graph: Graph,
    threshold: Swept = 0.25,
    reserve: float | Literal["auto"] = "auto",
    *,
    layers: str | Sequence[str] = "all",
    composite: Literal["separate", "shared"] = "separate",
    max_fraction: float = 0.25,
    reference: scores.Reference = "layer",
    window_decay: float | None = None,
    optimizer_state: Treatment = "fresh",
    when_full: Literal["skip", "recycle"] | None = None,
    dead_units: bool = True,
    repeat: bool = True,
    into_frozen: Literal["none", "drawn"] = "none",
    release_updates: float | None = None,
    select: Select = "stagnant",
    interventions: int | None = None,
    _change: tuple[str, dict[str, Any]] = ("knife", {}),
) -> Method:
    """Makes KNIFE for a graph.

    At an intervention every stagnant unit of a layer takes a slot of the reserve and is rewritten: the knowledge neuron K gets its
    incoming and outgoing weights and is frozen; the unit becomes the active neuron A with fresh weights; the compensation neuron C, a
    frozen copy of A, enters with a minus sign. In float32 the network's function changes by no more than the rounding of a reordered sum.
    The target network is rewritten with the same A and C and its own K.

    Recurrent units (a GRU's) are treated only if their layer is named. K and C then have running states of their own, which start from zero
    with every sequence; those of a sequence under way must be in `Trees.states` for `apply` and are rewritten with the rest. There a unit
    fired again takes a new slot even if it has not moved. In a `chain`, `reset` and penalties like weight decay act on live weights only.

    Args:
        graph: the layers of a model.
        threshold: a unit is stagnant if its relative update activity is below it; of another `select`, at most that.
        reserve: slots per live unit of each layer (rounded up); `auto` takes `interventions * max_fraction`, at most 3.
        layers: which ones, see `Graph.select`; `all` leaves out layers that composites cannot be put on.
        composite: `separate` gives K, A and C outgoing weights of their own; `shared` lets them share the unit's, which stay trainable.
        max_fraction: of a layer's units, at most so many per intervention (at least one), the least active first.
        reference: what activity is relative to, see `scores.relative_activity`; `error` needs `taps["error"]`.
        window_decay: decay of an exponential average of activity; None for the mean since the last intervention.
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`.
        when_full: `skip` leaves units alone that find no slot (counted as `reserve_full`); `recycle` empties the slots that contribute
            least (the function then changes; the report's `recycle_error` bounds by how much the mean input of the next layers did).
        dead_units: units with h = 0 on the whole window get fresh incoming and zero outgoing weights and no slot. Exact on what the window
            saw, not elsewhere; only where the target network, if there is one, equals the online one just then (else they take slots).
        repeat: whether units already rewritten are eligible again.
        into_frozen: whether A also feeds the frozen units of the next layer, by fixed drawn weights, or they keep exactly what they read.
        release_updates: half-life, in gradient steps, with which K and C fade after an intervention, see `release`; a slot is free again
            after ten of them (the report's `released`). None, as in the paper: they stay.
        select: what is low in the units to treat: `stagnant` update activity, or, for comparison, `dormant` mean |h| or `inactive` mean
            |dL/dh| (GraMa), both relative to the layer's mean whatever `reference` says; the report calls them stagnant all the same.
        interventions: how many are planned; with it, a reserve that must run out is refused unless `when_full` says what then.

    Raises:
        ValueError: for layers that cannot carry composites, a reserve that is not positive or must run out, a fraction outside (0, 1], or a
            release of shared outgoing weights.

    References:
        Stagnant Neuron (arXiv 2606.25335). What it leaves open was decided here; every choice is an option.
    """
    chosen = composable(graph, layers, composite)
    _check_options(threshold, composite, max_fraction, reference, window_decay, optimizer_state, when_full, into_frozen)
    pairs = reserve_size(chosen, reserve, max_fraction, interventions, when_full)
    parts = Parts(into_frozen=into_frozen == "drawn")
    releasing.check(release_updates, composite)
    options = (composite, max_fraction, reference, window_decay, optimizer_state, when_full or "skip", dead_units, repeat, parts)
    name, changes = _change
    check_choice("select", select, get_args(Select))
    settings = Settings(threshold, *options, release_updates=release_updates, select=select)
    return composite_method(name, chosen, settings._replace(**changes), pairs)


def _check_options(
    threshold: Any,
    composite: str,
    max_fraction: float,
    reference: str,
    window_decay: float | None,
    optimizer_state: str,
    when_full: str | None,
    into_frozen: str,
) -> None:
    """Refuses what `knife` cannot take."""
    if not 0 < max_fraction <= 1:
        raise ValueError(f"max_fraction: a share of a layer's units in (0, 1], got {max_fraction}")
    if window_decay is not None and not 0 <= window_decay < 1:
        raise ValueError(f"window_decay: at least 0 and below 1, got {window_decay}")
    check_number("threshold", threshold, at_least=0.0)
    check_choice("composite", composite, ("separate", "shared"))
    check_choice("reference", reference, get_args(scores.Reference))
    check_choice("optimizer_state", optimizer_state, get_args(Treatment))
    check_choice("when_full", when_full or "skip", ("skip", "recycle"))
    check_choice("into_frozen", into_frozen, ("none", "drawn"))


def control(name: str, parts: Parts = WHOLE, choose: str = "stagnant") -> Callable[..., Method]:
    """A null control: KNIFE but for one thing, with KNIFE's own options.

    Args:
        name: its name.
        parts: which parts of the composite are made.
        choose: `stagnant` units, or as many `random` ones.
    """

    @wraps(knife)
    def make(graph: Graph, *args: Any, **options: Any) -> Method:
        if options.get("composite", "separate") != "separate" and parts != WHOLE:
            raise ValueError(f"composite: {name} leaves out a part of separate outgoing weights; there is none where they are shared")
        return knife(graph, *args, **options, _change=(name, {"parts": parts, "choose": choose}))

    make.__doc__ = f"The null control `{name}`; options as in `knife`."
    return make


random_neurons = control("random_neurons", choose="random")
knife_without_knowledge = control("knife_without_knowledge", Parts(knowledge=False))
knife_without_active = control("knife_without_active", Parts(active=False, compensation=False))
knife_without_compensation = control("knife_without_compensation", Parts(compensation=False))
freeze_and_zero = control("freeze_and_zero", Parts(compensation=False, outgoing=False))


def composite_method(name: str, graph: Graph, settings: Settings, pairs: float) -> Method:
    """A method around the composite operator."""
    slots = {layer.name: max(1, math.ceil(pairs * layer.size - 1e-9)) for layer in graph.layers}
    return method(
        name,
        reserved=frozenset(module.name for module in frozen.modules(graph).values()),
        allocate=partial(_allocate, graph, slots, settings),
        lift=partial(lift, graph),
        wrap_optimizer=aged if settings.optimizer_state == "fresh" else lambda tx: tx,
        taps=lambda state: jax.tree.map(jnp.zeros_like, state.seen),
        init=partial(_init, graph, slots, settings),
        observe=partial(_observe, graph, settings),
        apply=partial(_apply, graph, settings),
        fade=no_fading if settings.release_updates is None else partial(releasing.fade, graph, settings.release_updates),
        state_sizes={layer.name: layer.size + 2 * slots[layer.name] for layer in graph.layers if layer.kind == "gru"},
    )


def _allocate(graph: Graph, slots: dict[str, int], settings: Settings, variables: Variables) -> Variables:
    leaves = flat(variables["params"])
    return {**variables, "reserve": variables.get("reserve", {}) | frozen.allocate(graph, leaves, slots, settings.composite == "shared")}


def _init(graph: Graph, slots: dict[str, int], settings: Settings, variables: Variables) -> KnifeState:
    activations = settings.dead_units or settings.when_full == "recycle" or settings.select == "dormant"
    statistics = ("absolute",) * activations + ("absolute_gradient",) * (settings.select == "inactive")
    seen: dict[str, dict[str, Array]] = tapping.zeros(graph, statistics) if statistics else {}
    if settings.when_full == "recycle":
        for layer in graph.layers:
            for part in ("knowledge", "compensation"):
                zeros = jnp.zeros((*layer.stack, slots[layer.name]))
                seen[f"{layer.name}/{part}"] = {"absolute": zeros, "count": jnp.zeros((*layer.stack, 1))}
    released = graph.layers if settings.release_updates is not None else ()
    age = {layer.name: jnp.zeros((*layer.stack, slots[layer.name])) for layer in released}
    return KnifeState(scores.new_window(graph), seen, jnp.zeros(()), age)


def _observe(graph: Graph, settings: Settings, state: KnifeState, variables: Variables, grads: Any, taps: Any) -> KnifeState:
    window = scores.watch(state.window, graph, flat(grads), flat(variables["params"]), settings.window_decay)
    seen = tapping.add(state.seen, taps)
    error = state.error + taps["error"] if settings.reference == "error" else state.error
    return KnifeState(window, seen, error, {name: age + 1 for name, age in state.age.items()})


def _apply(
    graph: Graph, settings: Settings, key: PRNGKeyArray, state: KnifeState, trees: Trees, tx: Any = None
) -> tuple[KnifeState, Trees, Report]:
    """One intervention: layers from the last to the first, so that frozen units keep exactly what they read."""
    check_states(graph, trees)
    key_draw, key_choose = jax.random.split(key)
    relative = scores.relative_activity(state.window, settings.reference, state.error / jnp.maximum(state.window.count, 1.0))
    operation = _Operation(graph, settings, trees, drawn_once(graph, key_draw))
    report: Report = {}
    for layer, layer_key in zip(graph.layers[::-1], jax.random.split(key_choose, len(graph.layers)), strict=True):
        candidates, order = _candidates(settings, layer, relative, state)
        released = operation.release(layer, state.age)
        said = released | operation.treat(layer, layer_key, candidates, order, state.seen)
        report |= {f"{layer.name}/{measure}": value for measure, value in said.items()}
    window = scores.restart(state.window)
    age = {name: jnp.where(operation.filled[name], 0.0, values) for name, values in state.age.items()}
    cleared = KnifeState(window, jax.tree.map(jnp.zeros_like, state.seen), jnp.zeros_like(state.error), age)
    return cleared, operation.finish(tx), report


def _candidates(settings: Settings, layer: NeuronLayer, relative: dict[str, Array], state: KnifeState) -> tuple[Array, Array]:
    """Which units may be treated, and by what the lowest are found, `[*K, H]` both."""
    if settings.select == "stagnant":
        candidates, order = scores.stagnant(relative[layer.name], settings.threshold), scores.activity(state.window)[layer.name]
    elif settings.select == "dormant":
        order = tapping.means(state.seen[layer.name])["absolute"]
        candidates = scores.dormant(order, settings.threshold)
    else:
        order = tapping.means(state.seen[layer.name])["absolute_gradient"]
        candidates = scores.layer_relative(order) <= settings.threshold
    return (jnp.ones_like(candidates) if settings.choose == "all" else candidates), order


def drawn_once(graph: Graph, key: PRNGKeyArray) -> Any:
    """Fresh parameters with the same bits wherever they are used.

    XLA computes cheap values again in every fusion that reads them, and may round each copy differently (a multiplication and an addition
    in one or in two steps), so that A and C would differ. What leaves a loop it must keep; of this loop it cannot know the length.
    """
    nothing_yet = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(graph.draw, key))
    missing = jax.random.uniform(key) < 2.0
    return jax.lax.while_loop(lambda carry: carry[0], lambda _: (jnp.array(False), graph.draw(key)), (missing, nothing_yet))[1]


class _Operation:
    """The trees while layer after layer is rewritten."""

    def __init__(self, graph: Graph, settings: Settings, trees: Trees, fresh: Any) -> None:
        self.settings, self.trees, self.fresh = settings, trees, flat(fresh)
        self.graph, self.modules = graph, frozen.modules(graph)
        self.sides = [_split(variables) for variables in (trees.variables, trees.target) if variables is not None]
        self.states = dict(trees.states or {})
        self.synced = _equal(trees.variables, trees.target)
        self.rewritten = {path: jnp.zeros(leaf.shape, bool) for path, leaf in self.sides[0][0].items()}
        self.filled: dict[str, Array] = {}

    def release(self, layer: NeuronLayer, age: dict[str, Array]) -> dict[str, Array]:
        """Empties the slots that have faded; says how many."""
        half_life = self.settings.release_updates
        if half_life is None:
            return {}
        used = gather(*self.sides[0], layer, self.modules).links["used"]
        freed = used & releasing.expired(age[layer.name], half_life)
        self._empty(layer, freed)
        return {"released": freed.sum().astype(jnp.float32)}

    def _empty(self, layer: NeuronLayer, freed: Array) -> None:
        """Empties slots of both networks."""
        for index, (leaves, reserve) in enumerate(self.sides):
            side = over_stack(release, layer)(gather(leaves, reserve, layer, self.modules), freed)
            self.sides[index] = scatter(leaves, reserve, layer, self.modules, side)

    def treat(self, layer: NeuronLayer, key: PRNGKeyArray, candidates: Array, activity: Array, seen: Any) -> dict[str, Array]:
        """Rewrites one layer of the online and of the target network; says what was done."""
        settings = self.settings
        online = gather(*self.sides[0], layer, self.modules)
        dead = jnp.zeros_like(candidates)
        if settings.dead_units and settings.composite == "separate":
            dead = (seen[layer.name]["absolute"] == 0) & (seen[layer.name]["count"] > 0) & self.synced
        cost = _contributions(online, layer, seen) if settings.when_full == "recycle" else None
        choose = over_stack(partial(_choose, settings, max(1, math.floor(settings.max_fraction * layer.size))), layer)
        keys = key if not layer.stack else jax.random.split(key, layer.stack)
        place, freed, said = choose(keys, candidates, activity, online, dead, cost)
        if layer.name in self.states:
            self.states[layer.name] = inject_states(self.states[layer.name], online.links, place)
        if settings.when_full == "recycle":
            self._empty(layer, freed)
        self.filled[layer.name] = place.source < layer.size
        for index, (leaves, reserve) in enumerate(self.sides):
            side = gather(leaves, reserve, layer, self.modules)
            fresh = gather(_as(leaves, self.fresh), reserve, layer, self.modules)
            side = over_stack(partial(inject, parts=settings.parts), layer)(side, fresh, place)
            self.sides[index] = scatter(leaves, reserve, layer, self.modules, side)
            if index == 0:
                said["reserve_in_use"] = side.links["used"].sum()
        self._mark(layer, over_stack(lambda placed: placed.redrawn, layer)(place))
        return {name: value.sum().astype(jnp.float32) for name, value in said.items()}

    def _mark(self, layer: NeuronLayer, redrawn: Array) -> None:
        """Notes which live entries were rewritten."""
        outgoing = () if self.settings.composite == "shared" else layer.outgoing
        for path in layer.incoming + layer.biases:
            leaf = self.rewritten[path]
            self.rewritten[path] = (incoming_view(leaf, layer) | redrawn[..., None, :]).reshape(leaf.shape)
        for path in outgoing:
            leaf = self.rewritten[path]
            self.rewritten[path] = (outgoing_view(leaf, layer) | redrawn[..., None]).reshape(leaf.shape)

    def finish(self, tx: Any) -> Trees:
        """The trees afterwards, with the optimizer's state treated."""
        olds = [variables for variables in (self.trees.variables, self.trees.target) if variables is not None]
        done = [
            {**old, "params": nested(leaves, old["params"]), "reserve": frozen.prepare(self.graph, reserve)}
            for old, (leaves, reserve) in zip(olds, self.sides, strict=True)
        ]
        params, rewritten = done[0]["params"], nested(self.rewritten, self.trees.variables["params"])
        opt_state = rewrite(tx, self.trees.opt_state, params, rewritten, self.settings.optimizer_state)
        return Trees(done[0], done[1] if len(done) > 1 else None, opt_state, None if self.trees.states is None else self.states)


def _equal(first: Variables, second: Variables | None) -> Array | bool:
    """Whether two networks are the same; true if there is one only."""
    if second is None:
        return True
    ours, theirs = _joined(first), _joined(second)
    return jnp.stack([(one == other).all() for one, other in zip(ours, theirs, strict=True)]).all()


def _joined(variables: Variables) -> list[Array]:
    """Parameters and reserve as one vector for each type of number, which compiles faster than leaf after leaf."""
    leaves = jax.tree.leaves((variables["params"], variables["reserve"]))
    types = sorted({leaf.dtype for leaf in leaves}, key=str)
    return [jnp.concatenate([leaf.ravel() for leaf in leaves if leaf.dtype == kind]) for kind in types]


def _split(variables: Variables) -> tuple[Flat, frozen.Reserve]:
    return flat(variables["params"]), variables["reserve"]


def _as(like: Flat, leaves: Flat) -> Flat:
    """Fresh leaves in the parameters' precision."""
    return {path: leaves[path].astype(leaf.dtype) if path in leaves else leaf for path, leaf in like.items()}


def _choose(
    settings: Settings, most: int, key: PRNGKeyArray, candidates: Array, activity: Array, side: Side, dead: Array, cost: Array | None
) -> tuple[Placement, Array, dict[str, Array]]:
    """Which units are treated and where they go; one member of a stack."""
    block, order = side.links, activity
    size, slots = candidates.shape[0], block["used"].shape[0]
    stagnant = candidates
    if settings.choose == "random":
        order = jax.random.uniform(key, (size,))
        candidates, dead = lowest(jnp.ones_like(candidates), order, candidates.sum()), jnp.zeros_like(dead)
    if not settings.parts.active:
        dead = jnp.zeros_like(dead)
    if not settings.repeat or not settings.parts.active:
        owned = (block["used"][:, None] & (block["owner"][:, None] == jnp.arange(size)[None])).any(axis=0)
        candidates = candidates & ~owned
    chosen = lowest(candidates, order, most)
    reusable = unmoved(side) if settings.parts.compensation else jnp.zeros_like(chosen)
    dead = dead & ~reusable
    needed = (chosen & ~dead & ~reusable).sum()
    used, freed = block["used"], jnp.zeros(slots, bool)
    if cost is not None:
        kept = jnp.zeros(slots, bool).at[block["inverse"][:size]].max(chosen & reusable & ~dead, mode="drop")
        freed = lowest(used & ~kept, cost, jnp.maximum(needed - (~used).sum(), 0))
    place, skipped = place_units(chosen, order, used & ~freed, reusable, dead)
    judged = {} if settings.choose == "all" else {"stagnant": stagnant.sum(), "not_stagnant": size - stagnant.sum()}
    said = judged | {
        "treated": place.redrawn.sum(),
        "reused": place.reused.sum(),
        "dead": place.zeroed.sum(),
        "reserve_full": skipped.sum(),
    }
    if cost is not None:
        said |= {"recycled": freed.sum(), "recycle_error": jnp.where(freed, cost, 0.0).sum()}
    return place, freed, said


def _contributions(side: Side, layer: NeuronLayer, seen: Any) -> Array:
    """Of every slot, mean |h| times the norm of the outgoing row, K and C together, `[*K, R]`."""
    means = [tapping.means(seen[f"{layer.name}/{part}"])["absolute"] for part in ("knowledge", "compensation")]
    shared = all(end.rows is None for end in side.outgoing)
    first = len(layer.stack) + 1
    rows = [end.kernel if shared else end.rows for end in side.outgoing]
    norms = jnp.sqrt(sum(jnp.square(row).sum(axis=tuple(range(first, row.ndim))) for row in rows if row is not None))
    if shared:
        norms = jnp.take_along_axis(norms, side.links["owner"], axis=-1)
        norms = jnp.concatenate([norms, norms], axis=-1)
    slots = means[0].shape[-1]
    return means[0] * norms[..., :slots] + means[1] * norms[..., slots:]

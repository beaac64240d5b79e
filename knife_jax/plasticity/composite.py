"""The composite neuron as a rewriting of arrays: unit i becomes K + (A - C), with the same function.

Everything here is for one member of a stack and is vmapped over stacks. Shapes as in `reserve`: H live units, R slots, I inputs, O outputs
of a reader, R' and R* slots of the layers before and after. The modules of a GRU have the axis of the gates before the last one.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from knife_jax.plasticity.graph import Flat, NeuronLayer, Path
from knife_jax.plasticity.reserve import Block, Module, Reserve, links_of, makers, pick, split_states


class Parts(NamedTuple):
    """Which parts of the composite are made; all but the default are null controls.

    Attributes:
        knowledge: K keeps the unit's outgoing weights; else they are lost.
        active: A is a fresh unit; else it is zero for good.
        compensation: C takes A's initial contribution away.
        outgoing: A has fresh outgoing weights; else zero ones.
        into_frozen: A also feeds frozen units of the next layer, with drawn weights that stay.
    """

    knowledge: bool = True
    active: bool = True
    compensation: bool = True
    outgoing: bool = True
    into_frozen: bool = False


WHOLE = Parts()
"""The composite as it is meant."""


class End(NamedTuple):
    """A module at an end of the layer.

    Attributes:
        kernel: `[I, O]`.
        bias: `[O]`, if any.
        rows: what the K and C that it reads give to its outputs, `[2R', O]`, if any.
        columns: what the K and C of the layer that it makes read, `[I + 2R', 2R*]`, if any.
        shift: their biases, `[2R*]`, if any.
        owner: which of its outputs their slots were taken for, `[R*]`, if any.
    """

    kernel: Array
    bias: Array | None
    rows: Array | None
    columns: Array | None
    shift: Array | None
    owner: Array | None


Ends = tuple[End, ...]


class Side(NamedTuple):
    """All arrays around one layer of one network (online or target).

    Attributes:
        links: who is whose partner, see `reserve`.
        makers: modules that only make the layer.
        own: modules that make the layer and read it (a recurrence).
        readers: modules that only read the layer.
    """

    links: Block
    makers: Ends
    own: Ends
    readers: Ends

    @property
    def incoming(self) -> Ends:
        """All modules that make the layer."""
        return self.makers + self.own

    @property
    def outgoing(self) -> Ends:
        """All modules that read the layer."""
        return self.own + self.readers

    @property
    def size(self) -> int:
        """H."""
        return self.links["inverse"].shape[-1] - self.links["used"].shape[-1]


class Placement(NamedTuple):
    """What happens to each unit and slot.

    Attributes:
        source: for each slot, the unit that moves into it, or H.
        slot_of: for each unit, the slot it moves into, or R.
        reused: units whose own slot is used again, because A never moved.
        zeroed: units that get fresh incoming and zero outgoing weights, and no slot.
    """

    source: Int[Array, "R"]
    slot_of: Int[Array, "H"]
    reused: Bool[Array, "H"]
    zeroed: Bool[Array, "H"]

    @property
    def redrawn(self) -> Bool[Array, "H"]:
        """Units whose live weights are rewritten."""
        return (self.slot_of < self.source.shape[0]) | self.reused | self.zeroed


def gather(leaves: Flat, reserve: Reserve, layer: NeuronLayer, modules: dict[Path, Module]) -> Side:
    """Collects the arrays around a layer."""
    block = links_of(reserve, layer)
    assert block is not None

    def end(module: Module) -> End:
        own, target = reserve.get(module.name, {}), module.target
        owner = (links_of(reserve, target) or {}).get("owner") if target and "columns" in own else None
        return End(leaves[module.kernel], leaves.get(module.bias), own.get("rows"), own.get("columns"), own.get("bias"), owner)

    return Side(block, *(tuple(end(module) for module in group) for group in _groups(layer, modules)))


def _groups(layer: NeuronLayer, modules: dict[Path, Module]) -> tuple[list[Module], list[Module], list[Module]]:
    """The modules that make a layer, that make and read it, and that read it."""
    making, reading = makers(layer), layer.outgoing
    only_make = [path for path in making if path not in reading]
    both = [path for path in making if path in reading]
    only_read = [path for path in reading if path not in making]
    first, second, third = ([modules[path[:-1]] for path in paths] for paths in (only_make, both, only_read))
    return first, second, third


def scatter(leaves: Flat, reserve: Reserve, layer: NeuronLayer, modules: dict[Path, Module], side: Side) -> tuple[Flat, Reserve]:
    """Puts the arrays around a layer back."""
    leaves, reserve = dict(leaves), dict(reserve)
    ends = (side.makers, side.own, side.readers)
    for module, end in (
        (module, end) for pair in zip(_groups(layer, modules), ends, strict=True) for module, end in zip(*pair, strict=True)
    ):
        leaves[module.kernel] = end.kernel
        if end.bias is not None:
            leaves[module.bias] = end.bias
        frozen = {"rows": end.rows, "columns": end.columns, "bias": end.shift}
        rewritten = {name: array for name, array in frozen.items() if array is not None}
        if rewritten:
            reserve[module.name] = reserve.get(module.name, {}) | rewritten
    name = modules[layer.module].name
    reserve[name] = reserve[name] | side.links
    return leaves, reserve


def unmoved(side: Side) -> Bool[Array, "H"]:
    """Units equal, bit for bit, to the compensation neuron made with them.

    Those of a recurrence never are: fresh units read each other, their compensation neurons are not read by fresh ones.
    """
    size, slots = side.size, side.links["used"].shape[0]
    mine = side.links["inverse"][:size]
    same = mine < slots
    for end in side.incoming:
        assert end.columns is not None
        incoming = end.kernel if end.rows is None else jnp.concatenate([end.kernel, end.rows])
        same &= _all_but_last(incoming == pick(end.columns[..., slots:], mine))
        if end.bias is not None and end.shift is not None:
            same &= _all_but_last(end.bias == pick(end.shift[..., slots:], mine))
    for end in side.outgoing:
        if end.rows is not None:
            same &= _all_but_first(end.kernel == pick(end.rows[slots:], mine, axis=0))
        if end.rows is not None and end.columns is not None:
            same &= _all_but_first(end.columns[:size] == pick(end.columns[size + slots :], mine, axis=0))
    return same


def _all_but_last(same: Bool[Array, "..."]) -> Bool[Array, "H"]:
    return same.all(axis=tuple(range(same.ndim - 1)))


def _all_but_first(same: Bool[Array, "..."]) -> Bool[Array, "H"]:
    return same.all(axis=tuple(range(1, same.ndim)))


def inject(side: Side, fresh: Side, place: Placement, parts: Parts = WHOLE) -> Side:
    """Rewrites one layer.

    First every K takes what its unit reads, then everybody who reads the layer is rewritten (of a recurrent layer those K too, which go on
    reading what they read), then the units and C take fresh weights, which read live units only.

    Args:
        side: the network's arrays.
        fresh: freshly drawn kernels and biases in the same places.
        place: what happens to each unit and slot.
        parts: which parts of the composite are made.

    Returns:
        The arrays afterwards. Unless `place.zeroed` or `parts` say otherwise they compute the same function.
    """
    compensated = _compensated(side.links, place)
    if not parts.compensation:
        compensated = jnp.full_like(compensated, side.size)
    links = _relink(side.links, place, parts)
    makers, own = (tuple(_keep(end, place) for end in ends) for ends in (side.makers, side.own))
    own, readers = tuple(end._replace(owner=links["owner"]) for end in own), side.readers
    if any(end.rows is not None for end in own + readers):
        reroute = partial(_reroute, place=place, compensated=compensated, parts=parts)
        own, readers = tuple(map(reroute, own, fresh.own)), tuple(map(reroute, readers, fresh.readers))
    redraw = partial(_redraw, place=place, compensated=compensated, parts=parts)
    return Side(links, tuple(map(redraw, makers, fresh.makers)), tuple(map(redraw, own, fresh.own)), readers)


def inject_states(states: Float[Array, "... S"], links: Block, place: Placement) -> Float[Array, "... S"]:
    """Rewrites running states `[..., H + 2R]`: K takes its unit's, the unit and C start equal.

    Args:
        states: of live units, K and C.
        links: as they were before `inject`.
        place: what happens to each unit and slot.
    """
    size = place.slot_of.shape[0]
    live, knowledge, compensation = split_states(states, size)
    moved, rewritten = place.source < size, _compensated(links, place) < size
    knowledge = jnp.where(_last(moved, states), pick(live, place.source), knowledge)
    live = jnp.where(_last(place.redrawn, states), 0, live)
    return jnp.concatenate([live, knowledge, jnp.where(_last(rewritten, states), 0, compensation)], axis=-1)


def _compensated(links: Block, place: Placement) -> Int[Array, "R"]:
    """For each slot, the unit that its C is made for, or H."""
    size, slots = place.slot_of.shape[0], place.source.shape[0]
    owns = place.reused[:, None] & (links["inverse"][:size, None] == jnp.arange(slots)[None])
    return jnp.where(owns.any(axis=0), owns.argmax(axis=0), place.source)


def _first(mask: Array, like: Array) -> Array:
    """A mask over the first axis."""
    return mask.reshape(-1, *(1,) * (like.ndim - 1))


def _last(mask: Array, like: Array) -> Array:
    """A mask over the last axis."""
    return mask.reshape(*(1,) * (like.ndim - 1), -1)


def _keep(end: End, place: Placement) -> End:
    """What K reads: all that its unit did."""
    assert end.columns is not None
    size, slots = place.slot_of.shape[0], place.source.shape[0]

    def kept(live: Array, frozen: Array) -> Array:
        known = jnp.where(_last(place.source < size, live), pick(live, place.source), frozen[..., :slots])
        return jnp.concatenate([known, frozen[..., slots:]], axis=-1)

    reading = end.kernel if end.rows is None else jnp.concatenate([end.kernel, end.rows])
    shift = end.shift if end.bias is None or end.shift is None else kept(end.bias, end.shift)
    return end._replace(columns=kept(reading, end.columns), shift=shift)


def _redraw(end: End, fresh: End, place: Placement, compensated: Array, parts: Parts) -> End:
    """What the unit and C read: fresh weights, live units only."""
    assert end.columns is not None
    size, slots = place.slot_of.shape[0], place.source.shape[0]

    def compensating(drawn: Array, frozen: Array) -> Array:
        made = jnp.where(_last(compensated < size, drawn), pick(drawn, compensated), frozen[..., slots:])
        return jnp.concatenate([frozen[..., :slots], made], axis=-1)

    def live(drawn: Array | int, old: Array) -> Array:
        return jnp.where(_last(place.redrawn, old), drawn, old)

    drawn = fresh.kernel if parts.active else jnp.zeros_like(fresh.kernel)
    reading = drawn if end.rows is None else jnp.concatenate([drawn, jnp.zeros_like(end.rows)])
    rows = None if end.rows is None else live(0, end.rows)
    end = end._replace(kernel=live(drawn, end.kernel), rows=rows, columns=compensating(reading, end.columns))
    if end.bias is None or end.shift is None or fresh.bias is None:
        return end
    drawn = fresh.bias if parts.active else jnp.zeros_like(fresh.bias)
    return end._replace(bias=live(drawn, end.bias), shift=compensating(drawn, end.shift))


def _reroute(end: End, fresh: End, place: Placement, compensated: Array, parts: Parts) -> End:
    """What a reader is given: by K what the unit gave, by the unit and C fresh weights; frozen readers keep what they had."""
    assert end.rows is not None
    size, slots = place.slot_of.shape[0], place.source.shape[0]
    has_outgoing = parts.active and parts.outgoing

    def given(drawn: Array, live: Array, frozen: Array) -> tuple[Array, Array]:
        moved = pick(live, place.source, axis=0) if parts.knowledge else 0
        known = jnp.where(_first(place.source < size, live), moved, frozen[:slots])
        compensating = jnp.where(_first(compensated < size, live), pick(drawn, compensated, axis=0), frozen[slots:])
        new = jnp.where(_first(place.zeroed, live), 0, drawn)
        return jnp.where(_first(place.redrawn, live), new, live), jnp.concatenate([known, compensating])

    drawn = fresh.kernel if has_outgoing else jnp.zeros_like(fresh.kernel)
    kernel, rows = given(drawn, end.kernel, end.rows)
    end = end._replace(kernel=kernel, rows=rows)
    if end.columns is None or end.owner is None:
        return end
    into, columns = jnp.zeros_like(end.columns[:size]), end.columns
    if parts.into_frozen and has_outgoing:
        into = pick(drawn, jnp.concatenate([end.owner, end.owner])) * (columns != 0).any(axis=0, keepdims=True)
    return end._replace(columns=jnp.concatenate(given(into, columns[:size], columns[size:])))


def _relink(block: Block, place: Placement, parts: Parts) -> Block:
    """Who is whose partner afterwards."""
    slots, size = place.source.shape[0], place.slot_of.shape[0]
    none, moved = size + slots, place.source < size
    partner, inverse = block["partner"], block["inverse"]
    became = jnp.where(place.slot_of < slots, size + place.slot_of, jnp.where(place.zeroed, none, jnp.arange(size)))
    partner = jnp.where(partner < size, pick(became, partner), partner)
    known = jnp.where(moved, jnp.take(inverse[:size], place.source, mode="fill", fill_value=slots), inverse[size:])
    if parts.compensation:
        partner = jnp.where(moved, place.source, partner)
        live = jnp.where(place.slot_of < slots, place.slot_of, inverse[:size])
    else:
        partner = jnp.where(moved, none, partner)
        live = jnp.where(place.slot_of < slots, slots, inverse[:size])
    live = jnp.where(place.zeroed, slots, live)
    return block | {
        "partner": partner.astype(jnp.int32),
        "inverse": jnp.concatenate([live, known]).astype(jnp.int32),
        "owner": jnp.where(moved, place.source, block["owner"]).astype(jnp.int32),
        "used": block["used"] | moved,
    }


def release(side: Side, freed: Bool[Array, "R"]) -> Side:
    """Empties slots; the function changes by what their K and C contributed."""
    size, slots = side.size, freed.shape[0]
    both, links, none = jnp.concatenate([freed, freed]), dict(side.links), side.size + slots
    gone = jnp.concatenate([jnp.zeros(size, bool), freed])
    partner_gone = jnp.take(gone, links["partner"], mode="fill", fill_value=True)
    compensation_gone = jnp.take(freed, links["inverse"], mode="fill", fill_value=True)
    links["partner"] = jnp.where(freed | partner_gone, none, links["partner"])
    links["inverse"] = jnp.where(gone | compensation_gone, slots, links["inverse"])
    links["used"] = links["used"] & ~freed
    rows = jnp.concatenate([jnp.zeros(size, bool), both])

    def without(values: Array | None, mask: Array, over: Any) -> Array | None:
        return None if values is None else jnp.where(over(mask, values), 0, values)

    def unread(end: End) -> End:
        columns = end.columns if end.rows is None else without(end.columns, rows, _first)
        return end._replace(rows=without(end.rows, both, _first), columns=columns)

    def unmade(end: End) -> End:
        return end._replace(columns=without(end.columns, both, _last), shift=without(end.shift, both, _last))

    own = tuple(unmade(unread(end)) for end in side.own)
    return Side(links, tuple(map(unmade, side.makers)), own, tuple(map(unread, side.readers)))


def place_units(
    chosen: Bool[Array, "H"], order: Float[Array, "H"], used: Bool[Array, "R"], reusable: Bool[Array, "H"], dead: Bool[Array, "H"]
) -> tuple[Placement, Bool[Array, "H"]]:
    """Gives every chosen unit a slot, its own one again, or none because it needs none.

    Args:
        chosen: units to treat.
        order: the lowest come first where slots run out.
        used: slots that are taken.
        reusable: units that may use their own slot again.
        dead: units that need no slot.

    Returns:
        The placement, and the units that found no free slot.
    """
    size, slots = chosen.shape[0], used.shape[0]
    zeroed, reused = chosen & dead, chosen & reusable & ~dead
    needy = chosen & ~dead & ~reusable
    rank = _rank(jnp.where(needy, order, jnp.inf))
    free_before = (~used[None, :] & jnp.tri(slots, k=-1, dtype=bool)).sum(axis=1)
    owns = needy[:, None] & ~used[None, :] & (free_before[None, :] == rank[:, None])
    served = owns.any(axis=1)
    slot_of = jnp.where(served, owns.argmax(axis=1), slots)
    source = jnp.where(owns.any(axis=0), owns.argmax(axis=0), size)
    return Placement(source.astype(jnp.int32), slot_of.astype(jnp.int32), reused, zeroed), needy & ~served


def _rank(values: Float[Array, "H"]) -> Int[Array, "H"]:
    """How many come before each one, ties in order; by comparing all pairs, which compiles many times faster than sorting twice."""
    earlier = jnp.tri(values.shape[0], k=-1, dtype=bool)
    before = (values[None, :] < values[:, None]) | ((values[None, :] == values[:, None]) & earlier)
    return before.sum(axis=1)


def lowest(candidates: Bool[Array, "H"], order: Float[Array, "H"], most: Int[Array, ""] | int) -> Bool[Array, "H"]:
    """At most so many of the candidates, the lowest in order first."""
    return candidates & (_rank(jnp.where(candidates, order, jnp.inf)) < most)


def over_stack(function: Any, layer: NeuronLayer) -> Any:
    """Maps a function of one member over a layer's stack."""
    for _ in layer.stack:
        function = jax.vmap(function)
    return function

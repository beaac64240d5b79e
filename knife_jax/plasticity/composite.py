"""The composite neuron as a rewriting of arrays: unit i becomes K + (A - C), with the same function.

Everything here is for one member of a stack and is vmapped over stacks. Shapes as in `reserve`: H live units, R slots, I inputs, O outputs
of a reader, R' and R* slots of the layers before and after.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from knife_jax.plasticity.graph import Flat, NeuronLayer, Path
from knife_jax.plasticity.reserve import Block, Module, Reserve, matrix, pick


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


class Reader(NamedTuple):
    """A module that reads the layer: its kernel `[H, O]`, and its block's rows `[2R, O]` and columns `[H + 2R, 2R*]`, if any."""

    kernel: Array
    rows: Array | None
    columns: Array | None
    owner: Array | None


class Side(NamedTuple):
    """All arrays around one layer of one network (online or target): kernel `[I, H]`, bias `[H]`, block, readers."""

    kernel: Array
    bias: Array | None
    block: Block
    readers: tuple[Reader, ...]


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
    module = modules[layer.module]
    readers = []
    for path in layer.outgoing:
        reader = modules[path[:-1]]
        block = reserve.get(reader.name, {})
        columns = block.get("columns") if "rows" in block else None
        readers.append(Reader(matrix(leaves[path], reader), block.get("rows"), columns, block.get("owner")))
    return Side(matrix(leaves[module.kernel], module), leaves.get(module.bias), reserve[module.name], tuple(readers))


def scatter(leaves: Flat, reserve: Reserve, layer: NeuronLayer, modules: dict[Path, Module], side: Side) -> tuple[Flat, Reserve]:
    """Puts the arrays around a layer back."""
    leaves, reserve = dict(leaves), dict(reserve)
    module = modules[layer.module]
    leaves[module.kernel] = side.kernel.reshape(leaves[module.kernel].shape)
    if side.bias is not None:
        leaves[module.bias] = side.bias
    reserve[module.name] = side.block
    for path, reader in zip(layer.outgoing, side.readers, strict=True):
        leaves[path] = reader.kernel.reshape(leaves[path].shape)
        name = modules[path[:-1]].name
        if reader.rows is not None:
            reserve[name] = reserve[name] | {"rows": reader.rows}
        if reader.columns is not None:
            reserve[name] = reserve[name] | {"columns": reader.columns}
    return leaves, reserve


def unmoved(side: Side) -> Bool[Array, "H"]:
    """Units equal, bit for bit, to the compensation neuron made with them."""
    inverse, size = side.block["inverse"], side.kernel.shape[-1]
    slots = inverse.shape[0] - size
    mine = inverse[:size]
    incoming = side.block["columns"][:, slots:]
    rows = side.block.get("rows", jnp.zeros((0, size)))
    same = (jnp.concatenate([side.kernel, rows]) == pick(incoming, mine)).all(axis=0) & (mine < slots)
    if side.bias is not None:
        same &= side.bias == pick(side.block["bias"][slots:], mine)
    for reader in side.readers:
        if reader.rows is not None:
            same &= (reader.kernel == pick(reader.rows[slots:], mine, axis=0)).all(axis=1)
        if reader.columns is not None:
            same &= (reader.columns[:size] == pick(reader.columns[size + slots :], mine, axis=0)).all(axis=1)
    return same


def inject(side: Side, fresh: Side, place: Placement, parts: Parts = WHOLE) -> Side:
    """Rewrites one layer.

    Args:
        side: the network's arrays.
        fresh: freshly drawn kernels and biases in the same places.
        place: what happens to each unit and slot.
        parts: which parts of the composite are made.

    Returns:
        The arrays afterwards. Unless `place.zeroed` or `parts` say otherwise they compute the same function.
    """
    reused_slots = _slots_of(place.reused, side.block["inverse"], place.source.shape[0])
    compensated = jnp.where(reused_slots < side.kernel.shape[-1], reused_slots, place.source)
    if not parts.compensation:
        compensated = jnp.full_like(compensated, side.kernel.shape[-1])
    kernel, bias, block = _rewrite_incoming(side, fresh, place, compensated, parts)
    shared = all(reader.rows is None for reader in side.readers)
    readers = (
        side.readers
        if shared
        else tuple(
            _rewrite_reader(reader, drawn, place, compensated, parts) for reader, drawn in zip(side.readers, fresh.readers, strict=True)
        )
    )
    return Side(kernel, bias, _relink(block, place, parts), readers)


def _slots_of(units: Bool[Array, "H"], inverse: Int[Array, "N"], slots: int) -> Int[Array, "R"]:
    """For each slot, the unit among `units` whose compensation it holds, or H."""
    size = units.shape[0]
    owns = units[:, None] & (inverse[:size, None] == jnp.arange(slots)[None])
    return jnp.where(owns.any(axis=0), owns.argmax(axis=0), size)


def _rewrite_incoming(side: Side, fresh: Side, place: Placement, compensated: Array, parts: Parts) -> tuple[Array, Array | None, Block]:
    """Incoming weights: K takes the unit's, the unit and C take fresh ones, which read live units only."""
    size, slots = side.kernel.shape[-1], place.source.shape[0]
    rows = side.block.get("rows", jnp.zeros((0, size), side.kernel.dtype))
    columns, redrawn = side.block["columns"], place.redrawn
    drawn = fresh.kernel if parts.active else jnp.zeros_like(fresh.kernel)
    reading = jnp.concatenate([drawn, jnp.zeros_like(rows)])
    known = jnp.where(place.source < size, pick(jnp.concatenate([side.kernel, rows]), place.source), columns[:, :slots])
    compensating = jnp.where(compensated < size, pick(reading, compensated), columns[:, slots:])
    block = side.block | {"columns": jnp.concatenate([known, compensating], axis=-1)}
    if "rows" in block:
        block["rows"] = jnp.where(redrawn, 0, rows)
    bias = side.bias
    if bias is not None and fresh.bias is not None:
        drawn_bias = fresh.bias if parts.active else jnp.zeros_like(fresh.bias)
        known = jnp.where(place.source < size, pick(bias, place.source), block["bias"][:slots])
        compensating = jnp.where(compensated < size, pick(drawn_bias, compensated), block["bias"][slots:])
        block["bias"] = jnp.concatenate([known, compensating])
        bias = jnp.where(redrawn, drawn_bias, bias)
    return jnp.where(redrawn, drawn, side.kernel), bias, block


def _rewrite_reader(reader: Reader, fresh: Reader, place: Placement, compensated: Array, parts: Parts) -> Reader:
    """Outgoing weights into one reader: K takes the unit's, the unit and C take fresh ones; frozen readers keep what they had."""
    size, slots = reader.kernel.shape[0], place.source.shape[0]
    moved, redrawn = (place.source < size)[:, None], place.redrawn[:, None]
    has_outgoing = parts.active and parts.outgoing
    drawn = fresh.kernel if has_outgoing else jnp.zeros_like(fresh.kernel)
    assert reader.rows is not None
    known = pick(reader.kernel, place.source, axis=0)
    known = jnp.where(moved, known if parts.knowledge else 0, reader.rows[:slots])
    compensating = jnp.where((compensated < size)[:, None], pick(drawn, compensated, axis=0), reader.rows[slots:])
    live = jnp.where(place.zeroed[:, None], 0, drawn)
    rewritten = reader._replace(kernel=jnp.where(redrawn, live, reader.kernel), rows=jnp.concatenate([known, compensating]))
    if reader.columns is None or reader.owner is None:
        return rewritten
    columns = reader.columns
    into = jnp.zeros_like(columns[:size])
    if parts.into_frozen and has_outgoing:
        into = pick(drawn, jnp.concatenate([reader.owner, reader.owner])) * (columns != 0).any(axis=0, keepdims=True)
    known = jnp.where(moved, pick(columns[:size], place.source, axis=0) if parts.knowledge else 0, columns[size : size + slots])
    compensating = jnp.where((compensated < size)[:, None], pick(into, compensated, axis=0), columns[size + slots :])
    live = jnp.where(redrawn, jnp.where(place.zeroed[:, None], 0, into), columns[:size])
    return rewritten._replace(columns=jnp.concatenate([live, known, compensating]))


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
    size = side.kernel.shape[-1]
    slots = freed.shape[0]
    both = jnp.concatenate([freed, freed])
    block, none = dict(side.block), size + slots
    block["columns"] = jnp.where(both, 0, block["columns"])
    if "bias" in block:
        block["bias"] = jnp.where(both, 0, block["bias"])
    gone = jnp.concatenate([jnp.zeros(size, bool), freed])
    partner_gone = jnp.take(gone, block["partner"], mode="fill", fill_value=True)
    compensation_gone = jnp.take(freed, block["inverse"], mode="fill", fill_value=True)
    block["partner"] = jnp.where(freed | partner_gone, none, block["partner"])
    block["inverse"] = jnp.where(gone | compensation_gone, slots, block["inverse"])
    block["used"] = block["used"] & ~freed
    rows = jnp.concatenate([jnp.zeros(size, bool), both])[:, None]
    readers = tuple(
        reader._replace(
            rows=None if reader.rows is None else jnp.where(both[:, None], 0, reader.rows),
            columns=None if reader.columns is None else jnp.where(rows, 0, reader.columns),
        )
        for reader in side.readers
    )
    return side._replace(block=block, readers=readers)


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

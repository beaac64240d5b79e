"""What the units of SMAX observe, for a whole batch of battles, batch axis last.

Shapes: A allies, M enemies, N = A + M units, K types, F = 7 + K features of another unit, B battles. Everything is said from the side of
the allies; what the enemies observe is the same for a mirrored record, see `other_side`.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from envs.smax.engine import statistics_of
from envs.smax.types import FIRST_ATTACK, STOP, UNIT_TYPES, SmaxParams, SmaxRecord, UnitStatistics

OWN_FEATURES = 4 + len(UNIT_TYPES)
UNIT_FEATURES = 7 + len(UNIT_TYPES)
SECTORS, UNITS_PER_SECTOR = 32, 2


class Seen(NamedTuple):
    """A record with what follows from it; health and cooldown are shares of their full values, `bits` the one-hot types."""

    x: Float[Array, "N B"]
    y: Float[Array, "N B"]
    alive: Bool[Array, "N B"]
    health: Float[Array, "N B"]
    cooldown: Float[Array, "N B"]
    reload: Float[Array, "N B"]
    unit_types: Int[Array, "N B"]
    bits: Float[Array, "N K B"]
    actions: Int[Array, "N B"]
    statistics: UnitStatistics


class Pairs(NamedTuple):
    """How each ally stands to every unit."""

    delta_x: Float[Array, "A N B"]
    delta_y: Float[Array, "A N B"]
    distance: Float[Array, "A N B"]


def see(record: SmaxRecord, params: SmaxParams, num_allies: int) -> Seen:
    """Widens a record."""
    unit_types = record.unit_types.astype(jnp.int32)
    statistics = statistics_of(params.statistics, unit_types, num_allies)
    health = record.health.astype(jnp.float32)
    return Seen(
        record.x,
        record.y,
        health > 0,
        health / statistics.health,
        record.cooldown,
        jnp.clip(record.cooldown / statistics.cooldown, 0.0, 1.0),
        unit_types,
        (unit_types[:, None] == jnp.arange(len(UNIT_TYPES))[None, :, None]).astype(jnp.float32),
        record.last_actions.astype(jnp.int32),
        statistics,
    )


def other_side(record: SmaxRecord, params: SmaxParams) -> tuple[SmaxRecord, SmaxParams]:
    """The same battle with the teams' roles exchanged: the enemies count all units backwards, and so do we."""
    statistics = UnitStatistics(*(table[::-1] for table in params.statistics))
    return SmaxRecord(*(leaf[::-1] for leaf in record)), params._replace(statistics=statistics)


def pairs_of(seen: Seen, num_allies: int) -> Pairs:
    """Differences of position, and distances."""
    delta_x, delta_y = seen.x[None] - seen.x[:num_allies, None], seen.y[None] - seen.y[:num_allies, None]
    return Pairs(delta_x, delta_y, jnp.sqrt(delta_x * delta_x + delta_y * delta_y))


def in_sight(seen: Seen, pairs: Pairs, num_allies: int) -> Bool[Array, "A N B"]:
    """Whom each ally sees (itself too): the living, from the living, within its range of sight."""
    near = pairs.distance < seen.statistics.sight_range[:num_allies, None]
    return near & seen.alive[:num_allies, None] & seen.alive[None]


class Listed(NamedTuple):
    """What lists of units are made of, see `unit_list`.

    Attributes:
        features: of every unit, with positions as they are; the last unit stands there twice.
        shown: whether each ally sees the other units, in the order of its list; 0 in the last place, which is its own.
        own: each ally's own features, and zeros after them.
        scale: one over each ally's range of sight.
    """

    features: Float[Array, "N+1 F B"]
    shown: Float[Array, "A N B"]
    own: Float[Array, "A F B"]
    scale: Float[Array, "A B"]


def listed(seen: Seen, pairs: Pairs, params: SmaxParams, num_allies: int, map_size: tuple[float, float]) -> Listed:
    """Gathers what `unit_list` puts together."""
    features = jnp.concatenate([jnp.concatenate([part, part[-1:]]) for part in _features(seen, params, num_allies)], axis=1)
    visible = in_sight(seen, pairs, num_allies)
    shown = jnp.where(_comes_before(num_allies, seen.x.shape[0])[:, :-1], visible[:, :-1], visible[:, 1:]).astype(jnp.float32)
    own = jnp.pad(own_features(seen, map_size)[:num_allies], ((0, 0), (0, UNIT_FEATURES - OWN_FEATURES), (0, 0)))
    scale = jnp.broadcast_to(1.0 / seen.statistics.sight_range[:num_allies], own.shape[::2])
    return Listed(features, jnp.pad(shown, ((0, 0), (0, 1), (0, 0))), own, scale)


def unit_list(parts: Listed) -> Float[Array, "A D B"]:
    """Every ally's list of the other units, allies first, then its own features; D = F (N - 1) + 4 + K.

    Features of another unit, all 0 if it is not in sight: health, relative position over the range of sight (x, y), last move (x, y), last
    attack over the largest action, cooldown, type. For its own see `own_features`.

    All is one expression over `[A, N, F, B]`, whose last unit stands for the observer itself. On processors XLA's loop over the batch is
    fast only if nothing is concatenated in it and little is computed for every feature anew: `parts` must be made apart.
    """
    features, shown, own, scale = parts
    num_allies, num_units, size = shown.shape
    other = jnp.where(_comes_before(num_allies, num_units)[..., None], features[None, :-1], features[None, 1:])
    feature = jnp.arange(UNIT_FEATURES)
    is_position = ((feature == 1) | (feature == 2))[None, None, :, None]
    relative = jnp.where(is_position, (other - features[:num_allies, None]) * scale[:, None, None], other)
    is_own = (jnp.arange(num_units) == num_units - 1)[None, :, None, None]
    views = jnp.where(is_own, own[:, None], shown[:, :, None] * relative).reshape(num_allies, num_units * UNIT_FEATURES, size)
    return views[:, : (num_units - 1) * UNIT_FEATURES + OWN_FEATURES]


def _comes_before(num_allies: int, num_units: int) -> Bool[Array, "A N 1"]:
    """Whether a unit comes before an ally, whose list it is: those after it are one place further ahead."""
    return (jnp.arange(num_units)[None] < jnp.arange(num_allies)[:, None])[..., None]


def _frames(seen: Seen, num_allies: int) -> tuple[Float[Array, "A F B"], Float[Array, "A F B"]]:
    """What each ally subtracts from the features of others, and what it multiplies them by."""
    nothing = jnp.zeros_like(seen.x[:num_allies])
    scale = nothing + 1.0 / seen.statistics.sight_range[:num_allies]
    origins, scales = [nothing] * UNIT_FEATURES, [jnp.ones_like(nothing)] * UNIT_FEATURES
    origins[1:3], scales[1:3] = (seen.x[:num_allies], seen.y[:num_allies]), (scale, scale)
    return jnp.stack(origins, axis=1), jnp.stack(scales, axis=1)


def sectors(
    seen: Seen, pairs: Pairs, params: SmaxParams, num_allies: int, legacy: bool
) -> tuple[Float[Array, "A N F B"], Int[Array, "A N B"]]:
    """Features of every unit for every ally, and where in its conic view they go: `2 sector + rank`, beyond the view for nowhere.

    A view has 32 sectors, counted counter-clockwise from the west, with room for the two closest units in sight. In JaxMARL (`legacy`)
    these are the two of lowest index, dead units take part, and unit 0 does not.
    """
    itself = (jnp.arange(seen.x.shape[0])[None] == jnp.arange(num_allies)[:, None])[..., None]
    if legacy:
        near = (pairs.distance < seen.statistics.sight_range[:num_allies, None]) & seen.alive[:num_allies, None]
        visible = near & ~itself & (jnp.arange(seen.x.shape[0]) > 0)[None, :, None]
        order = jnp.broadcast_to(jnp.arange(seen.x.shape[0], dtype=jnp.float32)[None, :, None], visible.shape)
    else:
        visible = in_sight(seen, pairs, num_allies) & ~itself
        order = pairs.distance
    angle = jnp.arctan2(pairs.delta_y, pairs.delta_x)
    sector = jnp.clip(jnp.floor((angle + math.pi) * (SECTORS / (2 * math.pi))).astype(jnp.int32), 0, SECTORS - 1)
    rank = jnp.zeros_like(sector)
    for other in range(seen.x.shape[0]):
        one = slice(other, other + 1)
        closer = (order[:, one] < order) & visible[:, one] & (sector[:, one] == sector)
        rank = rank + closer
    slot = jnp.where(visible & (rank < UNITS_PER_SECTOR), UNITS_PER_SECTOR * sector + rank, SECTORS * UNITS_PER_SECTOR)
    origin, scale = _frames(seen, num_allies)
    features = (jnp.concatenate(_features(seen, params, num_allies), axis=1)[None] - origin[:, None]) * scale[:, None]
    return jnp.where(visible[:, :, None], features, 0.0), slot


def _features(seen: Seen, params: SmaxParams, num_allies: int) -> list[Float[Array, "N _ B"]]:
    """The F features of every unit, with positions as they are, in parts along the second axis; the types are one."""
    columns = seen.health, seen.x, seen.y, *_last_actions(seen, params, num_allies), seen.reload
    return [*(column[:, None] for column in columns), seen.bits]


def _last_actions(seen: Seen, params: SmaxParams, num_allies: int) -> tuple[Array, Array, Array]:
    """Everyone's last move (x, y) and attack as the allies may see them."""
    actions, num_units = seen.actions, seen.x.shape[0]
    ally = jnp.arange(num_units)[:, None] < num_allies
    shown = ally | params.see_enemy_actions[None]
    move_x = (actions == 1).astype(jnp.float32) - (actions == 3)
    move_y = (actions == 0).astype(jnp.float32) - (actions == 2)
    largest = jnp.where(ally, STOP + num_units - num_allies, STOP + num_allies)
    attack = jnp.where(actions >= FIRST_ATTACK, actions, 0) / largest
    move_x, move_y, attack = (jnp.where(shown, column, 0.0) for column in (move_x, move_y, attack))
    return move_x, move_y, attack


def own_features(seen: Seen, map_size: tuple[float, float]) -> Float[Array, "N O B"]:
    """Health, position over the map's size (x, y), cooldown, type; all 0 if the unit is dead."""
    return _own(seen, seen.x / map_size[0], seen.y / map_size[1], seen.reload)


def _own(seen: Seen, x: Array, y: Array, cooldown: Array) -> Float[Array, "N O B"]:
    parts = *(column[:, None] for column in (seen.health, x, y, cooldown)), seen.bits
    return jnp.concatenate([jnp.where(seen.alive[:, None], part, 0.0) for part in parts], axis=1)


def action_mask(seen: Seen, pairs: Pairs, num_allies: int) -> Bool[Array, "A U B"]:
    """The living may move and attack living enemies in range; everyone may stop."""
    alive = seen.alive[:num_allies]
    in_range = pairs.distance[:, num_allies:] < seen.statistics.attack_range[:num_allies, None]
    attacks = in_range & seen.alive[None, num_allies:] & alive[:, None]
    moves = jnp.broadcast_to(alive[:, None], (num_allies, STOP, alive.shape[-1]))
    return jnp.concatenate([moves, jnp.ones_like(moves[:, :1]), attacks], axis=1)


def world_state(seen: Seen, num_allies: int, map_size: tuple[float, float], legacy: bool) -> Float[Array, "G B"]:
    """Every unit's own features, then its team (0 or 1), then its type over the largest type; G = N (4 + K + 2).

    In JaxMARL (`legacy`) positions, cooldowns and types are not normalised, and a cooldown goes below 0 without bound.
    """
    own = _own(seen, seen.x, seen.y, seen.cooldown) if legacy else own_features(seen, map_size)
    num_units, size = seen.x.shape
    teams = jnp.broadcast_to((jnp.arange(num_units) >= num_allies).astype(jnp.float32)[:, None], (num_units, size))
    kinds = seen.unit_types.astype(jnp.float32) / (1 if legacy else len(UNIT_TYPES) - 1)
    return jnp.concatenate([own.reshape(-1, size), teams, kinds])

"""What the units of SMAX observe, for a whole batch of battles, batch axis last.

Shapes: A allies, M enemies, N = A + M units, K types, F = 7 + K features of another unit, B battles. Everything is said from the side of
the allies; what the enemies observe is the same for a mirrored record, see `other_side`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from envs.smax.engine import statistics_of
from envs.smax.types import FIRST_ATTACK, STOP, UNIT_TYPES, SmaxParams, SmaxRecord, UnitStatistics

OWN_FEATURES = 4 + len(UNIT_TYPES)
UNIT_FEATURES = 7 + len(UNIT_TYPES)
SECTORS, UNITS_PER_SECTOR = 32, 2


class Seen(NamedTuple):
    """A record with what follows from it; health and `reload` (the cooldown) are shares of their full values."""

    x: Float[Array, "N B"]
    y: Float[Array, "N B"]
    alive: Bool[Array, "N B"]
    health: Float[Array, "N B"]
    cooldown: Float[Array, "N B"]
    reload: Float[Array, "N B"]
    unit_types: Int[Array, "N B"]
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
        features: of every unit, with positions as they are.
        shown: whether the other units, in the order of its list, are seen by each ally.
        own: each ally's own features, and zeros after them.
        scale: one over each ally's range of sight.
    """

    features: Float[Array, "N F B"]
    shown: Float[Array, "M A B"]
    own: Float[Array, "A F B"]
    scale: Float[Array, "A B"]


def listed(seen: Seen, pairs: Pairs, params: SmaxParams, num_allies: int, map_size: tuple[float, float]) -> Listed:
    """Gathers what `unit_list` puts together."""
    visible = in_sight(seen, pairs, num_allies)
    shown = jnp.where(_comes_before(num_allies, seen.x.shape[0])[:, :-1], visible[:, :-1], visible[:, 1:]).astype(jnp.float32)
    own = own_features(seen, map_size, UNIT_FEATURES)[:num_allies]
    scale = jnp.broadcast_to(1.0 / seen.statistics.sight_range[:num_allies], own.shape[::2])
    return Listed(_features(seen, params, num_allies), shown.swapaxes(0, 1), own, scale)


def with_room(parts: Listed) -> Listed:
    """With zeros at the end of lists, in the place of the observer itself."""
    return parts._replace(features=_one_longer(parts.features), shown=_one_longer(parts.shown))


def _one_longer(leaf: Float[Array, "N X B"]) -> Float[Array, "N+1 X B"]:
    """With zeros after the last of the first axis; added as rows of a matrix, which takes XLA a sixth of the time to compile."""
    number, width, size = leaf.shape
    return jnp.pad(leaf.reshape(-1, size), ((0, width), (0, 0))).reshape(number + 1, width, size)


def unit_list(parts: Listed) -> Float[Array, "A D B"]:
    """Every ally's list of the other units, allies first, then its own features; D = F (N - 1) + 4 + K.

    Features of another unit, all 0 if it is not in sight: health, relative position over the range of sight (x, y), last move (x, y), last
    attack over the largest action, cooldown, type. For its own see `own_features`.

    All is one expression over `[A, N, F, B]`, whose last unit stands for the observer itself. On processors XLA's loop over the batch is
    fast only if nothing is concatenated or padded in it and little is computed for every feature anew: `parts` (see `with_room`) must be
    made apart.
    """
    features, shown, own, scale = parts
    num_units, num_allies, size = shown.shape
    other = jnp.where(_comes_before(num_allies, num_units)[..., None], features[None, :-1], features[None, 1:])
    feature = jnp.arange(UNIT_FEATURES)
    is_position = ((feature == 1) | (feature == 2))[None, None, :, None]
    relative = jnp.where(is_position, (other - features[:num_allies, None]) * scale[:, None, None], other)
    is_own = (jnp.arange(num_units) == num_units - 1)[None, :, None, None]
    views = jnp.where(is_own, own[:, None], shown.swapaxes(0, 1)[:, :, None] * relative)
    return views.reshape(num_allies, num_units * UNIT_FEATURES, size)[:, : (num_units - 1) * UNIT_FEATURES + OWN_FEATURES]


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
    features = (_features(seen, params, num_allies)[None] - origin[:, None]) * scale[:, None]
    return jnp.where(visible[:, :, None], features, 0.0), slot


def _features(seen: Seen, params: SmaxParams, num_allies: int) -> Float[Array, "N F B"]:
    """The features of every unit, with positions as they are."""
    columns = seen.health, seen.x, seen.y, *_last_actions(seen, params, num_allies), seen.reload
    return _with_type(seen, columns, UNIT_FEATURES)


def _with_type(seen: Seen, columns: Sequence[Float[Array, "N B"]], places: int) -> Float[Array, "N P B"]:
    """Columns side by side, the one-hot type after them, and zeros; every place compares, as XLA does not vectorise a concatenation."""
    place = jnp.arange(places)[None, :, None]
    found = (seen.unit_types[:, None] == place - len(columns)).astype(jnp.float32)
    for number, column in enumerate(columns):
        found = jnp.where(place == number, column[:, None], found)
    return found


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


def own_features(seen: Seen, map_size: tuple[float, float], places: int = OWN_FEATURES) -> Float[Array, "N P B"]:
    """Health, position over the map's size (x, y), cooldown, type, zeros; all 0 if the unit is dead."""
    return _own(seen, (seen.health, seen.x / map_size[0], seen.y / map_size[1], seen.reload), places)


def _own(seen: Seen, columns: Sequence[Array], places: int = OWN_FEATURES) -> Float[Array, "N P B"]:
    return jnp.where(seen.alive[:, None], _with_type(seen, columns, places), 0.0)


def action_mask(seen: Seen, pairs: Pairs, num_allies: int) -> Bool[Array, "A U B"]:
    """The living may move and attack living enemies in range; everyone may stop."""
    alive = seen.alive[:num_allies]
    in_range = pairs.distance[:, num_allies:] < seen.statistics.attack_range[:num_allies, None]
    attacks = in_range & seen.alive[None, num_allies:] & alive[:, None]
    moves = jnp.broadcast_to(alive[:, None], (num_allies, STOP, alive.shape[-1]))
    return jnp.concatenate([moves, jnp.ones_like(moves[:, :1]), attacks], axis=1)


def world_state(
    seen: Seen, num_allies: int, map_size: tuple[float, float], legacy: bool
) -> tuple[Float[Array, "O B"], Float[Array, "P B"]]:
    """Two parts, one after another: every unit's own features; its team (0 or 1), then its type over the largest type, G = N (4 + K + 2).

    In JaxMARL (`legacy`) positions, cooldowns and types are not normalised, and a cooldown goes below 0 without bound.
    """
    own = _own(seen, (seen.health, seen.x, seen.y, seen.cooldown)) if legacy else own_features(seen, map_size)
    num_units, size = seen.x.shape
    teams = (jnp.arange(num_units) >= num_allies).astype(jnp.float32)[:, None]
    kinds = seen.unit_types.astype(jnp.float32) / (1 if legacy else len(UNIT_TYPES) - 1)
    is_team = (jnp.arange(2) == 0)[:, None, None]
    return own.reshape(-1, size), jnp.where(is_team, teams, kinds).reshape(-1, size)

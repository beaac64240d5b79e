"""One environment step of SMAX for a whole batch of battles, batch axis last.

Shapes: A allies, M enemies, N = A + M units, B battles. What the batch shares has 1 in the place of B. Pairs of units are visited one
column at a time, as plain elementwise code over `[units, B]`: a reduction over a pair axis would not be vectorised by XLA on processors,
and a gather by target costs more than comparing with every possible target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from envs.smax.types import FIRST_ATTACK, NOBODY, STOP, SmaxParams, UnitStatistics

TICKS = 8
TICK_SECONDS = 1.0 / 16
FAR = 1e3


class Units(NamedTuple):
    """What changes from tick to tick."""

    x: Float[Array, "N B"]
    y: Float[Array, "N B"]
    health: Float[Array, "N B"]
    cooldown: Float[Array, "N B"]


class Orders(NamedTuple):
    """What each unit does during a step: its velocity, and which opponent it attacks (`NOBODY` for none), counted within its team."""

    velocity_x: Float[Array, "N B"]
    velocity_y: Float[Array, "N B"]
    target: Int[Array, "N B"]


def picked(rows: Float[Array, "R b"], index: Int[Array, "U B"]) -> Float[Array, "U B"]:
    """The row that each index names, the first for an index below 0; by comparing with every row, which costs less than a gather."""
    found = jnp.broadcast_to(rows[:1], index.shape)
    for row in range(1, rows.shape[0]):
        found = jnp.where(index == row, rows[row : row + 1], found)
    return found


def statistics_of(statistics: UnitStatistics, unit_types: Int[Array, "N B"], num_allies: int) -> UnitStatistics:
    """The statistics of every unit, `[N, B]` each."""
    allies, enemies = jnp.stack(statistics, axis=1)[:, :, None]
    is_ally = (jnp.arange(unit_types.shape[0]) < num_allies)[:, None]
    found = jnp.where(is_ally, allies[:, :, 0], enemies[:, :, 0])
    for kind in range(1, allies.shape[2]):
        found = jnp.where(unit_types == kind, jnp.where(is_ally, allies[:, :, kind], enemies[:, :, kind]), found)
    return UnitStatistics(*jnp.broadcast_to(found, (found.shape[0], *unit_types.shape)))


def high_half(bits: UInt32[Array, "... B"]) -> Float[Array, "... B"]:
    """Uniform numbers in [0, 1) from the upper 16 bits."""
    return (bits >> 16).astype(jnp.int32).astype(jnp.float32) * 2.0**-16


def low_half(bits: UInt32[Array, "... B"]) -> Float[Array, "... B"]:
    """Uniform numbers in [0, 1) from the lower 16 bits."""
    return (bits & 0xFFFF).astype(jnp.int32).astype(jnp.float32) * 2.0**-16


def whole(bits: UInt32[Array, "... B"]) -> Float[Array, "... B"]:
    """Uniform numbers in [0, 1) from the upper 24 bits."""
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


def cooldown_deviation(bits: UInt32[Array, "N B"]) -> Float[Array, "N B"]:
    """How much longer or shorter than usual a unit reloads, in seconds: uniform from -1 to 2 ticks."""
    return TICK_SECONDS * (3.0 * high_half(bits) - 1.0)


def orders_of(actions: Int[Array, "N B"], speed: Float[Array, "N B"], num_allies: int) -> Orders:
    """Decodes actions; enemies count their opponents backwards, as they see them."""
    zero = jnp.zeros_like(speed)
    velocity_x = jnp.where(actions == 1, speed, jnp.where(actions == 3, -speed, zero))
    velocity_y = jnp.where(actions == 0, speed, jnp.where(actions == 2, -speed, zero))
    attacked = actions - FIRST_ATTACK
    target = jnp.concatenate([attacked[:num_allies], num_allies - 1 - attacked[num_allies:]])
    return Orders(velocity_x, velocity_y, jnp.where(attacked >= 0, target, NOBODY))


def push_apart(x: Float[Array, "N B"], y: Float[Array, "N B"], radius: Float[Array, "N B"]) -> tuple[Array, Array]:
    """Moves overlapping units apart, each by half of the overlap; a radius of `-FAR` keeps a unit (a dead one) out of it."""
    delta_x, delta_y = x[None] - x[:, None], y[None] - y[:, None]
    distance = jnp.sqrt(delta_x * delta_x + delta_y * delta_y) + 1e-6
    overlap = jnp.maximum((radius[None] + radius[:, None]) / distance - 1.0, 0.0)
    shift_x, shift_y = jnp.zeros_like(x), jnp.zeros_like(y)
    for x_offset, y_offset, share in zip(delta_x, delta_y, overlap, strict=True):
        shift_x, shift_y = shift_x + x_offset * share, shift_y + y_offset * share
    return x + 0.5 * shift_x, y + 0.5 * shift_y


def _aimed(values: Float[Array, "N B"], target: Int[Array, "N B"], num_allies: int) -> Float[Array, "N B"]:
    """The value of each unit's target, the first opponent's if it has none."""
    allies, enemies = values[:num_allies], values[num_allies:]
    return jnp.concatenate([picked(enemies, target[:num_allies]), picked(allies, target[num_allies:])])


def _suffered(hits: Float[Array, "U B"], aims: Bool[Array, "U O B"]) -> Float[Array, "O B"]:
    """The sum of the hits on each opponent, from whom each unit aims at."""
    total = jnp.zeros(aims.shape[1:], hits.dtype)
    for hit, aimed in zip(hits, aims, strict=True):
        total = total + jnp.where(aimed, hit[None], 0.0)
    return total


def fight(
    units: Units,
    orders: Orders,
    statistics: UnitStatistics,
    deviation: Float[Array, "T N B"],
    num_allies: int,
    map_size: tuple[float, float],
    walls_kill: Bool[Array, "b"],
    keep_inside: bool = True,
) -> Units:
    """The ticks of one environment step: everyone moves and shoots at once, touches walls, and is pushed apart.

    Args:
        units: at the start.
        orders: held for all ticks.
        statistics: of every unit.
        deviation: what is added to a cooldown after a shot, in seconds, one for each tick, or one for all. One is enough: a unit whose
            cooldown is at least half a second cannot shoot twice in eight ticks.
        num_allies: A.
        map_size: width and height.
        walls_kill: whether touching the border kills.
        keep_inside: whether units that are pushed beyond the border stop at it. (Either way they are at it on the next tick.)
    """
    (width, height) = map_size
    allies, enemies = slice(None, num_allies), slice(num_allies, None)
    reload = statistics.cooldown[None] + deviation
    has_target = orders.target != NOBODY
    at_enemies = orders.target[allies, None] == jnp.arange(orders.target.shape[0] - num_allies)[None, :, None]
    at_allies = orders.target[enemies, None] == jnp.arange(num_allies)[None, :, None]

    def tick(units: Units, reload_now: Array | None) -> tuple[Units, None]:
        alive = units.health > 0
        x = jnp.clip(units.x + jnp.where(alive, orders.velocity_x * TICK_SECONDS, 0.0), 0.0, width)
        y = jnp.clip(units.y + jnp.where(alive, orders.velocity_y * TICK_SECONDS, 0.0), 0.0, height)
        aim_x, aim_y, aim_health = (_aimed(values, orders.target, num_allies) for values in (units.x, units.y, units.health))
        delta_x, delta_y = units.x - aim_x, units.y - aim_y
        in_range = jnp.sqrt(delta_x * delta_x + delta_y * delta_y) < statistics.attack_range
        hit = has_target & in_range & alive & (aim_health > 0) & (units.cooldown <= 0)
        hits = jnp.where(hit, statistics.attack, 0.0)
        damage = jnp.concatenate([_suffered(hits[enemies], at_allies), _suffered(hits[allies], at_enemies)])
        at_wall = (x <= 0) | (x >= width) | (y <= 0) | (y >= height)
        health = jnp.where(at_wall & walls_kill[None], 0.0, jnp.maximum(units.health - damage, 0.0))
        x, y = push_apart(x, y, jnp.where(health > 0, statistics.radius, -FAR))
        if keep_inside:
            x, y = jnp.clip(x, 0.0, width), jnp.clip(y, 0.0, height)
        passed = jnp.where(hit, (reload[0] if reload_now is None else reload_now) - units.cooldown, -TICK_SECONDS)
        return Units(x, y, health, units.cooldown + passed), None

    per_tick = reload if deviation.shape[0] > 1 else None
    return jax.lax.scan(tick, units, per_tick, length=TICKS)[0]


def rewards(
    health_before: Float[Array, "N B"], health: Float[Array, "N B"], full_health: Float[Array, "N B"], params: SmaxParams, num_allies: int
) -> tuple[Float[Array, "B"], Bool[Array, "B"], Bool[Array, "B"]]:
    """The team's reward, and whether every ally and every enemy is dead.

    The damage to all enemies, as shares of their full health, over their number; and the bonus if none is left while an ally lives. It
    does not matter what killed them: a wall counts.
    """
    enemies = slice(num_allies, None)
    loss = (health_before[enemies] - health[enemies]) / full_health[enemies]
    damage = sum(loss[index] for index in range(loss.shape[0])) / params.active_enemies
    allies_dead = ~_any(health[:num_allies] > 0)
    enemies_dead = ~_any(health[enemies] > 0)
    bonus = jnp.where(enemies_dead & ~allies_dead, params.win_reward, 0.0)
    bonus = bonus + jnp.where(allies_dead & ~enemies_dead, params.loss_reward, 0.0)
    return params.damage_reward * damage + bonus, allies_dead, enemies_dead


def _any(flags: Bool[Array, "U B"]) -> Bool[Array, "B"]:
    found = flags[0]
    for index in range(1, flags.shape[0]):
        found = found | flags[index]
    return found


def stop_all(num_units: int, size: int) -> Int[Array, "N B"]:
    """Everyone's last action at the start of an episode."""
    return jnp.full((num_units, size), STOP, jnp.int8)

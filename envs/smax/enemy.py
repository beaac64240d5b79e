"""The heuristic enemy, decided from the state for a whole batch of battles, batch axis last.

Rules of JaxMARL's `heuristic_enemy.py`, which decides from rendered observations. Shapes: A allies, M enemies, N = A + M units, B battles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from envs.smax.engine import high_half, low_half
from envs.smax.types import FIRST_ATTACK, NOBODY, STOP, SmaxParams, SmaxState, UnitStatistics


class Sight(NamedTuple):
    """What the enemies know of one ally, `[M, B]` each."""

    x: Float[Array, "M B"]
    y: Float[Array, "M B"]
    distance: Float[Array, "M B"]
    visible: Bool[Array, "M B"]
    shootable: Bool[Array, "M B"]


def heuristic_actions(
    bits: UInt32[Array, "M B"], state: SmaxState, statistics: UnitStatistics, params: SmaxParams, num_allies: int
) -> tuple[Int[Array, "M B"], Int[Array, "M B"]]:
    """What each enemy does, and whom it attacks.

    An enemy that has allies in range attacks: the one of last time if it still can, else the closest or a random one. Otherwise it walks,
    along the axis that points best, to a random ally that it sees, or to its goal if it sees none. As in JaxMARL an enemy that may
    not shoot keeps walking to a random ally it sees.

    Args:
        bits: one draw per enemy: a 16-bit uniform number for its choice, another for idleness.
        state: of the battles.
        statistics: of every unit.
        params: the tasks.
        num_allies: A.

    Returns:
        Actions, and the ally each can attack and would (`NOBODY` if none), to be remembered.
    """
    sights = _sights(state, statistics, num_allies)
    luck = high_half(bits)
    chosen = _random_pick([sight.shootable for sight in sights], luck)
    target = jnp.where(params.enemy_attacks_randomly[None], chosen, _closest(sights))
    last = state.last_target.astype(jnp.int32)
    sticks = jnp.zeros_like(target, bool)
    for ally, sight in enumerate(sights):
        sticks = sticks | ((last == ally) & sight.shootable)
    target = jnp.where(sticks, last, target)
    attacks = (target != NOBODY) & params.enemy_shoots[None]
    attack = FIRST_ATTACK + num_allies - 1 - target
    actions = jnp.where(attacks, attack, _walk(sights, luck, state, num_allies))
    alive = state.health[num_allies:] > 0
    awake = alive & (low_half(bits) >= params.enemy_idleness[None])
    return jnp.where(awake, actions, STOP), target


def _sights(state: SmaxState, statistics: UnitStatistics, num_allies: int) -> list[Sight]:
    """Every ally as the enemies see it, in the order in which they see them: backwards."""
    own_x, own_y = state.x[num_allies:], state.y[num_allies:]
    alive, sight_range = state.health[num_allies:] > 0, statistics.sight_range[num_allies:]
    attack_range = statistics.attack_range[num_allies:]
    sights = []
    for ally in range(num_allies):
        one = slice(ally, ally + 1)
        delta_x, delta_y = state.x[one] - own_x, state.y[one] - own_y
        distance = jnp.sqrt(delta_x * delta_x + delta_y * delta_y)
        visible = (distance < sight_range) & (state.health[one] > 0) & alive
        sights.append(Sight(delta_x, delta_y, distance, visible, visible & (distance < attack_range)))
    return sights


def _closest(sights: list[Sight]) -> Int[Array, "M B"]:
    """The closest ally in range."""
    best = jnp.full_like(sights[0].distance, jnp.inf)
    target = jnp.full(best.shape, NOBODY)
    for ally, sight in reversed(list(enumerate(sights))):
        better = sight.shootable & (sight.distance < best)
        best, target = jnp.where(better, sight.distance, best), jnp.where(better, ally, target)
    return target


def _random_pick(candidates: list[Bool[Array, "M B"]], luck: Float[Array, "M B"]) -> Int[Array, "M B"]:
    """The index of one of the candidates, each with the same chance; `NOBODY` if there is none."""
    count = sum(candidate.astype(jnp.int32) for candidate in candidates)
    wanted = (luck * count).astype(jnp.int32)
    seen, picked = jnp.zeros_like(wanted), jnp.full(wanted.shape, NOBODY)
    for index, candidate in enumerate(candidates):
        picked = jnp.where(candidate & (seen == wanted), index, picked)
        seen = seen + candidate
    return picked


def _walk(sights: list[Sight], luck: Float[Array, "M B"], state: SmaxState, num_allies: int) -> Int[Array, "M B"]:
    """The move that points best to a random visible ally, or to the goal; the first of north, east, south, west among equals."""
    to_x, to_y = state.goal_x - state.x[num_allies:], state.goal_y - state.y[num_allies:]
    picked = _random_pick([sight.visible for sight in sights], luck)
    for ally, sight in enumerate(sights):
        to_x, to_y = jnp.where(picked == ally, sight.x, to_x), jnp.where(picked == ally, sight.y, to_y)
    best, move = to_y, jnp.zeros(to_y.shape, jnp.int32)
    for index, similarity in ((1, to_x), (2, -to_y), (3, -to_x)):
        best, move = jnp.maximum(best, similarity), jnp.where(similarity > best, index, move)
    return move

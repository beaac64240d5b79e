"""The heuristic of the enemy, playing the allies: a yardstick for how hard a scenario is.

Shapes: A allies, M enemies, N = A + M units, B battles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, PRNGKeyArray, UInt32

from envs.base import Actions
from envs.smax import engine
from envs.smax.batching import batch_last
from envs.smax.enemy import heuristic_actions
from envs.smax.game import Smax
from envs.smax.types import NOBODY, SmaxParams, SmaxState


class HeuristicMemory(NamedTuple):
    """What the heuristic remembers: where each ally goes if it sees nobody, and the enemy it attacked last (or `NOBODY`)."""

    goal_x: Float[Array, "A"]
    goal_y: Float[Array, "A"]
    last_target: Int8[Array, "A"]


def first_memory(env: Smax, state: SmaxState) -> HeuristicMemory:
    """The memory at the start of an episode."""
    allies = slice(None, env.num_agents)
    nobody = jnp.full(env.num_agents, NOBODY, jnp.int8)
    return HeuristicMemory(env.map_width - state.x[allies], env.map_height - state.y[allies], nobody)


def heuristic_allies(
    env: Smax, key: PRNGKeyArray, state: SmaxState, memory: HeuristicMemory, params: SmaxParams
) -> tuple[Actions, HeuristicMemory]:
    """What the heuristic (attacking the closest) would have the allies do, and its memory afterwards."""
    bits = jax.random.bits(key, (env.num_agents,))
    return _single(env)(bits, state, memory, params._replace(enemy=()))


@functools.lru_cache(maxsize=128)
def _single(env: Smax):
    return batch_last(functools.partial(_decide, env.num_enemies))


def _decide(
    num_enemies: int, bits: UInt32[Array, "A B"], state: SmaxState, memory: HeuristicMemory, params: SmaxParams
) -> tuple[Int[Array, "A B"], HeuristicMemory]:
    """Exchanges the teams by counting all units backwards, and lets the enemy's heuristic decide."""
    units = {name: getattr(state, name)[::-1] for name in ("x", "y", "health", "unit_types")}
    goals = {name: leaf[::-1] for name, leaf in memory._asdict().items()}
    mirrored = state._replace(**units, **goals)
    params = params._replace(
        statistics=engine.UnitStatistics(*(table[::-1] for table in params.statistics)),
        enemy_shoots=jnp.ones(1, bool),
        enemy_attacks_randomly=jnp.zeros(1, bool),
        enemy_idleness=jnp.zeros(1),
    )
    statistics = engine.statistics_of(params.statistics, mirrored.unit_types.astype(jnp.int32), num_enemies)
    actions, target = heuristic_actions(bits, mirrored, statistics, params, num_enemies)
    return actions[::-1], memory._replace(last_target=target[::-1].astype(jnp.int8))

"""SMAX as an `Environment`: a battle of our team against a scripted or learned enemy.

The game of JaxMARL (Rutherford et al., 2023, arXiv:2311.10090, `environments/smax`), itself after SMAC (Samvelyan et al., 2019) and SMACv2
(Ellis et al., 2023). The rules are in `envs.smax.engine` (a step), `start` (start states), `enemy` (the heuristic) and `views`
(observations); this module puts them together.

Shapes: A allies, M enemies, N = A + M units, U = 5 + M actions, D observation features, G state features.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from envs.apart import apart
from envs.base import Actions, Environment, Flag, Observation, Outcome, Scalar
from envs.smax import engine, views
from envs.smax.batching import batch_last
from envs.smax.enemy import heuristic_actions
from envs.smax.start import num_draws, start
from envs.smax.types import FIRST_ATTACK, SmaxParams, SmaxRecord, SmaxState

OBSERVATION_TYPES = ("unit_list", "conic")

EnemyPolicy = Callable[[PRNGKeyArray, Observation, Any], Int[Array, "M"]]
"""`(key, what the enemies observe, params.enemy) -> their actions`; memoryless. They count opponents backwards."""


class Happened(NamedTuple):
    """What one step brings, beside the next state."""

    reward: Scalar
    allies_dead: Bool[Array, ""]
    enemies_dead: Bool[Array, ""]


@dataclass(frozen=True)
class Smax(Environment):
    """SMAX for teams of given sizes; everything else that a scenario says is in `SmaxParams`, see `envs.smax.scenarios.make`.

    Defects of JaxMARL 0.2 that are mended unless `legacy`: episodes lasted 101 steps; a time limit could not be told from a defeat; the
    world state was not normalised; enemies beyond the number of allies were always marines in random teams; units could start off the
    map, where they died at once and paid the other team; the conic view never showed unit 0, and showed the dead.

    Attributes:
        num_agents: A.
        num_enemies: M.
        max_steps: the time limit in environment steps.
        observation_type: `unit_list` or `conic`, see `envs.smax.views`.
        legacy: whether to play and to observe exactly as JaxMARL 0.2 does, defects included. (The time limit is a truncation even then.)
        map_width: in map units.
        map_height: in map units.
        enemy_policy: what plays the enemy; the heuristic of `envs.smax.enemy` if None. Its parameters are `SmaxParams.enemy`.

    Raises:
        ValueError: if a size is out of range or the type of observation unknown.
    """

    num_agents: int = 3
    num_enemies: int = 3
    max_steps: int = 100
    observation_type: str = "unit_list"
    legacy: bool = False
    map_width: float = 32.0
    map_height: float = 32.0
    enemy_policy: EnemyPolicy | None = None

    def __post_init__(self):
        for name in ("num_agents", "num_enemies", "max_steps"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        if max(self.num_agents, self.num_enemies) > MOST_UNITS:
            raise ValueError(f"num_agents and num_enemies must be at most {MOST_UNITS} (a record keeps actions in bytes)")
        for name in ("map_width", "map_height"):
            if not 8.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 8 map units and finite, not {getattr(self, name)!r}")
        if self.observation_type not in OBSERVATION_TYPES:
            raise ValueError(f"observation_type must be one of {', '.join(OBSERVATION_TYPES)}, not {self.observation_type!r}")

    @property
    def num_units(self) -> int:
        """N."""
        return self.num_agents + self.num_enemies

    @property
    def num_actions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """U: four moves (north, east, south, west), stop, then one attack per enemy."""
        return FIRST_ATTACK + self.num_enemies

    @property
    def observation_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """D, see `envs.smax.views`."""
        others = views.SECTORS * views.UNITS_PER_SECTOR if self.observation_type == "conic" else self.num_units - 1
        return views.UNIT_FEATURES * others + views.OWN_FEATURES

    @property
    def state_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """G."""
        return (views.OWN_FEATURES + 2) * self.num_units

    @property
    def map_size(self) -> tuple[float, float]:
        """Width and height."""
        return self.map_width, self.map_height

    @property
    def default_params(self) -> SmaxParams:
        """Marines against marines, facing each other."""
        from envs.smax.scenarios import default_params

        return default_params(self)

    def reset(self, key: PRNGKeyArray, params: SmaxParams) -> SmaxState:
        """Draws unit types and positions; everyone is healthy and ready to shoot."""
        return batched(self).start(_draw(key, num_draws(self.num_units)), _without_policy(params))

    def step(self, key: PRNGKeyArray, state: SmaxState, actions: Actions, params: SmaxParams) -> tuple[SmaxState, Outcome]:
        """Eight ticks of a sixteenth of a second, during which every unit keeps to its action.

        Returns:
            The next state, and an outcome whose `info` has `won`, `lost` and `timeout`.
        """
        draws, plain = self.num_units, _without_policy(params)
        if self.enemy_policy is None:
            return self._with_outcome(*batched(self).step(_draw(key, draws + self.num_enemies), state, actions, plain))
        key_bits, key_policy = jax.random.split(key)
        enemy_actions = self.enemy_policy(key_policy, self.observe_as_enemy(self.record(state), params), params.enemy)
        return self._with_outcome(*batched(self).step_all(_draw(key_bits, draws), state, actions, enemy_actions, plain))

    def step_or_reset(
        self, key: PRNGKeyArray, state: SmaxState, over: Flag, actions: Actions, params: SmaxParams
    ) -> tuple[SmaxState, Outcome]:
        """Advances one step, or draws the first state of another episode where this one is over; one draw is for both.

        Games derived from this one, with a step or a reset of their own, draw for each.
        """
        derived = type(self).step is not Smax.step or type(self).reset is not Smax.reset
        if derived or self.enemy_policy is not None:
            return super().step_or_reset(key, state, over, actions, params)
        bits = _draw(key, self.num_units + self.num_enemies + num_draws(self.num_units))
        return self._with_outcome(*batched(self).step_or_start(bits, state, over, actions, _without_policy(params)))

    def record(self, state: SmaxState) -> SmaxRecord:
        """Drops the time and the enemy's intentions, which nobody observes."""
        health = state.health.astype(jnp.float16)
        return SmaxRecord(state.x, state.y, state.cooldown, health, state.unit_types, state.last_actions)

    def observe(self, record: SmaxRecord, params: SmaxParams) -> Observation:
        """Renders the allies' views, the world state and the action masks."""
        return self._observe(record, _without_policy(params))

    def observe_as_enemy(self, record: SmaxRecord, params: SmaxParams) -> Observation:
        """What the enemies would observe in the allies' place: opponents counted backwards, agents in the usual order."""
        record, params = views.other_side(record, _without_policy(params))
        mirrored = Smax(self.num_enemies, self.num_agents, self.max_steps, self.observation_type, self.legacy, *self.map_size)
        seen = mirrored._observe(record, params._replace(active_allies=params.active_enemies, active_enemies=params.active_allies))
        backwards = (leaf[::-1] for leaf in (seen.agents, seen.action_mask, seen.agent_mask))
        agents, action_mask, agent_mask = backwards
        return Observation(agents, seen.state, action_mask, agent_mask)

    def optimal_return(self, params: SmaxParams) -> Scalar:
        """All damage and the win; nobody knows whether a policy can reach it against a strong enemy."""
        return jnp.asarray(params.damage_reward + params.win_reward, jnp.float32)

    def _with_outcome(self, stepped: SmaxState, happened: Happened) -> tuple[SmaxState, Outcome]:
        """The next state, and what a step brought as an outcome."""
        terminated = happened.allies_dead | happened.enemies_dead
        truncated = (stepped.steps >= self.max_steps + int(self.legacy)) & ~terminated
        won, lost = happened.enemies_dead & ~happened.allies_dead, happened.allies_dead & ~happened.enemies_dead
        return stepped, Outcome(happened.reward, terminated, truncated, {"won": won, "lost": lost, "timeout": truncated})

    def _observe(self, record: SmaxRecord, params: SmaxParams) -> Observation:
        agents, state, action_mask = batched(self).observe(record, params)
        if self.observation_type == "conic":
            agents = _placed(*agents)
        return Observation(agents, state, action_mask, jnp.arange(self.num_agents) < params.active_allies)


MOST_UNITS = 120


class _Batched(NamedTuple):
    """The single-environment views of what is computed for whole batches."""

    start: Callable[..., SmaxState]
    step: Callable[..., tuple[SmaxState, Happened]]
    step_or_start: Callable[..., tuple[SmaxState, Happened]]
    step_all: Callable[..., tuple[SmaxState, Happened]]
    observe: Callable[..., tuple[Any, Array, Array]]


@functools.lru_cache(maxsize=128)
def batched(env: Smax) -> _Batched:
    """The functions of one environment, made once, so that equal environments share what is traced and compiled."""
    own = [functools.partial(function, env) for function in (_start, _step, _step_or_start, _step_all)]
    parts = apart(functools.partial(_parts, env))
    observe = functools.partial(_observe, env.observation_type == "conic", parts)
    return _Batched(*map(batch_last, own), observe=batch_last(jax.jit(observe), is_apart=True))


def _start(env: Smax, bits: UInt32[Array, "D B"], params: SmaxParams) -> SmaxState:
    return start(bits, params, env.num_agents, env.map_size, env.legacy)


def _step(
    env: Smax, bits: UInt32[Array, "D B"], state: SmaxState, actions: Int[Array, "A B"], params: SmaxParams
) -> tuple[SmaxState, Happened]:
    """A step against the heuristic enemy."""
    statistics = engine.statistics_of(params.statistics, state.unit_types.astype(jnp.int32), env.num_agents)
    enemy_actions, target = heuristic_actions(bits[env.num_units :], state, statistics, params, env.num_agents)
    stepped, happened = _step_all(env, bits[: env.num_units], state, actions, enemy_actions, params)
    return stepped._replace(last_target=target.astype(jnp.int8)), happened


def _step_or_start(
    env: Smax, bits: UInt32[Array, "D B"], state: SmaxState, over: Bool[Array, "B"], actions: Int[Array, "A B"], params: SmaxParams
) -> tuple[SmaxState, Happened]:
    """A step against the heuristic enemy, or a start from the draws that come after the step's where the episode is over."""
    draws = env.num_units + env.num_enemies
    stepped, happened = _step(env, bits[:draws], state, actions, params)
    fresh = _start(env, bits[draws:], params)
    return jax.tree.map(lambda new, old: jnp.where(over.reshape((1,) * (new.ndim - 1) + over.shape), new, old), fresh, stepped), happened


def _step_all(
    env: Smax,
    bits: UInt32[Array, "N B"],
    state: SmaxState,
    actions: Int[Array, "A B"],
    enemy_actions: Int[Array, "M B"],
    params: SmaxParams,
) -> tuple[SmaxState, Happened]:
    """A step in which both teams' actions are given."""
    everyone = jnp.concatenate([actions.astype(jnp.int32), enemy_actions.astype(jnp.int32)])
    stepped, statistics = advance(env, engine.cooldown_deviation(bits)[None], state, everyone, params)
    happened = Happened(*engine.rewards(state.health, stepped.health, statistics.health, params, env.num_agents))
    return stepped, happened


def advance(
    env: Smax, deviation: Float[Array, "T N B"], state: SmaxState, actions: Int[Array, "N B"], params: SmaxParams
) -> tuple[SmaxState, engine.UnitStatistics]:
    """The battle's next state for given actions of all units and deviations of cooldowns, and everyone's statistics; batch axis last."""
    statistics = engine.statistics_of(params.statistics, state.unit_types.astype(jnp.int32), env.num_agents)
    orders = engine.orders_of(actions, statistics.speed, env.num_agents)
    units = engine.Units(state.x, state.y, state.health, state.cooldown)
    units = engine.fight(units, orders, statistics, deviation, env.num_agents, env.map_size, params.walls_cause_death, not env.legacy)
    return state._replace(**units._asdict(), last_actions=actions.astype(jnp.int8), steps=state.steps + 1), statistics


_unit_list = apart(views.unit_list)


def _observe(is_conic: bool, parts: Callable[..., Any], record: SmaxRecord, params: SmaxParams) -> tuple[Any, Array, Array]:
    """The allies' views (for a conic one what `_placed` takes), the world state, the action masks."""
    agents, state, mask = parts(record, params)
    agents, state = _joined(agents, state)
    return agents if is_conic else _unit_list(agents), state, mask


@apart
def _joined(agents: Any, state: tuple[Array, Array]) -> tuple[Any, Array]:
    """Room in the lists of units, and the world state in one; copies of what is made, which XLA does not compute anew for each number."""
    return views.with_room(agents) if isinstance(agents, views.Listed) else agents, jnp.concatenate(state)


def _parts(env: Smax, record: SmaxRecord, params: SmaxParams) -> tuple[Any, tuple[Array, Array], Array]:
    """What the allies' views and the world state are made of, and the action masks."""
    seen = views.see(record, params, env.num_agents)
    pairs = views.pairs_of(seen, env.num_agents)
    if env.observation_type == "conic":
        agents = (*views.sectors(seen, pairs, params, env.num_agents, env.legacy), views.own_features(seen, env.map_size)[: env.num_agents])
    else:
        agents = views.listed(seen, pairs, params, env.num_agents, env.map_size)
    state = views.world_state(seen, env.num_agents, env.map_size, env.legacy)
    return agents, state, views.action_mask(seen, pairs, env.num_agents)


def _placed(features: Float[Array, "A N F"], slots: Int[Array, "A N"], own: Float[Array, "A O"]) -> Float[Array, "A D"]:
    """Puts every unit's features into its place of a conic view."""
    rows = jnp.arange(slots.shape[0])[:, None]
    empty = jnp.zeros((slots.shape[0], views.SECTORS * views.UNITS_PER_SECTOR, features.shape[-1]))
    return jnp.concatenate([empty.at[rows, slots].set(features, mode="drop").reshape(slots.shape[0], -1), own], axis=-1)


def _draw(key: PRNGKeyArray, number: int) -> UInt32[Array, "D"]:
    return jax.random.bits(key, (number,))


def _without_policy(params: SmaxParams) -> SmaxParams:
    return params._replace(enemy=())

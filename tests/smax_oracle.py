"""JaxMARL's SMAX as the oracle of ours: its states in our form, its noise, and its steps for given actions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs import smax
from envs.jaxmarl_quiet import import_jaxmarl, in_jaxmarl
from envs.smax.types import STOP, SmaxState

TICK_SECONDS = 1 / 16


class Oracle(NamedTuple):
    """A scenario of JaxMARL's, and the same of ours in legacy mode."""

    theirs: Any
    ours: smax.Smax
    params: smax.SmaxParams


@functools.cache
def oracle(scenario: str, observation_type: str = "unit_list", **options: Any) -> Oracle:
    """Builds both."""
    module = import_jaxmarl().environments.smax.smax_env
    with in_jaxmarl():
        theirs = module.SMAX(scenario=module.MAP_NAME_TO_SCENARIO[scenario], observation_type=observation_type, **options)
    env, params = smax.make(scenario, legacy=True, observation_type=observation_type, **options)
    return Oracle(theirs, env, params)


def converted(env: smax.Smax, state: Any) -> SmaxState:
    """Their state as ours; what the heuristic enemy intends is not part of theirs."""
    enemies = env.num_enemies
    x, y = state.unit_positions[..., 0], state.unit_positions[..., 1]
    moves = jnp.array([[0, 1], [1, 0], [0, -1], [-1, 0]], jnp.float32)
    moves = moves.reshape((1,) * (x.ndim) + moves.shape)
    moved = jnp.abs(state.prev_movement_actions[..., None, :] - moves).sum(-1) < 1e-3
    actions = jnp.where(moved.any(-1), moved.argmax(-1), jnp.where(state.prev_attack_actions > STOP, state.prev_attack_actions, STOP))
    return SmaxState(
        x,
        y,
        state.unit_health,
        state.unit_weapon_cooldowns,
        state.unit_types.astype(jnp.int8),
        actions.astype(jnp.int8),
        jnp.zeros((*x.shape[:-1], enemies)),
        jnp.zeros((*x.shape[:-1], enemies)),
        jnp.full((*x.shape[:-1], enemies), -1, jnp.int8),
        state.step.astype(jnp.int32),
    )


def deviations(key: jax.Array, num_units: int, ticks: int = 8) -> jax.Array:
    """The deviations of cooldowns, `[ticks, N]`, that JaxMARL draws from this key in `step_env_no_decode`."""

    def tick(key: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        key, mine = jax.random.split(key)
        draw = functools.partial(jax.random.uniform, minval=-TICK_SECONDS, maxval=2 * TICK_SECONDS)
        return key, jax.vmap(draw)(jax.random.split(mine, num_units))

    return jax.lax.scan(tick, key, None, length=ticks)[1]


def stacked(by_agent: dict[str, jax.Array], agents: list[str]) -> jax.Array:
    """A dictionary by agent as an array."""
    return jnp.stack([by_agent[agent] for agent in agents])


def start_states(scenario: Oracle, seed: int, number: int) -> Any:
    """Their start states."""
    with in_jaxmarl():
        return jax.vmap(scenario.theirs.reset)(jax.random.split(jax.random.key(seed), number))[1]


def random_orders(scenario: Oracle, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Actions for all units, half of them attacks, available or not: `[*shape, N]`."""
    rng, env = np.random.default_rng(seed), scenario.ours
    sizes = np.array([env.num_enemies] * env.num_agents + [env.num_agents] * env.num_enemies)
    attacks = STOP + 1 + rng.integers(0, sizes, (*shape, env.num_units))
    # Allies walk east and enemies west more often than not, so that they meet.
    forward = np.array([1] * env.num_agents + [3] * env.num_enemies)
    moves = np.where(rng.random((*shape, env.num_units)) < 0.5, forward, rng.integers(0, STOP + 1, (*shape, env.num_units)))
    return np.where(rng.random((*shape, env.num_units)) < 0.5, attacks, moves).astype(np.int32)

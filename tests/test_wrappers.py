"""Automatic reset, idling and episode statistics, on a game whose every number can be counted."""

import copy
import pickle
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from envs.base import Environment, Observation, Outcome
from envs.wrappers import AutoReset, EpisodeStatistics, IdleAfterEnd, Wrapper

NEVER = 1000


class _LifeParams(NamedTuple):
    """The bounds of a lifetime."""

    shortest: Array
    longest: Array


class _LifeState(NamedTuple):
    """Steps taken, and the lifetime drawn at the reset."""

    steps: Array
    lifetime: Array


@dataclass(frozen=True)
class _Life(Environment):
    """Ends by rule when a drawn lifetime is over, or by the time limit; pays the sum of the actions and shows its whole state."""

    max_steps: int = 3
    num_agents: int = 2
    num_actions: int = 5
    observation_size: int = 2
    state_size: int = 2
    reports_wins: bool = False

    @property
    def default_params(self):
        return _lifetimes(NEVER)

    def reset(self, key, params):
        return _LifeState(jnp.zeros((), jnp.int32), jax.random.randint(key, (), params.shortest, params.longest + 1))

    def step(self, key, state, actions, params):
        del key, params
        state = state._replace(steps=state.steps + 1)
        terminated = state.steps >= state.lifetime
        truncated = (state.steps >= self.max_steps) & ~terminated
        return state, Outcome(actions.sum().astype(jnp.float32), terminated, truncated, {"won": terminated})

    def record(self, state):
        return state

    def observe(self, record, params):
        del params
        state = jnp.stack(record).astype(jnp.float32)
        agents = jnp.tile(state, (self.num_agents, 1))
        return Observation(agents, state, jnp.ones((self.num_agents, self.num_actions), bool), jnp.ones(self.num_agents, bool))

    def optimal_return(self, params):
        return 8.0 * jnp.minimum(params.longest, self.max_steps)


def _lifetimes(shortest, longest=None):
    return _LifeParams(jnp.int32(shortest), jnp.int32(shortest if longest is None else longest))


@partial(jax.jit, static_argnums=0)
def _rollout(env, key, actions, params):
    """The record before, and the outcome of, every step of actions `[T, A]`."""

    def one_step(state, slot):
        key, actions = slot
        stepped, outcome = env.step(key, state, actions, params)
        return stepped, (env.record(state), outcome)

    key_reset, key_steps = jax.random.split(key)
    return jax.lax.scan(one_step, env.reset(key_reset, params), (jax.random.split(key_steps, len(actions)), actions))[1]


def _count_up(length):
    """Actions that tell the steps apart: the team is paid 0, 1, ..., 7, 0, 1, ... ."""
    step = jnp.arange(length) % 8
    return jnp.stack([step // 2, step - step // 2], axis=1)


@pytest.mark.parametrize(("lifetime", "length", "by_rule"), [(2, 2, True), (3, 3, True), (NEVER, 3, False)])
def test_auto_reset_shows_the_last_observation_and_resets_on_the_next_step(key, lifetime, length, by_rule):
    """An episode of n steps takes n + 1 slots; the last pays nothing, ends nothing and says `reset`."""
    record, outcome = _rollout(AutoReset(_Life()), key, _count_up(24), _lifetimes(lifetime))
    place = np.arange(24) % (length + 1)
    np.testing.assert_array_equal(record.steps, place)
    np.testing.assert_array_equal(outcome.terminated, (place == length - 1) & by_rule)
    np.testing.assert_array_equal(outcome.truncated, (place == length - 1) & (not by_rule))
    np.testing.assert_array_equal(outcome.info["won"], outcome.terminated)
    np.testing.assert_array_equal(outcome.info["reset"], place == length)
    np.testing.assert_array_equal(outcome.reward, np.where(place == length, 0, np.arange(24) % 8))


def test_auto_reset_ignores_the_action_of_a_reset(key):
    """Other actions on those slots change nothing at all."""
    env, params, actions = AutoReset(EpisodeStatistics(_Life())), _lifetimes(1, NEVER), _count_up(24)
    expected = _rollout(env, key, actions, params)
    changed = jnp.where(expected[1].info["reset"][:, None], 4, actions)
    assert (changed != actions).any()
    jax.tree.map(np.testing.assert_array_equal, _rollout(env, key, changed, params), expected)


def test_auto_reset_draws_every_episode_anew(key):
    """A lifetime is constant within an episode, and no two of the six episodes have the same."""
    record, _ = _rollout(AutoReset(_Life()), key, _count_up(24), _lifetimes(NEVER, 2**30))
    lifetimes = np.asarray(record.lifetime).reshape(6, 4)
    np.testing.assert_array_equal(lifetimes, np.tile(lifetimes[:, :1], (1, 4)))
    assert len(np.unique(lifetimes)) == 6


@pytest.mark.parametrize("lifetime", [1, NEVER])
def test_a_game_of_one_step_is_reset_at_once_and_always_terminates(key, lifetime):
    """No slot is spent on its last observation, so that it must not be bootstrapped from."""
    record, outcome = _rollout(AutoReset(_Life(max_steps=1)), key, _count_up(16), _lifetimes(lifetime))
    np.testing.assert_array_equal(record.steps, 0)
    np.testing.assert_array_equal(outcome.reward, np.arange(16) % 8)
    assert outcome.terminated.all() and not outcome.truncated.any() and not outcome.info["reset"].any()


@pytest.mark.parametrize(("lifetime", "length", "by_rule"), [(2, 2, True), (NEVER, 3, False)])
def test_idle_after_end_stays_for_ever(key, lifetime, length, by_rule):
    """One episode, then its last state without reward or flags."""
    record, outcome = _rollout(IdleAfterEnd(_Life()), key, _count_up(64), _lifetimes(lifetime))
    time = np.arange(64)
    np.testing.assert_array_equal(record.steps, np.minimum(time, length))
    np.testing.assert_array_equal(outcome.terminated, (time == length - 1) & by_rule)
    np.testing.assert_array_equal(outcome.truncated, (time == length - 1) & (not by_rule))
    np.testing.assert_array_equal(outcome.info["reset"], time >= length)
    np.testing.assert_array_equal(outcome.reward, np.where(time < length, time % 8, 0))


def test_idle_after_one_step_terminates_at_the_limit(key):
    """As under automatic reset: a rollout of one slot has no place for a last observation."""
    _, outcome = _rollout(IdleAfterEnd(_Life(max_steps=1)), key, _count_up(4), _lifetimes(NEVER))
    np.testing.assert_array_equal(outcome.terminated, [True, False, False, False])
    assert not outcome.truncated.any()


def test_statistics_are_those_of_complete_episodes(key):
    """Over many episodes of different lengths in sixteen environments at once, against a plain count."""
    env, slots = AutoReset(EpisodeStatistics(_Life(max_steps=6))), 80
    keys, params = jax.random.split(key, 16), _lifetimes(1, 9)
    _, outcome = jax.vmap(lambda key: _rollout(env, key, _count_up(slots), params))(keys)
    info = jax.tree.map(np.asarray, outcome.info)
    np.testing.assert_array_equal(info["episode_ended"], outcome.terminated | outcome.truncated)
    assert outcome.terminated.any() and outcome.truncated.any() and (info["episode_ended"].sum(axis=1) > 5).all()
    for row in range(16):
        total, length = 0.0, 0
        for slot in range(slots):
            is_reset = info["reset"][row, slot]
            total, length = (0.0, 0) if is_reset else (total + slot % 8, length + 1)
            assert info["episode_return"][row, slot] == total and info["episode_length"][row, slot] == length
    assert set(np.unique(info["episode_length"][info["episode_ended"]])) == set(range(1, 7))


_WRAPPERS = [Wrapper, AutoReset, IdleAfterEnd, EpisodeStatistics]


@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_a_wrapper_passes_the_facts_on(wrapper):
    """Sizes, parameters, the best return and whether wins are reported are those of the game."""
    game, wrapped = _Life(max_steps=7), wrapper(EpisodeStatistics(_Life(max_steps=7)))
    for name in ("num_agents", "num_actions", "observation_size", "state_size", "max_steps", "reports_wins", "default_params"):
        assert getattr(wrapped, name) == getattr(game, name), name
    assert float(wrapped.optimal_return(game.default_params)) == 56.0


@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_wrapped_environments_are_values(wrapper):
    """Equal if all they wrap is equal, hashable, and the same after a copy or a pickle."""
    env = wrapper(EpisodeStatistics(_Life()))
    for twin in (wrapper(EpisodeStatistics(_Life())), copy.copy(env), copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert twin == env and hash(twin) == hash(env) and type(twin) is wrapper
    assert env != wrapper(EpisodeStatistics(_Life(max_steps=4)))
    assert env != wrapper(_Life())

"""Whole episodes of the grid predator-prey game: laws that hold in all of them, and the averages of the reference implementation."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from envs.predator_prey_scenarios import make

STAY, CATCH = 4, 5


@partial(jax.jit, static_argnums=(0, 1, 4))
def rollout(env, greedy, key, params, trace=True):
    """One episode: catches wherever it may if `greedy`, else uniform over available actions. After its end the last state is repeated.

    Returns the first state, then for every step the state after it and the observation before it (None without `trace`), and the totals.
    """

    def act(key, mask):
        luck = jnp.where(mask, jax.random.uniform(key, mask.shape), -1.0)
        return jnp.where(greedy & mask[:, CATCH], CATCH, jnp.argmax(luck, axis=1))

    def body(carry, key):
        state, over, totals = carry
        act_key, step_key = jax.random.split(key)
        observation = env.observe(env.record(state), params)
        stepped, outcome = env.step(step_key, state, act(act_key, observation.action_mask), params)
        state = jax.tree.map(lambda old, new: jnp.where(over, old, new), state, stepped)
        counts = {"reward": outcome.reward, "captures": outcome.info["captures"], "miscaptures": outcome.info["miscaptures"], "length": 1}
        totals = jax.tree.map(lambda total, count: total + jnp.where(over, 0, count), totals, counts)
        return (state, over | outcome.terminated | outcome.truncated, totals), (state, observation) if trace else None

    reset_key, key = jax.random.split(key)
    first = env.reset(reset_key, params)
    totals = {"reward": jnp.zeros(()), **{name: jnp.zeros((), jnp.int32) for name in ("captures", "miscaptures", "length")}}
    (*_, totals), traced = jax.lax.scan(body, (first, jnp.zeros((), bool), totals), jax.random.split(key, env.max_steps))
    return first, traced, totals


def check_against_the_reference(episodes):
    """Averages of the reference implementation (value, standard error) against our own, to 4 combined standard errors.

    The reference's length in the second row comes without its error, which we take to be ours for its 120 episodes.
    """
    published = {
        False: {"captures": (0.56, 0.05), "miscaptures": (48.2, 0.8), "length": (200.0, 0.02)},
        True: {"captures": (2.83, 0.05), "miscaptures": (95.8, 3.1), "length": (195.6, None)},
    }
    env, params = make("wqmix")

    @partial(jax.jit, static_argnums=0)
    def totals(greedy, key):
        keys = jax.random.split(key, episodes)
        return jax.vmap(lambda key: rollout(env, greedy, key, params, False)[2])(keys)

    for greedy, row in published.items():
        ours = jax.tree.map(np.asarray, totals(greedy, jax.random.key(11)))
        np.testing.assert_allclose(ours["reward"], 10.0 * ours["captures"] - 2.0 * ours["miscaptures"], atol=1e-3)
        for name, (value, error) in row.items():
            spread = ours[name].std()
            error = spread / np.sqrt(120) if error is None else error
            assert abs(ours[name].mean() - value) < 4 * np.hypot(error, spread / np.sqrt(episodes)), (greedy, name, ours[name].mean())


def test_averages_of_the_reference():
    """Two fixed policies, enough episodes that our own error is small."""
    check_against_the_reference(1024)


@pytest.mark.slow
@pytest.mark.computes
def test_averages_of_the_reference_over_many_episodes():
    """The same with an error of a quarter."""
    check_against_the_reference(32768)


def render(state, frozen, params, env):
    """Grid and windows from a full state, cell by cell."""
    grid = np.zeros((env.height + 2 * env.radius, env.width + 2 * env.radius, 3))
    visible = (np.arange(env.num_agents) < params.active_agents) & ~(frozen & bool(params.remove_frozen))
    for (row, column), shown in zip(state.agents, visible, strict=True):
        grid[row + env.radius, column + env.radius, 0] += shown
    for index, ((row, column), shown) in enumerate(zip(state.prey, state.alive, strict=True)):
        grid[row + env.radius, column + env.radius, 1 if index < env.num_stags else 2] += shown
    side = 2 * env.radius + 1
    windows = [grid[row : row + side, column : column + side] * shown for (row, column), shown in zip(state.agents, visible, strict=True)]
    inner = slice(env.radius, -env.radius)
    return grid[inner, inner], np.stack(windows)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    agents=st.integers(1, 6),
    stags=st.integers(0, 4),
    hares=st.integers(1, 4),
    sides=st.tuples(st.integers(4, 6), st.integers(4, 7)),
    freezes=st.booleans(),
    removes=st.booleans(),
)
def test_laws_of_whole_episodes(seed, agents, stags, hares, sides, freezes, removes):
    """Properties of every step of an episode, whatever the task."""
    sizes = {"height": 6, "width": 7, "num_agents": 6, "num_stags": 4, "num_hares": 4, "radius": 2, "max_steps": 30}
    active = {"active_agents": agents, "active_stags": stags, "active_hares": hares, "active_height": sides[0], "active_width": sides[1]}
    env, params = make("pymarl2", **sizes, **active, capture_freezes=freezes, remove_frozen=removes)
    first, (states, observations), _ = jax.tree.map(np.asarray, rollout(env, True, jax.random.key(seed), params))
    for time in range(env.max_steps):
        before = first if time == 0 else jax.tree.map(lambda leaf, index=time - 1: leaf[index], states)
        after = jax.tree.map(lambda leaf, index=time: leaf[index], states)
        grid, windows = render(before, before.frozen, params, env)
        # No two entities on one cell, nobody in the walls, and what is observed from the record is what the full state shows.
        assert grid.sum(axis=-1).max() <= 1 and grid[sides[0] :].sum() == grid[:, sides[1] :].sum() == 0
        np.testing.assert_array_equal(observations.state[time], grid.ravel())
        np.testing.assert_array_equal(observations.agents[time], windows.reshape(env.num_agents, -1))
        # Frozen agents stay frozen where they are, the dead stay dead, and the living move by one cell at most.
        np.testing.assert_array_equal(before.agents[before.frozen], after.agents[before.frozen])
        assert (after.frozen >= before.frozen).all() and (after.alive <= before.alive).all()
        assert np.abs(after.agents - before.agents).sum(axis=1).max() <= 1
        assert np.abs(after.prey - before.prey).sum(axis=1).max() <= 1
    assert observations.action_mask[:, :, STAY].all() and not observations.action_mask[:, agents:, :STAY].any()

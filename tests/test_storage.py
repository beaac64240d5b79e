"""Observations of adapter games stored in fewer bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.jaxmarl_adapter import make_jaxmarl

BATCH = 8

STORED = {"3m": 1.0 + 2 / 32, "MPE_simple_spread_v3": 4.0, "overcooked": 127.0}
"""Games with what no number in them exceeds: SMAX's positions over the edge, distances in MPE, whole numbers."""


def available(key, action_mask):
    """Draws uniformly among the available actions."""
    return jax.random.categorical(key, jnp.where(action_mask, 0.0, -jnp.inf)).astype(jnp.int32)


@functools.cache
def exact_play(name):
    """States of random play, as they are stored in float32, and what is seen of them."""
    env = make_jaxmarl(name)
    reset, step = (
        jax.jit(jax.vmap(lambda key: env.reset(key, ()))),
        jax.jit(jax.vmap(lambda key, state, actions: env.step(key, state, actions, ()))),
    )
    state = reset(jax.random.split(jax.random.key(2), BATCH))
    look, records = jax.jit(jax.vmap(lambda record: env.observe(record, ()))), []
    for time in range(12):
        keys = jax.random.split(jax.random.key(time), BATCH)
        records.append(state.record)
        state, _ = step(keys, state, available(keys[0], look(state.record).action_mask))
    record = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *records)
    return env, record, look(record)


@pytest.mark.parametrize(("kind", "share_of_bytes"), [("float16", 0.55), ("int8", 0.3)])
@pytest.mark.parametrize("name", STORED)
def test_compact_observations_are_as_precise_as_stated(name, kind, share_of_bytes):
    """Within 2^-11 of a number, or 1/254 of the bound; masks exactly; and a record of half the bytes, or a quarter."""
    exact_env, exact, seen = exact_play(name)
    env = make_jaxmarl(name, storage=kind, storage_bound=None if kind == "float16" or name == "3m" else STORED[name])
    assert env != exact_env
    state = None if exact.world_state is None else env.storage.encode(exact.world_state)
    record = exact._replace(agents=env.storage.encode(exact.agents), world_state=state)
    found = jax.jit(jax.vmap(lambda record: env.observe(record, ())))(record)
    for stored, true in ((found.agents, seen.agents), (found.state, seen.state)):
        assert stored.dtype == true.dtype and np.abs(true).max() <= STORED[name]
        error = 2.0**-11 * np.abs(true) + 2.0**-24 if kind == "float16" else env.storage.bound / 254 + 1e-6
        assert (np.abs(stored - true) <= error).all()
        np.testing.assert_array_equal(stored[true == 0], 0.0)
        np.testing.assert_array_equal(stored[true == 1], 1.0) if name != "MPE_simple_spread_v3" else None
    np.testing.assert_array_equal(found.action_mask, seen.action_mask)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) for kept in (record, exact)]
    assert sizes[0] < share_of_bytes * sizes[1]
    if name == "overcooked":
        np.testing.assert_array_equal(found.agents, seen.agents)


def test_a_compact_game_stores_what_it_shows(key):
    """The state that is played from holds the compact record, so that play and replay see the same."""
    env = make_jaxmarl("MPE_simple_spread_v3", storage="float16")
    state = jax.jit(env.reset)(key, ())
    assert env.record(state).agents.dtype == jnp.float16 and env.record(state).action_mask is None

"""What is learned from is what was seen: records from every place of a ring, made under several tasks, by random play of our games."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import registry
from knife_jax import Config, collect, learner, make_program, model, replay
from knife_jax.model import observe
from knife_jax.networks.agents import agent_inputs
from knife_jax.replay import Continuation

ENVS, LENGTH, CAPACITY, SEQUENCE, ROUNDS = 3, 6, 24, 5, 7
"""The ring wraps in the middle of play: 42 slots are written, the newest 24 stay."""

SMALL_PREY = {"height": 5, "width": 5, "num_agents": 3, "num_stags": 1, "num_hares": 1, "max_steps": 7}
GAMES = {
    "payoffs": {"name": "matrix", "scenario": "permuted"},
    "two_step": {"name": "matrix", "scenario": "two_step"},
    "mmdp": {"name": "matrix", "scenario": "mmdp"},
    "predator_prey": {"name": "predator_prey", "tasks": [SMALL_PREY, {**SMALL_PREY, "active_agents": 2, "active_width": 4}]},
    "predator_prey_drift": {"name": "predator_prey", "scenario": "drift", "options": {"max_steps": 7}},
    "smax": {
        "name": "smax",
        "scenario": "2s3z",
        "tasks": [{"max_steps": 9}, {"max_steps": 9, "enemy_scale": {"health": 1.3, "attack": 0.6}}],
    },
    "smax_drift": {"name": "smax", "scenario": "5gen_protoss_drift", "options": {"max_steps": 9, "observation_type": "conic"}},
}


class Played(NamedTuple):
    """A ring, and of every slot ever written `[time, E]`: what was seen there, its episode, and its task."""

    networks: Any
    ring: replay.ReplayState
    seen: Any
    episodes: np.ndarray
    tasks: np.ndarray


@cache
def played(name: str) -> Played:
    """Random play under alternating tasks, into a ring that is cut where the task changes; each slot's reward is its number."""
    networks = make_program(Config.from_dict({"env": GAMES[name], "learner": {"mixer": "vdn"}})).networks
    env = collect.acting_environment(networks.env, "continuous")
    num_tasks = len(networks.tasks.names)

    @jax.jit
    def rollout(key, states, task):
        params = networks.tasks.at(task)

        def one_slot(states, key):
            record = jax.vmap(env.record)(states)
            seen = jax.vmap(lambda record: env.observe(record, params))(record)
            actions = jax.random.categorical(key, jnp.where(seen.action_mask, 0.0, -jnp.inf)).astype(jnp.int32)
            states, outcome = jax.vmap(env.step, (0, 0, 0, None))(jax.random.split(key, ENVS), states, actions, params)
            kinds = collect.continuation_of(outcome)
            slot = replay.Slot(record, actions.astype(jnp.int8), jnp.zeros(ENVS), kinds, jnp.full(ENVS, task, jnp.int16))
            return states, (slot, seen)

        return jax.lax.scan(one_slot, states, jax.random.split(key, LENGTH))

    start = jax.jit(lambda key, task: jax.vmap(lambda key: env.reset(key, networks.tasks.at(task)))(jax.random.split(key, ENVS)))
    states = start(jax.random.key(99), 0)
    example = jax.eval_shape(rollout, jax.random.key(0), states, 0)[1][0]
    ring = replay.init(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), example), ENVS, CAPACITY)
    seen, kinds, tasks = [], [], []
    for index in range(ROUNDS):
        task = (index // 2) % num_tasks
        if index and task != tasks[-1]:
            ring, states = replay.cut(ring), start(jax.random.key(index), task)
            kinds[-1] = kinds[-1].at[-1].set(replay.cut_ends(kinds[-1][-1]))
        states, (slots, views) = rollout(jax.random.key(index), states, task)
        numbers = (index * LENGTH + jnp.arange(LENGTH))[:, None] * ENVS + jnp.arange(ENVS)[None]
        slots = slots._replace(reward=numbers.astype(jnp.float32))
        ring = replay.add(ring, slots)
        seen.append(views)
        kinds.append(slots.continuation)
        tasks.append(task)
    over = np.isin(np.concatenate(kinds), [Continuation.TERMINATED, Continuation.CUT])
    episodes = np.concatenate([np.zeros((1, ENVS), int), np.cumsum(over, axis=0)[:-1]])
    views = jax.tree.map(lambda *leaves: np.concatenate(leaves), *seen)
    return Played(networks, ring, views, episodes, np.repeat(tasks, LENGTH))


def sequences(play: Played) -> tuple[replay.Sequences, np.ndarray, np.ndarray]:
    """Sequences from every place of the ring, and the time and environment at which each slot was written."""
    batch = jax.jit(partial(replay.sample, batch_size=1024, length=SEQUENCE))(jax.random.key(5), play.ring)
    time, env = np.divmod(np.asarray(batch.slots.reward).astype(int), ENVS)
    return batch, time, env


@pytest.mark.parametrize("name", GAMES)
def test_replayed_observations_are_those_that_were_seen(name):
    """Bit for bit, from every place of a ring that has wrapped, also those of an earlier task."""
    play = played(name)
    batch, time, env = sequences(play)
    written = ROUNDS * LENGTH
    assert set(zip(time.ravel(), env.ravel(), strict=True)) == {(t, e) for t in range(written - CAPACITY, written) for e in range(ENVS)}
    if len(play.networks.tasks.names) > 1:
        assert len(np.unique(batch.slots.task)) > 1
    np.testing.assert_array_equal(batch.slots.task, play.tasks[time])
    again = jax.jit(partial(observe, play.networks))(batch.slots.record, batch.slots.task)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old[time, env]), again, play.seen)


@pytest.mark.parametrize("name", ["two_step", "predator_prey", "smax"])
def test_what_agents_are_fed_is_the_same_in_blocks(name, monkeypatch):
    """Bit for bit, as with all records rendered at once and completed afterwards; where a game has several tasks, under all of them."""
    play = played(name)
    networks, (batch, _, _) = play.networks, sequences(play)
    env, slots = networks.env, batch.slots
    monkeypatch.setattr(model, "CACHED_BYTES", 512 * 4 * env.num_agents * env.observation_size)
    in_blocks = jax.jit(lambda batch: learner.observed(networks, batch)).lower(batch)
    monkeypatch.setattr(model, "CACHED_BYTES", 2**40)
    at_once = jax.jit(lambda batch: learner.observed(networks, batch)).lower(batch)
    assert in_blocks.as_text().count("stablehlo.while") == at_once.as_text().count("stablehlo.while") + 1
    whole = jax.jit(partial(observe, networks))(slots.record, slots.task)
    inputs = agent_inputs(networks.config.agent, whole, batch.last_actions, batch.starts)
    jax.tree.map(np.testing.assert_array_equal, in_blocks.compile()(batch), whole._replace(agents=inputs))


@pytest.mark.parametrize("name", GAMES)
def test_sequences_never_pass_from_one_episode_to_another_unnoticed(name):
    """Memory is reset there, and no value is bootstrapped from beyond; what follows in a sequence followed in the game."""
    play = played(name)
    batch, time, env = sequences(play)
    episode = play.episodes[time, env]
    passes = episode[1:] != episode[:-1]
    assert passes.any() == (play.networks.env.max_steps < CAPACITY) and (~passes).any() == (play.networks.env.max_steps > 1)
    np.testing.assert_array_equal(np.diff(time, axis=0), 1)
    np.testing.assert_array_equal(np.asarray(batch.starts)[1:], passes)
    bootstraps = np.isin(batch.slots.continuation, [Continuation.CONTINUE, Continuation.TRUNCATED])
    assert not (bootstraps[:-1] & passes).any() and not bootstraps[-1].any()
    is_oldest = time[0] == ROUNDS * LENGTH - CAPACITY
    assert is_oldest.any() and np.asarray(batch.starts)[0][is_oldest].all()


def test_every_game_of_ours_is_here():
    """A new game must be added above."""
    assert {game["name"] for game in GAMES.values()} == set(registry.GAMES) - {"jaxmarl"}

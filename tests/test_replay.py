"""The ring: what is written, what is sampled, and how each slot goes on."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.typing import ArrayLike

from knife_jax import replay
from knife_jax.replay import Continuation, Slot

CONTINUE, TERMINATED, TRUNCATED, CUT = (int(kind) for kind in Continuation)


@partial(jax.jit, static_argnums=(1, 2))
def _rollout(first, length, envs, continuation: ArrayLike = CONTINUE):
    """Slots numbered by time and environment, so that each can be recognised."""
    number = (first + jnp.arange(length))[:, None] + 1000 * jnp.arange(envs)[None, :]
    kinds = jnp.broadcast_to(jnp.asarray(continuation, jnp.int8), (length,))[:, None] * jnp.ones((1, envs), jnp.int8)
    return Slot(number, jnp.stack([number, -number], -1), number.astype(jnp.float32), kinds, jnp.zeros_like(kinds, jnp.int16))


_add = jax.jit(replay.add)
_sample = jax.jit(replay.sample, static_argnums=(2, 3), static_argnames=("stride", "burn_in"))


@partial(jax.jit, static_argnums=(0, 1))
def _empty(envs, capacity):
    example = jax.tree.map(lambda leaf: leaf[0, 0], _rollout(0, 1, 1))
    return replay.init(example, envs, capacity)


def _filled(rollouts, length, envs, capacity, continuation: ArrayLike = CONTINUE):
    state = _empty(envs, capacity)
    for index in range(rollouts):
        state = _add(state, _rollout(index * length, length, envs, continuation))
    return state


SHAPES = [(1, 1, 6, 3), (2, 3, 12, 4), (3, 2, 24, 6), (6, 1, 6, 1), (6, 2, 18, 5)]
"""Lengths of rollouts, numbers of environments, capacities and lengths of sequences."""


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(1, 12), st.sampled_from(SHAPES), st.integers(0, 2**20))
def test_sequences_are_consecutive_and_among_the_newest(rollouts, shape, seed):
    """Every sampled slot is stored, in order, of one environment, and never older than the ring holds."""
    length, envs, capacity, slots = shape
    state = _filled(rollouts, length, envs, capacity)
    written = rollouts * length
    stored = min(written, capacity)
    hypothesis.assume(stored >= slots)
    batch = _sample(jax.random.key(seed), state, 64, slots)
    number, env = np.asarray(batch.slots.record) % 1000, np.asarray(batch.slots.record) // 1000
    assert int(state.size) == stored
    assert (number >= written - stored).all() and (number < written).all()
    assert (np.diff(number, axis=0) == 1).all() and (np.diff(env, axis=0) == 0).all()
    np.testing.assert_array_equal(batch.slots.reward, batch.slots.record)
    np.testing.assert_array_equal(batch.slots.actions[..., 1], -batch.slots.record)
    assert set(np.unique(env)) <= set(range(envs))


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.one_of(st.integers(1, 70_000), st.integers(1, 2**31 - 1)))
def test_integers_below_a_number(bits, number):
    """`bits * number // 2**32`, which Python computes with as many bits as it takes."""
    drawn = replay.uniform_below(jnp.array([bits], jnp.uint32), jnp.int32(number))
    assert drawn.dtype == jnp.int32
    assert int(drawn[0]) == bits * number >> 32 < number


def test_every_possible_sequence_is_equally_likely():
    """Offsets and environments are uniform over all that are stored, the newest included."""
    state = _filled(5, 4, 3, 12)
    batch = _sample(jax.random.key(0), state, 30_000, 5)
    _, counts = np.unique(batch.slots.record[0], return_counts=True)
    assert len(counts) == 3 * (12 - 5 + 1)
    expected = 30_000 / len(counts)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_whole_rollouts_with_a_stride():
    """With a stride, sequences begin where rollouts do, also after the ring has wrapped."""
    state = _filled(7, 4, 2, 12, jnp.array([CONTINUE, CONTINUE, CONTINUE, CUT]))
    batch = _sample(jax.random.key(0), state, 500, 4, stride=4)
    assert set(np.unique(batch.slots.record[0] % 1000)) == {16, 20, 24}
    assert not batch.burn_in.any()
    assert batch.starts[0].all()


def test_the_last_slot_is_cut_unless_terminated():
    """What follows a sequence is not in it; only a termination needs nothing of it."""
    for kind, expected in ((CONTINUE, CUT), (TRUNCATED, CUT), (CUT, CUT), (TERMINATED, TERMINATED)):
        batch = _sample(jax.random.key(0), _filled(2, 4, 2, 8, kind), 16, 3)
        assert (batch.slots.continuation[-1] == expected).all()
        assert (batch.slots.continuation[:-1] == kind).all()


def test_starts_and_last_actions_follow_the_slot_before():
    """An episode starts after a termination or a cut, not after a truncation, whose last observation belongs to it."""
    kinds = jnp.array([CONTINUE, TERMINATED, CONTINUE, TRUNCATED, CUT, CONTINUE])
    state = _add(_empty(2, 6), _rollout(0, 6, 2, kinds))
    batch = _sample(jax.random.key(0), state, 32, 6)
    np.testing.assert_array_equal(batch.starts[:, 0], [True, False, True, False, False, True])
    np.testing.assert_array_equal(batch.last_actions[1:, :, 0], batch.slots.actions[:-1, :, 0])


def test_the_oldest_slot_has_nothing_before_it():
    """Once the ring has wrapped, the slot before the oldest is the newest one, and must not count."""
    state = _filled(4, 3, 1, 9)
    batch = _sample(jax.random.key(0), state, 200, 2)
    oldest = np.asarray(batch.slots.record[0]) == 3
    assert oldest.any()
    np.testing.assert_array_equal(batch.starts[0], oldest)
    assert not batch.starts[1].any()


@pytest.mark.parametrize("burn_in", [0, 2])
def test_burn_in_only_where_a_sequence_began_inside_an_episode(burn_in):
    """The front of a sequence warms up until its first known start, and no longer than asked."""
    kinds = jnp.array([CONTINUE, CONTINUE, TERMINATED, CONTINUE, CONTINUE, CONTINUE, CONTINUE, CONTINUE])
    state = _add(_empty(1, 16), _rollout(0, 8, 1, kinds))
    batch = _sample(jax.random.key(0), state, 200, 4, burn_in=burn_in)
    by_first = {int(first): np.asarray(batch.burn_in[:, index]) for index, first in enumerate(batch.slots.record[0])}
    expected = {0: [0, 0, 0, 0], 1: [1, 1, 0, 0], 2: [1, 0, 0, 0], 3: [0, 0, 0, 0], 4: [1, 1, 0, 0]}
    for first, warming in expected.items():
        np.testing.assert_array_equal(by_first[first], np.array(warming, bool) & (np.arange(4) < burn_in))


def test_a_wrapped_ring_begins_inside_an_episode():
    """Once slots were overwritten, what came before the oldest is unknown, and its sequence warms up like any other."""
    state = _filled(4, 3, 1, 9)
    batch = _sample(jax.random.key(0), state, 200, 2, burn_in=1)
    np.testing.assert_array_equal(batch.burn_in, np.tile([[True], [False]], (1, 200)))


def test_unwritten_slots_are_cut():
    """Nothing is ever learned from a slot that was never written."""
    assert (_empty(2, 4).slots.continuation == CUT).all()


def test_cut_and_clear():
    """A cut marks the newest slot of every ring; a cleared replay holds nothing but takes rollouts as before."""
    state = replay.cut(_filled(3, 2, 2, 8))
    np.testing.assert_array_equal(state.slots.continuation[0, :6], [CONTINUE] * 5 + [CUT])
    np.testing.assert_array_equal(replay.cut(_filled(3, 2, 2, 8, TERMINATED)).slots.continuation[:, 5], [TERMINATED] * 2)
    wrapped = replay.cut(_filled(4, 2, 2, 8))
    np.testing.assert_array_equal(wrapped.slots.continuation[1, -1], CUT)
    cleared = _add(replay.clear(state), _rollout(50, 2, 2))
    assert int(cleared.size) == 2
    assert set(np.unique(_sample(jax.random.key(0), cleared, 20, 2).slots.record[0] % 1000)) == {50}


def test_a_rollout_that_does_not_divide_the_ring_is_refused():
    """A split at the end of the ring would tear a rollout apart."""
    with pytest.raises(ValueError, match="must divide"):
        replay.add(_empty(1, 8), _rollout(0, 3, 1))

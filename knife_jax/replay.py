"""A ring of records: what the games need to show themselves again, and how each slot goes on.

A slot holds the record of a state, the actions taken there, the reward that followed, and a `Continuation`. Each parallel environment
has a ring of its own; all are written together, in place, so that the position is one number that does not depend on the seed.

Shapes: E environments, C slots of each ring, T slots of a rollout, B sequences, L slots of a sequence, A agents.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from knife_jax.split import WHOLE, Split


class Continuation(enum.IntEnum):
    """How a slot goes on to the next one of its ring."""

    CONTINUE = 0
    """The next slot is the next step of the episode."""
    TERMINATED = 1
    """The episode ended here by a rule of the game: nothing follows, nothing is bootstrapped."""
    TRUNCATED = 2
    """The episode ended here by its time limit: the next slot is its true last observation, and is bootstrapped from."""
    CUT = 3
    """Nothing is known of what follows (a last observation, the end of a rollout or of a sequence, a task switch): never trained on."""


class Slot(NamedTuple):
    """One step of one environment, or with axes in front a rollout, a ring or a batch of them."""

    record: Any
    actions: Int[Array, "*N A"]
    reward: Float[Array, "*N"]
    continuation: Int[Array, "*N"]
    task: Int[Array, "*N"]


class ReplayState(NamedTuple):
    """The rings `[E, C, ...]`, the next position to write and the number of slots written, both shared by all rings."""

    slots: Slot
    head: Int[Array, ""]
    size: Int[Array, ""]


class Sequences(NamedTuple):
    """Sampled sequences, time first.

    Attributes:
        slots: `[L, B, ...]`; the last one is cut unless it is terminated.
        last_actions: the actions of the slot before each, `[L, B, A]`; meaningless where `starts`.
        starts: where an episode starts, or must be taken to start because what came before is gone, `[L, B]`.
        burn_in: the slots that only warm up a recurrent state which began inside an episode, `[L, B]`.
        task: the task of all slots, where it is known that the replay holds no other.
    """

    slots: Slot
    last_actions: Int[Array, "L B A"]
    starts: Bool[Array, "L B"]
    burn_in: Bool[Array, "L B"]
    task: Int[Array, ""] | None = None


def init(example: Slot, num_envs: int, capacity: int) -> ReplayState:
    """An empty replay.

    Args:
        example: one slot, as shapes or as arrays.
        num_envs: E.
        capacity: C, a multiple of the length of every rollout that will be written.
    """
    slots = jax.tree.map(lambda leaf: jnp.zeros((num_envs, capacity, *leaf.shape), leaf.dtype), example)
    slots = slots._replace(continuation=jnp.full_like(slots.continuation, Continuation.CUT))
    return ReplayState(slots, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(state: ReplayState, rollout: Slot) -> ReplayState:
    """Writes a rollout `[T, E, ...]` over the oldest slots. T must divide C, so that no rollout is split at the end of the ring."""
    length, capacity = rollout.reward.shape[0], state.slots.reward.shape[1]
    if capacity % length:
        raise ValueError(f"a ring of {capacity} slots cannot take rollouts of {length}: the length must divide the capacity")

    def write(ring: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(ring, jnp.swapaxes(new, 0, 1).astype(ring.dtype), state.head, axis=1)

    slots = jax.tree.map(write, state.slots, rollout)
    return ReplayState(slots, (state.head + length) % capacity, jnp.minimum(state.size + length, capacity))


def clear(state: ReplayState) -> ReplayState:
    """Forgets everything."""
    return state._replace(head=jnp.zeros_like(state.head), size=jnp.zeros_like(state.size))


def cut(state: ReplayState) -> ReplayState:
    """Marks the newest slots as not continued, before environments are reset from outside."""
    newest = (state.head - 1) % state.slots.reward.shape[1]
    last = jax.lax.dynamic_index_in_dim(state.slots.continuation, newest, axis=1)
    continuation = jax.lax.dynamic_update_slice_in_dim(state.slots.continuation, cut_ends(last), newest, axis=1)
    return state._replace(slots=state.slots._replace(continuation=continuation))


def cut_ends(continuation: Int[Array, "..."]) -> Int[Array, "..."]:
    """What slots become when nothing is known of what follows them; a terminated one is complete as it is."""
    return jnp.where(continuation == Continuation.TERMINATED, continuation, Continuation.CUT).astype(continuation.dtype)


def starts_after(continuation: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether the slot after one with this continuation is taken as the first of an episode.

    (After a termination the last observation comes first, if the game shows it; memory does not matter there.)
    """
    return (continuation == Continuation.TERMINATED) | (continuation == Continuation.CUT)


def uniform_below(bits: UInt32[Array, "*N"], number: Int[Array, ""] | int) -> Int[Array, "*N"]:
    """Integers from 0 to below `number`, as 32 random bits say: `bits * number // 2**32`, in halves of 16 bits.

    Of a number n, none is likelier than another by more than n / 2**32 of its chance. (`jax.random.randint` draws four times as often.)
    """
    factor = jnp.asarray(number).astype(jnp.uint32)
    high, low, factor_high, factor_low = bits >> 16, bits & 0xFFFF, factor >> 16, factor & 0xFFFF
    middle = high * factor_low + (low * factor_low >> 16)
    carried = low * factor_high + (middle & 0xFFFF)
    return (high * factor_high + (middle >> 16) + (carried >> 16)).astype(jnp.int32)


def sample(
    key: PRNGKeyArray, state: ReplayState, batch_size: int, length: int, stride: int = 1, burn_in: int = 0, split: Split = WHOLE
) -> Sequences:
    """Draws sequences uniformly, with replacement, from all that are stored.

    Args:
        key: a key.
        state: the replay, with at least `length` slots in each ring.
        batch_size: B.
        length: L.
        stride: sequences begin only at multiples of this many slots from the oldest one; above 1 they are rollouts from a reset.
        burn_in: slots at the front of a sequence that began inside an episode which are marked as such.
        split: gives a device its part of the batch.
    """
    num_envs, capacity = state.slots.reward.shape
    bits_env, bits_start = split.own(jax.random.bits(key, (2, batch_size)), axis=1)
    env = uniform_below(bits_env, num_envs)
    offset = stride * uniform_below(bits_start, (state.size - length) // stride + 1)
    oldest = state.head - state.size
    positions = (oldest + offset[None, :] + jnp.arange(length)[:, None]) % capacity
    before = (positions - 1) % capacity
    slots: Slot = jax.tree.map(lambda ring: ring[env[None, :], positions], state.slots)
    slots = slots._replace(continuation=slots.continuation.at[-1].set(cut_ends(slots.continuation[-1])))
    starts = starts_after(state.slots.continuation[env[None, :], before])
    oldest_is_start = (stride > 1) | (state.size < capacity)
    known_starts = starts.at[0].set(jnp.where(offset == 0, oldest_is_start, starts[0]))
    warming = (jnp.cumsum(known_starts, axis=0) == 0) & (jnp.arange(length)[:, None] < burn_in)
    starts = starts.at[0].set(starts[0] | (offset == 0))
    return Sequences(slots, state.slots.actions[env[None, :], before], starts, warming)

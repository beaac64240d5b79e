"""Seeds in groups, one after the other in one program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax import Config, RunnerState, make_program
from knife_jax.groups import vmap_in_groups
from knife_jax.replay import ReplayState

AXES = RunnerState._make((0, 0, ReplayState._make((0, None, None)), None, 0, 0))
CONFIG = {
    "env": {"name": "matrix", "scenario": "two_step"},
    "agent": {"hidden_size": 4},
    "learner": {"mixer": "vdn"},
    "collect": {"num_envs": 2, "rollout_length": 4},
    "replay": {"capacity_env_steps": 200_000, "batch_size": 2, "sequence_length": 3},
    "train": {"env_steps_per_task": 96},
    "evaluation": {"episodes": 1, "per_task": 2},
    "plasticity": {"diagnostics": False},
}


def _round_trip(state, factor, shift):
    total = state["own"].sum() * factor + shift
    new = {"own": state["own"] + total, "key": jax.random.split(state["key"])[0], "count": state["count"] + 1}
    return new, {"total": total, "nothing": jnp.zeros(0)}


def test_groups_are_the_same_as_one_batch():
    """What is the seed's own, what all share, keys, outputs and arguments: all as without groups."""
    axes = {"own": 0, "key": 0, "count": None}
    state = {"own": jnp.arange(12.0).reshape(6, 2), "key": jax.random.split(jax.random.key(0), 6), "count": jnp.int32(4)}
    arguments = (state, jnp.arange(6.0), jnp.float32(0.5))
    ins, outs = (axes, 0, None), (axes, 0)
    expected = jax.vmap(_round_trip, ins, outs)(*arguments)
    for width in (1, 2, 3, 6, 10):
        found = jax.jit(vmap_in_groups(_round_trip, ins, outs, width))(*arguments)
        assert int(found[0]["count"]) == 5
        np.testing.assert_array_equal(jax.random.key_data(found[0]["key"]), jax.random.key_data(expected[0]["key"]))
        np.testing.assert_array_equal(found[0]["own"], expected[0]["own"])
        np.testing.assert_array_equal(found[1]["total"], expected[1]["total"])
        assert found[1]["nothing"].shape == (6, 0)
    with pytest.raises(ValueError, match="6 seeds cannot be split into groups of 4"):
        vmap_in_groups(_round_trip, ins, outs, 4)(*arguments)


@pytest.mark.slow
def test_a_round_in_groups_trains_as_a_batch_of_that_width_does_and_in_place():
    """As the group's own batch up to the compiler's rounding; one replay in memory, and temporaries of a group, with its rings once."""
    program = make_program(Config.from_dict(CONFIG))
    hyper, seeds, width = program.config.hyper, 6, 2

    def advance(state):
        return program.train_rounds(state, jnp.int32(0), hyper)

    begin = jax.jit(jax.vmap(lambda key: program.begin_task(program.init(key, hyper), jnp.int32(0), hyper), out_axes=AXES))
    keys = jax.random.split(jax.random.key(0), seeds)
    state = begin(keys)
    grouped = jax.jit(vmap_in_groups(advance, (AXES,), (AXES, 0), width), donate_argnums=0).lower(state).compile()
    replay_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.replay))
    analysis = grouped.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes >= replay_bytes
    assert analysis.temp_size_in_bytes < 1.1 * replay_bytes * width / seeds
    found, metrics = grouped(state)
    alone = jax.jit(jax.vmap(advance, in_axes=(AXES,), out_axes=(AXES, 0)))
    assert int(found.counters.updates) > 0 and np.isfinite(metrics.unpacked()["train/loss"]).all()
    for first in range(0, seeds, width):
        expected, said = alone(begin(keys[first : first + width]))
        here = slice(first, first + width)
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, here=here: leaf[here], (found.learner, metrics)), (expected.learner, said), rtol=1e-5, atol=1e-6
        )

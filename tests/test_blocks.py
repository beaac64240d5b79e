"""Sequences worked through in blocks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax import Config, learner
from knife_jax.blocks import in_blocks
from tests.test_cures_in_training import ALWAYS, HUNTING, primed


def _running_sum(state, slots):
    sums = state + jnp.cumsum(slots["added"], axis=0)
    return sums[-1], {"sums": sums, "doubled": 2 * slots["added"]}


def _case(length, seed=0):
    return jnp.float32(1.0), {"added": jax.random.normal(jax.random.key(seed), (length, 3)).sum(axis=-1)}


@pytest.mark.parametrize("at_once", [1, 2, 5, 6, 12, 13])
def test_blocks_give_what_the_whole_gives(at_once):
    """Also vmapped, and where no block is small enough."""
    state, slots = _case(12)
    whole = _running_sum(state, slots)[1]
    np.testing.assert_allclose(in_blocks(_running_sum, state, slots, at_once)["sums"], whole["sums"], rtol=1e-6)
    states, many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_case(12, seed) for seed in range(2)])
    ours = jax.vmap(lambda state, slots: in_blocks(_running_sum, state, slots, at_once))(states, many)
    expected = jax.vmap(lambda state, slots: _running_sum(state, slots)[1])(states, many)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), ours, expected)


@pytest.mark.parametrize(("length", "at_once", "blocks"), [(12, 5, 3), (128, 10, 16), (12, 1, 1), (12, 12, 1), (13, 6, 1)])
def test_blocks_are_the_largest_equal_ones_on_processors(length, at_once, blocks):
    """Accelerators, and lengths without equal blocks that are small enough, take all at once."""
    state, slots = _case(length)

    def counts_of_loops(platform):
        traced = jax.jit(lambda state, slots: in_blocks(_first_plus, state, slots, at_once)).trace(state, slots)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"dense<(\d+)> : tensor<i32>", text) if "stablehlo.while" in text else []

    assert counts_of_loops("cuda") == []
    assert (str(blocks) in counts_of_loops("cpu")) == (blocks > 1)


def _first_plus(state, slots):
    return state + slots["added"][-1], state + slots["added"]


RECURRENT = {"hidden_size": 8, "recurrent": True}
CASES = {
    "qmix with composites everywhere": {"agent": RECURRENT, "plasticity": {**ALWAYS, "layers": ["agent", "agent/gru", "mixer"]}},
    "qplex, whose target network chooses by itself": {"agent": RECURRENT, "learner": {"mixer": "qplex", "double_q": False}},
    "independent feed-forward agents that see the task": {
        "env": {"name": "predator_prey", "scenario": "drift", "options": {"max_steps": 10}},
        "learner": {"mixer": "none"},
        "switch": {"observe_task": True, "replay": "keep"},
    },
    "vdn in bfloat16": {"agent": RECURRENT, "learner": {"mixer": "vdn", "compute_dtype": "bfloat16"}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_target_networks_values_are_the_same_in_blocks(case, monkeypatch):
    """The recurrent state passes from block to block, and episodes start within them."""
    config = Config.from_dict({**HUNTING, **CASES[case], "replay": {**HUNTING["replay"], "sequence_length": 11}})
    program, state, batch = primed(config)
    networks, learned = program.networks, state.learner
    if config.plasticity.name != "none":
        acting = networks.running_states(networks.initial_hidden((0,)))
        assert acting
        learned = jax.jit(lambda: learner.intervene(jax.random.key(0), learned, acting, networks, config.hyper)[0])()
    assert batch.starts[1:].any()

    def values(target, batch):
        return learner.team_values(learned.variables, target, networks, batch, learner.observed(networks, batch)).target

    def lowered(slots):
        monkeypatch.setattr(learner, "CACHED_BYTES", slots * 4 * batch.slots.actions[0].size * config.agent.hidden_size)
        afresh = jax.jit(lambda *args: values(*args))  # jit would remember what it traced of the same function
        return afresh.lower(learned.target_variables, batch)

    blocks, whole = lowered(5), lowered(12)
    assert blocks.as_text().count("stablehlo.while") > whole.as_text().count("stablehlo.while")
    ours, expected = (program.compile()(learned.target_variables, batch) for program in (blocks, whole))
    assert np.ptp(expected) > 0
    tolerance = 1e-2 if config.learner.compute_dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())

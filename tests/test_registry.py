"""Games by name: each keeps the interface's promises, sequences of tasks are data of one shape, and errors help."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import knife_jax.envs
from envs.base import stack_tasks
from envs.registry import GAMES, make

SCENARIOS = [(name, scenario) for name, entry in GAMES.items() for scenario in (*entry.scenarios, *entry.drifts)]
COMPACT = ("matrix", "predator_prey", "smax")
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("matrix", "custom"): {"payoff": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]},
    ("smax", "custom"): {"allies": {"marine": 2, "zealot": 1}, "enemies": {"stalker": 2}},
}

# Tracing a SMAX step takes a second; a few scenarios stand for the rest.
STANDING_FOR_SMAX = ("3m", "custom", "protoss_10_vs_11", "5gen_zerg_drift")
TRACED = [
    pytest.param(*pair, marks=[pytest.mark.slow] if pair[0] == "smax" and pair[1] not in STANDING_FOR_SMAX else []) for pair in SCENARIOS
]


def _facts(tree):
    """The shape and type of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def _bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "scenario"), TRACED)
def test_every_game_keeps_the_promises_of_the_interface(name, scenario):
    """Shapes and types of resets, steps, records and observations, without running any."""
    env, tasks = make(name, scenario, **OPTIONS.get((name, scenario), {}))
    key, params = jax.random.key(0), tasks.at(0)
    state = jax.eval_shape(env.reset, key, params)
    actions = jax.ShapeDtypeStruct((env.num_agents,), jnp.int32)
    stepped, outcome = jax.eval_shape(env.step, key, state, actions, params)
    assert _facts(stepped) == _facts(state)
    assert _facts(outcome[:3]) == (((), jnp.float32), ((), bool), ((), bool))
    assert _facts(outcome.info["won"]) == ((), bool)
    assert all(leaf.shape == () for leaf in outcome.info.values())
    record = jax.eval_shape(env.record, state)
    seen = jax.eval_shape(env.observe, record, params)
    assert _facts(seen.agents) == ((env.num_agents, env.observation_size), jnp.float32)
    assert _facts(seen.state) == ((env.state_size,), jnp.float32)
    assert _facts(seen.action_mask) == ((env.num_agents, env.num_actions), bool)
    assert _facts(seen.agent_mask) == ((env.num_agents,), bool)
    assert _facts(jax.eval_shape(env.optimal_return, params)) == ((), jnp.float32)
    assert name not in COMPACT or _bytes(record) < _bytes(seen.agents)


@pytest.mark.parametrize(("name", "scenario"), [pair for pair in SCENARIOS if pair[0] in COMPACT])
def test_tasks_are_stacked_parameters_of_one_environment(name, scenario):
    """Every leaf has one entry per distinct task, and one task has the shapes of the environment's default."""
    env, tasks = make(name, scenario, **OPTIONS.get((name, scenario), {}))
    assert _facts(tasks.at(0)) == _facts(env.default_params)
    assert all(leaf.shape[0] == len(tasks.names) for leaf in jax.tree.leaves(tasks.params))
    assert set(tasks.order) == set(range(len(tasks.names)))
    assert hash(env) == hash(make(name, scenario, **OPTIONS.get((name, scenario), {})).env)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("matri",), {}, "unknown game 'matri'; did you mean 'matrix'"),
        (("predator",), {}, "unknown game 'predator'; did you mean 'predator_prey'"),
        (("matrix", "qtram"), {}, "unknown scenario of 'matrix' 'qtram'; did you mean 'qtran'"),
        (("matrix/perm",), {}, "unknown scenario of 'matrix' 'perm'; did you mean 'permuted'"),
        (("smax", "2s3x"), {}, "unknown scenario of 'smax' '2s3x'; did you mean '2s3z'"),
        (("matrix", "custom"), {}, "needs the option 'payoff'"),
        (("matrix",), {"payof": [[1]]}, "unknown option 'payof'; did you mean 'payoff'"),
        (("matrix", "permuted"), {"task_sed": 1}, "unknown option 'task_sed'; did you mean 'task_seed'"),
        (("predator_prey",), {"heigth": 5}, "unknown override 'heigth'; did you mean 'height'"),
        (("predator_prey", "drift"), {"miscapture": -1}, "did you mean 'miscapture_punishment'"),
        (("jaxmarl", "MPE_simple_spread"), {}, "unknown game of JaxMARL 'MPE_simple_spread'; did you mean 'MPE_simple_spread_v3'"),
        (("smax",), {"max_step": 8}, "unknown option 'max_step'; did you mean 'max_steps'"),
        (("smax", "5gen_terran_drift"), {"atack_mode": "random"}, "unknown option 'atack_mode'; did you mean 'attack_mode'"),
        (("jaxmarl", "3m"), {"map_widht": 8}, "options {'map_widht': 8} are not what this game takes"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(arguments, options, message):
    """Games, scenarios and options alike; JaxMARL's own constructors only say what they do not take."""
    with pytest.raises(ValueError, match=message):
        make(*arguments, **options)


def test_a_users_sequence_is_stacked():
    """Each task's options go over the common ones; it may name its own scenario."""
    game = make("matrix", "paper", tasks=[{}, {"payoff": np.eye(3)}, {"scenario": "qtran"}])
    assert game.tasks.names == ("task_1", "task_2", "task_3") and game.tasks.order == (0, 1, 2)
    assert game.tasks.params.reward.shape == (3, 1, 3, 3)
    np.testing.assert_array_equal(game.tasks.params.optimal_return, [12.0, 1.0, 8.0])


def test_common_options_hold_for_every_task_that_does_not_change_them():
    """Two predator-prey tasks on one smaller grid."""
    game = make("predator_prey", tasks=[{}, {"time_reward": -1.0}], height=6, time_reward=-0.5)
    assert game.env.state_size == 3 * 6 * 10
    np.testing.assert_array_equal(game.tasks.params.time_reward, [-0.5, -1.0])
    np.testing.assert_array_equal(game.tasks.params.active_height, [6, 6])


@pytest.mark.parametrize(
    ("arguments", "tasks", "message"),
    [
        (("matrix",), [{"payoff": np.eye(2)}, {"payoff": np.eye(3)}], r"tasks\[1\]: 3 actions, but tasks\[0\] has 2"),
        (
            ("matrix",),
            [{"payoff": np.eye(2)}, {"scenario": "two_step"}],
            r"tasks\[1\]: its environment .* differs in shape from .*tasks\[0\]",
        ),
        (("predator_prey",), [{}, {}, {"height": 6}], r"tasks\[2\]: its environment .* differs in shape"),
        (("matrix",), [{}, {"payoff": [1, 2]}], r"tasks\[1\]: a payoff must be a non-empty 2-D array"),
        (("matrix",), [{}, {"payof": np.eye(3)}], r"tasks\[1\]: unknown option 'payof'; did you mean 'payoff'"),
        (("matrix",), [{"scenario": "qtram"}], r"tasks\[0\]: unknown scenario of 'matrix' 'qtram'; did you mean 'qtran'"),
        (("matrix",), [{"scenario": "permuted"}], r"tasks\[0\]: scenario 'permuted' is itself a sequence of tasks"),
        (("matrix", "permuted"), [{}], "scenario 'permuted' is itself a sequence of tasks; leave `tasks` empty"),
        (("predator_prey/drift",), [{}], "scenario 'drift' is itself a sequence of tasks; leave `tasks` empty"),
    ],
)
def test_a_sequence_that_cannot_be_is_refused(arguments, tasks, message):
    """With the index of the task to mend."""
    with pytest.raises(ValueError, match=message):
        make(*arguments, tasks=tasks)


def test_tasks_of_different_shapes_do_not_stack():
    """Both are named."""
    with pytest.raises(ValueError, match=r"must have the same shapes, but 'long' has .* and 'short' has"):
        stack_tasks([{"x": jnp.zeros(2)}, {"x": jnp.zeros(3)}], ["short", "long"])


@pytest.mark.parametrize(("name", "scenario"), [("matrix", "paper"), ("matrix", "permuted"), ("predator_prey", "p05")])
def test_a_scenario_may_be_named_behind_a_slash(name, scenario):
    """`matrix/paper` is short for both names."""
    short, full = make(f"{name}/{scenario}"), make(name, scenario)
    assert short.env == full.env and short.tasks.names == full.tasks.names
    jax.tree.map(np.testing.assert_array_equal, short.tasks.params, full.tasks.params)


@pytest.mark.parametrize("name", GAMES)
def test_a_game_without_a_scenario_is_its_default(name):
    """Which is one of those listed."""
    assert GAMES[name].default in GAMES[name].scenarios
    assert make(name).env == make(name, GAMES[name].default).env


def test_the_public_names_are_the_same_under_the_librarys_own_name():
    """`knife_jax.envs` is `envs`, for code in which `envs` means something else."""
    assert knife_jax.envs.__all__ == envs.__all__
    assert all(getattr(knife_jax.envs, name) is getattr(envs, name) for name in envs.__all__)

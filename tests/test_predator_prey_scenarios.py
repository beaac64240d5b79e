"""The published scenarios of predator-prey and their drift: sizes, best returns, refusals."""

import jax
import numpy as np
import pytest

from envs.predator_prey_scenarios import drift_tasks, make


@pytest.mark.parametrize(
    ("scenario", "overrides", "expected"),
    [
        ("pymarl2", {}, 40.0),
        ("wqmix", {}, 40.0),
        ("pymarl2", {"capture_condition": (3, 1)}, 20.0),
        ("pymarl2", {"active_agents": 7}, 30.0),
        ("pymarl2", {"active_stags": 2}, 20.0),
        ("pymarl2", {"capture_freezes": False}, 80.0),
        ("pymarl2", {"active_agents": 1, "capture_freezes": False}, 0.0),
        ("pymarl2", {"capture_condition": (5, 1)}, 0.0),
        ("gradps_small", {}, 120.0),
        ("gradps_medium", {}, 200.0),
        ("gradps_large", {}, 300.0),
        ("gradps_small", {"num_hunters": 0}, 72.0),
        ("gradps_small", {"capture_freezes": True}, np.nan),
        ("reborn_small", {}, np.nan),
        ("reborn_small", {"time_reward": 0.0}, 120.0),
        ("pymarl2", {"capture_condition": (0, 1)}, np.nan),
        ("pymarl2", {"miscapture_punishment": 1.0}, np.nan),
    ],
)
def test_optimal_return(scenario, overrides, expected):
    """Against values worked out by hand."""
    env, params = make(scenario, **overrides)
    np.testing.assert_equal(float(env.optimal_return(params)), expected)


@pytest.mark.parametrize(
    ("scenario", "observation_size", "state_size", "entities"),
    [
        ("pymarl2", 75, 300, 16),
        ("dcg", 75, 300, 16),
        ("gradps_small", 147, 1200, 18),
        ("gradps_medium", 147, 1875, 30),
        ("gradps_large", 147, 2700, 45),
        ("reborn_small", 27, 1200, 18),
        ("reborn_medium", 27, 2700, 36),
        ("reborn_large", 27, 4800, 54),
    ],
)
def test_sizes_of_the_scenarios(scenario, observation_size, state_size, entities):
    """Against the published window and grid sizes."""
    env, params = make(scenario)
    assert (env.observation_size, env.state_size, env.num_agents + env.num_prey, env.num_actions) == (
        observation_size,
        state_size,
        entities,
        6,
    )
    observation = jax.eval_shape(lambda key: env.observe(env.record(env.reset(key, params)), params), jax.random.key(0))
    assert observation.agents.shape == (env.num_agents, observation_size) and observation.state.shape == (state_size,)


@pytest.mark.parametrize(
    ("scenario", "overrides", "message"),
    [
        ("pymarl", {}, "unknown scenario 'pymarl'; did you mean 'pymarl2'"),
        ("pymarl2", {"num_agent": 3}, "unknown override 'num_agent'; did you mean 'num_agents'"),
        ("pymarl2", {"miscapture": -1}, "did you mean 'miscapture_punishment'"),
        ("pymarl2", {"height": -1}, "height must be a whole number of at least 1, not -1"),
        ("pymarl2", {"width": 300}, "width must be at most 256"),
        ("pymarl2", {"num_agents": 0}, "num_agents must be"),
        ("pymarl2", {"radius": -1}, "radius must be a whole number of at least 0"),
        ("pymarl2", {"num_stags": 0}, "num_stags \\+ num_hares must be at least 1"),
        ("pymarl2", {"num_agents": 93}, "101 entities, more than the 100 cells of height x width"),
        ("pymarl2", {"active_height": 1}, "16 entities, more than the 10 cells of active_height x active_width"),
        ("pymarl2", {"active_agents": 9}, "active_agents must be at least 1 and at most 8, not 9"),
        ("pymarl2", {"active_stags": 0}, "active_stags \\+ active_hares must be at least 1"),
        ("pymarl2", {"rest_probability": (0.0, 1.5)}, "rest_probability must be at least 0 and at most 1"),
        ("pymarl2", {"capture_condition": 2}, "capture_condition must have the shape \\(2,\\) for \\[stag, hare\\]"),
        ("pymarl2", {"capture_condition": (1.5, 1.0)}, "capture_condition must be of type int32"),
    ],
)
def test_refusals(scenario, overrides, message):
    """Errors name the field and the nearest valid name."""
    with pytest.raises(ValueError, match=message):
        make(scenario, **overrides)


def test_default_params_can_be_asked_for_inside_a_compiled_function():
    """The checks need values and must not trace."""
    env, _ = make("pymarl2")
    assert jax.jit(lambda: env.default_params.capture_reward)().tolist() == [10.0, 1.0]


@pytest.mark.parametrize("scenario", ["pymarl2", "wqmix", "gradps_small"])
def test_drift(scenario):
    """Eight distinct tasks, and the first one again."""
    env, params = make(scenario)
    tasks = drift_tasks(env, params)
    assert len(tasks.names) == len(set(tasks.names)) == 8 and tasks.order == (*range(8), 0)
    base = jax.tree.leaves(tasks.at(0))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all().item(), tasks.at(0), params)))
    for index in range(1, 8):
        assert any((leaf != other).any() for leaf, other in zip(jax.tree.leaves(tasks.at(index)), base, strict=True))


def test_one_program_serves_every_task_of_the_drift():
    """All tasks reset in one batch; their best returns are known."""
    env, params = make("pymarl2")
    tasks = drift_tasks(env, params)
    states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 8), tasks.params)
    walls, numbers = tasks.names.index("walls"), tasks.names.index("numbers")
    assert np.asarray(states.alive).sum(axis=1)[numbers] == 4
    assert np.asarray(states.agents[walls]).max() < 8 and np.asarray(states.prey[walls]).max() < 8
    best = jax.jit(jax.vmap(env.optimal_return))(tasks.params)
    expected = {"base": 40, "condition": 20, "reward": 20, "punishment": 40, "rest": 40, "numbers": 20, "walls": 40, "freezing": 80}
    assert dict(zip(tasks.names, best.tolist(), strict=True)) == expected


def test_a_drift_that_does_not_fit_is_refused():
    """The walls leave 9 cells for 16 entities."""
    env, params = make("pymarl2", height=4, width=4)
    with pytest.raises(ValueError, match="16 entities, more than the 9 cells"):
        drift_tasks(env, params)

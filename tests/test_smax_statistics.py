"""Our SMAX under policies that do not learn, against JaxMARL's own numbers."""

import jax
import numpy as np
import pytest

from envs import smax
from experiments.smax_difficulty import play

# Mean return and win rate of 512 episodes of JaxMARL's SMAX, against its heuristic enemy (closest).
RANDOM = {"3m": 0.18, "2s3z": 0.20, "5m_vs_6m": 0.14, "3s5z_vs_3s6z": 0.18, "6h_vs_8z": 0.32, "smacv2_5_units": 0.26}
HEURISTIC = {
    "3m": (1.39, 0.48),
    "2s3z": (1.37, 0.47),
    "5m_vs_6m": (0.58, 0.006),
    "3s5z_vs_3s6z": (0.62, 0.0),
    "6h_vs_8z": (0.62, 0.0),
    "smacv2_5_units": (1.36, 0.50),
}
THEIRS = 512
OURS = 2048

pytestmark = [pytest.mark.slow, pytest.mark.computes]
per_scenario = pytest.mark.parametrize("scenario", RANDOM)


def check_mean(values, expected, rounded_to):
    """Within four standard errors of a difference of both samples, and rounding."""
    error = np.std(values) * np.sqrt(1 / len(values) + 1 / THEIRS)
    assert abs(np.mean(values) - expected) < 4 * error + rounded_to / 2


@per_scenario
@pytest.mark.parametrize("legacy", [True, False])
def test_random_allies_do_as_in_jaxmarl(scenario, legacy):
    """Returns; nobody wins by chance."""
    env, params = smax.make(scenario, legacy=legacy)
    told = play(env, params, "random", jax.random.key(1), OURS)
    check_mean(told.returns, RANDOM[scenario], 0.01)
    assert np.mean(told.won) < 0.01


@per_scenario
@pytest.mark.parametrize("legacy", [True, False])
def test_the_heuristic_does_as_in_jaxmarl(scenario, legacy):
    """Returns and wins of the heuristic against itself."""
    env, params = smax.make(scenario, legacy=legacy)
    told = play(env, params, "heuristic", jax.random.key(2), OURS)
    expected, won = HEURISTIC[scenario]
    check_mean(told.returns, expected, 0.01)
    assert abs(np.mean(told.won) - won) < 4 * np.sqrt(max(won * (1 - won), 0.002) * (1 / OURS + 1 / THEIRS)) + 0.005


def test_drifting_tasks_differ_in_how_hard_they_are():
    """Hard ones and easy ones, by the heuristic's wins, and never one that is decided in advance."""
    env, tasks = smax.drift("protoss", 5)
    won = [float(np.mean(play(env, tasks.at(task), "heuristic", jax.random.key(3), 512).won)) for task in range(10)]
    assert max(won) - min(won) > 0.4
    assert max(won) < 0.99 and sum(rate > 0.02 for rate in won) >= 8

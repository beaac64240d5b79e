"""What each mixer can and cannot represent, learned from uniform data as the QPLEX paper runs it; and the main job's claim. All slow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.matrix_game import PAYOFFS
from knife_jax import learner, make_program, results, runner
from knife_jax.config import resolve
from knife_jax.replay import Continuation, Sequences, Slot

pytestmark = [pytest.mark.slow, pytest.mark.computes]
SEEDS = 5


def _joint_table(config, params):
    """The learned Q_tot of every joint action of a one-step game, `[S, U, U]`."""
    networks = make_program(resolve(config)).networks
    size = networks.env.num_actions
    joint = jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), -1).reshape(1, -1, 2)
    rows = joint.shape[:2]
    slots = Slot(
        jnp.zeros(rows, jnp.uint8), joint, jnp.zeros(rows), jnp.full(rows, int(Continuation.TERMINATED)), jnp.zeros(rows, jnp.int32)
    )
    batch = Sequences(slots, jnp.zeros_like(joint), jnp.ones(rows, bool), jnp.zeros(rows, bool))

    def table(params):
        observation = learner.observed(networks, batch)
        return learner.team_values(params, params, networks, batch, observation).online.reshape(size, size)

    return np.asarray(jax.vmap(table)(params))


def _calibrate(mixer, payoff, updates=20_000):
    """Final greedy returns `[S]`, and the mean absolute error of each seed's table `[S]`."""
    preset = "qplex_matrix" if mixer == "qplex" else "matrix_calibration"
    config = {
        "preset": preset,
        "env": {"name": "matrix", "scenario": payoff},
        "learner": {"mixer": mixer},
        "train": {"env_steps_per_task": updates},
    }
    result = runner.run(config, seeds=SEEDS)
    tables = _joint_table(config, result.variables)
    return result.metrics["eval/return"][:, -1], np.abs(tables - np.asarray(PAYOFFS[payoff])).mean(axis=(1, 2))


@pytest.mark.parametrize(
    ("payoff", "updates", "at_optimum", "close"),
    [("qtran", 20_000, 5, 3), ("qplex_1", 20_000, 5, 3), ("qplex_3", 30_000, 3, 2), ("pymarl2_alt_1", 20_000, 5, 3)],
)
def test_qplex_finds_the_optimum_of_payoffs_that_are_not_monotone(payoff, updates, at_optimum, close):
    """Of five seeds so many are at the optimum, and so many have a table that is off by less than 1 on average.

    With constant steps a seed passes through spikes: single final tables of QPLEX-3 have been off by 1.5 and by 4.5, and which ones changes
    with the machine's rounding. For the same reason greedy actions flip there between near ties (8 against 6 and 6, all others 0 or -12):
    no seed may be worse than 6, and most must be at 8. 20,000 updates are too few for that. QMIX is off by more than 3 on QTRAN, see below.
    """
    returns, errors = _calibrate("qplex", payoff, updates)
    optimum = np.max(PAYOFFS[payoff])
    assert (returns >= (6 if payoff == "qplex_3" else optimum) - 1e-4).all()
    assert np.isclose(returns, optimum, rtol=1e-5).sum() >= at_optimum
    assert (errors < 1).sum() >= close


def test_qmix_cannot_represent_qtran():
    """Its error stays large, though some seeds are lucky in their greedy action."""
    _, errors = _calibrate("qmix", "qtran")
    assert errors.mean() > 3


@pytest.mark.parametrize(("mixer", "expected"), [("qmix", 8.0), ("vdn", 7.0)])
def test_two_step_game(mixer, expected):
    """QMIX finds the risky branch's 8, VDN settles on the safe 7, on every seed."""
    config = {
        "preset": "matrix_calibration",
        "env": {"name": "matrix", "scenario": "two_step"},
        "learner": {"mixer": mixer},
        "collect": {"mode": "episode", "num_envs": 4},
        "replay": {"capacity_episodes": 2000},
        "train": {"env_steps_per_task": 60_000},
    }
    returns = runner.run(config, seeds=SEEDS).metrics["eval/return"][:, -1]
    np.testing.assert_allclose(returns, expected)


def test_the_main_job_shows_plasticity_loss():
    """QMIX on permuted matrix games solves task 1 the first time and clearly less often when it returns."""
    result = runner.run("matrix_drift", seeds=64)
    summary = results.summarise(result)
    first, last = summary.tasks[0].success, summary.tasks[-1].success
    assert first is not None and last is not None
    assert first.value > 0.95
    assert last.below(first)
    assert summary.plasticity_loss is not None and "the intervals are apart" in summary.plasticity_loss
    assert result.provenance["run_seconds"] > 0

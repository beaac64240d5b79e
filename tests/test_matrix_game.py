"""Matrix games, the two-step game and the MMDP: their tables, ends and optima, by hand and by trying every plan."""

import itertools
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from envs.matrix_game import PAYOFFS, TabularGame, matrix_game, mmdp, permuted_payoffs, tabular_params, two_step_game
from envs.registry import make
from envs.wrappers import IdleAfterEnd

OPTIMA = {
    "qtran": 8.0,
    "qplex_1": 10.4,
    "qplex_3": 8.0,
    "pymarl2": 12.0,
    "pymarl2_alt_1": 12.0,
    "pymarl2_alt_2": 12.0,
    "climbing": 11.0,
    "penalty": 10.0,
    "paper": 12.0,
}


@partial(jax.jit, static_argnums=0)
def _play(env, plans, params):
    """What is seen before, and what comes of, every step of every plan `[plans, T, 2]`; the axes of the result are [plan, time]."""
    key = jax.random.key(0)

    def one_step(state, actions):
        seen = env.observe(env.record(state), params)
        state, outcome = env.step(key, state, actions, params)
        return state, (seen, outcome)

    return jax.vmap(lambda plan: jax.lax.scan(one_step, env.reset(key, params), plan)[1])(plans)


def _all_plans(num_actions, length):
    """Every sequence of joint actions, `[plans, T, 2]`."""
    joint = np.array(list(itertools.product(range(num_actions), repeat=2)), np.int32)
    return joint[np.array(list(itertools.product(range(len(joint)), repeat=length)))]


@pytest.mark.parametrize("name", PAYOFFS)
def test_a_payoff_is_paid_at_once_and_won_only_at_its_optimum(name):
    """Every joint action of a named payoff ends the game and pays its cell; the best cell is the optimum of the source."""
    game, params = matrix_game(PAYOFFS[name])
    table = np.array(PAYOFFS[name], np.float32)
    assert table.shape == (3, 3) and (game.num_states, game.num_actions, game.max_steps) == (1, 3, 1)
    _, outcome = _play(game, _all_plans(3, 1), params)
    np.testing.assert_array_equal(outcome.reward.reshape(3, 3), table)
    np.testing.assert_array_equal(outcome.info["won"].reshape(3, 3), table == np.float32(OPTIMA[name]))
    np.testing.assert_allclose(game.optimal_return(params), OPTIMA[name], rtol=1e-6)
    assert outcome.terminated.all() and not outcome.truncated.any() and outcome.info["won"].any()


def test_every_named_payoff_has_a_known_optimum():
    """The table above forgets none."""
    assert set(OPTIMA) == set(PAYOFFS)


def test_two_step_game_pays_8_for_the_second_matrix_and_7_for_the_first():
    """Agent 0's first action alone picks the matrix; the game terminates on its second step."""
    game, params = two_step_game()
    plans = _all_plans(2, 2)
    _, outcome = _play(game, plans, params)
    first, second = plans[:, 0], plans[:, 1]
    expected = np.where(first[:, 0] == 0, 7.0, np.array([[0, 1], [1, 8]])[second[:, 0], second[:, 1]])
    np.testing.assert_array_equal(outcome.reward.sum(axis=1), expected)
    np.testing.assert_array_equal(outcome.reward[:, 0], 0.0)
    np.testing.assert_array_equal(outcome.terminated, np.tile([False, True], (16, 1)))
    np.testing.assert_array_equal(outcome.info["won"][:, 1], expected == 8.0)
    assert not outcome.truncated.any() and float(game.optimal_return(params)) == 8.0


def test_mmdp_pays_for_ever_until_it_is_absorbed():
    """In state 1 only (0, 0) pays; (1, 1) leads to state 0, which pays nothing; the limit truncates at exactly 100."""
    game, params = mmdp()
    stay, left = np.zeros((100, 2), np.int32), np.zeros((100, 2), np.int32)
    left[:4] = [[0, 0], [0, 1], [1, 0], [1, 1]]
    seen, outcome = _play(game, jnp.stack([stay, left]), params)
    np.testing.assert_array_equal(outcome.reward[0], 1.0)
    np.testing.assert_array_equal(outcome.reward[1], np.eye(1, 100)[0])
    np.testing.assert_array_equal(seen.agents[1, :, 0].argmax(axis=-1), np.arange(100) < 4)
    np.testing.assert_array_equal(outcome.truncated, np.tile(np.arange(100) == 99, (2, 1)))
    np.testing.assert_array_equal(outcome.info["won"][:, -1], [True, False])
    assert not outcome.terminated.any() and float(game.optimal_return(params)) == 100.0


@pytest.mark.parametrize(
    ("payoff", "mask"),
    [
        ([[-1, -2, -3], [-4, -5, -6]], [[True, True, False], [True, True, True]]),
        ([[-1], [-2]], [[True, True], [True, False]]),
        ([[-1.0]], [[True], [True]]),
    ],
)
def test_a_rectangular_payoff_is_padded_and_masked(payoff, mask):
    """The agent with fewer actions lacks the last ones, and their zeros are no optimum."""
    game, params = matrix_game(payoff)
    seen, _ = _play(game, np.zeros((1, 1, 2), np.int32), params)
    np.testing.assert_array_equal(seen.action_mask[0, 0], mask)
    assert game.num_actions == max(np.shape(payoff)) and float(game.optimal_return(params)) == -1.0


@pytest.mark.parametrize(
    ("payoff", "message"),
    [
        (3.0, r"non-empty 2-D array.*got shape \(\)"),
        ([1, 2], r"non-empty 2-D array.*got shape \(2,\)"),
        ([[[1, 2]]], r"non-empty 2-D array.*got shape \(1, 1, 2\)"),
        ([], r"non-empty 2-D array.*got shape \(0,\)"),
        ([[], []], r"non-empty 2-D array.*got shape \(2, 0\)"),
        ([[1, float("nan")]], "must be finite"),
        ([[1, float("-inf")]], "must be finite"),
        ([["a", "b"]], "must be a 2-D array of numbers"),
        ([["1", "2"]], "must be a 2-D array of numbers"),
        ([[1, None]], "must be a 2-D array of numbers"),
        ([[1, 2], [3]], "must be a 2-D array of numbers"),
        ("qtran", "must be a 2-D array of numbers"),
    ],
)
def test_a_bad_payoff_is_refused(payoff, message):
    """Before anything is compiled, with what was given."""
    with pytest.raises(ValueError, match=message):
        matrix_game(payoff)


def test_views_are_one_hot_states_and_the_global_state_is_both():
    """A record is one byte; a game of one state shows the constant 1."""
    game, params = two_step_game()
    records = jnp.arange(3, dtype=jnp.uint8)
    seen = jax.jit(jax.vmap(game.observe, (0, None)))(records, params)
    np.testing.assert_array_equal(seen.agents, np.stack([np.eye(3), np.eye(3)], axis=1))
    np.testing.assert_array_equal(seen.state, np.concatenate([np.eye(3), np.eye(3)], axis=1))
    assert seen.agent_mask.all() and seen.action_mask.all()
    assert jax.eval_shape(lambda key: game.record(game.reset(key, params)), jax.random.key(0)).dtype == jnp.uint8
    game, params = matrix_game(PAYOFFS["paper"])
    constant, _ = _play(game, np.zeros((1, 1, 2), np.int32), params)
    np.testing.assert_array_equal(constant.agents, 1.0)
    np.testing.assert_array_equal(constant.state, 1.0)


def test_permuted_tasks_are_permutations_with_optima_in_different_cells():
    """Five tasks, the first is the paper's payoff itself, which comes again at the end."""
    paper = np.array(PAYOFFS["paper"], np.float32)
    permutations = [paper[np.ix_(rows, columns)] for rows, columns in itertools.product(itertools.permutations(range(3)), repeat=2)]
    game = make("matrix", "permuted", task_seed=0)
    payoffs = np.asarray(game.tasks.params.reward)[:, 0]
    assert payoffs.shape == (5, 3, 3) and game.tasks.order == (0, 1, 2, 3, 4, 0)
    np.testing.assert_array_equal(payoffs[0], paper)
    assert all(any((payoff == permutation).all() for permutation in permutations) for payoff in payoffs)
    assert len({int(payoff.argmax()) for payoff in payoffs}) == 5
    np.testing.assert_array_equal(game.tasks.params.optimal_return, 12.0)


def test_permuted_tasks_are_fixed_by_their_seed():
    """The same ones for the same `task_seed`, others for another."""
    drawn = [np.stack(permuted_payoffs(seed)).tobytes() for seed in range(10)]
    assert drawn == [np.stack(permuted_payoffs(seed)).tobytes() for seed in range(10)]
    assert len(set(drawn)) == 10


@pytest.mark.parametrize("num_tasks", [0, 10])
def test_a_drift_needs_a_cell_for_every_optimum(num_tasks):
    """A 3 x 3 payoff has nine."""
    with pytest.raises(ValueError, match=f"num_tasks must be 1 to 9.*got {num_tasks}"):
        make("matrix", "permuted", num_tasks=num_tasks)


_TABLE = (3, 2, 2)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    reward=hnp.arrays(np.float32, _TABLE, elements=st.integers(-5, 5)),
    next_state=hnp.arrays(np.int32, _TABLE, elements=st.integers(0, 2)),
    terminal=hnp.arrays(bool, _TABLE),
    mask=st.sampled_from([((1, 1), (1, 1)), ((1, 0), (1, 1)), ((1, 1), (0, 1)), ((0, 1), (1, 0))]),
    start=st.integers(0, 2),
    horizon=st.integers(1, 3),
)
def test_the_optimum_is_the_best_of_all_plans(reward, next_state, terminal, mask, start, horizon):
    """Backward induction against every sequence of available joint actions; those that reach it, and no others, are won."""
    game = TabularGame(num_states=3, num_actions=2, max_steps=horizon)
    params = tabular_params(reward, next_state, terminal, start, horizon, np.array(mask, bool))
    plans = _all_plans(2, horizon)
    _, outcome = _play(IdleAfterEnd(game), plans, params)
    available = np.all(np.array(mask, bool)[[0, 1], plans], axis=(1, 2))
    returns = np.asarray(outcome.reward)[available].sum(axis=1)
    won = np.asarray(outcome.info["won"])[available].any(axis=1)
    assert returns.max() == float(game.optimal_return(params))
    np.testing.assert_array_equal(won, returns == returns.max())
    np.testing.assert_array_equal((outcome.terminated | outcome.truncated).sum(axis=1), 1)

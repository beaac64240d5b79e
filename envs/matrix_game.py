"""Matrix games, the two-step game and the MMDP: small cooperative games given by tables.

Shapes: X states of the table, U actions of each of the two agents.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from envs.base import Actions, Environment, Observation, Outcome, Scalar

NUM_AGENTS = 2


class TabularParams(NamedTuple):
    """The tables of a game; X states, U actions of each agent.

    Attributes:
        reward: the team reward of every joint action.
        next_state: where it leads.
        terminal: whether the game ends by it.
        start: the first state.
        action_mask: the actions that each agent has; agents of a rectangular payoff have different numbers of them.
        optimal_return: the best undiscounted return within the time limit.
    """

    reward: Float[Array, "X U U"]
    next_state: Int[Array, "X U U"]
    terminal: Bool[Array, "X U U"]
    start: Int[Array, ""]
    action_mask: Bool[Array, "2 U"]
    optimal_return: Float[Array, ""]


class TabularState(NamedTuple):
    """The table's state, the steps taken and the return so far."""

    table_state: Int[Array, ""]
    steps: Int[Array, ""]
    episode_return: Float[Array, ""]


@dataclass(frozen=True)
class TabularGame(Environment):
    """A deterministic game of two agents given by tables of rewards, next states and ends.

    Each agent sees the one-hot of the state (the constant 1 in a game of one state), without identity or time; the global state is both
    views side by side. An episode is won if it ends with the best possible return.

    Attributes:
        num_states: X.
        num_actions: U, the larger number if the agents' differ.
        max_steps: the time limit; reaching it without a terminal joint action is a truncation.
    """

    num_states: int
    num_actions: int
    max_steps: int = 1
    num_agents: int = NUM_AGENTS

    @property
    def observation_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One entry per state."""
        return self.num_states

    @property
    def state_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Both agents' views."""
        return NUM_AGENTS * self.num_states

    @property
    def default_params(self) -> TabularParams:
        """A game of the right shape that pays nothing and ends at once; real tasks come from this module's makers."""
        table = (self.num_states, self.num_actions, self.num_actions)
        reward, next_state = np.zeros(table, np.float32), np.zeros(table, np.int32)
        return tabular_params(reward, next_state, np.ones(table, bool), start=0, max_steps=self.max_steps)

    def reset(self, key: PRNGKeyArray, params: TabularParams) -> TabularState:
        """Every episode starts in the same state."""
        del key
        return TabularState(params.start, jnp.zeros((), jnp.int32), jnp.zeros(()))

    def step(self, key: PRNGKeyArray, state: TabularState, actions: Actions, params: TabularParams) -> tuple[TabularState, Outcome]:
        """Looks the joint action up."""
        del key
        where = (state.table_state, actions[0], actions[1])
        reward, terminated = params.reward[where], params.terminal[where]
        after = TabularState(params.next_state[where], state.steps + 1, state.episode_return + reward)
        truncated = (after.steps >= self.max_steps) & ~terminated
        reached = after.episode_return >= params.optimal_return - 1e-4 * (1.0 + jnp.abs(params.optimal_return))
        return after, Outcome(reward, terminated, truncated, {"won": (terminated | truncated) & reached})

    def record(self, state: TabularState) -> UInt8[Array, ""]:
        """The table's state in one byte."""
        return state.table_state.astype(jnp.uint8)

    def observe(self, record: UInt8[Array, ""], params: TabularParams) -> Observation:
        """The one-hot of the state for each agent."""
        view = jax.nn.one_hot(record, self.num_states)
        agents = jnp.tile(view, (NUM_AGENTS, 1))
        return Observation(agents, agents.reshape(-1), params.action_mask, jnp.ones(NUM_AGENTS, bool))

    def optimal_return(self, params: TabularParams) -> Scalar:
        """The best return within the time limit, by dynamic programming when the tables were made."""
        return params.optimal_return


def tabular_params(
    reward: np.ndarray,
    next_state: np.ndarray,
    terminal: np.ndarray,
    start: int,
    max_steps: int,
    action_mask: np.ndarray | None = None,
) -> TabularParams:
    """Makes the parameters of a tabular game and solves it by backward induction.

    Args:
        reward: rewards, `[X, U, U]`.
        next_state: indices of states, `[X, U, U]`.
        terminal: whether the game ends, `[X, U, U]`.
        start: the first state.
        max_steps: the time limit for which the best return is computed.
        action_mask: the actions of each agent, `[2, U]`; all by default.
    """
    mask = np.ones((NUM_AGENTS, reward.shape[-1]), bool) if action_mask is None else action_mask
    allowed = mask[0][:, None] & mask[1][None, :]
    value = np.zeros(len(reward))
    for _ in range(max_steps):
        q = reward + np.where(terminal, 0.0, value[next_state])
        value = np.where(allowed, q, -np.inf).max(axis=(1, 2))
    return TabularParams(
        jnp.asarray(reward, jnp.float32),
        jnp.asarray(next_state, jnp.int32),
        jnp.asarray(terminal, bool),
        jnp.int32(start),
        jnp.asarray(mask),
        jnp.float32(value[start]),
    )


def matrix_params(payoff: Any) -> TabularParams:
    """The parameters of the one-step game that pays `payoff[u0, u1]`, rows for agent 0; a rectangular payoff is padded and masked.

    Raises:
        ValueError: if the payoff is not two-dimensional, is empty, or holds a value that is not finite.
    """
    try:
        table = np.asarray(payoff).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError) as error:
        raise ValueError(f"a payoff must be a 2-D array of numbers, rows for agent 0; got {payoff!r}") from error
    if table.ndim != NUM_AGENTS or table.size == 0:
        raise ValueError(f"a payoff must be a non-empty 2-D array, rows for agent 0 and columns for agent 1; got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"a payoff must be finite; got {table.tolist()}")
    size = max(table.shape)
    mask = np.arange(size) < np.asarray(table.shape)[:, None]
    padded = np.zeros((1, size, size))
    padded[0, : table.shape[0], : table.shape[1]] = table
    return tabular_params(padded, np.zeros_like(padded, np.int32), np.ones_like(padded, bool), start=0, max_steps=1, action_mask=mask)


PAPER_PAYOFF = ((-10.0, -10.0, 12.0), (-9.0, -12.0, -8.0), (-4.0, -8.0, -11.0))
"""The first task of the "Stagnant Neuron" paper's matrix drift."""

PAYOFFS: dict[str, tuple[tuple[float, ...], ...]] = {
    "qtran": ((8, -12, -12), (-12, 0, 0), (-12, 0, 0)),
    "qplex_1": ((10.4, 0, 10), (0, 10, 10), (10, 10, 10)),
    "qplex_3": ((8, -12, -12), (-12, 6, 0), (-12, 0, 6)),
    "pymarl2": ((12, -0.1, -0.1), (-0.1, 0, 0), (-0.1, 0, 0)),
    "pymarl2_alt_1": ((12, -12, -12), (-12, 0, 0), (-12, 0, 0)),
    "pymarl2_alt_2": ((12, 0, 10), (0, 0, 10), (10, 10, 10)),
    "climbing": ((11, -30, 0), (-30, 7, 6), (0, 0, 5)),
    "penalty": ((10, 0, -100), (0, 2, 0), (-100, 0, 10)),
    "paper": PAPER_PAYOFF,
}
"""Payoffs by name: QTRAN (Son et al. 2019), QPLEX (Wang et al. 2021; its games 1 and 3), pymarl2's one-step game and the alternatives in
its comments, the climbing game and the penalty game with p = -100 (Claus and Boutilier 1998), and the paper's own."""


def matrix_game(payoff: Any) -> tuple[TabularGame, TabularParams]:
    """A one-step game of two agents.

    Raises:
        ValueError: as in `matrix_params`.
    """
    params = matrix_params(payoff)
    return TabularGame(num_states=1, num_actions=params.reward.shape[-1]), params


def two_step_game() -> tuple[TabularGame, TabularParams]:
    """The two-step game of the QMIX paper (Rashid et al. 2018, section 4.2).

    Agent 0's first action alone picks the second matrix: one that pays 7 always, or `[[0, 1], [1, 8]]`. The optimum is 8; VDN settles on 7.
    """
    reward = np.array([np.zeros((2, 2)), np.full((2, 2), 7.0), [[0, 1], [1, 8]]])
    next_state = np.array([[[1, 1], [2, 2]], np.ones((2, 2)), np.full((2, 2), 2)], np.int32)
    terminal = np.broadcast_to(np.array([False, True, True])[:, None, None], reward.shape)
    return TabularGame(num_states=3, num_actions=2, max_steps=2), tabular_params(reward, next_state, terminal, start=0, max_steps=2)


def mmdp() -> tuple[TabularGame, TabularParams]:
    """The two-state MMDP of the QPLEX paper's appendix (Wang et al. 2021; `mmdp_game_1` of its code).

    State 1 pays 1 for the joint action (0, 0); (1, 1) leads to state 0, which pays nothing for ever. 100 steps. The source reports the
    time limit as a plain end; here it is a truncation, as every time limit is.
    """
    reward = np.array([np.zeros((2, 2)), [[1, 0], [0, 0]]])
    next_state = np.array([np.zeros((2, 2)), [[1, 1], [1, 0]]], np.int32)
    game = TabularGame(num_states=2, num_actions=2, max_steps=100)
    return game, tabular_params(reward, next_state, np.zeros(reward.shape, bool), start=1, max_steps=game.max_steps)


def permuted_payoffs(task_seed: int, num_tasks: int = 5, payoff: Sequence[Sequence[float]] = PAPER_PAYOFF) -> list[np.ndarray]:
    """Row and column permutations of one payoff whose optima lie in different cells.

    Args:
        task_seed: fixes the tasks; it is not the seed of a run, so that every run of every method meets the same ones.
        num_tasks: how many tasks; the first is the payoff itself.
        payoff: the payoff to permute, with a unique optimum.

    Raises:
        ValueError: if there are fewer different cells than tasks, or less than one task.
    """
    table = np.asarray(payoff, np.float64)
    if not 1 <= num_tasks <= table.size:
        raise ValueError(
            f"num_tasks must be 1 to {table.size}, the cells where the optimum of a {table.shape} payoff may lie; got {num_tasks}"
        )
    permutations = list(itertools.product(*(itertools.permutations(range(size)) for size in table.shape)))
    order = np.random.default_rng(task_seed).permutation(len(permutations))
    chosen, optima = [table], {int(table.argmax())}
    for rows, columns in (permutations[index] for index in order):
        candidate = table[np.ix_(rows, columns)]
        if len(chosen) < num_tasks and int(candidate.argmax()) not in optima:
            chosen.append(candidate)
            optima.add(int(candidate.argmax()))
    return chosen

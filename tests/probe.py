"""A game of three steps whose every number is known, to follow targets through the real replay and learner."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from envs.base import Actions, Environment, Observation, Outcome


class ProbeParams(NamedTuple):
    """Whether the third step is an end by rule (else the limit is reached there), and the reward of each step."""

    terminates: Bool[Array, ""]
    rewards: Array


class ProbeState(NamedTuple):
    """Steps taken."""

    steps: Int[Array, ""]


@dataclass(frozen=True)
class ProbeGame(Environment):
    """Three steps that pay `rewards[t]` whatever is done; the observation is the one-hot of the step, the last one included."""

    num_agents: int = 2
    num_actions: int = 2
    observation_size: int = 4
    state_size: int = 4
    max_steps: int = 3

    @property
    def default_params(self) -> ProbeParams:
        """Ends by rule, pays 1, 2, 3."""
        return ProbeParams(jnp.array(True), jnp.array([1.0, 2.0, 3.0]))

    def reset(self, key: PRNGKeyArray, params: ProbeParams) -> ProbeState:
        """The first step."""
        del key, params
        return ProbeState(jnp.zeros((), jnp.int32))

    def step(self, key: PRNGKeyArray, state: ProbeState, actions: Actions, params: ProbeParams) -> tuple[ProbeState, Outcome]:
        """One step on."""
        del key, actions
        reward = params.rewards[jnp.minimum(state.steps, 2)]
        after = state.steps + 1
        ended = after >= self.max_steps
        return ProbeState(after), Outcome(reward, ended & params.terminates, ended & ~params.terminates, {"won": ended})

    def record(self, state: ProbeState) -> Int[Array, ""]:
        """Steps taken."""
        return state.steps.astype(jnp.int8)

    def observe(self, record: Int[Array, ""], params: ProbeParams) -> Observation:
        """The one-hot of the steps taken."""
        del params
        view = jax.nn.one_hot(record, self.state_size)
        agents = jnp.tile(view, (self.num_agents, 1))
        return Observation(agents, view, jnp.ones((self.num_agents, self.num_actions), bool), jnp.ones(self.num_agents, bool))

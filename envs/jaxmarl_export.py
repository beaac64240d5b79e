"""Our games under JaxMARL's interface; imported by `envs.jaxmarl_adapter.to_jaxmarl` only, since it needs JaxMARL to be defined.

Shapes: A agents, U actions, D observation features, G state features.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from envs.base import Environment, EnvParams
from envs.jaxmarl_quiet import import_jaxmarl

import_jaxmarl()

from jaxmarl.environments.multi_agent_env import MultiAgentEnv, State  # noqa: E402 (JaxMARL must first be imported quietly)
from jaxmarl.environments.spaces import Box, Discrete  # noqa: E402


@struct.dataclass
class ToJaxMARLState(State):
    """JaxMARL's state of one of our games.

    Attributes:
        done: whether the episode is over.
        step: environment steps taken.
        game: the game's own state.
    """

    done: Any  # not an array type: JAX rebuilds states around batches and placeholders, and JaxMARL's own annotation is of one flag
    step: Any
    game: Any


class ToJaxMARL(MultiAgentEnv):
    """One task of one of our games as a JaxMARL environment.

    Every agent receives the team's reward, and ends when the episode does, by rule or by time; `info` tells which (`terminated`,
    `truncated`), beside what the game reports, such as `won`. Observations also hold `world_state`. JaxMARL's `step`, which resets at
    once, works as in any of its games; `step_env` does not reset.

    Attributes:
        max_steps: the time limit in environment steps.
        reports_wins: whether `info["won"]` means anything.
    """

    def __init__(self, env: Environment, params: EnvParams) -> None:
        """Takes the game and the task."""
        super().__init__(env.num_agents)
        self.env = env
        self.params = params
        self.max_steps = env.max_steps
        self.reports_wins = env.reports_wins
        self.observation_spaces = {agent: Box(-jnp.inf, jnp.inf, (env.observation_size,)) for agent in self.agents}
        self.action_spaces = {agent: Discrete(env.num_actions) for agent in self.agents}

    @property
    def name(self) -> str:
        """The game's name, marked as SMAX-like.

        JaxMARL's `CTRolloutManager` reads a game's interface from its name, and only with "smax" in it uses the world state, the reward
        as it is (not its A-fold) and the available actions.
        """
        return f"{type(self.env).__name__} (SMAX interface)"

    @property
    def agent_classes(self) -> dict[str, list[str]]:
        """One class: all agents."""
        return {"agents": self.agents}

    def reset(self, key: PRNGKeyArray) -> tuple[dict[str, Array], ToJaxMARLState]:
        """Draws the first state of an episode."""
        game = self.env.reset(key, self.params)
        state = ToJaxMARLState(done=jnp.zeros((), bool), step=jnp.zeros((), jnp.int32), game=game)
        return self.get_obs(state), state

    def step_env(
        self, key: PRNGKeyArray, state: ToJaxMARLState, actions: dict[str, Int[Array, ""]]
    ) -> tuple[dict[str, Array], ToJaxMARLState, dict[str, Float[Array, ""]], dict[str, Bool[Array, ""]], dict[str, Array]]:
        """Advances one environment step; never resets."""
        stacked = jnp.stack([jnp.asarray(actions[agent], jnp.int32).reshape(()) for agent in self.agents])
        game, outcome = self.env.step(key, state.game, stacked, self.params)
        ended = outcome.terminated | outcome.truncated
        state = ToJaxMARLState(done=ended, step=state.step + 1, game=game)
        rewards = dict.fromkeys(self.agents, outcome.reward)
        dones = dict.fromkeys([*self.agents, "__all__"], ended)
        info = {**outcome.info, "terminated": outcome.terminated, "truncated": outcome.truncated}
        return self.get_obs(state), state, rewards, dones, info

    def get_obs(self, state: ToJaxMARLState) -> dict[str, Array]:
        """Each agent's observation, float32 of D features, and the `world_state` of G."""
        observation = self.env.observe(self.env.record(state.game), self.params)
        return {**{agent: observation.agents[i] for i, agent in enumerate(self.agents)}, "world_state": observation.state}

    def get_avail_actions(self, state: ToJaxMARLState) -> dict[str, Bool[Array, "U"]]:
        """Each agent's action mask."""
        mask = self.env.observe(self.env.record(state.game), self.params).action_mask
        return {agent: mask[i] for i, agent in enumerate(self.agents)}

"""Wrappers that serve every game: automatic reset, and the statistics of complete episodes."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from envs.base import Actions, Environment, EnvParams, EnvState, Flag, Observation, Outcome, Record, Scalar, select


@dataclass(frozen=True)
class Wrapper(Environment):
    """Passes everything on to the wrapped environment; subclasses replace what they change."""

    env: Environment

    @property
    def num_agents(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A, of the wrapped environment."""
        return self.env.num_agents

    @property
    def num_actions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """U, of the wrapped environment."""
        return self.env.num_actions

    @property
    def observation_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """D, of the wrapped environment."""
        return self.env.observation_size

    @property
    def state_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """G, of the wrapped environment."""
        return self.env.state_size

    @property
    def max_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The time limit of the wrapped environment."""
        return self.env.max_steps

    @property
    def reports_wins(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the wrapped environment reports wins."""
        return self.env.reports_wins

    @property
    def default_params(self) -> EnvParams:
        """The parameters of the wrapped environment's default task."""
        return self.env.default_params

    def reset(self, key: PRNGKeyArray, params: EnvParams) -> EnvState:
        """Draws the first state of an episode."""
        return self.env.reset(key, params)

    def step(self, key: PRNGKeyArray, state: EnvState, actions: Actions, params: EnvParams) -> tuple[EnvState, Outcome]:
        """Advances one environment step."""
        return self.env.step(key, state, actions, params)

    def record(self, state: EnvState) -> Record:
        """The record of the wrapped state."""
        return self.env.record(state)

    def observe(self, record: Record, params: EnvParams) -> Observation:
        """The observation of a recorded state."""
        return self.env.observe(record, params)

    def optimal_return(self, params: EnvParams) -> Scalar:
        """The best episode return of the wrapped environment."""
        return self.env.optimal_return(params)


class AutoResetState(NamedTuple):
    """The wrapped state, and whether its episode is over."""

    env: EnvState
    over: Flag


@dataclass(frozen=True)
class AutoReset(Wrapper):
    """Starts a new episode on the step *after* an end, so that the true last observation is seen like any other.

    On that step the actions are ignored, the reward is 0, neither flag is set and `info["reset"]` is true. In a game of one step there is
    nothing to learn from the last observation: it is reset at once, and every end of it is a termination.
    """

    @property
    def resets_at_once(self) -> bool:
        """Whether an ended episode is replaced within the step that ended it."""
        return self.env.max_steps == 1

    def reset(self, key: PRNGKeyArray, params: EnvParams) -> AutoResetState:
        """Draws the first state of an episode."""
        return AutoResetState(self.env.reset(key, params), jnp.zeros((), bool))

    def step(self, key: PRNGKeyArray, state: AutoResetState, actions: Actions, params: EnvParams) -> tuple[AutoResetState, Outcome]:
        """Advances one step, or starts a new episode where the last one is over."""
        if self.resets_at_once:
            key_step, key_reset = jax.random.split(key)
            fresh = self.env.reset(key_reset, params)
            stepped, outcome = self._inner_step(key_step, state, actions, params)
            never = jnp.zeros((), bool)
            next_env = select(outcome.terminated, fresh, stepped)
            return AutoResetState(next_env, never), outcome._replace(info={**outcome.info, "reset": never})
        next_env, outcome = self.env.step_or_reset(key, state.env, state.over, actions, params)
        ended = outcome.terminated | outcome.truncated
        return AutoResetState(next_env, ended & ~state.over), _ignored_where(state.over, outcome)

    def record(self, state: AutoResetState) -> Record:
        """The record of the wrapped state."""
        return self.env.record(state.env)

    def _inner_step(self, key: PRNGKeyArray, state: AutoResetState, actions: Actions, params: EnvParams) -> tuple[EnvState, Outcome]:
        """Steps the wrapped game; a bootstrap from an observation that is never seen is ruled out here."""
        stepped, outcome = self.env.step(key, state.env, actions, params)
        if self.resets_at_once:
            ended = outcome.terminated | outcome.truncated
            outcome = outcome._replace(terminated=ended, truncated=jnp.zeros((), bool))
        return stepped, outcome


@dataclass(frozen=True)
class IdleAfterEnd(AutoReset):
    """Stays in the last state of an ended episode for ever, so that a fixed number of steps holds exactly one complete episode.

    On an idle step the actions are ignored, the reward is 0, neither flag is set and `info["reset"]` is true, as on `AutoReset`'s. Here
    too every end of a game of one step is a termination.
    """

    def step(self, key: PRNGKeyArray, state: AutoResetState, actions: Actions, params: EnvParams) -> tuple[AutoResetState, Outcome]:
        """Advances one step, or idles where the episode is over."""
        stepped, outcome = self._inner_step(key, state, actions, params)
        over = state.over | outcome.terminated | outcome.truncated
        return AutoResetState(select(state.over, state.env, stepped), over), _ignored_where(state.over, outcome)


class EpisodeStatisticsState(NamedTuple):
    """The wrapped state, and the return and length of its episode so far."""

    env: EnvState
    episode_return: Float[Array, ""]
    episode_length: Int[Array, ""]


@dataclass(frozen=True)
class EpisodeStatistics(Wrapper):
    """Adds `episode_return`, `episode_length` and `episode_ended` to `info`; the first two are complete where the third is true.

    Goes inside `AutoReset`, whose resets start the counts anew; whether the episode was won is the game's own `info["won"]`.
    """

    def reset(self, key: PRNGKeyArray, params: EnvParams) -> EpisodeStatisticsState:
        """Draws the first state of an episode, with empty statistics."""
        return EpisodeStatisticsState(self.env.reset(key, params), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def step(
        self, key: PRNGKeyArray, state: EpisodeStatisticsState, actions: Actions, params: EnvParams
    ) -> tuple[EpisodeStatisticsState, Outcome]:
        """Advances one step and counts it."""
        stepped, outcome = self.env.step(key, state.env, actions, params)
        return self._counted(state, stepped, outcome)

    def step_or_reset(
        self, key: PRNGKeyArray, state: EpisodeStatisticsState, over: Flag, actions: Actions, params: EnvParams
    ) -> tuple[EpisodeStatisticsState, Outcome]:
        """Advances one step and counts it, or starts another episode and its counts."""
        following, outcome = self.env.step_or_reset(key, state.env, over, actions, params)
        counted, outcome = self._counted(state, following, outcome)
        kept = counted._replace(env=())
        return select(over, jax.tree.map(jnp.zeros_like, kept), kept)._replace(env=following), outcome

    def record(self, state: EpisodeStatisticsState) -> Record:
        """The record of the wrapped state."""
        return self.env.record(state.env)

    def _counted(self, state: EpisodeStatisticsState, stepped: EnvState, outcome: Outcome) -> tuple[EpisodeStatisticsState, Outcome]:
        state = EpisodeStatisticsState(stepped, state.episode_return + outcome.reward, state.episode_length + 1)
        statistics = {
            "episode_return": state.episode_return,
            "episode_length": state.episode_length,
            "episode_ended": outcome.terminated | outcome.truncated,
        }
        return state, outcome._replace(info={**outcome.info, **statistics})


def _ignored_where(over: Flag, outcome: Outcome) -> Outcome:
    """Blanks the outcome of a step whose action is ignored, and says so."""
    outcome = select(over, jax.tree.map(jnp.zeros_like, outcome), outcome)
    return outcome._replace(info={**outcome.info, "reset": over})

"""Pure-functional cooperative games; knows nothing of `knife_jax`.

What users need is here: `make` builds every game by name, and a game of your own is a frozen dataclass that implements `Environment`.

Examples:
    >>> import envs
    >>> game = envs.make("matrix", payoff=[[1, 0], [0, 2]])
    >>> game.env.num_actions, float(game.env.optimal_return(game.tasks.at(0)))
    (2, 2.0)
"""

from envs.base import Environment, EnvParams, Observation, Outcome, Tasks, stack_tasks
from envs.jaxmarl_adapter import from_jaxmarl, to_jaxmarl
from envs.registry import GAMES, Game, make
from envs.wrappers import AutoReset, EpisodeStatistics, IdleAfterEnd

__all__ = [
    "GAMES",
    "AutoReset",
    "EnvParams",
    "Environment",
    "EpisodeStatistics",
    "Game",
    "IdleAfterEnd",
    "Observation",
    "Outcome",
    "Tasks",
    "from_jaxmarl",
    "make",
    "stack_tasks",
    "to_jaxmarl",
]

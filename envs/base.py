"""The interface that every game speaks, sequences of tasks, and the errors for names that do not exist.

Shapes: A agents, U actions, D observation features, G state features. Everything here is for one environment; batching is `jax.vmap`.
"""

import abc
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

EnvParams = Any
EnvState = Any
Record = Any

Scalar = Float[Array, ""]
Flag = Bool[Array, ""]
Actions = Int[Array, "A"]


class Outcome(NamedTuple):
    """What one environment step brings, beside the next state.

    Attributes:
        reward: the team's reward for this step, in the game's own units.
        terminated: the episode ended by a rule of the game; its value is not bootstrapped.
        truncated: the episode ended by its time limit only; its value is bootstrapped from the true last observation.
        info: named scalars. Every game reports `won` (bool), true on the step at which the episode is won.
    """

    reward: Scalar
    terminated: Flag
    truncated: Flag
    info: dict[str, Array]


class Observation(NamedTuple):
    """What the learners see of one state.

    Attributes:
        agents: each agent's own view.
        state: the global state, for the mixer only.
        action_mask: the actions each agent may take; at least one is true in every row.
        agent_mask: the agents that exist in this task (one that is dead or frozen still exists).
    """

    agents: Float[Array, "A D"]
    state: Float[Array, "G"]
    action_mask: Bool[Array, "A U"]
    agent_mask: Bool[Array, "A"]


class Environment(abc.ABC):
    """A cooperative game with one team reward, as pure functions of explicit keys, states and parameters.

    An instance holds static facts only and is hashable; all that may differ between tasks is in `EnvParams`, a pytree of arrays, so that
    one compiled program serves every task. Implementations are frozen dataclasses.

    Attributes:
        num_agents: A, the size of the agent axis.
        num_actions: U, the actions of each agent (those it lacks are masked).
        observation_size: D.
        state_size: G.
        max_steps: the time limit in environment steps.
        reports_wins: whether `info["won"]` means anything in this game.
    """

    num_agents: int
    num_actions: int
    observation_size: int
    state_size: int
    max_steps: int
    reports_wins: bool = True

    @property
    @abc.abstractmethod
    def default_params(self) -> EnvParams:
        """The parameters of the default task, a pytree of arrays."""

    @abc.abstractmethod
    def reset(self, key: PRNGKeyArray, params: EnvParams) -> EnvState:
        """Draws the first state of an episode."""

    @abc.abstractmethod
    def step(self, key: PRNGKeyArray, state: EnvState, actions: Actions, params: EnvParams) -> tuple[EnvState, Outcome]:
        """Advances one environment step; never resets. Actions must be available ones."""

    def step_or_reset(
        self, key: PRNGKeyArray, state: EnvState, over: Flag, actions: Actions, params: EnvParams
    ) -> tuple[EnvState, Outcome]:
        """For automatic resets: advances one step, or draws the first state of another episode where this one is over.

        The outcome is that of a step; where the episode is over it means nothing. A game may override it to draw for both at once.
        """
        key_step, key_reset = jax.random.split(key)
        fresh = self.reset(key_reset, params)
        stepped, outcome = self.step(key_step, state, actions, params)
        return select(over, fresh, stepped), outcome

    @abc.abstractmethod
    def record(self, state: EnvState) -> Record:
        """The few bytes of a state from which, with the parameters, `observe` recomputes everything that learners see."""

    @abc.abstractmethod
    def observe(self, record: Record, params: EnvParams) -> Observation:
        """Observations, global state and masks of a recorded state."""

    def optimal_return(self, params: EnvParams) -> Scalar:
        """The best undiscounted episode return under `params`; NaN where it is not known."""
        del params
        return jnp.float32(jnp.nan)


def select(condition: Flag, if_true: Any, if_false: Any) -> Any:
    """Chooses a whole pytree; typed keys are selected like any other leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


class Tasks(NamedTuple):
    """A sequence of tasks as data.

    Attributes:
        params: the parameters of every distinct task, stacked along a new leading axis.
        names: the name of every distinct task.
        order: the tasks in the order in which they are met, as indices into `names`; an index may return.
    """

    params: EnvParams
    names: tuple[str, ...]
    order: tuple[int, ...]

    def at(self, index: Int[Array, "..."] | int) -> EnvParams:
        """The parameters of one task, or of an array of task indices (then with the index's axes in front)."""
        if isinstance(index, jax.Array) and index.ndim == 0:  # a slice, which JAX traces in a third of the time
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self.params)
        return jax.tree.map(lambda leaf: leaf[index], self.params)


def stack_tasks(params: Sequence[EnvParams], names: Sequence[str], order: Sequence[int] | None = None) -> Tasks:
    """Stacks the parameters of distinct tasks into `Tasks`.

    Args:
        params: one pytree per task, all of the same structure and shapes.
        names: one name per task.
        order: indices into `names`; every task once, in the order given, by default.

    Raises:
        ValueError: if two tasks differ in structure or in the shape of a leaf.
    """
    shapes = [jax.tree.map(jnp.shape, task) for task in params]
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"the tasks of one sequence must have the same shapes, but {name!r} has {shape} and {names[0]!r} has {shapes[0]}"
            )
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *params)
    return Tasks(stacked, tuple(names), tuple(range(len(names))) if order is None else tuple(order))


def some_of(tasks: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Any]:
    """The named tasks of a drift, in the order of the names; all of them if None.

    Raises:
        ValueError: for a name that does not exist or comes twice, or no names.
    """
    if only is None:
        return dict(tasks)
    for name in only:
        if name not in tasks:
            raise unknown_name("task", name, tasks)
    if not only or len(set(only)) < len(only):
        raise ValueError(f"only: names of tasks that differ from each other, at least one; got {list(only)}")
    return {name: tasks[name] for name in only}


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    return ValueError(f"unknown {kind} {name!r}; did you mean {nearest(str(name), names)!r}? Known: {', '.join(names)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like the given one; one that begins with it comes first."""
    names = sorted(known)
    beginning = [candidate for candidate in names if name and candidate.startswith(name)]
    return difflib.get_close_matches(name, beginning or names, n=1, cutoff=0.0)[0]

"""What a run learned, kept and used again: agents that can be loaded, asked, evaluated.

`policy.safetensors` holds the networks of all seeds, `policy.json` the configuration under which they mean something.

Shapes: S seeds, A agents, U actions, D features, N episodes.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from envs.base import Observation, unknown_name
from knife_jax import collect
from knife_jax.config import Config
from knife_jax.model import Networks, task_code
from knife_jax.networks.agents import agent_inputs
from knife_jax.plasticity.method import Variables
from knife_jax.program import make_program
from knife_jax.run_result import RunResult
from knife_jax.trees import flat, nested

WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"


class Memory(NamedTuple):
    """What agents remember between two steps of an episode.

    Attributes:
        hidden: the recurrent state.
        last_actions: what they did last; means nothing at an episode's start.
        starts: whether the next step is the first of an episode.
    """

    hidden: Float[Array, "A H"]
    last_actions: Int[Array, "A"]
    starts: Bool[Array, ""]


@dataclass(frozen=True, eq=False)
class Policy:
    """The learned agents of one seed.

    Attributes:
        config: what they were trained with.
        variables: `{"params": {"agent": ..., "mixer": ...}, "reserve": ...}`.
        seed: the seed's number.
    """

    config: Config
    variables: Variables
    seed: int

    @cached_property
    def networks(self) -> Networks:
        """The modules, the game and its tasks."""
        return make_program(self.config).networks

    def initial_memory(self) -> Memory:
        """What agents remember at the start of an episode: nothing."""
        agents = self.networks.env.num_agents
        hidden = self.networks.initial_hidden((agents,))
        return Memory(hidden, jnp.zeros(agents, jnp.int32), jnp.ones((), bool))

    def values(self, observation: Float[Array, "A D"], memory: Memory, task: int = 0) -> tuple[Float[Array, "A U"], Float[Array, "A H"]]:
        """Every action's value to each agent, unavailable ones included, and the next recurrent state."""
        networks, starts = self.networks, memory.starts[None, None]
        env = networks.env
        state, mask = jnp.zeros((1, 1, env.state_size)), jnp.ones((1, 1, env.num_agents, env.num_actions), bool)
        view = Observation(observation[None, None], state, mask, mask[..., 0])
        code = task_code(networks, jnp.full(starts.shape, task, jnp.int32))
        inputs = agent_inputs(networks.config.agent, view, memory.last_actions[None, None], starts, code)
        values, hidden = networks.apply_agent(self.variables, inputs, starts, memory.hidden[None])
        return jnp.asarray(values)[0, 0], jnp.asarray(hidden)[0]

    def act(
        self,
        observation: Float[Array, "A D"],
        hidden: Memory,
        action_mask: Bool[Array, "A U"],
        key: PRNGKeyArray | None = None,
        *,
        epsilon: float = 0.0,
        task: int = 0,
    ) -> tuple[Int[Array, "A"], Memory]:
        """Chooses an action for each agent; a pure function that may be jitted and vmapped.

        Args:
            observation: what each agent sees.
            hidden: `initial_memory()` at an episode's start, then what the step before returned.
            action_mask: the available actions.
            key: for exploration; not needed without.
            epsilon: the chance that an agent takes any available action.
            task: the distinct task, where agents are shown it (`switch.observe_task`).

        Returns:
            Actions, and what to pass next time.

        Raises:
            ValueError: for exploration without a key.
        """
        values, memory = self.values(observation, hidden, task)
        if key is None:
            if epsilon:
                raise ValueError(f"epsilon: exploring with {epsilon} needs a key")
            key = jax.random.key(0)
        actions = collect.epsilon_greedy(key, values, action_mask, jnp.float32(epsilon)).astype(jnp.int32)
        return actions, Memory(memory, actions, jnp.zeros((), bool))


def save(result: RunResult, directory: Path) -> None:
    """Writes the agents of all seeds into a directory that exists."""
    arrays = {name: np.ascontiguousarray(values) for name, values in flat(result.variables).items()}
    save_file(arrays, directory / WEIGHTS)
    first, seeds = result.provenance.get("first_seed", 0), len(result.metrics["eval/return"])
    about = {"config": json.loads(json.dumps(result.config.to_dict())), "seeds": seeds, "first_seed": first}
    (directory / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n")


def load_policy(path: str | Path, seed: int | None = None) -> Policy:
    """Loads what a run learned.

    Args:
        path: the directory of a finished run.
        seed: whose agents; the first seed's if None.

    Raises:
        ValueError: if there is no policy or it is damaged, or the run did not have that seed.
    """
    path = Path(path)
    about, variables = _read(path)
    numbers = range(about["first_seed"], about["first_seed"] + about["seeds"])
    number = numbers[0] if seed is None else seed
    if number not in numbers:
        raise ValueError(f"seed: the run in {path} has seeds {numbers[0]} to {numbers[-1]}, not {number}")
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[number - numbers[0]]), variables)
    return Policy(Config.from_dict(about["config"]), one, number)


def evaluate(path: str | Path, episodes: int, seed: int | None = None, first_key: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Plays complete greedy episodes of every distinct task.

    Args:
        path: the directory of a finished run.
        episodes: N.
        seed: whose agents; those of all seeds if None.
        first_key: another number gives other episodes.

    Returns:
        `{task: {"return" | "won" | "length": [S, N]}}`.

    Raises:
        ValueError: as `load_policy`, or for less than one episode.
    """
    if episodes < 1:
        raise ValueError(f"episodes: at least 1, got {episodes}")
    policy = load_policy(path, seed)
    variables = load_variables(path) if seed is None else jax.tree.map(lambda leaf: leaf[None], policy.variables)
    networks = policy.networks
    keys = jax.random.split(jax.random.key(first_key), episodes)

    @jax.jit
    def play(task: Array) -> dict[str, Array]:
        def one(variables: Variables, key: PRNGKeyArray) -> dict[str, Array]:
            return collect.evaluate(key, variables, networks, task, 1)

        return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(variables, keys)

    played = {name: jax.device_get(play(jnp.int32(task))) for task, name in enumerate(networks.tasks.names)}
    return {name: {measure: metrics[measure] for measure in ("return", "won", "length")} for name, metrics in played.items()}


def task_index(policy: Policy, name: str | None) -> int:
    """The index of a task by its name; the first one if None.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    names = policy.networks.tasks.names
    if name is not None and name not in names:
        raise unknown_name("task", name, names)
    return 0 if name is None else names.index(name)


def load_variables(path: str | Path) -> Any:
    """The variables of all seeds, `{"params": ..., "reserve": ...}` with the seed axis in front, in numpy.

    Raises:
        ValueError: if there is no policy or it is damaged.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """The description, and the variables of all seeds."""
    try:
        return json.loads((path / DESCRIPTION).read_text()), nested(load_file(path / WEIGHTS))
    except FileNotFoundError as error:
        raise ValueError(f"there is no policy in {path}: {Path(str(error.filename or WEIGHTS)).name} is missing") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"the policy in {path} is damaged: {' '.join(str(error).split())}") from None

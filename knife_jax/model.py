"""The networks of a run: agents and mixer, their neurons, and the cure that may extend them."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from envs.apart import apart_over_rows
from envs.base import Environment, Observation, Tasks
from knife_jax.config import Config
from knife_jax.networks import agents, mixers
from knife_jax.networks.agents import RECURRENT, AgentNetwork, agent_inputs, initial_hidden
from knife_jax.networks.laws import Law, Path, draw_all, laws_of
from knife_jax.networks.mixers import MixerInputs, make_mixer
from knife_jax.plasticity import registry
from knife_jax.plasticity.graph import Graph, make_graph
from knife_jax.plasticity.lift import lift
from knife_jax.plasticity.method import Method, Variables
from knife_jax.split import WHOLE, Split

Params = Any
Hyper = dict[str, dict[str, Any]]
States = dict[str, Array]

CACHED_BYTES = 2**21
"""About how much of what agents see is rendered at once on processors, where there is much more of it: each of the steps that make it
then reads what the one before wrote while it is still in a cache."""


class Networks(NamedTuple):
    """The modules and static facts that losses and policies close over.

    Attributes:
        agent: the agents' network.
        mixer: the mixer.
        env: the game.
        tasks: its tasks.
        config: the configuration.
        graph: the hidden units of both networks.
        interventions: how many of them the run plans; None if nobody said.
        laws: of all parameters, by their paths.
        split: over how many devices a seed is.
    """

    agent: AgentNetwork
    mixer: nn.Module
    env: Environment
    tasks: Tasks
    config: Config
    graph: Graph
    interventions: int | None = None
    laws: Mapping[Path, Law] = MappingProxyType({})
    split: Split = WHOLE

    def apply_agent(self, variables: Variables, *args: Any) -> Any:
        """The agents' network under `{"params": ..., "reserve": ...}`."""
        return self._lifted("agent", self.agent)(_of("agent", variables), *args)

    def apply_mixer(self, variables: Variables, inputs: MixerInputs) -> Array:
        """The mixer under the same."""
        return jnp.asarray(self._lifted("mixer", self.mixer)(_of("mixer", variables), inputs))

    def initial_hidden(self, batch: tuple[int, ...]) -> Float[Array, "*N S"]:
        """Zero memory for a batch of agents under the cure."""
        return initial_hidden(self.config.agent, batch, self.cure(self.config.hyper).state_sizes.get(RECURRENT))

    def running_states(self, hidden: Float[Array, "*N S"]) -> States:
        """What the cure must be passed of the memory of agents at play; nothing for most cures."""
        return {RECURRENT: hidden} if RECURRENT in self.cure(self.config.hyper).state_sizes else {}

    def cure(self, hyper: Hyper) -> Method:
        """The cure that the configuration names, with numbers from `hyper`."""
        settings = self.config.plasticity
        return registry.make(settings.name, self.graph, settings.options, hyper.get("plasticity"), self.interventions)

    def _lifted(self, name: str, module: nn.Module) -> Callable[..., Any]:
        return lift(self.graph, self.cure(self.config.hyper).lift(module.apply, (name,)), (name,))


def _of(name: str, variables: Variables) -> Variables:
    """What one of the two networks sees of the variables."""
    own = {**variables, "params": variables["params"][name]}
    if "tap_mask" in variables:
        own["tap_mask"] = variables["tap_mask"][name]
    return own


def make_networks(config: Config, env: Environment, tasks: Tasks, interventions: int | None = None) -> Networks:
    """Builds the modules that a configuration names, and checks that its cure fits them.

    Raises:
        ValueError: if the cure cannot be made for these networks, with the field's path.
    """
    widen = _width_factor(config)
    agent, mixer = AgentNetwork(env.num_actions, config.agent, widen), make_mixer(config, widen)
    layers = agents.neuron_layers(config.agent, widen) + mixers.neuron_layers(config, widen)
    modules = Networks(agent, mixer, env, tasks, config, Graph((), lambda key: {}, {}), interventions)
    modules = modules._replace(laws=_laws(modules))
    graph = make_graph(layers, partial(draw_params, networks=modules), mixers.REFUSED, mixers.mixing_layer(config))
    networks = modules._replace(graph=graph)
    try:
        networks.cure(config.hyper)
    except ValueError as error:
        raise ValueError(f"plasticity.options: {error}") from error
    return networks


def _width_factor(config: Config) -> float:
    """How many times wider the hidden layers are; see `registry.wide_none`."""
    settings = config.plasticity
    for name, options in registry.parts_of(settings.name, settings.options):
        if name == "wide_none":
            reserve = options.get("reserve", 1.0)
            if reserve < 0:
                raise ValueError(f"plasticity.options: reserve: at least 0, got {reserve}")
            return 1.0 + 2.0 * reserve
    return 1.0


def draw_params(key: PRNGKeyArray, networks: Networks) -> Params:
    """Fresh `{"agent": ..., "mixer": ...}` parameters."""
    return {"agent": {}, "mixer": {}} | draw_all(key, networks.laws)


def _laws(networks: Networks) -> dict[Path, Law]:
    """The laws of all parameters, by their paths."""
    observation, num_agents = _zero_observation(networks), networks.env.num_agents
    task = task_code(networks, jnp.zeros((1, 1), jnp.int32))
    starts = jnp.ones((1, 1), bool)
    values = jnp.zeros((1, 1, num_agents))
    actions = jnp.zeros((1, 1, num_agents, networks.env.num_actions))
    mixed = MixerInputs(values, values, actions, mixer_state(observation, task))
    inputs = agent_inputs(networks.config.agent, observation, jnp.zeros((1, 1, num_agents), jnp.int32), starts, task)
    hidden = initial_hidden(networks.config.agent, (1, num_agents))
    found = {
        "agent": laws_of(lambda: networks.agent.init(jax.random.key(0), inputs, starts, hidden)),
        "mixer": laws_of(lambda: networks.mixer.init(jax.random.key(0), mixed)),
    }
    return {(name, *path): law for name, laws in found.items() for path, law in laws.items()}


def observe(networks: Networks, record: Any, task: Int[Array, "*N"], only: Int[Array, ""] | None = None) -> Observation:
    """Renders recorded states under the parameters of their tasks, over any batch axes.

    It is compiled apart from what reads it, into which XLA would fuse parts of it on processors, and compute them slowly and several times.

    Args:
        networks: the game and its tasks.
        record: what the replay holds, `[*N, ...]`.
        task: the task of each.
        only: the task of all of them, if they share one: SMAX is rendered several times faster if parameters are not read per record.
    """
    return _rendered(networks, (record, task), only, lambda rows, seen: seen)


def observe_fed(
    networks: Networks,
    record: Any,
    task: Int[Array, "*N"],
    only: Int[Array, ""] | None,
    last_actions: Int[Array, "*N A"],
    starts: Bool[Array, "*N"],
) -> Observation:
    """`observe`, with all that the agents' network is fed in place of the agents' views; see `agent_inputs`."""

    def fed(rows: Any, seen: Observation) -> Observation:
        _, task, last_actions, starts = rows
        return seen._replace(agents=agent_inputs(networks.config.agent, seen, last_actions, starts, task_code(networks, task)))

    return _rendered(networks, (record, task, last_actions, starts), only, fed)


def _rendered(networks: Networks, rows: Any, only: Int[Array, ""] | None, finish: Callable[[Any, Observation], Observation]) -> Observation:
    """What is made of rows that begin with `(record, task)`, and of what is seen of these; over the batch axes of the task."""
    if len(networks.tasks.names) == 1:
        only = jnp.int32(0)
    axes, env = rows[1].shape, networks.env
    at_once = max(1, CACHED_BYTES // (4 * env.num_agents * env.observation_size))
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(axes) :]), rows)
    if only is None:
        each = jax.vmap(lambda record, task: env.observe(record, networks.tasks.at(task)))
        seen = apart_over_rows(lambda rows, _: each(*rows[:2]), finish, at_once)(flat, ())
    else:
        render = jax.vmap(env.observe, in_axes=(0, None))
        seen = apart_over_rows(lambda rows, task: render(rows[0], networks.tasks.at(task)), finish, at_once)(flat, only)
    return jax.tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[1:]), seen)


def task_code(networks: Networks, task: Int[Array, "*N"]) -> Float[Array, "*N K"] | None:
    """The one-hot of the task, if agents and mixer are to see it."""
    if not networks.config.switch.observe_task:
        return None
    return jax.nn.one_hot(task, len(networks.tasks.names))


def mixer_state(observation: Observation, task: Array | None) -> Array:
    """What the mixer is given of the game: the global state, and the task's one-hot if there is one."""
    return observation.state if task is None else jnp.concatenate([observation.state, task], axis=-1)


def _zero_observation(networks: Networks) -> Observation:
    """An observation `[1, 1, ...]` of zeros."""
    env = networks.env
    return Observation(
        jnp.zeros((1, 1, env.num_agents, env.observation_size)),
        jnp.zeros((1, 1, env.state_size)),
        jnp.ones((1, 1, env.num_agents, env.num_actions), bool),
        jnp.ones((1, 1, env.num_agents), bool),
    )

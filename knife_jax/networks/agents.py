"""The agents' shared network, and what it is fed.

Shapes: T time, *N any batch axes, A agents, U actions, D features, H hidden units, S numbers of running state (H, more under some cures).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from envs.base import Observation
from knife_jax.config import AgentConfig
from knife_jax.networks.neurons import GRU, Dense, Initializer, NeuronLayer, dense_layer, widened

UNAVAILABLE = -1e7
"""The value of an action that may not be taken: finite, so that a masked row times zero is zero and not NaN."""

RECURRENT = "agent/gru"
"""The layer of units that remember."""


class AgentNetwork(nn.Module):
    """One network for all agents: Dense-ReLU-GRU-Dense, or Dense-ReLU-Dense-ReLU-Dense without memory (PyMARL's `rnn_agent`)."""

    num_actions: int
    config: AgentConfig = AgentConfig()
    widen: float = 1.0
    """Times as many units in the Dense hidden layers."""

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "T *N A I"], starts: Bool[Array, "T *N"], hidden: Float[Array, "*N A S"]
    ) -> tuple[Float[Array, "T *N A U"], Float[Array, "*N A S"]]:
        """Values of every action, over time.

        Args:
            inputs: see `agent_inputs`.
            starts: where an episode starts; memory is zero before those steps.
            hidden: memory before the first step, see `initial_hidden`; untouched by a network without memory.

        Returns:
            Action values, and the memory after the last step.
        """
        settings = self.config
        initializer = Initializer(settings.initializer, settings.init_scale)
        width = widened(settings.hidden_size, self.widen)
        features = nn.relu(Dense(width, initializer, name="hidden_1")(inputs))
        if settings.recurrent:
            per_agent = jnp.broadcast_to(starts[..., None], inputs.shape[:-1])
            features, hidden = GRU(settings.hidden_size, initializer, name="gru")(features, per_agent, hidden)
        else:
            features = nn.relu(Dense(width, initializer, name="hidden_2")(features))
        return Dense(self.num_actions, initializer, name="output")(features), hidden


def neuron_layers(config: AgentConfig, widen: float = 1.0) -> tuple[NeuronLayer, ...]:
    """The network's hidden units, in the order of the dataflow; its parameters are expected under `agent`."""
    size = widened(config.hidden_size, widen)
    if not config.recurrent:
        return dense_layer("agent", "hidden_1", "hidden_2", size), dense_layer("agent", "hidden_2", "output", size)
    recurrent = ("agent", "gru", "hidden_kernel")
    units = NeuronLayer(
        RECURRENT,
        config.hidden_size,
        incoming=(("agent", "gru", "input", "kernel"), recurrent),
        biases=(("agent", "gru", "input", "bias"), ("agent", "gru", "hidden_bias")),
        outgoing=(recurrent, ("agent", "output", "kernel")),
        outgoing_biases=(("agent", "gru", "hidden_bias"), ("agent", "output", "bias")),
        kind="gru",
    )
    return dense_layer("agent", "hidden_1", "gru/input", size), units


def initial_hidden(config: AgentConfig, batch: tuple[int, ...], size: int | None = None) -> Float[Array, "*N S"]:
    """Zero memory for a batch of agents; a network without memory keeps none (S is 0).

    Args:
        config: the network.
        batch: leading axes.
        size: S where a cure made it larger than the GRU, see `Method.state_sizes`.
    """
    if size is None:
        size = config.hidden_size if config.recurrent else 0
    return jnp.zeros((*batch, size))


def agent_inputs(
    config: AgentConfig,
    observation: Observation,
    last_actions: Int[Array, "*N A"],
    starts: Bool[Array, "*N"],
    task: Float[Array, "*N K"] | None = None,
) -> Float[Array, "*N A I"]:
    """Puts an agent's view, last action, identity and, if given, the task's one-hot together.

    Args:
        config: says which of them are fed.
        observation: its `agents` are `[*N, A, D]`.
        last_actions: what each agent did on the slot before; ignored where an episode starts.
        starts: where an episode starts.
        task: the one-hot of the task, fed as it is.
    """
    views, num_actions = observation.agents, observation.action_mask.shape[-1]
    parts = [views]
    if config.last_action:
        none_yet = starts[..., None, None]
        parts.append(jnp.where(none_yet, 0.0, jax.nn.one_hot(last_actions, num_actions, dtype=views.dtype)))
    if config.agent_id:
        identity = jnp.eye(views.shape[-2], dtype=views.dtype)
        parts.append(jnp.broadcast_to(identity, (*views.shape[:-1], views.shape[-2])))
    if task is not None:
        parts.append(jnp.broadcast_to(task[..., None, :], (*views.shape[:-1], task.shape[-1])))
    return jnp.concatenate(parts, axis=-1)


def mask_unavailable(values: Float[Array, "*N U"], action_mask: Bool[Array, "*N U"]) -> Float[Array, "*N U"]:
    """Replaces the values of unavailable actions by `UNAVAILABLE`."""
    return jnp.where(action_mask, values, UNAVAILABLE)

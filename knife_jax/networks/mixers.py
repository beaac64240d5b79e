"""Mixers: how the agents' chosen values become a team value.

Shapes: *N any batch axes, A agents, U actions, G state features, E units of the mixing layer, K kernels. Every mixer gives `[*N, M]` with
M = 1 team value, or M = A where agents learn by themselves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from knife_jax.config import Config, QmixConfig, QplexConfig
from knife_jax.networks.neurons import Dense, Initializer, NeuronLayer, dense_layer, widened

_TINY = 1e-10


class MixerInputs(NamedTuple):
    """What a mixer may use.

    Attributes:
        chosen_q: the value of each agent's action.
        greedy_q: the value of each agent's best available action; QPLEX takes no gradient through it.
        actions: the one-hot of each agent's action.
        state: the global state.
        agent_mask: the agents that exist; all if None. The values of the others are given as 0.
    """

    chosen_q: Float[Array, "*N A"]
    greedy_q: Float[Array, "*N A"]
    actions: Float[Array, "*N A U"]
    state: Float[Array, "*N G"]
    agent_mask: Bool[Array, "*N A"] | None = None


class Independent(nn.Module):
    """Independent Q-learning: every agent's value is trained by itself."""

    @nn.compact
    def __call__(self, inputs: MixerInputs) -> Float[Array, "*N A"]:
        """The chosen values as they are."""
        return inputs.chosen_q


class VDN(nn.Module):
    """Value decomposition: the sum of the agents' values.

    References:
        Sunehag et al., Value-Decomposition Networks For Cooperative Multi-Agent Learning, 2018.
    """

    @nn.compact
    def __call__(self, inputs: MixerInputs) -> Float[Array, "*N 1"]:
        """The sum over agents."""
        return inputs.chosen_q.sum(axis=-1, keepdims=True)


class Mixing(nn.Module):
    """QMIX's mixing layer, whose weights are made elsewhere. It has no parameters: it is a module so that cures and taps can find it."""

    def __call__(
        self, q: Float[Array, "*N A"], w1: Float[Array, "*N A E"], b1: Float[Array, "*N E"], w2: Float[Array, "*N E"]
    ) -> Float[Array, "*N 1"]:
        """`sum_j elu(sum_i q_i w1_ij + b1_j) w2_j`, monotone in every q if no weight w1 or w2 is negative."""
        return (nn.elu(self.pre_activations(q, w1, b1)) * w2).sum(axis=-1, keepdims=True)

    def pre_activations(self, q: Float[Array, "*N A"], w1: Float[Array, "*N A E"], b1: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
        """What the units' ELU is given; apart from the rest, so that it can be intercepted."""
        return jnp.einsum("...a,...ae->...e", q, w1) + b1


class QMIX(nn.Module):
    """A mixing layer whose weights come from the state and are never negative, so that the team value is monotone in every agent's.

    References:
        Rashid et al., QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement Learning, 2018 (PyMARL's `qmix.py`).
    """

    config: QmixConfig = QmixConfig()
    initializer: Initializer = Initializer()
    widen: float = 1.0
    """Times as many hidden units in the hypernetworks."""

    @nn.compact
    def __call__(self, inputs: MixerInputs) -> Float[Array, "*N 1"]:
        """The team value."""
        q, state, embed = inputs.chosen_q, inputs.state, self.config.embed_size
        num_agents = q.shape[-1]
        w1 = jnp.abs(self._hypernet("w1", num_agents * embed, state)).reshape(*q.shape, embed)
        b1 = Dense(embed, self.initializer, name="b1_output")(state)
        w2 = jnp.abs(self._hypernet("w2", embed, state))
        value_hidden = nn.relu(Dense(widened(embed, self.widen), self.initializer, name="v_hidden")(state))
        value = Dense(1, self.initializer, name="v_output")(value_hidden)
        return Mixing(name="mixing")(q, w1, b1, w2) + value

    def _hypernet(self, name: str, size: int, state: Array) -> Array:
        if self.config.hypernet_layers == 2:
            size_hidden = widened(self.config.hypernet_size, self.widen)
            state = nn.relu(Dense(size_hidden, self.initializer, name=f"{name}_hidden")(state))
        return Dense(size, self.initializer, name=f"{name}_output")(state)


class QPLEX(nn.Module):
    """Duplex duelling mixing ("dmaq"): a sum of transformed values plus advantages weighted by a positive lambda-net.

    `Q_tot = sum_i q~max_i + sum_i lambda_i w_i (q_i - qmax_i)` with `q~ = w q + v`. The advantage branch trains the lambda-net alone: it is
    detached from agents and from w, so that `dQ_tot/dq_i = w_i` for every action. Its parts are sown as intermediates `w`, `v`, `lambda`
    and `advantage`, each `[*N, A]`.

    References:
        Wang et al., QPLEX: Duplex Dueling Multi-Agent Q-Learning, 2021 (its `dmaq_general.py` and `dmaq_si_weight.py`).
    """

    config: QplexConfig = QplexConfig()
    initializer: Initializer = Initializer()
    widen: float = 1.0
    """Times as many hidden units in every network of the state."""

    @nn.compact
    def __call__(self, inputs: MixerInputs) -> Float[Array, "*N 1"]:
        """The team value."""
        w, v = self._transformation(inputs.state, inputs.chosen_q.shape[-1])
        transformed = w * inputs.chosen_q + v
        if inputs.agent_mask is not None:
            transformed = jnp.where(inputs.agent_mask, transformed, 0.0)
        advantage = jax.lax.stop_gradient(w * (inputs.chosen_q - inputs.greedy_q))
        weight = self._lambda_net(inputs.state, inputs.actions)
        for name, value in {"w": w, "v": v, "lambda": weight, "advantage": advantage}.items():
            self.sow("intermediates", name, value)
        weight = weight - 1.0 if self.config.is_minus_one else weight
        return (transformed + advantage * weight).sum(axis=-1, keepdims=True)

    def _transformation(self, state: Array, num_agents: int) -> tuple[Array, Array]:
        """The positive scale w and the shift v of each agent's value; 1 and 0 without `weighted_head`."""
        if not self.config.weighted_head:
            return jnp.ones((*state.shape[:-1], num_agents)), jnp.zeros((*state.shape[:-1], num_agents))
        w = jnp.abs(self._two_layers("w", num_agents, state)) + _TINY
        return w, self._two_layers("v", num_agents, state)

    def _lambda_net(self, state: Array, actions: Array) -> Array:
        """The positive weights of the advantages, summed over kernels."""
        num_agents = actions.shape[-2]
        joint = jnp.concatenate([state, actions.reshape(*actions.shape[:-2], -1)], axis=-1)
        key = jnp.abs(self._kernels("key", 1, state)) + _TINY
        agents = nn.sigmoid(self._kernels("agents", num_agents, state))
        action = nn.sigmoid(self._kernels("action", num_agents, joint))
        return (key * agents * action).sum(axis=-2)

    def _two_layers(self, name: str, size: int, state: Array) -> Array:
        width = widened(self.config.hypernet_size, self.widen)
        hidden = nn.relu(Dense(width, self.initializer, name=f"{name}_hidden")(state))
        return Dense(size, self.initializer, name=f"{name}_output")(hidden)

    def _kernels(self, name: str, size: int, features: Array) -> Array:
        """One network per kernel, stacked; `[*N, I]` to `[*N, K, size]`."""
        stack = self.config.num_kernels
        for layer in range(1, self.config.adv_layers):
            hidden = Dense(widened(self.config.adv_size, self.widen), self.initializer, stack, layer > 1, name=f"{name}_hidden_{layer}")
            features = nn.relu(hidden(features))
        return Dense(size, self.initializer, stack, self.config.adv_layers > 1, name=f"{name}_output")(features)


def make_mixer(config: Config, widen: float = 1.0) -> nn.Module:
    """The mixer that `learner.mixer` names, with so many times as many hidden units."""
    initializer = Initializer(config.learner.mixer_initializer, config.learner.mixer_init_scale)
    mixers = {
        "none": Independent(),
        "vdn": VDN(),
        "qmix": QMIX(config.qmix, initializer, widen),
        "qplex": QPLEX(config.qplex, initializer, widen),
    }
    return mixers[config.learner.mixer]


def neuron_layers(config: Config, widen: float = 1.0) -> tuple[NeuronLayer, ...]:
    """The hidden units of the hypernetworks, in the order of the dataflow; parameters are expected under `mixer`."""
    if config.learner.mixer == "qmix":
        sizes = {"w1": config.qmix.hypernet_size, "w2": config.qmix.hypernet_size} if config.qmix.hypernet_layers == 2 else {}
        sizes["v"] = config.qmix.embed_size
    elif config.learner.mixer == "qplex":
        sizes = {"w": config.qplex.hypernet_size, "v": config.qplex.hypernet_size} if config.qplex.weighted_head else {}
    else:
        return ()
    heads = [dense_layer("mixer", f"{name}_hidden", f"{name}_output", widened(size, widen)) for name, size in sizes.items()]
    return (*heads, *_kernel_layers(config.qplex, widen)) if config.learner.mixer == "qplex" else tuple(heads)


def mixing_layer(config: Config) -> NeuronLayer | None:
    """The units of QMIX's monotone mixing layer, by the hypernetworks' heads that make their weights; None for other mixers.

    Heads have a unit's numbers in columns: E of them in `b1_output` and `w2_output`, A times E in `w1_output`, agent after agent.
    """
    if config.learner.mixer != "qmix":
        return None
    kernels, biases = ([("mixer", f"{name}_output", leaf) for name in ("w1", "b1", "w2")] for leaf in ("kernel", "bias"))
    return NeuronLayer(
        "mixer/mixing",
        config.qmix.embed_size,
        incoming=(kernels[0], kernels[1]),
        biases=(biases[0], biases[1]),
        outgoing=(kernels[2],),
        outgoing_biases=(biases[2],),
        activation=nn.elu,
        kind="mixing",
    )


REFUSED = {
    "mixer/mixing": "the units of the monotone mixing layer cannot be treated: a compensation neuron enters with a minus sign and would "
    "break dQ_tot/dq >= 0, and their weights are made from the state, not learned (the method knife_mixing is made for them)",
}
"""Names that are no neuron layers, and why."""


def _kernel_layers(config: QplexConfig, widen: float) -> list[NeuronLayer]:
    """Hidden layers of the lambda-net's three networks, K side by side."""
    layers, size = [], widened(config.adv_size, widen)
    for name in ("key", "agents", "action"):
        for layer in range(1, config.adv_layers):
            reader = f"{name}_hidden_{layer + 1}" if layer + 1 < config.adv_layers else f"{name}_output"
            layers.append(dense_layer("mixer", f"{name}_hidden_{layer}", reader, size, (config.num_kernels,)))
    return layers

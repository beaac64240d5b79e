"""Layers whose parameters keep each unit's numbers together, and their initializers.

Kernels are `[inputs, units]`, a GRU's `[inputs, 3, units]` (gates r, z, n), stacked kernels have the stack in front. A unit is always an
index of the last axis of what enters it, and of the second last input axis of what it feeds.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from knife_jax.networks.laws import Law, Path, drawn, lecun_normal, orthogonal, uniform_within, zeros
from knife_jax.networks.products import times_kernel
from knife_jax.networks.recurrence import Projected, Projection, recur


class NeuronLayer(NamedTuple):
    """A layer of hidden units and where its numbers live.

    Attributes:
        name: network and layer, such as `agent/hidden_1`.
        size: H, how many units (of each member of a stack).
        incoming: kernels that the units read through, `[*K, I, ..., H]`: units on the last axis.
        biases: their biases, `[*K, ..., H]`.
        outgoing: kernels that read the units, `[*K, H, ...]`: units on the first axis after the stack's. One leaf may be both (a recurrent
            kernel).
        outgoing_biases: the biases of what each outgoing kernel feeds, or None.
        stack: sizes of the leading axes.
        activation: what turns pre-activations into activations.
        kind: `dense`; `gru` for recurrent units; `mixing` for units of a monotone mixing layer, all of whose kernels are hypernetworks'
            heads with the units on the last axis (after that of the agents, if any, and in one with it).
        normalised: whether a normalisation stands between kernel and activation.
        leaks: whether the units are also read by something other than the outgoing kernels (a residual path, ...).
    """

    name: str
    size: int
    incoming: tuple[Path, ...]
    biases: tuple[Path, ...]
    outgoing: tuple[Path, ...]
    outgoing_biases: tuple[Path | None, ...] = ()
    stack: tuple[int, ...] = ()
    activation: Callable[[Array], Array] = nn.relu
    kind: str = "dense"
    normalised: bool = False
    leaks: bool = False

    @property
    def network(self) -> str:
        """The first part of the name."""
        return self.name.split("/")[0]

    @property
    def module(self) -> Path:
        """The module that owns the first incoming kernel."""
        return self.incoming[0][:-1]


def dense_layer(network: str, module: str, reader: str, size: int, stack: tuple[int, ...] = ()) -> NeuronLayer:
    """A ReLU layer that one module makes and one reads, both given as paths within the network."""
    made, read = (network, *module.split("/")), (network, *reader.split("/"))
    return NeuronLayer(
        f"{network}/{module}",
        size,
        incoming=((*made, "kernel"),),
        biases=((*made, "bias"),),
        outgoing=((*read, "kernel"),),
        outgoing_biases=((*read, "bias"),),
        stack=stack,
    )


def widened(size: int, factor: float) -> int:
    """So many times as many units, rounded up."""
    return math.ceil(size * factor - 1e-9)


class Initializer(NamedTuple):
    """The laws of weights and biases.

    Attributes:
        name: `torch_uniform` (weights and biases uniform within 1/sqrt(fan in), as PyTorch's layers), `flax` (LeCun normal, zero biases)
            or `orthogonal` (zero biases).
        scale: scale of the orthogonal weights.
    """

    name: str = "torch_uniform"
    scale: float = 1.0

    def kernel(self, shape: Sequence[int], fan_in: int) -> Law:
        """The law of a kernel `[*K, inputs, units]`."""
        if self.name == "torch_uniform":
            return uniform_within(shape, fan_in)
        return lecun_normal(shape, fan_in) if self.name == "flax" else orthogonal(shape, self.scale)

    def gates(self, shape: Sequence[int], fan_in: int, recurrent: bool) -> Law:
        """The law of a GRU's kernel `[inputs, 3, units]`, of every gate the same.

        But for `torch_uniform` these are Flax's own defaults (as JaxMARL has them): LeCun normal on the input, orthogonal on the state.
        """
        if self.name == "torch_uniform":
            return uniform_within(shape, fan_in)
        return orthogonal(shape, 1.0, axes=(0, 2)) if recurrent else lecun_normal(shape, shape[0])

    def bias(self, shape: Sequence[int], fan_in: int) -> Law:
        """The law of the biases that go with a kernel of `fan_in` inputs."""
        return uniform_within(shape, fan_in) if self.name == "torch_uniform" else zeros(shape)


class Dense(nn.Module):
    """An affine layer, `[..., inputs]` to `[..., units]`; with `stack=K`, K of them side by side.

    A stacked layer takes `[..., inputs]`, shared by all K, or `[..., K, inputs]`, and gives `[..., K, units]`.
    """

    units: int
    initializer: Initializer = Initializer()
    stack: int | None = None
    stacked_input: bool = False

    @nn.compact
    def __call__(self, inputs: Float[Array, "... I"]) -> Float[Array, "... units"]:
        """Applies the layer."""
        fan_in = inputs.shape[-1]
        stack = () if self.stack is None else (self.stack,)
        kernel = drawn(self, "kernel", self.initializer.kernel((*stack, fan_in, self.units), fan_in))
        bias = drawn(self, "bias", self.initializer.bias((*stack, self.units), fan_in))
        if self.stack is None:
            return affine(inputs, kernel, bias)
        product = jnp.einsum("...ki,kio->...ko" if self.stacked_input else "...i,kio->...ko", inputs, kernel)
        return product + bias.reshape((1,) * (product.ndim - bias.ndim) + bias.shape)


class GateProjection(nn.Module):
    """A GRU's projection of its input for all three gates, to be worked out where it is read; its kernel is `[I, 3, H]`."""

    units: int
    initializer: Initializer = Initializer()

    @nn.compact
    def __call__(self, inputs: Float[Array, "... I"]) -> Projection:
        """The layer, as it applies to the inputs."""
        size, units = inputs.shape[-1], self.units
        kernel = drawn(self, "kernel", self.initializer.gates((size, 3, units), units, recurrent=False))
        bias = drawn(self, "bias", self.initializer.bias((3, units), units))
        return Projection(inputs, kernel.reshape(size, -1), bias.reshape(-1))


class GRU(nn.Module):
    """A gated recurrent layer with PyTorch's equations, scanned over time.

    `r = s(W_r x + b_r + U_r h + c_r)`, `z` alike, `n = tanh(W_n x + b_n + r (U_n h + c_n))`, `h' = (1 - z) n + z h`. What depends on the
    input alone is a matrix product for all steps outside the scan; inside it there is one product for the three gates. (See `recurrence`.)
    """

    units: int
    initializer: Initializer = Initializer()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "T *N I"], starts: Bool[Array, "T *N"], hidden: Float[Array, "*N S"]
    ) -> tuple[Float[Array, "T *N units"], Float[Array, "*N S"]]:
        """Unrolls the layer.

        Args:
            inputs: time first.
            starts: where an episode starts; the hidden state is zero before those steps.
            hidden: the state before the first step; S is `units`, or more where a cure added frozen units.

        Returns:
            The hidden states after every step, and the last one.
        """
        laws, units = self.initializer, self.units
        projected = GateProjection(units, laws, name="input")(inputs)
        hidden_kernel = drawn(self, "hidden_kernel", laws.gates((units, 3, units), units, recurrent=True))
        hidden_bias = drawn(self, "hidden_bias", laws.bias((3, units), units))
        return self.unroll(projected, starts, hidden, hidden_kernel, hidden_bias)

    def unroll(
        self,
        projected: Projected | Projection,
        starts: Bool[Array, "T *N"],
        hidden: Float[Array, "*N S"],
        hidden_kernel: Float[Array, "units 3 units"],
        hidden_bias: Float[Array, "3 units"],
    ) -> tuple[Float[Array, "T *N units"], Float[Array, "*N S"]]:
        """The way through time from what the inputs give to the gates; apart from the rest, so that it can be intercepted."""
        length, units = starts.shape[0], self.units
        given, begins, first = projected.flat(length), starts.reshape(length, -1), hidden.reshape(-1, units)
        states = recur(given, begins, first, hidden_kernel.reshape(units, -1), hidden_bias.reshape(-1)).reshape(length, *hidden.shape)
        return states, states[-1]


def affine(inputs: Array, kernel: Array, bias: Array) -> Array:
    """`inputs @ kernel + bias`, without promotion of ranks.

    All leading axes are one in the product: XLA's gradients of kernels are several times slower when they contract more than one axis.
    """
    exact = jnp.promote_types(inputs.dtype, kernel.dtype)
    product = times_kernel(inputs.reshape(-1, inputs.shape[-1]).astype(exact), kernel.astype(exact)) + bias[None]
    return product.reshape(*inputs.shape[:-1], product.shape[-1])

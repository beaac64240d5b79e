"""Composites on the units of a monotone mixing layer: what is frozen, how it enters, how a unit becomes one.

A unit gives `elu(sum_i q_i |w1_i(s)| + b1(s)) |w2(s)|`. It becomes a knowledge neuron K with its weights, a fresh unit A, and an offset
`-elu(sum_i c_i |w1_A,i(s)| + b1_A(s)) |w2_A(s)|`, A's initial contribution at fixed values c. The offset reads the state alone, so that
the team value stays monotone in every q; in return A is compensated where q = c and not elsewhere. Weights are made from a state's features
by the hypernetworks' heads: what is frozen are the heads' columns, the features in front of them go on learning.

Shapes: A agents, E units, R slots, F features that a head reads.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from knife_jax.networks.neurons import NeuronLayer, Path, affine
from knife_jax.plasticity.composite import Placement
from knife_jax.plasticity.graph import Flat
from knife_jax.plasticity.reserve import Block, pick


class Head(NamedTuple):
    """The head that makes one of a unit's weights.

    Attributes:
        name: `w1`, `b1` or `w2`.
        kernel: its kernel's path.
        bias: its bias's.
    """

    name: str
    kernel: Path
    bias: Path

    @property
    def leaves(self) -> tuple[tuple[str, Path], ...]:
        """Both leaves, each with its name in the reserve."""
        return ((f"{self.name}_kernel", self.kernel), (f"{self.name}_bias", self.bias))


def heads(layer: NeuronLayer) -> tuple[Head, ...]:
    """The heads of a mixing layer: w1, b1 and w2."""
    kernels = (*layer.incoming, *layer.outgoing)
    return tuple(Head(name, kernel, (*kernel[:-1], "bias")) for name, kernel in zip(("w1", "b1", "w2"), kernels, strict=True))


def columns(leaf: Array, layer: NeuronLayer) -> Float[Array, "*F B E"]:
    """A head's kernel or bias with the units on an axis of their own; B is A for w1 and 1 for b1 and w2."""
    return leaf.reshape(*leaf.shape[:-1], -1, layer.size)


def allocate(layer: NeuronLayer, leaves: Flat, slots: int) -> Block:
    """An empty reserve: columns of K and of the offset (`[*F, B, 2R]`), its values c (`at_q`, `[A, R]`), and which slots are `used`."""
    block: Block = {}
    for head in heads(layer):
        for name, path in head.leaves:
            like = columns(leaves[path], layer)
            block[name] = jnp.zeros((*like.shape[:-1], 2 * slots), like.dtype)
    at_q = jnp.zeros((block["w1_bias"].shape[0], slots), block["w1_bias"].dtype)
    return block | {"at_q": at_q, "used": jnp.zeros(slots, bool)}


def mixed(pre_activations: Float[Array, "*N R"], w2: Float[Array, "*N R"]) -> Float[Array, "*N 1"]:
    """What units give to the team value, summed."""
    return (nn.elu(pre_activations) * jnp.abs(w2)).sum(axis=-1, keepdims=True)


class MixingCall:
    """What a forward pass remembers of a mixing layer: the features that its heads read.

    Args:
        layer: the mixing layer.
        block: its part of the reserve, if any.
        tapped: `(name, activations) -> activations`, measures what was asked for: of `<layer>` what the units' ELU is given, of `<layer>/q`
            the agents' values, of `<layer>/w1`, `/b1` and `/w2` the features.
    """

    def __init__(self, layer: NeuronLayer, block: Block | None, tapped: Callable[[str, Array], Array]) -> None:
        self.layer, self.block, self.tapped = layer, block, tapped
        self.path: Path = tuple(layer.name.split("/"))
        self.heads = {head.kernel[:-1]: head.name for head in heads(layer)}
        self.features: dict[str, Array] = {}

    def enter(self, path: Path, features: Array) -> Array:
        """Notes what a head is about to read."""
        name = self.heads[path]
        self.features[name] = self.tapped(f"{self.layer.name}/{name}", features)
        return self.features[name]

    def intercept(self, call: Callable[..., Array], method: str, q: Array, *weights: Array) -> Array:
        """Measures the units, and adds what K and the offset give."""
        if method == "pre_activations":
            return self.tapped(self.layer.name, call(q, *weights))
        q = self.tapped(f"{self.layer.name}/q", q)
        outputs = call(q, *weights)
        if self.block is None:
            return outputs
        (w1, w1_offset), (b1, b1_offset), (w2, w2_offset) = (self._made(name, self.block) for name in ("w1", "b1", "w2"))
        known = jnp.einsum("...a,...ar->...r", q, jnp.abs(w1)) + b1[..., 0, :]
        offset = jnp.einsum("ar,...ar->...r", self.block["at_q"], jnp.abs(w1_offset)) + b1_offset[..., 0, :]
        return outputs + (mixed(known, w2[..., 0, :]) - mixed(offset, w2_offset[..., 0, :]))

    def _made(self, name: str, block: Block) -> tuple[Float[Array, "*N B R"], Float[Array, "*N B R"]]:
        """What the frozen columns of one head make, for K and for the offset."""
        kernel, bias, features = block[f"{name}_kernel"], block[f"{name}_bias"], self.features[name]
        made = affine(features, kernel.reshape(kernel.shape[0], -1), bias.reshape(-1)).reshape(*features.shape[:-1], *bias.shape)
        slots = bias.shape[-1] // 2
        return made[..., :slots], made[..., slots:]


def inject(
    layer: NeuronLayer, leaves: Flat, block: Block, fresh: Flat, place: Placement, at_q: Float[Array, "A"]
) -> tuple[Flat, Block, dict[Path, Array]]:
    """Turns units into composites.

    Args:
        layer: the mixing layer.
        leaves: the network's parameters.
        block: its reserve.
        fresh: parameters that A and the offset take their columns from.
        place: which unit moves into which slot.
        at_q: the values at which A is compensated.

    Returns:
        Parameters and reserve afterwards, which give the same team value where q is `at_q`, and which entries of the heads were rewritten.
    """
    leaves, block, rewritten = dict(leaves), dict(block), {}
    moved, slots = place.source < layer.size, place.source.shape[0]
    for name, path in (pair for head in heads(layer) for pair in head.leaves):
        leaf, kept = leaves[path], block[name]
        live, drawn = columns(leaf, layer), columns(fresh[path].astype(leaf.dtype), layer)
        known, compensating = (pick(values, place.source) for values in (live, drawn))
        over = _last(moved, live)
        parts = jnp.where(over, known, kept[..., :slots]), jnp.where(over, compensating, kept[..., slots:])
        block[name] = jnp.concatenate(parts, axis=-1)
        redrawn = _last(place.redrawn, live)
        leaves[path] = jnp.where(redrawn, drawn, live).reshape(leaf.shape)
        rewritten[path] = jnp.broadcast_to(redrawn, live.shape).reshape(leaf.shape)
    block["at_q"] = jnp.where(moved[None], at_q[:, None].astype(block["at_q"].dtype), block["at_q"])
    return leaves, block | {"used": block["used"] | moved}, rewritten


def release(block: Block, freed: Bool[Array, "R"]) -> Block:
    """Empties slots."""
    both = jnp.concatenate([freed, freed])
    masks = dict.fromkeys(block, both) | {"at_q": freed, "used": freed}
    return {name: jnp.where(_last(masks[name], values), jnp.zeros((), values.dtype), values) for name, values in block.items()}


def fade(block: Block, share: float) -> Block:
    """A reserve whose K and offset give so much of what they gave."""
    return block | {name: share * block[name] for name in ("w2_kernel", "w2_bias")}


def centred(layer: NeuronLayer, fresh: Flat, features: Float[Array, "F"], at_q: Float[Array, "A"]) -> Flat:
    """Fresh parameters with the biases of b1 shifted so that the values `at_q` cancel: what they give through w1 at mean features."""
    w1, b1, _ = heads(layer)
    weights = head_values(layer, w1, fresh, features)
    bias = columns(fresh[b1.bias], layer) - (at_q[:, None] * jnp.abs(weights)).sum(axis=0, keepdims=True)
    return fresh | {b1.bias: bias.reshape(fresh[b1.bias].shape)}


def head_values(layer: NeuronLayer, head: Head, leaves: Flat, features: Float[Array, "F"]) -> Float[Array, "B E"]:
    """What a head makes of features."""
    return columns(features @ leaves[head.kernel] + leaves[head.bias], layer)


def change_bound(
    layer: NeuronLayer, fresh: Flat, features: dict[str, Float[Array, "F"]], spread: Float[Array, "A"], treated: Bool[Array, "E"]
) -> Float[Array, ""]:
    """How much composites change the team value where every q is its `spread` away from where they are compensated, at most.

    `sum_j |w2_j| sum_i |w1_ij| spread_i` over the units treated, at given features (an ELU's slope is 1 at most).
    """
    w1, _, w2 = heads(layer)
    slopes = (jnp.abs(head_values(layer, w1, fresh, features["w1"])) * spread[:, None]).sum(axis=0)
    return jnp.where(treated, slopes * jnp.abs(head_values(layer, w2, fresh, features["w2"]))[0], 0.0).sum()


def blank_taps(layer: NeuronLayer, leaves: Flat) -> dict[str, Any]:
    """The taps that `centred`, `change_bound` and the choice of units need, as zeros."""
    sizes = {name: leaves[path].shape[0] for name, path in _features(layer)}
    one = {"count": jnp.zeros(1)}
    agents = columns(leaves[heads(layer)[0].bias], layer).shape[0]
    values = {"signed": jnp.zeros(agents), "squared": jnp.zeros(agents)}
    blank = {layer.name: {"slope": jnp.zeros(layer.size)} | one, f"{layer.name}/q": values | one}
    return blank | {f"{layer.name}/{name}": {"signed": jnp.zeros(size)} | one for name, size in sizes.items()}


def _features(layer: NeuronLayer) -> Iterator[tuple[str, Path]]:
    """The heads whose features are measured, with their kernels."""
    return ((head.name, head.kernel) for head in heads(layer) if head.name != "b1")


def _last(mask: Array, like: Array) -> Array:
    """A mask over the last axis."""
    return mask.reshape(*(1,) * (like.ndim - 1), -1)

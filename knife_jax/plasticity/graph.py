"""Which numbers of a parameter dict belong to which hidden unit.

Shapes: *K leading axes of stacked kernels (none for plain layers), I inputs, H units, O what the units feed, B biases per unit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from envs.base import nearest
from knife_jax.networks.neurons import NeuronLayer, Path

Flat = dict[Path, Any]
Params = Any


class Units(NamedTuple):
    """The numbers of a layer's units, gathered from a tree shaped like the parameters (parameters, gradients, moments, masks)."""

    incoming: Float[Array, "*K I H"]
    biases: Float[Array, "*K B H"]
    outgoing: Float[Array, "*K H O"]


@dataclass(frozen=True)
class Graph:
    """The neuron layers of a model, in the order of the dataflow.

    Attributes:
        layers: the layers.
        draw: fresh parameters of the whole model from a key, by its own initializers.
        shapes: `{path: shape}` of every parameter.
        refused: names that sound like layers but can be no part of a graph, with the reason.
        mixing: the units of a monotone mixing layer, which are made by hypernetworks and no part of `layers`.
    """

    layers: tuple[NeuronLayer, ...]
    draw: Callable[[PRNGKeyArray], Params]
    shapes: Mapping[Path, tuple[int, ...]]
    refused: Mapping[str, str] = field(default_factory=dict)
    mixing: NeuronLayer | None = None

    @property
    def heads(self) -> tuple[Path, ...]:
        """Modules that read hidden units and are themselves no hidden layer."""
        hidden = {path[:-1] for layer in self.layers for path in layer.incoming}
        readers = {path[:-1]: None for layer in self.layers for path in layer.outgoing}
        return tuple(module for module in readers if module not in hidden)

    @property
    def mixing_alone(self) -> "Graph":
        """The graph whose one layer is the monotone mixing layer; without layers if there is none."""
        return replace(self, layers=() if self.mixing is None else (self.mixing,))

    def select(self, which: str | Sequence[str] = "all") -> "Graph":
        """The graph with some layers only.

        Args:
            which: `all`, the name of a network or of a layer, or several names. Recurrent units only come along when their layer is named.

        Raises:
            ValueError: for a name that no layer or network has.
        """
        wanted = (which,) if isinstance(which, str) else tuple(which)
        known = ["all", *dict.fromkeys(layer.network for layer in self.layers), *(layer.name for layer in self.layers)]
        for name in wanted:
            if name in self.refused:
                raise ValueError(f"layers: {name}: {self.refused[name]}")
            if name not in known:
                raise ValueError(f"layers: no layer or network {name!r}; did you mean {nearest(name, known)!r}? Known: {', '.join(known)}")
        networks = {layer.network for layer in self.layers} if "all" in wanted else set(wanted)
        return self.only(lambda layer: layer.name in wanted or (layer.network in networks and layer.kind == "dense"))

    def only(self, keep: Callable[[NeuronLayer], bool]) -> "Graph":
        """The graph with the layers for which `keep` holds."""
        return replace(self, layers=tuple(layer for layer in self.layers if keep(layer)))


def make_graph(
    layers: Sequence[NeuronLayer],
    draw: Callable[[PRNGKeyArray], Params],
    refused: Mapping[str, str] | None = None,
    mixing: NeuronLayer | None = None,
) -> Graph:
    """Checks layers against the parameters that `draw` gives.

    Args:
        layers: in the order of the dataflow.
        draw: fresh parameters from a key.
        refused: see `Graph`.
        mixing: see `Graph`.

    Raises:
        ValueError: for a leaf that does not exist, or whose shape does not hold the layer's units.
    """
    drawn: Flat = flatten_dict(jax.eval_shape(draw, jax.random.key(0)))
    shapes = {path: tuple(leaf.shape) for path, leaf in drawn.items()}
    for layer in layers:
        first = len(layer.stack)
        for path in (*layer.incoming, *layer.biases, *layer.outgoing):
            if path not in shapes:
                names = ["/".join(known) for known in shapes]
                raise ValueError(f"layer {layer.name}: no parameter {'/'.join(path)!r}; did you mean {nearest('/'.join(path), names)!r}?")
        _check(layer, layer.incoming + layer.biases, shapes, -1, "last")
        _check(layer, layer.outgoing, shapes, first, "first")
        if layer.outgoing_biases and len(layer.outgoing_biases) != len(layer.outgoing):
            raise ValueError(f"layer {layer.name}: {len(layer.outgoing)} outgoing kernels but {len(layer.outgoing_biases)} outgoing biases")
    return Graph(tuple(layers), draw, shapes, refused or {}, mixing)


def _check(layer: NeuronLayer, paths: Sequence[Path], shapes: Mapping[Path, tuple[int, ...]], axis: int, where: str) -> None:
    for path in paths:
        shape = shapes[path]
        if shape[: len(layer.stack)] != layer.stack or len(shape) <= len(layer.stack) or shape[axis] != layer.size:
            expected = f"{layer.size} units on the {where} axis" + (f" after the stack {layer.stack}" if layer.stack else "")
            raise ValueError(f"layer {layer.name}: {'/'.join(path)} has shape {shape}, expected {expected}")


def flat(tree: Params) -> Flat:
    """A nested dict as `{path: leaf}`."""
    return flatten_dict(tree)


def nested(leaves: Flat, like: Params) -> Params:
    """`{path: leaf}` as a nested dict, with the branches of another one that have no leaves (a mixer without parameters)."""
    bare = {path: node for path, node in flatten_dict(like, keep_empty_nodes=True).items() if node is empty_node}
    return unflatten_dict(bare | leaves)


def read(leaves: Flat, layer: NeuronLayer) -> Units:
    """Gathers a layer's numbers from a flat tree."""
    return Units(
        jnp.concatenate([incoming_view(leaves[path], layer) for path in layer.incoming], axis=-2),
        read_biases(leaves, layer),
        jnp.concatenate([outgoing_view(leaves[path], layer) for path in layer.outgoing], axis=-1),
    )


def read_biases(leaves: Flat, layer: NeuronLayer) -> Float[Array, "*K B H"]:
    """Gathers a layer's biases."""
    none = jnp.zeros((*layer.stack, 0, layer.size))
    return jnp.concatenate([none, *(incoming_view(leaves[path], layer) for path in layer.biases)], axis=-2)


def incoming_view(leaf: Array, layer: NeuronLayer) -> Shaped[Array, "*K I H"]:
    """A kernel or bias with everything but stack and units on one axis."""
    return leaf.reshape(*layer.stack, prod(leaf.shape[len(layer.stack) :]) // layer.size, layer.size)


def outgoing_view(leaf: Array, layer: NeuronLayer) -> Shaped[Array, "*K H O"]:
    """An outgoing kernel with everything but stack and units on one axis."""
    return leaf.reshape(*layer.stack, layer.size, prod(leaf.shape[len(layer.stack) + 1 :]))


def write_incoming(leaves: Flat, layer: NeuronLayer, units: Units) -> Flat:
    """Puts incoming kernels and biases back into a flat tree."""
    written = dict(leaves)
    for paths, values in ((layer.incoming, units.incoming), (layer.biases, units.biases)):
        start = 0
        for path in paths:
            rows = incoming_view(leaves[path], layer).shape[-2]
            written[path] = values[..., start : start + rows, :].reshape(leaves[path].shape)
            start += rows
    return written


def write_outgoing(leaves: Flat, layer: NeuronLayer, units: Units) -> Flat:
    """Puts outgoing kernels back into a flat tree."""
    written, start = dict(leaves), 0
    for path in layer.outgoing:
        columns = outgoing_view(leaves[path], layer).shape[-1]
        written[path] = units.outgoing[..., start : start + columns].reshape(leaves[path].shape)
        start += columns
    return written


def write(leaves: Flat, layer: NeuronLayer, units: Units) -> Flat:
    """Puts a layer's numbers back; of an entry that is both, outgoing wins."""
    return write_outgoing(write_incoming(leaves, layer, units), layer, units)

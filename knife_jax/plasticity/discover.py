"""The hidden layers of any Flax model, found by the dataflow: names and the order of creation play no part."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from envs.base import nearest
from knife_jax.networks.neurons import NeuronLayer, Path
from knife_jax.plasticity.dataflow import POINTS, Flow, Probe, follow
from knife_jax.plasticity.graph import Graph, make_graph

Activation = Callable[[Array], Array]

ACTIVATIONS: tuple[Activation, ...] = (
    *(nn.relu, nn.tanh, nn.gelu, partial(nn.gelu, approximate=False), nn.silu, nn.elu, nn.leaky_relu, nn.sigmoid, nn.softplus, nn.selu),
    *(nn.relu6, nn.hard_tanh, nn.hard_sigmoid, nn.hard_silu, nn.soft_sign, nn.log_sigmoid, jnp.sin, jnp.square, jnp.abs),
)
"""Activations that are recognised, by their values; all others have to be named."""

RETURNED = "no Dense module reads it (those inside loops do not count); it goes into the model's output"
UNREAD = (
    "no Dense module reads its units alone and in place: something is added to them, multiplied (dropout too) or concatenated, axes are "
    "moved, a convolution or loop comes in between, their reader also reads something else, or it is called again before they are read"
)
LINEAR = "nothing but a linear map is between it and its readers; to count its units as hidden all the same, give `activations`"


def discover(model: nn.Module, *examples: Any, activations: Mapping[str, Activation] | None = None, **keywords: Any) -> Graph:
    """Finds the layers of hidden units of a Flax model.

    A hidden layer is an `nn.Dense` (or one of `networks.neurons`) whose outputs reach other such modules through an elementwise activation.
    Layers are named by the module's path, joined by `/`, and ordered by the dataflow. Two flags say what keeps composites away:

    * `normalised`: between kernel and reader is more than a fixed elementwise function: a normalisation of any kind, a function with
      parameters or a gradient of its own, `stop_gradient`.
    * `leaks`: something else reads the units too (a sum, a concatenation, a reshape, a convolution, a loop, the model's output), a shared
      module is read after it was called again, or readers disagree on the activation.

    Modules that make no hidden layer are in the graph's `refused`, each with the reason: output layers, linear layers without an
    activation, those whose units no Dense module reads by itself, those inside `nn.scan`, `nn.vmap` or `nn.jit`, and those whose parameters
    are used elsewhere too.

    Args:
        model: the model; its modules may be defined in `setup` or inline.
        examples: what `model.init` takes after the key; of arrays only shapes and types matter.
        activations: what turns the outputs of the layers named into what their readers read, where it is none of `ACTIVATIONS`.
        keywords: further arguments of `model.init` and `model.apply`, such as `train=False`.

    Returns:
        The graph; paths are relative to `variables["params"]`.

    Raises:
        ValueError: if there is no hidden layer, if an activation is not recognised, and for `activations` that name no layer or are not
            what the model computes.

    Examples:
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> graph = discover(model, jnp.zeros((1, 5)))
        >>> [(layer.name, layer.size, layer.outgoing) for layer in graph.layers]
        [('layers_0', 8, (('layers_2', 'kernel'),))]
    """
    given, title = dict(activations or {}), type(model).__name__
    flow = follow(model, examples, keywords)
    found = {"/".join(path): _layer(path, flow, given) for path in flow.modules}
    layers = [layer for layer in found.values() if isinstance(layer, NeuronLayer)]
    refused = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    if not layers:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in refused.items())
        raise ValueError(f"discover: no hidden layer in {title}: {reasons or 'it calls no Dense module'}")
    known = [layer.name for layer in layers]
    for name in given:
        if name not in known:
            hint = refused.get(name, f"did you mean {nearest(name, known)!r}?")
            raise ValueError(f"activations: no hidden layer {name!r} in {title}: {hint}")
    return make_graph(layers, lambda key: model.init(key, *examples, **keywords)["params"], refused)


def _layer(path: Path, flow: Flow, given: Mapping[str, Activation]) -> NeuronLayer | str:
    """A module's hidden layer, or why it makes none."""
    if path in flow.spoiled:
        return flow.spoiled[path]
    own, name, kernel = flow.modules[path], "/".join(path), (*path, "kernel")
    call = flow.calls[min(own)]
    readings = [reading for reading in flow.readings if reading.value.sources & own]
    readers = [reader for reader in dict.fromkeys(reading.reader for reading in readings) if flow.reads_only(reader, path)]
    if not readers:
        return RETURNED if flow.returned & own and not readings else UNREAD
    if flow.shapes[kernel] != (*call.stack, call.inputs[-1], call.outputs[-1]):
        return f"its kernel has shape {flow.shapes[kernel]}, which is not one row per input and one column per unit"
    probes = [reading.value.probe for reading in readings if reading.reader in readers]
    known = [probe for probe in probes if probe is not None]
    normalised, agreed = len(known) < len(probes), all(probe.equals(known[0].values) for probe in known)
    if name not in given and not normalised and all(_is(_identity, probe) for probe in known):
        return LINEAR
    leaks = not agreed or bool(flow.returned & own) or any(reading.reader not in readers for reading in readings)
    return NeuronLayer(
        name,
        size=call.outputs[-1],
        incoming=(kernel,),
        biases=tuple(bias for bias in ((*path, "bias"),) if bias in flow.shapes),
        outgoing=tuple((*reader, "kernel") for reader in readers),
        outgoing_biases=tuple((*reader, "bias") if (*reader, "bias") in flow.shapes else None for reader in readers),
        stack=call.stack,
        activation=_activation(name, known, given, required=not (normalised or leaks)),
        normalised=normalised,
        leaks=leaks,
    )


def _activation(name: str, probes: list[Probe], given: Mapping[str, Activation], required: bool) -> Activation:
    """The function that has the values of the probes; one that refuses to be called if it is not known and not required."""
    if name in given:
        if not all(_is(given[name], probe) for probe in probes):
            raise ValueError(
                f"activations: {name}: {_called(given[name])} is not what the model computes between the layer and its readers"
            )
        return given[name]
    found = next((function for function in ACTIVATIONS if probes and _is(function, probes[0])), None)
    if found is None and required:
        names = ", ".join(dict.fromkeys(_called(function) for function in ACTIVATIONS))
        raise ValueError(f"discover: the activation of {name} is none of {names}; pass it as activations={{{name!r}: function}}")
    return found or partial(_unknown, name)


def _is(function: Activation, probe: Probe) -> bool:
    """Whether a function has the values that the model was seen to compute."""
    with jax.ensure_compile_time_eval():
        return probe.equals(np.asarray(function(jnp.asarray(POINTS, jnp.float32))))


def _called(function: Activation) -> str:
    function = function.func if isinstance(function, partial) else function
    return getattr(function, "__name__", repr(function))


def _identity(values: Array) -> Array:
    return values


def _unknown(name: str, values: Array) -> Array:
    raise ValueError(f"layer {name}: its activation is not known, since more than a fixed elementwise function comes before its readers")

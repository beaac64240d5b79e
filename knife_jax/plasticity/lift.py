"""Flax apply functions that know of reserve and taps, without a change to the user's modules.

Calls of Dense modules are intercepted. A module that makes a layer also computes the layer's frozen units; a module that reads one also
reads them. A GRU's way through time is intercepted where its units have a reserve: the states of frozen units go beside those of live ones;
and so is QMIX's mixing layer (see `mixing`). Taps measure what passes from a layer to its readers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from knife_jax.networks.neurons import GRU, Dense, GateProjection
from knife_jax.networks.recurrence import Projected, Projection, projected_from, unroll_gates
from knife_jax.plasticity import reserve as frozen
from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, Path, flat, nested
from knife_jax.plasticity.mixing import MixingCall
from knife_jax.plasticity.reserve import Effective, Module
from knife_jax.plasticity.taps import tap

AFFINE = (nn.Dense, Dense, GateProjection)
"""Modules whose calls can be extended: one kernel, contracted with the last axis of the input."""

Apply = Callable[..., Any]


def lift(graph: Graph, apply: Apply, prefix: Path = ()) -> Apply:
    """Extends an apply function.

    Args:
        graph: the layers to watch or extend.
        apply: `(variables, *args, **kwargs)`, as `module.apply`.
        prefix: the path of the module's parameters within the graph's.

    Returns:
        The same function, which also understands the collections `reserve` (see `reserve.allocate`), `taps` (see `taps`) and `tap_mask`
        (which samples count, an array over the leading axes of the activations; all if absent). Without them it is `apply`; what they hold
        of other layers than the graph's is passed on to it.
    """
    known = {module.name for module in frozen.modules(graph).values()} | {layer.name for layer in graph.layers}
    known |= {layer.name for layer in graph.mixing_alone.layers}

    def is_known(name: str) -> bool:
        return any(name == own or name.startswith(f"{own}/") for own in known)

    def lifted(variables: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        variables = dict(variables)
        reserve, taps, mask = (variables.pop(name, None) for name in ("reserve", "taps", "tap_mask"))
        if not reserve and not taps:
            return apply(variables, *args, **kwargs)
        call = _Call(graph, prefix, reserve or {}, taps or {}, mask)
        for collection, values in {"reserve": reserve or {}, "taps": taps or {}}.items():
            if others := {name: value for name, value in values.items() if not is_known(name)}:
                variables |= {collection: others} if mask is None else {collection: others, "tap_mask": mask}
        variables["params"] = call.extend(variables["params"])
        with nn.intercept_methods(call.intercept):
            return apply(variables, *args, **kwargs)

    return lifted


class _Call:
    """What one call of a lifted function remembers between the modules of a forward pass."""

    def __init__(self, graph: Graph, prefix: Path, reserve: frozen.Reserve, taps: dict[str, Any], mask: Array | None) -> None:
        self.prefix, self.reserve, self.taps, self.mask = prefix, reserve, taps, mask
        self.modules = {path: module for path, module in frozen.modules(graph).items() if path[: len(prefix)] == prefix}
        self.weights: dict[Path, Effective] = {}
        self.made: dict[str, tuple[Array, Array]] = {}
        self.projected: dict[str, tuple[Array, Array]] = {}
        self.entered: dict[int, tuple[Array, Array, Array | None]] = {}
        self.mixing = None if graph.mixing is None else MixingCall(graph.mixing, self.reserve.get(graph.mixing.name), self._tapped)

    def extend(self, params: Any) -> Any:
        """Works out the weights of every module with a block in the reserve, and puts the live ones into the parameters."""
        leaves: Flat = flat(params)
        for path, module in self.modules.items():
            if module.name not in self.reserve:
                continue
            kernel, bias = module.kernel[len(self.prefix) :], module.bias[len(self.prefix) :]
            shift = leaves.get(bias)
            if shift is not None:
                shift = shift.reshape(*module.stack, -1)
            weights = self._effective(module, frozen.matrix(leaves[kernel], module), shift)
            leaves[kernel] = weights.kernel.reshape(leaves[kernel].shape)
            self.weights[path] = weights
        return nested(leaves, params)

    def _effective(self, module: Module, kernel: Array, bias: Array | None) -> Effective:
        function = frozen.effective
        for _ in module.stack:
            function = jax.vmap(function)
        return function(kernel, bias, self.reserve[module.name])

    def intercept(self, call: Apply, args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        """Extends the calls of the graph's modules; leaves all others as they are."""
        path = (*self.prefix, *context.module.path)
        if context.method_name == "unroll" and isinstance(context.module, GRU) and path in self.modules:
            return self._unroll(self.modules[path], call, *args, **kwargs)
        if self.mixing is not None and path == self.mixing.path:
            return self.mixing.intercept(call, context.method_name, *args)
        module, is_head = self.modules.get(path), self.mixing is not None and path in self.mixing.heads
        if context.method_name != "__call__" or not isinstance(context.module, AFFINE) or not (module or is_head):
            return call(*args, **kwargs)
        inputs, added = args[0], None
        if module and module.source:
            inputs, added = self._enter(module.source, inputs)
        if self.mixing is not None and is_head:
            inputs = self.mixing.enter(path, inputs)
        given = call(inputs, *args[1:], **kwargs)
        weights = self.weights.get(path)
        if module is None or weights is None:
            return given
        rows = None if added is None else weights.rows
        target = None if weights.knowledge is None else module.target
        if rows is None and target is None:
            return given
        outputs = one_array(given)
        if rows is not None:
            outputs = outputs + _over_stack(jnp.matmul, module, (True,))(added, rows)
        if target:
            read = inputs if rows is None or added is None else jnp.concatenate([inputs, added], axis=-1)
            function = _over_stack(frozen.frozen_units, module, (getattr(context.module, "stacked_input", False), True))
            made = self.projected if target.kind == "gru" else self.made
            made[target.name] = function(read, outputs, weights)
        return as_given(outputs, given)

    def _unroll(
        self,
        module: Module,
        call: Apply,
        projected: Projected | Projection,
        starts: Array,
        hidden: Array,
        kernel: Array,
        bias: Array,
    ) -> Any:
        """A GRU's way through time, with the states of K and C beside those of the live units."""
        layer, weights = module.target, self.weights.get(module.path)
        block = frozen.links_of(self.reserve, layer) if layer else None
        if layer is None or weights is None or block is None:
            return call(projected, starts, hidden, kernel, bias)
        size = layer.size + 2 * block["used"].shape[0]
        if hidden.shape[-1] != size:
            raise ValueError(f"hidden: {layer.name} has a reserve and {size} running states (Method.state_sizes), got {hidden.shape[-1]}")
        weights = weights._replace(kernel=kernel.reshape(layer.size, -1))
        read = partial(frozen.read_states, bias=bias.reshape(-1), weights=weights, block=block)
        knowledge, compensation = self.projected[layer.name]
        states, last = unroll_gates(read, frozen.join_gates(projected.joint(), knowledge, compensation), starts, hidden)
        live, knowledge, compensation = frozen.split_states(states, layer.size)
        self.made[layer.name] = knowledge, compensation
        return live, last

    def _enter(self, layer: NeuronLayer, live: Array) -> tuple[Array, Array | None]:
        """What a reader of a layer is fed: the live activations, and those of the frozen units."""
        if id(live) in self.entered:
            return self.entered[id(live)][1:]
        inputs, added = self._tapped(layer.name, live), None
        block = frozen.links_of(self.reserve, layer)
        if block is not None and layer.kind == "gru" and layer.name not in self.made:
            raise ValueError(f"{layer.name}: composites on recurrent units are known to the module networks.neurons.GRU alone")
        if block is not None and layer.name in self.made:
            activation = layer.activation if layer.kind == "dense" else _identity
            knowledge, compensation = (
                self._tapped(f"{layer.name}/{part}", activation(values))
                for part, values in zip(("knowledge", "compensation"), self.made[layer.name], strict=True)
            )
            module = self.modules[layer.module]
            if self._has_rows(layer):
                added = _over_stack(frozen.differences, module, (True, True, True))(inputs, knowledge, compensation, block)
            else:
                inputs = _over_stack(frozen.shared_activations, module, (True, True, True))(inputs, knowledge, compensation, block)
        self.entered[id(live)] = (live, inputs, added)  # holds `live`, so that its id stays its own
        return inputs, added

    def _tapped(self, name: str, activations: Array) -> Array:
        """Activations of a layer's live units, K or C, measured where that was asked for."""
        return tap(activations, self.taps[name], self.mask) if name in self.taps else activations

    def _has_rows(self, layer: NeuronLayer) -> bool:
        return any("rows" in self.reserve.get("/".join(kernel[:-1]), {}) for kernel in layer.outgoing)


def one_array(outputs: Array | Projection) -> Array:
    """What a module of `AFFINE` gives, as one array."""
    return outputs.joint() if isinstance(outputs, Projection) else outputs


def as_given(array: Array, outputs: Array | Projection) -> Array | Projected:
    """One array in the form that the readers of what a module gave take."""
    return projected_from(array) if isinstance(outputs, Projection) else array


def _identity(states: Array) -> Array:
    return states


def _over_stack(function: Callable[..., Any], module: Module, stacked: tuple[bool, ...]) -> Callable[..., Any]:
    """Maps a function of activations and weights over the stack, which is the second last axis of activations, the first of weights.

    Args:
        function: takes activations first, then weights.
        module: says whether there is a stack.
        stacked: for each of the activations, whether it has the stack's axis.
    """
    if not module.stack:
        return function

    def mapped(*args: Any) -> Any:
        axes = [-2 if has else None for has in stacked] + [0] * (len(args) - len(stacked))
        return jax.vmap(function, in_axes=tuple(axes), out_axes=-2)(*args)

    return mapped

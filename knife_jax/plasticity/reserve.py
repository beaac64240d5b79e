"""The reserve: frozen knowledge and compensation neurons, and how they enter a forward pass.

Every layer with a reserve of R slots has, beside its H live units, a knowledge neuron K and a compensation neuron C per slot. C enters with
a minus sign and has a *partner*, the neuron that was equal to it when both were made: a live unit, or the K that this unit became. Partners
are subtracted before anything is multiplied, `h_A V_A - h_C V_C = h_A (V_A - V_C) + (h_A - h_C) V_C`, and so is what they read, so that a
pair that has not moved cancels bit for bit, however large it is beside the rest of the network.

The units of an extended layer are ordered live, K, C. Arrays of one module's block, each with the stack's axes in front:

* `rows` [2R', O]: what the K and C of the layer read (R' slots) give to the module's O outputs;
* `columns` [I + 2R', 2R], `bias` [2R]: what the K and C of the layer that the module makes read;
* `partner` [R]: of each C, an index into live and K, or H + R for none; `inverse` [H + R]: of each live unit and K, its C, or R for none;
* `owner` [R]: the live unit that each slot was taken for; `used` [R].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, Path

Block = dict[str, Array]
Reserve = dict[str, Block]


class Module(NamedTuple):
    """An affine module at an end of some layer: the layer it reads, if any, and the layer it makes, if any."""

    path: Path
    source: NeuronLayer | None
    target: NeuronLayer | None

    @property
    def name(self) -> str:
        """The module's key in the reserve."""
        return "/".join(self.path)

    @property
    def kernel(self) -> Path:
        """Its kernel's path."""
        return (*self.path, "kernel")

    @property
    def bias(self) -> Path:
        """Its bias's path."""
        return (*self.path, "bias")

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of its kernel."""
        layer = self.source or self.target
        return layer.stack if layer else ()


class Effective(NamedTuple):
    """The weights of a module's forward pass, partners subtracted; None where it reads or makes no layer with a reserve.

    Attributes:
        kernel: for the live inputs, `[I, O]`.
        rows: for what `differences` adds to them, `[2R', O]`.
        knowledge: incoming weights of K `[F, R]`, F = I + 2R'.
        difference: those of the partners minus those of C.
        compensation: those of C.
        biases: of K, and of the partners minus C.
    """

    kernel: Array
    rows: Array | None = None
    knowledge: Array | None = None
    difference: Array | None = None
    compensation: Array | None = None
    biases: tuple[Array, Array] | None = None


def modules(graph: Graph) -> dict[Path, Module]:
    """The affine modules at the ends of a graph's layers."""
    found: dict[Path, Module] = {}
    for layer in graph.layers:
        if layer.kind == "dense":
            found[layer.module] = found.get(layer.module, Module(layer.module, None, None))._replace(target=layer)
        for kernel in layer.outgoing:
            found[kernel[:-1]] = found.get(kernel[:-1], Module(kernel[:-1], None, None))._replace(source=layer)
    return found


def allocate(graph: Graph, leaves: Flat, slots: dict[str, int], shared: bool) -> Reserve:
    """An empty reserve.

    Args:
        graph: the layers that get one.
        leaves: the live parameters.
        slots: R of each layer.
        shared: whether K, A and C share the live unit's outgoing weights, so that no rows are needed.
    """
    reserve: Reserve = {}
    for module in modules(graph).values():
        kernel = matrix(leaves[module.kernel], module)
        inputs, outputs = kernel.shape[-2:]
        extra = 2 * slots[module.source.name] if module.source and not shared else 0
        block: Block = {"rows": jnp.zeros((*module.stack, extra, outputs), kernel.dtype)} if extra else {}
        if module.target:
            size, number, stack = module.target.size, slots[module.target.name], module.stack
            block["columns"] = jnp.zeros((*stack, inputs + extra, 2 * number), kernel.dtype)
            if module.bias in leaves:
                block["bias"] = jnp.zeros((*stack, 2 * number), kernel.dtype)
            block["partner"] = jnp.full((*stack, number), size + number, jnp.int32)
            block["inverse"] = jnp.full((*stack, size + number), number, jnp.int32)
            block["owner"] = jnp.zeros((*stack, number), jnp.int32)
            block["used"] = jnp.zeros((*stack, number), bool)
        if block:
            reserve[module.name] = block
    return prepare(graph, reserve)


def matrix(kernel: Array, module: Module) -> Array:
    """A kernel as `[*K, I, O]`."""
    stack = len(module.stack)
    return kernel.reshape(*kernel.shape[: stack + 1], -1)


def pick(values: Array, indices: Array, axis: int = -1) -> Array:
    """Entries by index; zeros where the index is beyond the end."""
    return jnp.take(values, indices, axis=axis, mode="fill", fill_value=0)


def prepare(graph: Graph, reserve: Reserve) -> Reserve:
    """Works out what `effective` needs and only an intervention changes, under names that begin with `ready_`."""
    ready = dict(reserve)
    for module in modules(graph).values():
        block = reserve.get(module.name)
        if block:
            source = reserve["/".join(module.source.module)] if module.source and "rows" in block else None
            function = _prepare
            for _ in module.stack:
                function = jax.vmap(function)
            ready[module.name] = block | function(block, source)
    return ready


def _prepare(block: Block, source: Block | None) -> Block:
    """The `ready_` arrays of one module, unstacked.

    * `offset` [I, O]: what partners take from the live kernel; `rows` [2R', O]: the rows after that;
    * `knowledge`, `compensation` [F, R], where they differ from the columns;
    * `fixed` [F, R] and `fixed_bias` [R]: what does not come from live weights in partners minus C.
    """
    ready: Block = {}
    rows, inverse = block.get("rows"), source["inverse"] if source else None
    inputs = 0
    if rows is not None and inverse is not None:
        inputs = inverse.shape[0] - rows.shape[0] // 2
        weights = _subtract_partners(jnp.concatenate([jnp.zeros((inputs, rows.shape[1]), rows.dtype), rows]), inverse)
        ready |= {"offset": -weights[:inputs], "rows": weights[inputs:]}
    if "columns" in block:
        columns = block["columns"] if inverse is None else _subtract_partners(block["columns"], inverse)
        slots = columns.shape[-1] // 2
        knowledge, compensation = columns[:, :slots], columns[:, slots:]
        live = jnp.zeros((columns.shape[0], block["inverse"].shape[0] - slots), columns.dtype)
        if ready:
            live = live.at[:inputs].set(-ready["offset"]).at[inputs:].set(ready["rows"])
        fixed = pick(jnp.concatenate([live, knowledge], axis=-1), block["partner"]) - compensation
        ready["fixed"] = fixed
        if inverse is not None:
            ready |= {"knowledge": knowledge, "compensation": compensation}
        if "bias" in block:
            known, compensating = block["bias"][:slots], block["bias"][slots:]
            none = jnp.zeros(block["inverse"].shape[0] - slots, known.dtype)
            ready["fixed_bias"] = pick(jnp.concatenate([none, known]), block["partner"]) - compensating
    return {f"ready_{name}": value for name, value in ready.items()}


def effective(kernel: Array, bias: Array | None, block: Block) -> Effective:
    """The weights of one module's forward pass; unstacked.

    Args:
        kernel: live kernel `[I, O]`.
        bias: live bias `[O]`.
        block: the module's part of the reserve, prepared.
    """
    live = Effective(kernel)
    if "ready_rows" in block:
        live = Effective(kernel - block["ready_offset"], block["ready_rows"])
    if "columns" not in block:
        return live
    partner, fixed = block["partner"], block["ready_fixed"]
    inputs = kernel.shape[0]
    partners = pick(jax.lax.stop_gradient(kernel), partner)
    difference = jnp.concatenate([fixed[:inputs] + partners, fixed[inputs:]])
    biases = (jnp.zeros(partner.shape, kernel.dtype),) * 2
    if bias is not None:
        known = block["bias"][: partner.shape[0]]
        biases = (known, block["ready_fixed_bias"] + pick(jax.lax.stop_gradient(bias), partner))
    slots = partner.shape[0]
    knowledge = block.get("ready_knowledge", block["columns"][:, :slots])
    compensation = block.get("ready_compensation", block["columns"][:, slots:])
    return live._replace(knowledge=knowledge, difference=difference, compensation=compensation, biases=biases)


def _subtract_partners(weights: Array, inverse: Array) -> Array:
    """`[I + 2R, N]`, rows live, K, C: takes from every live and K row that of its C."""
    rows, slots = weights.shape[0], weights.shape[0] - inverse.shape[0]
    compensation = weights[rows - slots :]
    first = weights[: rows - slots] - pick(compensation, inverse, axis=0)
    return jnp.concatenate([first, compensation])


@jax.custom_vjp
def frozen_units(inputs: Array, live: Array, weights: Effective, partner: Array) -> tuple[Array, Array]:
    """Pre-activations of K and C, `[..., R]` each; no gradient is taken for any weight.

    Args:
        inputs: what they read, `[..., F]`.
        live: pre-activations of the live units, `[..., H]`.
        weights: see `effective`.
        partner: see above.
    """
    return _frozen_units(inputs, live, weights, partner)


def _frozen_units(inputs: Array, live: Array, weights: Effective, partner: Array) -> tuple[Array, Array]:
    assert weights.knowledge is not None and weights.difference is not None and weights.biases is not None
    shift, difference = (bias.reshape((1,) * (inputs.ndim - 1) + bias.shape) for bias in weights.biases)
    knowledge = inputs @ weights.knowledge + shift
    partners = pick(jnp.concatenate([live, knowledge], axis=-1), partner)
    return knowledge, partners - (inputs @ weights.difference + difference)


def _frozen_units_forward(inputs: Array, live: Array, weights: Effective, partner: Array) -> Any:
    return _frozen_units(inputs, live, weights, partner), weights


def _frozen_units_backward(weights: Effective, cotangents: tuple[Array, Array]) -> Any:
    assert weights.knowledge is not None and weights.compensation is not None
    return cotangents[0] @ weights.knowledge.T + cotangents[1] @ weights.compensation.T, None, None, None


frozen_units.defvjp(_frozen_units_forward, _frozen_units_backward)


@jax.custom_vjp
def partners_of(activations: Array, partner: Array, inverse: Array) -> Array:
    """Activations `[..., H + R]` (live, K) of every C's partner, `[..., R]`."""
    return pick(activations, partner)


def _partners_forward(activations: Array, partner: Array, inverse: Array) -> tuple[Array, Array]:
    return pick(activations, partner), inverse


def _partners_backward(inverse: Array, cotangent: Array) -> tuple[Array, None, None]:
    """Each neuron has one C at most, so that the transpose of the gather is a gather too."""
    return pick(cotangent, inverse), None, None


partners_of.defvjp(_partners_forward, _partners_backward)


def differences(live: Array, knowledge: Array, compensation: Array, block: Block) -> Array:
    """What a consumer with rows of its own adds to the live activations: `[..., 2R]`, K and partners minus C."""
    everyone = jnp.concatenate([live, knowledge], axis=-1)
    return jnp.concatenate([knowledge, partners_of(everyone, block["partner"], block["inverse"]) - compensation], axis=-1)


def shared_activations(live: Array, knowledge: Array, compensation: Array, block: Block) -> Array:
    """`A + sum of (K - C)` of every live unit, partners first, `[..., H]`."""
    paired = pick(compensation, block["inverse"])
    size = live.shape[-1]
    owned = jax.nn.one_hot(block["owner"], size, dtype=live.dtype) * block["used"][:, None]
    kept = jnp.matmul(knowledge - paired[..., size:], owned, precision=jax.lax.Precision.HIGHEST)
    return (live - paired[..., :size]) + kept

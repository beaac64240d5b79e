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

The last two lines, the *links*, are a layer's, and stand in the block of the first module that makes it. A GRU's units are made by two
modules, the projection of the input and the recurrence, which also reads them; their arrays have the axis of the gates before the last one,
as their kernels do. Its K and C have running states of their own, behind those of the live units.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from knife_jax.networks.neurons import affine
from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, Path

Block = dict[str, Array]
Reserve = dict[str, Block]

LINKS = ("partner", "inverse", "owner", "used")


class Module(NamedTuple):
    """An affine module at an end of some layer: the layer it reads, if any, and the layer it makes, if any."""

    path: Path
    source: NeuronLayer | None
    target: NeuronLayer | None
    kernel_name: str = "kernel"
    bias_name: str = "bias"

    @property
    def name(self) -> str:
        """The module's key in the reserve."""
        return "/".join(self.path)

    @property
    def kernel(self) -> Path:
        """Its kernel's path."""
        return (*self.path, self.kernel_name)

    @property
    def bias(self) -> Path:
        """Its bias's path."""
        return (*self.path, self.bias_name)

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
        partner: of each C's output, an index into the outputs of live units and K.
    """

    kernel: Array
    rows: Array | None = None
    knowledge: Array | None = None
    difference: Array | None = None
    compensation: Array | None = None
    biases: tuple[Array, Array] | None = None
    partner: Array | None = None


def modules(graph: Graph) -> dict[Path, Module]:
    """The affine modules at the ends of a graph's layers."""
    found: dict[Path, Module] = {}

    def known(path: Path) -> Module:
        return found.get(path, Module(path, None, None))

    for layer in graph.layers:
        if layer.kind == "gru":
            for kernel, bias in zip(layer.incoming, layer.biases, strict=True):
                found[kernel[:-1]] = known(kernel[:-1])._replace(target=layer, kernel_name=kernel[-1], bias_name=bias[-1])
        elif layer.kind == "dense":
            found[layer.module] = known(layer.module)._replace(target=layer)
        for kernel in layer.outgoing:
            found[kernel[:-1]] = known(kernel[:-1])._replace(source=layer)
    return found


def makers(layer: NeuronLayer) -> tuple[Path, ...]:
    """The kernels through which a layer's K and C read."""
    return layer.incoming if layer.kind == "gru" else layer.incoming[:1]


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
        stack, kernel = module.stack, leaves[module.kernel]
        inputs, *gates, outputs = kernel.shape[len(stack) :]
        extra = 2 * slots[module.source.name] if module.source and not shared else 0
        block: Block = {"rows": jnp.zeros((*stack, extra, *gates, outputs), kernel.dtype)} if extra else {}
        if module.target:
            number = slots[module.target.name]
            block["columns"] = jnp.zeros((*stack, inputs + extra, *gates, 2 * number), kernel.dtype)
            if module.bias in leaves:
                block["bias"] = jnp.zeros((*stack, *gates, 2 * number), kernel.dtype)
            if module.path == module.target.module:
                block |= _no_links(stack, outputs, number)
        if block:
            reserve[module.name] = block
    return prepare(graph, reserve)


def _no_links(stack: tuple[int, ...], size: int, slots: int) -> Block:
    """The links of a layer whose slots are all free."""
    return {
        "partner": jnp.full((*stack, slots), size + slots, jnp.int32),
        "inverse": jnp.full((*stack, size + slots), slots, jnp.int32),
        "owner": jnp.zeros((*stack, slots), jnp.int32),
        "used": jnp.zeros((*stack, slots), bool),
    }


def links_of(reserve: Reserve, layer: NeuronLayer) -> Block | None:
    """Who is whose partner in a layer; None without slots."""
    block = reserve.get("/".join(layer.module), {})
    return {name: block[name] for name in LINKS} if "partner" in block else None


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
            source = links_of(reserve, module.source) if module.source and "rows" in block else None
            target = links_of(reserve, module.target) if module.target and "columns" in block else None
            function = _prepare
            for _ in module.stack:
                function = jax.vmap(function)
            ready[module.name] = block | function(block, source, target)
    return ready


def _prepare(block: Block, source: Block | None, target: Block | None) -> Block:
    """The `ready_` arrays of one module, unstacked and with all gates on one axis.

    * `offset` [I, O]: what partners take from the live kernel; `rows` [2R', O]: the rows after that;
    * `knowledge`, `compensation` [F, R], where they differ from the columns;
    * `fixed` [F, R] and `fixed_bias` [R]: what does not come from live weights in partners minus C;
    * `partner`, where a unit has several outputs: that of each.
    """
    ready: Block = {}
    inverse, inputs = source["inverse"] if source else None, 0
    if inverse is not None:
        rows = block["rows"].reshape(block["rows"].shape[0], -1)
        inputs = inverse.shape[0] - rows.shape[0] // 2
        weights = _subtract_partners(jnp.concatenate([jnp.zeros((inputs, rows.shape[1]), rows.dtype), rows]), inverse)
        ready |= {"offset": -weights[:inputs], "rows": weights[inputs:]}
    if target is not None:
        columns, gates = block["columns"], block["columns"].shape[1:-1]
        columns = columns if inverse is None else _subtract_partners(columns, inverse)
        knowledge, compensation = _halves(columns, 1)
        partner, outputs = _partner_of_outputs(target, *gates)
        live = jnp.zeros((columns.shape[0], outputs), columns.dtype)
        if ready:
            live = live.at[:inputs].set(-ready["offset"]).at[inputs:].set(ready["rows"])
        ready["fixed"] = pick(jnp.concatenate([live, knowledge], axis=-1), partner) - compensation
        if gates:
            ready["partner"] = partner
        if gates or inverse is not None:
            ready |= {"knowledge": knowledge, "compensation": compensation}
        if "bias" in block:
            known, compensating = _halves(block["bias"], 0)
            ready["fixed_bias"] = pick(jnp.concatenate([jnp.zeros(outputs, known.dtype), known]), partner) - compensating
    return {f"ready_{name}": value for name, value in ready.items()}


def _halves(values: Array, axis: int) -> tuple[Array, Array]:
    """What belongs to K and what to C, of `[..., 2R]`, with all axes from the given one on (the gates) as one."""
    slots = values.shape[-1] // 2
    return values[..., :slots].reshape(*values.shape[:axis], -1), values[..., slots:].reshape(*values.shape[:axis], -1)


def _partner_of_outputs(target: Block, gates: int = 1) -> tuple[Array, int]:
    """Of each output of a C its partner's, and how many outputs the live units have; outputs are ordered live, K, each gate after gate."""
    partner, slots = target["partner"], target["partner"].shape[0]
    size = target["inverse"].shape[0] - slots
    if gates == 1:
        return partner, size
    gate, partner = jnp.arange(gates, dtype=partner.dtype)[:, None], partner[None]
    known = gates * size + gate * slots + partner - size
    none = gates * (size + slots)
    outputs = jnp.where(partner < size, gate * size + partner, jnp.where(partner < size + slots, known, none))
    return outputs.reshape(-1), gates * size


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
    partner, fixed = block["ready_partner" if "ready_partner" in block else "partner"], block["ready_fixed"]
    inputs = kernel.shape[0]
    partners = pick(jax.lax.stop_gradient(kernel), partner)
    difference = jnp.concatenate([fixed[:inputs] + partners, fixed[inputs:]])
    none = jnp.zeros(partner.shape, kernel.dtype)
    biases = none, none
    if bias is not None:
        biases = (_halves(block["bias"], 0)[0], block["ready_fixed_bias"] + pick(jax.lax.stop_gradient(bias), partner))
    knowledge, compensation = _halves(block["columns"], 1)
    knowledge, compensation = block.get("ready_knowledge", knowledge), block.get("ready_compensation", compensation)
    return Effective(live.kernel, live.rows, knowledge, difference, compensation, biases, partner)


def _subtract_partners(weights: Array, inverse: Array) -> Array:
    """`[I + 2R, ...]`, rows live, K, C: takes from every live and K row that of its C."""
    rows, slots = weights.shape[0], weights.shape[0] - inverse.shape[0]
    compensation = weights[rows - slots :]
    first = weights[: rows - slots] - pick(compensation, inverse, axis=0)
    return jnp.concatenate([first, compensation])


@jax.custom_vjp
def frozen_units(inputs: Array, live: Array, weights: Effective) -> tuple[Array, Array]:
    """Pre-activations of K and C, `[..., R]` each; no gradient is taken for any weight.

    Args:
        inputs: what they read, `[..., F]`.
        live: pre-activations of the live units, `[..., H]`.
        weights: see `effective`.
    """
    return _frozen_units(inputs, live, weights)


def _frozen_units(inputs: Array, live: Array, weights: Effective) -> tuple[Array, Array]:
    assert weights.knowledge is not None and weights.difference is not None and weights.biases is not None and weights.partner is not None
    shift, difference = (bias.reshape((1,) * (inputs.ndim - 1) + bias.shape) for bias in weights.biases)
    knowledge = inputs @ weights.knowledge + shift
    partners = pick(jnp.concatenate([live, knowledge], axis=-1), weights.partner)
    return knowledge, partners - (inputs @ weights.difference + difference)


def _frozen_units_forward(inputs: Array, live: Array, weights: Effective) -> Any:
    return _frozen_units(inputs, live, weights), (weights.knowledge, weights.compensation)


def _frozen_units_backward(columns: tuple[Array, Array], cotangents: tuple[Array, Array]) -> Any:
    knowledge, compensation = columns
    return cotangents[0] @ knowledge.T + cotangents[1] @ compensation.T, None, None


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


def join_gates(live: Array, knowledge: Array, compensation: Array, gates: int = 3) -> Array:
    """What live units, K and C are given, gate after gate each (`[..., G H]`, `[..., G R]` twice), for all together `[..., G (H + 2R)]`."""
    parts = [part.reshape(*part.shape[:-1], gates, -1) for part in (live, knowledge, compensation)]
    joined = jnp.concatenate(parts, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def split_states(states: Array, size: int) -> tuple[Array, Array, Array]:
    """States `[..., H + 2R]` of the H live units, K and C."""
    slots = (states.shape[-1] - size) // 2
    return states[..., :size], states[..., size : size + slots], states[..., size + slots :]


def read_states(states: Array, bias: Array, weights: Effective, block: Block) -> Array:
    """What the states `[..., H + 2R]` of recurrent units give to the gates of all of them.

    Args:
        states: of live units, K and C.
        bias: live bias `[G H]`.
        weights: of the recurrence.
        block: the units' links.
    """
    assert weights.rows is not None
    live, knowledge, compensation = split_states(states, weights.kernel.shape[0])
    added = differences(live, knowledge, compensation, block)
    outputs = affine(live, weights.kernel, bias) + added @ weights.rows
    return join_gates(outputs, *frozen_units(jnp.concatenate([live, added], axis=-1), outputs, weights))

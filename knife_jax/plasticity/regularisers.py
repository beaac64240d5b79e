"""Cures that rewrite nothing: penalties, weight decay, and an added normalisation."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from knife_jax.plasticity.checks import check_number, keep_layers
from knife_jax.plasticity.graph import Graph, NeuronLayer, Params, Path, flat, nested
from knife_jax.plasticity.lift import AFFINE
from knife_jax.plasticity.method import Apply, Method, Swept, Variables, method

NORMALISATION = {"norm_scale": 1.0, "norm_bias": 0.0}
"""Parameters that `layer_norm` adds to a module, and their first values."""

SPECTRAL_WARM_UP = 10
"""Power iterations before the first gradient."""


def l2_init(graph: Graph, strength: Swept = 1e-4) -> Method:
    """Pulls all parameters towards where they began: `strength * ||theta - theta_0||^2` is added to the loss.

    Args:
        graph: unused; every parameter is pulled.
        strength: of the pull.

    Raises:
        ValueError: for a negative strength.

    References:
        Kumar, Marklund, Van Roy, Maintaining Plasticity in Continual Learning via Regenerative Regularization, 2023.
    """
    check_number("strength", strength, at_least=0)

    def penalty(params: Params, state: Params) -> Float[Array, ""]:
        return strength * _squared_norm(jax.tree.map(jnp.subtract, params, state))

    return method("l2_init", init=copied_params, penalty=penalty)


def weight_decay(graph: Graph, strength: Swept = 1e-5, *, decoupled: bool = True) -> Method:
    """Pulls all parameters towards zero.

    In a `chain` with a method whose rewritten entries have an age (`optimizer_state="fresh"`), name that one first: what is wrapped later
    is left out of its corrections.

    Args:
        graph: unused; every parameter decays, biases too.
        strength: decoupled, the share of a parameter that every gradient step takes away; an AdamW with learning rate r and weight decay w
            has r * w. Otherwise the factor of `||theta||^2` in the loss; PyTorch's and `optax.add_decayed_weights` before a scaling have
            twice it.
        decoupled: whether the decay follows the optimizer, or passes through it as a part of the gradient.

    Raises:
        ValueError: for a strength that is negative or, decoupled, above 1.

    References:
        Krogh, Hertz, A Simple Weight Decay Can Improve Generalization, 1991; decoupled: Loshchilov, Hutter, Decoupled Weight Decay
        Regularization, 2019, but for the learning rate, which is no factor here.
    """
    check_number("strength", strength, at_least=0, at_most=1 if decoupled else None)
    if not decoupled:
        return method("weight_decay", penalty=lambda params, state: strength * _squared_norm(params))
    return method("weight_decay", wrap_optimizer=lambda tx: optax.chain(tx, optax.add_decayed_weights(-strength)))


def layer_norm(graph: Graph, *, layers: str | Sequence[str] = "all", epsilon: float = 1e-5) -> Method:
    """Normalises the pre-activations of dense hidden layers over their units, with a trained scale and bias.

    `allocate` adds the parameters `norm_scale` (ones) and `norm_bias` (zeros) to the module that makes a layer; they are trained like the
    rest and reset with their units. KNIFE and ReBorn cannot be chained with it, whose units would see each other.

    Args:
        graph: the layers of a model.
        layers: which ones, see `Graph.select`; `all` leaves out those that cannot be normalised.
        epsilon: added to the variance.

    Raises:
        ValueError: for a layer that is recurrent or already normalised, or an epsilon that is not positive.

    References:
        Ba, Kiros, Hinton, Layer Normalization, 2016; as a cure for plasticity loss: Lyle et al., Understanding Plasticity in Neural
        Networks, 2023.
    """
    check_number("epsilon", epsilon, above=0)
    chosen = keep_layers(graph, layers, _unnormalisable, "layer normalisation")
    return method("layer_norm", allocate=partial(_allocate_norm, chosen), lift=partial(_lift_norm, chosen, epsilon))


def _unnormalisable(layer: NeuronLayer) -> str | None:
    if layer.kind != "dense":
        return "only dense layers have a single pre-activation"
    return "it is normalised already" if layer.normalised else None


def _allocate_norm(graph: Graph, variables: Variables) -> Variables:
    leaves = flat(variables["params"])
    for layer in graph.layers:
        like = leaves[layer.incoming[0]].dtype
        leaves |= {(*layer.module, name): jnp.full((*layer.stack, layer.size), value, like) for name, value in NORMALISATION.items()}
    return {**variables, "params": nested(leaves, variables["params"])}


def _lift_norm(graph: Graph, epsilon: float, apply: Apply, prefix: Path = ()) -> Apply:
    """Normalises what the graph's modules give, wherever their parameters hold a scale and a bias."""
    modules = {layer.module for layer in graph.layers if layer.module[: len(prefix)] == prefix}

    def lifted(variables: Variables, *args: Any, **kwargs: Any) -> Any:
        leaves = flat(variables["params"])

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            outputs, path = call(*args, **kwargs), context.module.path
            if context.method_name != "__call__" or not isinstance(context.module, AFFINE) or (*prefix, *path) not in modules:
                return outputs
            return _normalise(outputs, leaves[(*path, "norm_scale")], leaves[(*path, "norm_bias")], epsilon)

        with nn.intercept_methods(intercept):
            return apply(variables, *args, **kwargs)

    return lifted


def _normalise(values: Float[Array, "*N H"], scale: Array, bias: Array, epsilon: float) -> Float[Array, "*N H"]:
    """`scale * (x - mean) / sqrt(variance + epsilon) + bias` over the last axis."""
    centred = values - values.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    aligned = (1,) * (values.ndim - scale.ndim) + scale.shape
    return centred * jax.lax.rsqrt(variance + epsilon) * scale.reshape(aligned) + bias.reshape(aligned)


def spectral(graph: Graph, strength: Swept = 1e-4, *, power: int = 2) -> Method:
    """Keeps the largest singular value of every kernel near one, and biases small.

    `strength * sum_l ((sigma_l^k - 1)^2 + ||b_l||^(2k))` is added to the loss, where sigma is `u W v` with one step of the power iteration
    for u and v per gradient, through which no gradient flows. Of a GRU's kernel the gates side by side are one matrix, as in PyTorch.

    Args:
        graph: the parameters of a model; each member of a stack counts by itself.
        strength: of the penalty.
        power: k.

    Raises:
        ValueError: for a negative strength or a power below one.

    References:
        Lewandowski et al., Learning Continually by Spectral Regularization, 2025 (arXiv 2406.06811). The vectors get ten iterations before
        training, so that the first gradients are right.
    """
    check_number("strength", strength, at_least=0)
    check_number("power", power, at_least=1)
    stacks = _stacks(graph)

    def observe(state: Any, variables: Variables, grads: Any, taps: Any) -> Any:
        leaves = flat(variables["params"])
        return {path: _iterate(_matrix(leaves[path], stacks[path]), pair) for path, pair in state.items()}

    def init(variables: Variables) -> Any:
        leaves = flat(variables["params"])
        return {path: _start(_matrix(leaves[path], stacks[path])) for path in stacks if not _is_bias(graph, path)}

    def penalty(params: Params, state: Any) -> Float[Array, ""]:
        leaves = flat(params)
        sizes = [_singular_value(_matrix(leaves[path], stacks[path]), *pair) for path, pair in state.items()]
        kernels = [jnp.square(size**power - 1).sum() for size in sizes]
        biases = [_bias_norms(leaves[path], stacks[path], power) for path in stacks if _is_bias(graph, path)]
        return strength * sum(kernels + biases, jnp.zeros(()))

    return method("spectral", init=init, observe=observe, penalty=penalty)


def _stacks(graph: Graph) -> dict[Path, tuple[int, ...]]:
    """Of every parameter, the leading axes whose members count by themselves."""
    known: dict[Path, tuple[int, ...]] = {}
    for layer in graph.layers:
        read = [path for path in layer.outgoing_biases if path is not None]
        known |= dict.fromkeys((*layer.incoming, *layer.biases, *layer.outgoing, *read), layer.stack)
    return {path: known.get(path, shape[:-2] if path[-1] != "bias" else ()) for path, shape in graph.shapes.items()}


def _is_bias(graph: Graph, path: Path) -> bool:
    listed = {bias for layer in graph.layers for bias in (*layer.biases, *layer.outgoing_biases)}
    return path in listed or path[-1] == "bias" or len(graph.shapes[path]) < 2


def _matrix(kernel: Array, stack: tuple[int, ...]) -> Float[Array, "N I O"]:
    """A kernel as a batch of matrices."""
    return kernel.reshape(prod(stack), kernel.shape[len(stack)], -1)


def _start(matrix: Float[Array, "N I O"]) -> tuple[Array, Array]:
    """Singular vectors after the warm-up, from a fixed direction."""
    members, inputs, outputs = matrix.shape
    right = jax.random.normal(jax.random.key(0), (members, outputs), matrix.dtype)
    pair = (jnp.zeros((members, inputs), matrix.dtype), right)
    return jax.lax.fori_loop(0, SPECTRAL_WARM_UP, lambda _, pair: _iterate(matrix, pair), pair)


def _iterate(matrix: Float[Array, "N I O"], pair: tuple[Array, Array]) -> tuple[Array, Array]:
    """One power iteration."""
    left = _unit(jnp.einsum("nio,no->ni", matrix, pair[1]))
    right = _unit(jnp.einsum("nio,ni->no", matrix, left))
    return left, right


def _unit(vectors: Float[Array, "N D"]) -> Float[Array, "N D"]:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _singular_value(matrix: Float[Array, "N I O"], left: Array, right: Array) -> Float[Array, "N"]:
    left, right = jax.lax.stop_gradient((left, right))
    return jnp.einsum("ni,nio,no->n", left, matrix, right)


def _bias_norms(bias: Array, stack: tuple[int, ...], power: int) -> Float[Array, ""]:
    return (jnp.square(bias.reshape(prod(stack), -1)).sum(axis=-1) ** power).sum()


def copied_params(variables: Variables) -> Params:
    """The parameters, in buffers of their own."""
    return jax.tree.map(jnp.copy, variables["params"])


def _squared_norm(params: Params) -> Float[Array, ""]:
    return sum((jnp.square(leaf).sum() for leaf in jax.tree.leaves(params)), jnp.zeros(()))

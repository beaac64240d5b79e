"""What state the hidden units of a network are in: shares of stuck units, ranks, norms."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import eigh_tridiagonal
from jaxtyping import Array, Bool, Float

from knife_jax.plasticity import scores
from knife_jax.plasticity import taps as tapping
from knife_jax.plasticity.graph import Graph, NeuronLayer, flat, incoming_view

STATISTICS = ("absolute", "absolute_gradient", "gram")
"""The taps that `measure` needs of hidden layers."""

MIXING_STATISTICS = ("saturated", "slope")
"""Those that it needs of a monotone mixing layer."""

SHARES = ("stagnant", "volatile", "dormant", "inactive")
NORMS = ("weight_norm", "grad_norm")
RANKS = ("effective_rank", "stable_rank", "rank_99")
OPENNESS = ("saturated", "saturation", "openness")
"""What `measure` tells: shares and norms of layers and networks, ranks of layers, and of a monotone mixing layer how open it is."""

Measures = dict[str, Float[Array, ""]]


class Limits(NamedTuple):
    """Thresholds of the shares: stagnant below, volatile above, dormant and inactive (GraMa) at or below."""

    stagnant: float = 0.25
    volatile: float = 4.0
    dormant: float = 0.1
    inactive: float = 0.01


LIMITS = Limits()
"""The literature's."""


def measure(
    graph: Graph, params: Any, grads: Any, window: scores.Window, taps: Any, limits: Limits = LIMITS
) -> tuple[Measures, dict[str, Bool[Array, "*K H"]]]:
    """Diagnoses every layer.

    Args:
        graph: the layers.
        params: the live parameters.
        grads: a gradient, for its norms.
        window: update activity, see `scores.watch`.
        taps: what the taps `STATISTICS` gave over the same data.
        limits: thresholds.

    Returns:
        `{"<layer>/<measure>": number}` and every layer's stagnant units. The measures are the shares `stagnant`, `volatile`, `dormant`
        and `inactive` (each against its layer's mean; a layer of zeros is dormant and otherwise not judged), `effective_rank`,
        `stable_rank` and `rank_99` of the activations (means over a stack's members), and `weight_norm` and `grad_norm` of the incoming
        weights. Where there are several networks, `<network>/<share>` is that of all its units, and `<network>/weight_norm` and
        `<network>/grad_norm` are those of all its parameters. Of a monotone mixing layer's ELU units they are `saturated`, the share of
        units below `taps.SATURATED_BELOW` on every sample, `saturation`, the mean share of samples on which a unit is, and `openness`,
        the mean slope of the ELU (1 where gradients pass unhindered, 0 where none does).
    """
    relative = scores.relative_activity(window)
    leaves, slopes = flat(params), flat(grads)
    found = _ranks_of_layers(graph, taps)
    measures: Measures = {}
    for layer in graph.layers:
        means = tapping.means({name: values for name, values in taps[layer.name].items() if name != "gram"})
        said = {
            "stagnant": scores.stagnant(relative[layer.name], limits.stagnant).mean(),
            "volatile": scores.volatile(relative[layer.name], limits.volatile).mean(),
            "dormant": scores.dormant(means["absolute"], limits.dormant).mean(),
            "inactive": (scores.layer_relative(means["absolute_gradient"]) <= limits.inactive).mean(),
            "weight_norm": _norm(leaves, layer),
            "grad_norm": _norm(slopes, layer),
            **found[layer.name],
        }
        measures |= {f"{layer.name}/{name}": value for name, value in said.items()}
    if graph.mixing is not None:
        measures |= {f"{graph.mixing.name}/{name}": value for name, value in openness(taps[graph.mixing.name]).items()}
    measures |= _network_shares(graph, measures)
    for name, tree in zip(NORMS, (params, grads), strict=True):
        measures |= {f"{network}/{name}": optax.tree.norm(tree[network]) for network in _several_networks(graph)}
    return measures, {name: scores.stagnant(values, limits.stagnant) for name, values in relative.items()}


def measure_names(graph: Graph) -> list[str]:
    """The names that `measure` gives, without computing anything."""
    names = [f"{layer.name}/{name}" for layer in graph.layers for name in (*SHARES, *NORMS, *RANKS)]
    if graph.mixing is not None:
        names += [f"{graph.mixing.name}/{name}" for name in OPENNESS]
    return names + [f"{network}/{name}" for network in _several_networks(graph) for name in (*SHARES, *NORMS)]


def _several_networks(graph: Graph) -> tuple[str, ...]:
    """The networks that have layers, if they are more than one."""
    networks = tuple(dict.fromkeys(layer.network for layer in graph.layers))
    return networks if len(networks) > 1 else ()


def openness(measured: tapping.Tap) -> Measures:
    """How far ELU units are open, from the taps `MIXING_STATISTICS`; see `measure`. NaN if there was no sample."""
    seen = measured["count"] > 0
    means = tapping.means(measured)
    said = {"saturated": means["saturated"] >= 1.0, "saturation": means["saturated"], "openness": means["slope"]}
    return {name: jnp.where(seen, values, jnp.nan).mean() for name, values in said.items()}


def _norm(leaves: Any, layer: NeuronLayer) -> Array:
    return jnp.sqrt(sum(jnp.square(incoming_view(leaves[path], layer)).sum() for path in layer.incoming))


def _network_shares(graph: Graph, measures: Measures) -> Measures:
    """The shares of every network's units together."""
    shares: Measures = {}
    for network in _several_networks(graph):
        layers = [layer for layer in graph.layers if layer.network == network]
        sizes = [layer.size * math.prod(layer.stack) for layer in layers]
        for name in SHARES:
            parts = (size * measures[f"{layer.name}/{name}"] for layer, size in zip(layers, sizes, strict=True))
            shares[f"{network}/{name}"] = sum(parts, jnp.zeros(())) / sum(sizes)
    return shares


def _ranks_of_layers(graph: Graph, taps: Any) -> dict[str, Measures]:
    """Ranks of every layer, means over stacks; all layers in one computation, which zeros around the smaller ones do not change."""
    grams = [taps[layer.name]["gram"].reshape(-1, layer.size, layer.size) for layer in graph.layers]
    widest = max(layer.size for layer in graph.layers)
    pads = [((0, 0), (0, widest - gram.shape[-1]), (0, widest - gram.shape[-1])) for gram in grams]
    everything = ranks(jnp.concatenate([jnp.pad(gram, pad) for gram, pad in zip(grams, pads, strict=True)]))
    ends = np.cumsum([len(gram) for gram in grams])
    starts = ends - [len(gram) for gram in grams]
    return {
        layer.name: {name: values[start:end].mean() for name, values in everything.items()}
        for layer, start, end in zip(graph.layers, starts, ends, strict=True)
    }


def ranks(gram: Float[Array, "*K H H"]) -> dict[str, Float[Array, "*K"]]:
    """Ranks of a feature matrix from its Gram matrix `h^T h`; 0 for a matrix of zeros.

    Returns:
        `effective_rank`, the exponential of the entropy of the normalised singular values (Roy and Vetterli, The Effective Rank, 2007);
        `stable_rank`, the squared Frobenius norm over the squared spectral norm; `rank_99`, the fewest singular values that make up 99 %
        of their sum (what "Loss of Plasticity in Deep Continual Learning", Dohare et al. 2024, calls stable rank in its code).
    """
    eigenvalues = jnp.maximum(_eigenvalues(gram)[..., ::-1], 0.0)
    noise = eigenvalues.shape[-1] * jnp.finfo(gram.dtype).eps * eigenvalues[..., :1]
    eigenvalues = jnp.where(eigenvalues > noise, eigenvalues, 0.0)
    singular = jnp.sqrt(eigenvalues)
    total = singular.sum(axis=-1, keepdims=True)
    shares = singular / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), 0.0).sum(axis=-1)
    largest = eigenvalues[..., 0]
    alive = largest > 0
    return {
        "effective_rank": jnp.where(alive, jnp.exp(entropy), 0.0),
        "stable_rank": eigenvalues.sum(axis=-1) / jnp.where(alive, largest, 1.0),
        "rank_99": jnp.where(alive, 1.0 + (jnp.cumsum(shares, axis=-1) < 0.99).sum(axis=-1), 0.0),
    }


def _eigenvalues(gram: Float[Array, "*K H H"]) -> Float[Array, "*K H"]:
    """Eigenvalues of symmetric matrices, rising.

    By Householder reflections to tridiagonal form and JAX's bisection of that. `jnp.linalg.eigvalsh` calls LAPACK, which for a batch inside
    a scan never returns on some machines (seen with jaxlib 0.10.2 on two cores, 16 seeds), and is no faster for matrices of this size.
    """
    size = gram.shape[-1]
    flat_batch = gram.reshape(-1, size, size)
    if size < 3:
        padded = jnp.zeros((flat_batch.shape[0], 3, 3), gram.dtype).at[:, :size, :size].set(flat_batch)
        return _eigenvalues(padded)[:, 3 - size :].reshape(gram.shape[:-1])
    scale = jnp.maximum(jnp.trace(flat_batch, axis1=-2, axis2=-1), jnp.finfo(gram.dtype).tiny)
    diagonal, beside = jax.vmap(_tridiagonal)(flat_batch / scale[:, None, None])
    values = jax.vmap(lambda d, e: eigh_tridiagonal(d, e, eigvals_only=True))(diagonal, beside)
    return (jnp.sort(values, axis=-1) * scale[:, None]).reshape(gram.shape[:-1])


def _tridiagonal(matrix: Float[Array, "H H"]) -> tuple[Float[Array, "H"], Float[Array, "H-1"]]:
    """Diagonal and off-diagonal of a tridiagonal matrix with the same eigenvalues."""
    size = matrix.shape[-1]
    rows = jnp.arange(size)

    def reflect(step: Array, matrix: Array) -> Array:
        column = jnp.where(rows > step, matrix[:, step], 0.0)
        head = jnp.where(rows == step + 1, column, 0.0).sum()
        length = jnp.sqrt(jnp.square(column).sum())
        mirror = column + jnp.where(rows == step + 1, jnp.where(head >= 0, length, -length), 0.0)
        factor = 2.0 / jnp.maximum(jnp.square(mirror).sum(), jnp.finfo(matrix.dtype).tiny)
        image = factor * (matrix @ mirror)
        shift = image - 0.5 * factor * (image @ mirror) * mirror
        return matrix - jnp.outer(mirror, shift) - jnp.outer(shift, mirror)

    reduced = jax.lax.fori_loop(0, size - 2, reflect, matrix)
    return jnp.diagonal(reduced), jnp.diagonal(reduced, 1)


def overlap(before: Bool[Array, "*N"], now: Bool[Array, "*N"]) -> Float[Array, ""]:
    """The overlap coefficient of two sets of units, `|A and B| / min(|A|, |B|)`; NaN if one is empty.

    References:
        Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023, figure 5.
    """
    smaller = jnp.minimum(before.sum(), now.sum())
    return jnp.where(smaller > 0, (before & now).sum() / jnp.maximum(smaller, 1), jnp.nan)


def blank_taps(graph: Graph) -> Any:
    """The taps that `measure` needs, as zeros."""
    return tapping.zeros(graph, STATISTICS) | tapping.zeros(graph.mixing_alone, MIXING_STATISTICS)


def add(first: Any, second: Any) -> Any:
    """Adds up what taps or gradients gave on several batches."""
    return jax.tree.map(jnp.add, first, second)

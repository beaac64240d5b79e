"""Diagnoses of layers against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax.networks.neurons import dense_layer
from knife_jax.plasticity import diagnostics, scores
from knife_jax.plasticity.graph import flat, make_graph

ROWS, INPUTS, UNITS, MEMBERS = 40, 4, 6, 3


def numpy_ranks(features):
    """Effective rank, stable rank and the fewest singular values that make 99 % of their sum."""
    singular = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    shares = singular / singular.sum()
    shares_alive = shares[shares > 1e-9]
    entropy = -(shares_alive * np.log(shares_alive)).sum()
    return np.exp(entropy), (singular**2).sum() / singular[0] ** 2, 1 + np.argmax(np.cumsum(shares) >= 0.99)


def gram(features):
    """`h^T h` of features `[..., N, H]`."""
    return jnp.einsum("...ni,...nj->...ij", features, features)


@pytest.mark.parametrize("rank", [1, 3, UNITS])
def test_ranks_are_those_of_the_singular_values(rank):
    """Of full and deficient matrices, of any scale, one by one and side by side."""
    rng = np.random.default_rng(rank)
    features = rng.normal(size=(MEMBERS, ROWS, rank)) @ rng.normal(size=(MEMBERS, rank, UNITS))
    for scale in (1e-4, 1.0, 1e4):
        got = diagnostics.ranks(gram(jnp.asarray(scale * features, jnp.float32)))
        expected = np.transpose([numpy_ranks(member) for member in features])
        for name, values in zip(("effective_rank", "stable_rank", "rank_99"), expected, strict=True):
            np.testing.assert_allclose(got[name], values, rtol=1e-3, err_msg=name)


def test_ranks_of_equal_and_of_no_singular_values():
    """Orthonormal features have full rank by every measure, features of zeros none, and neither is NaN."""
    for matrix, rank in ((jnp.eye(UNITS), UNITS), (jnp.zeros((UNITS, UNITS)), 0.0)):
        for value in diagnostics.ranks(matrix).values():
            np.testing.assert_allclose(value, rank, rtol=1e-5)


def test_overlap():
    """|A and B| over the smaller of both; NaN where one is empty."""
    sets = [jnp.asarray(units, bool) for units in ([1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0])]
    assert float(diagnostics.overlap(sets[0], sets[1])) == 0.5
    assert float(diagnostics.overlap(sets[2], sets[1])) == 1.0
    assert float(diagnostics.overlap(sets[0], sets[2])) == 0.0
    assert np.isnan(diagnostics.overlap(sets[0], sets[3])) and np.isnan(diagnostics.overlap(sets[3], sets[3]))


def two_networks():
    """A plain layer `a/hidden` and a stack `b/hidden` of three, with random parameters and gradients."""
    rng = np.random.default_rng(0)

    def draw(key):
        plain = {"hidden": {"kernel": jnp.zeros((INPUTS, UNITS)), "bias": jnp.zeros(UNITS)}}
        plain["head"] = {"kernel": jnp.zeros((UNITS, 1)), "bias": jnp.zeros(1)}
        return {"a": plain, "b": jax.tree.map(lambda leaf: jnp.zeros((MEMBERS, *leaf.shape)), plain)}

    layers = [dense_layer("a", "hidden", "head", UNITS), dense_layer("b", "hidden", "head", UNITS, (MEMBERS,))]
    graph = make_graph(layers, draw)
    trees = [jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), draw(None)) for _ in range(2)]
    return graph, *trees


def test_measures():
    """Shares against each member's own mean, ranks as means over members, norms of incoming weights and of whole networks."""
    graph, params, grads = two_networks()
    rng = np.random.default_rng(1)
    grads["a"]["hidden"]["kernel"] = grads["a"]["hidden"]["kernel"].at[:, 2].set(0.0)
    grads["b"]["hidden"]["kernel"] = grads["b"]["hidden"]["kernel"].at[1, :, 3:].mul(1e-3).at[2].set(0.0)
    window = scores.watch(scores.new_window(graph), graph, flat(grads), flat(params))
    sizes = {"a/hidden": np.exp(2 * rng.normal(size=UNITS)), "b/hidden": np.exp(2 * rng.normal(size=(MEMBERS, UNITS)))}
    features = {name: np.abs(rng.normal(size=(ROWS, *size.shape))) * size for name, size in sizes.items()}
    slopes = {name: 10.0 ** rng.integers(-4, 0, size.shape) for name, size in sizes.items()}
    seen = {}
    for name, values in features.items():
        members = np.moveaxis(values, 0, -2)
        sums = {
            "absolute": values.sum(0),
            "absolute_gradient": slopes[name],
            "gram": gram(members),
            "count": np.full((*values.shape[1:-1], 1), ROWS),
        }
        seen[name] = {statistic: jnp.asarray(value, jnp.float32) for statistic, value in sums.items()}
    got, stagnant = jax.jit(lambda *args: diagnostics.measure(graph, *args))(params, grads, window, seen)
    for name in sizes:
        network = name.split("/")[0]
        kernels = [np.asarray(tree[network]["hidden"]["kernel"]) for tree in (grads, params)]
        activity = np.linalg.norm(kernels[0], axis=-2) / np.linalg.norm(kernels[1], axis=-2)
        mean = activity.mean(-1, keepdims=True)
        judged = np.where(mean > 0, activity / np.where(mean > 0, mean, 1), np.nan)
        means, slope = features[name].mean(0), slopes[name]
        expected = {
            "stagnant": (judged < 0.25).mean(),
            "volatile": (judged > 4).mean(),
            "dormant": (means <= 0.1 * means.mean(-1, keepdims=True)).mean(),
            "inactive": (slope <= 0.01 * slope.mean(-1, keepdims=True)).mean(),
            "grad_norm": np.linalg.norm(kernels[0]),
            "weight_norm": np.linalg.norm(kernels[1]),
        }
        every = [numpy_ranks(member) for member in np.moveaxis(features[name], 0, -2).reshape(-1, ROWS, UNITS)]
        expected |= dict(zip(("effective_rank", "stable_rank", "rank_99"), np.mean(every, axis=0), strict=True))
        for measure, value in expected.items():
            np.testing.assert_allclose(got[f"{name}/{measure}"], value, rtol=2e-3, err_msg=f"{name}/{measure}")
        np.testing.assert_array_equal(stagnant[name], judged < 0.25)
        for measure, tree in (("weight_norm", params), ("grad_norm", grads)):
            whole = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree[network])))
            np.testing.assert_allclose(got[f"{network}/{measure}"], whole, rtol=1e-5)
    assert got["a/hidden/stagnant"] > 0 < got["b/hidden/stagnant"] and got["a/hidden/dormant"] > 0 < got["b/hidden/inactive"]


def test_measures_of_a_silent_network_are_numbers():
    """Without activity, activation or gradient: dormant, rank 0, otherwise not judged, and no NaN."""
    graph, params, grads = two_networks()
    nothing = jax.tree.map(jnp.zeros_like, grads)
    got, stagnant = diagnostics.measure(graph, params, nothing, scores.new_window(graph), diagnostics.blank_taps(graph))
    assert all(np.isfinite(value) for value in got.values())
    assert not any(mask.any() for mask in stagnant.values())
    said = {
        measure: float(got[f"b/hidden/{measure}"]) for measure in ("stagnant", "volatile", "dormant", "inactive", "rank_99", "grad_norm")
    }
    assert said == {"stagnant": 0, "volatile": 0, "dormant": 1, "inactive": 0, "rank_99": 0, "grad_norm": 0}

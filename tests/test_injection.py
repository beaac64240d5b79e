"""Plasticity injection against its definition, and what each reference of relative activity flags on real networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import stagnation_references
from knife_jax.networks.neurons import Dense, dense_layer
from knife_jax.plasticity import Trees, make_graph, plasticity_injection

INPUTS = jax.random.normal(jax.random.key(9), (32, 5))


class _Model(nn.Module):
    """An encoder, a hidden block and a head."""

    @nn.compact
    def __call__(self, inputs):
        features = nn.relu(Dense(8, name="encoder")(inputs))
        return Dense(3, name="head")(nn.relu(Dense(8, name="block")(features)))


MODEL = _Model()
GRAPH = make_graph(
    [dense_layer("net", "encoder", "block", 8), dense_layer("net", "block", "head", 8)],
    lambda key: {"net": MODEL.init(key, INPUTS)["params"]},
)


def _features(params):
    return np.maximum(np.asarray(INPUTS) @ np.asarray(params["encoder"]["kernel"]) + np.asarray(params["encoder"]["bias"]), 0)


def _block_and_head(features, block, head):
    """The head's values without its bias."""
    return np.maximum(features @ np.asarray(block["kernel"]) + np.asarray(block["bias"]), 0) @ np.asarray(head["kernel"])


def test_injection_is_old_plus_fresh_minus_frozen_fresh():
    """Before and after training of the fresh part, online and target: `h_theta + h_theta1 - h_theta2` with theta and theta2 frozen."""
    method = plasticity_injection(GRAPH)
    old = [method.allocate({"params": GRAPH.draw(jax.random.key(seed))}) for seed in (0, 1)]
    _, trees, report = method.apply(jax.random.key(2), method.init(old[0]), Trees(old[0], old[1]))
    assert report["net/block/treated"] == 8 and "net/encoder/treated" not in report
    fresh = jax.tree.map(np.asarray, trees.variables["params"]["net"])
    assert trees.target is not None
    for before, after in zip(old, (trees.variables, trees.target), strict=True):
        theta = before["params"]["net"]
        np.testing.assert_array_equal(after["params"]["net"]["block"]["kernel"], fresh["block"]["kernel"])
        moved = {"net": jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), after["params"]["net"])}
        features = _features(moved["net"])
        expected = (
            _block_and_head(features, theta["block"], theta["head"])
            + _block_and_head(features, moved["net"]["block"], moved["net"]["head"])
            - _block_and_head(features, fresh["block"], fresh["head"])
            + np.asarray(moved["net"]["head"]["bias"])
        )
        np.testing.assert_allclose(_values(method, {**after, "params": moved}), expected, rtol=1e-4, atol=1e-5)


def _values(method, variables):
    lifted = method.lift(MODEL.apply, ("net",))
    return lifted({**variables, "params": variables["params"]["net"]}, INPUTS)


def test_the_fourth_injection_finds_no_room():
    """There is room for three; the fourth leaves everything as it is and says so."""
    method = plasticity_injection(GRAPH, interventions=10)
    variables = method.allocate({"params": GRAPH.draw(jax.random.key(0))})
    state = method.init(variables)
    step = jax.jit(lambda key, state, variables: method.apply(key, state, Trees(variables)))
    for number in range(4):
        shifted = jax.tree.map(lambda leaf: leaf + 0.01, variables["params"])
        variables = {**variables, "params": shifted}
        state, trees, report = step(jax.random.key(number), state, variables)
        np.testing.assert_allclose(_values(method, variables), _values(method, trees.variables), atol=1e-5)
        assert (report["net/block/treated"], report["net/block/reserve_full"]) == ((8, 0) if number < 3 else (0, 8))
        variables = trees.variables


@pytest.mark.slow
@pytest.mark.computes
def test_what_the_references_flag_on_healthy_and_collapsed_networks():
    """The layer's mean flags half of a healthy network here and cannot tell a collapsed one apart; the layer's own history can."""
    healthy_won, healthy = stagnation_references.last_window({"env": {"name": "matrix", "scenario": "paper"}}, 8)
    collapsed_won, collapsed = stagnation_references.last_window({}, 8)
    assert (healthy_won == 1).all() and (collapsed_won == 0).any()
    well, ill = (stagnation_references.flagged(state, 0.25) for state in (healthy, collapsed))
    share = {name: (well[name]["all"].mean(), ill[name]["all"][collapsed_won == 0].mean()) for name in well}
    assert 0.3 < share["layer"][0] < 0.7
    assert share["history"][1] > share["history"][0] + 0.15
    assert share["error"][1] > share["error"][0] + 0.15

"""Laws of parameters: those of Flax, and a whole network from one draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from knife_jax import Config, make_program
from knife_jax.model import draw_params
from knife_jax.networks import laws
from knife_jax.networks.neurons import Dense, Initializer

KEY = jax.random.key(3)


@pytest.mark.parametrize("shape", [(16, 16), (16, 4), (4, 16)], ids=str)
def test_single_parameters_are_those_of_flax(shape):
    """LeCun normal and orthogonal, square, high and wide: the same numbers from the same key, for each of three gates too."""
    theirs = nn.initializers.lecun_normal()(KEY, shape)
    np.testing.assert_allclose(laws.lecun_normal(shape, shape[0]).draw(KEY), theirs, rtol=1e-6)
    theirs = nn.initializers.orthogonal(0.5)(KEY, shape)
    np.testing.assert_allclose(laws.orthogonal(shape, 0.5).draw(KEY), theirs, rtol=1e-5, atol=1e-6)
    gates = laws.orthogonal((shape[0], 3, shape[1]), 2.0, axes=(0, 2)).draw(KEY)
    for gate in range(3):
        matrix = np.asarray(gates[:, gate]) / 2.0
        gram = matrix.T @ matrix if shape[0] >= shape[1] else matrix @ matrix.T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)


class Two(nn.Module):
    """Two layers, one in a stack."""

    initializer: Initializer

    @nn.compact
    def __call__(self, inputs):
        """Applies both."""
        return Dense(5, self.initializer, name="second")(Dense(6, self.initializer, stack=2, name="first")(inputs).sum(axis=-2))


@pytest.mark.parametrize("name", ["torch_uniform", "flax", "orthogonal"])
def test_a_network_drawn_at_once_has_the_parameters_of_one_drawn_by_itself(name):
    """The same tree; every parameter's own law, with noise that no two of them share, another for every key, and seeds as if alone."""
    module, inputs = Two(Initializer(name, 0.5)), jnp.zeros((1, 4))
    found = laws.laws_of(lambda: module.init(KEY, inputs))
    alone, drawn = module.init(KEY, inputs)["params"], laws.draw_all(KEY, found)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, alone)
    parts = [np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(drawn) if np.any(leaf)]
    assert len(parts) == (4 if name == "torch_uniform" else 2)
    noise = np.concatenate([part / np.abs(part).max() for part in parts])
    assert len(np.unique(noise)) > 0.9 * len(noise)
    kernel = np.asarray(drawn["first"]["kernel"])
    assert not np.allclose(kernel[0], kernel[1])
    if name == "torch_uniform":
        assert np.abs(kernel).max() <= 4**-0.5
        assert np.abs(drawn["second"]["kernel"]).max() <= 6**-0.5
    if name == "orthogonal":
        np.testing.assert_allclose(kernel[1] @ kernel[1].T, 0.25 * np.eye(4), atol=1e-5)
    keys = jax.random.split(KEY)
    together = jax.vmap(lambda key: laws.draw_all(key, found))(keys)
    for seed in range(2):
        np.testing.assert_allclose(together["first"]["kernel"][seed], laws.draw_all(keys[seed], found)["first"]["kernel"], atol=1e-6)
    assert not np.allclose(together["first"]["kernel"][0], together["first"]["kernel"][1])


@pytest.mark.parametrize("mixer", ["vdn", "qmix", "qplex"])
def test_networks_are_drawn_by_the_laws_of_their_modules(mixer):
    """The trees of both networks, also of a mixer without parameters; with one kind of noise, one draw."""
    networks = make_program(Config.from_dict({"preset": "matrix_drift", "learner": {"mixer": mixer}})).networks
    drawn = draw_params(KEY, networks)
    assert set(drawn) == {"agent", "mixer"}
    found = jax.tree.leaves(jax.tree.map(jnp.shape, drawn), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert found == [networks.laws[path].shape for path in sorted(networks.laws)]
    assert bool(drawn["mixer"]) == (mixer != "vdn")
    draws = str(jax.make_jaxpr(lambda key: draw_params(key, networks))(KEY)).count("random_bits[")
    assert draws == 1

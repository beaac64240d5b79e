"""Gradient steps that compute their networks in bfloat16: near those in float32, and float32 wherever numbers are kept or counted."""

import dataclasses

import jax
import numpy as np
import pytest

from knife_jax import Config, learner
from knife_jax.model import make_networks
from tests.test_cures_in_training import ALWAYS, HUNTING, primed

SIZES = {"qmix": {"embed_size": 8, "hypernet_size": 16}}


def _both(mixer, cure, recurrent=False):
    """A gradient step on the same state and batch in either type, as `{dtype: (state after it, metrics, gradients)}`."""
    sections = {"agent": {"hidden_size": 8, "recurrent": recurrent}, "learner": {"mixer": mixer}, "plasticity": cure}
    config = Config.from_dict({**HUNTING, **SIZES, **sections})
    program, state, batch = primed(config)
    start = state.learner
    if cure["name"] != "none":
        start = jax.jit(lambda: learner.intervene(jax.random.key(0), start, {}, program.networks, config.hyper)[0])()
    found = {}
    for dtype in ("float32", "bfloat16"):
        own = dataclasses.replace(config, learner=dataclasses.replace(config.learner, compute_dtype=dtype))
        networks = make_networks(own, program.networks.env, program.networks.tasks, program.networks.interventions)

        @jax.jit
        def step(state, networks=networks):
            def loss(params):
                online = {"params": params, "reserve": state.reserve}
                return learner.loss_fn(online, state.target_variables, networks, batch, config.hyper)[0]

            return *learner.gradient_step(state, networks, batch, config.hyper), jax.grad(loss)(state.params)

        found[dtype] = step(start)
    return start, found


def _vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("mixer", "recurrent"),
    [("qmix", True), pytest.param("qplex", False, marks=pytest.mark.slow)],
)
def test_a_step_is_near_that_in_float32(mixer, recurrent):
    """The loss within 2 % and not the same, the gradient in the same direction, and everything that is kept of the type it was."""
    start, found = _both(mixer, {"name": "none"}, recurrent)
    (_, plain, direction), (after, metrics, other) = found["float32"], found["bfloat16"]
    assert metrics["loss"] != plain["loss"]
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=2e-2)
    one, two = _vector(direction), _vector(other)
    assert one @ two > 0.999 * np.linalg.norm(one) * np.linalg.norm(two)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knife", "redo"])
def test_cures_take_part(name):
    """With treated units the same holds, and samples are counted exactly."""
    cure = ALWAYS if name == "knife" else {"name": name, "tau": 1e9}
    start, found = _both("qmix", cure)
    (exact, plain, _), (after, metrics, _) = found["float32"], found["bfloat16"]
    assert metrics["loss"] != plain["loss"]
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=3e-2)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, start)
    one, two = (_counts(state.cure) for state in (exact, after))
    assert one == two and (min(one, default=1) > 0) and bool(one) == (name != "knife")


def _counts(memory):
    """How many samples each tap saw."""
    leaves = jax.tree_util.tree_leaves_with_path(memory)
    return [float(leaf.min()) for path, leaf in leaves if getattr(path[-1], "key", None) == "count"]

"""Mixers and agents against the reference implementations' numbers, and the identities that define them."""

import functools
import itertools
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from knife_jax.config import AgentConfig, QmixConfig, QplexConfig
from knife_jax.networks.agents import AgentNetwork, agent_inputs, initial_hidden
from knife_jax.networks.mixers import QMIX, QPLEX, VDN, Independent, MixerInputs
from knife_jax.networks.neurons import GRU, Dense, Initializer
from tests import conformance as reference

E, H = 32, 64


@pytest.fixture
def float64():
    """Double precision, in which the references ran."""
    with jax.enable_x64(True):
        yield


def mixer_inputs():
    """The reference data."""
    return MixerInputs(*map(jnp.asarray, (reference.CHOSEN_Q, reference.GREEDY_Q, reference.ACTIONS, reference.STATE)))


def count(params):
    """How many numbers a pytree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def qmix_params(layers):
    """The reference weights of QMIX."""
    s, n = reference.STATE_SIZE, reference.NUM_AGENTS
    shared = {"b1_output": reference.dense(E, s, 3), "v_hidden": reference.dense(E, s, 4), "v_output": reference.dense(1, E, 4.1)}
    if layers == 1:
        return {**shared, "w1_output": reference.dense(n * E, s, 1), "w2_output": reference.dense(E, s, 2)}
    return {
        **shared,
        "w1_hidden": reference.dense(H, s, 1),
        "w1_output": reference.dense(n * E, H, 1.1),
        "w2_hidden": reference.dense(H, s, 2),
        "w2_output": reference.dense(E, H, 2.1),
    }


def qplex_params(depth, kernels=2):
    """The reference weights of QPLEX."""
    s, n, joint = reference.STATE_SIZE, reference.NUM_AGENTS, reference.STATE_SIZE + reference.NUM_AGENTS * reference.NUM_ACTIONS
    params = {}
    for name, role in (("w", 1), ("v", 2)):
        params |= {f"{name}_hidden": reference.dense(H, s, role), f"{name}_output": reference.dense(n, H, role + 0.1)}
    for name, role, inputs, outputs in (("key", 3, s, 1), ("agents", 5, s, n), ("action", 7, joint, n)):
        roles = [float(role + kernel) for kernel in range(kernels)]
        for layer in range(1, depth):
            shifted = [value + 0.1 * (layer - 1) for value in roles]
            params[f"{name}_hidden_{layer}"] = reference.stacked_dense(H, inputs if layer == 1 else H, shifted)
        shifted = [value + 0.1 * (depth - 1) for value in roles]
        params[f"{name}_output"] = reference.stacked_dense(outputs, inputs if depth == 1 else H, shifted)
    return params


def test_qmix_reproduces_the_reference(float64):
    """Values and parameter count."""
    params = jax.tree.map(jnp.asarray, qmix_params(2))
    q_tot = jnp.asarray(QMIX().apply({"params": params}, mixer_inputs()))
    np.testing.assert_allclose(q_tot[:, 0], [0.41403356346939674, -0.03283264943251869], atol=1e-6)
    assert count(params) == 9505


@pytest.mark.parametrize("layers", [1, 2])
def test_qmix_parameters_have_the_declared_shapes(layers):
    """Drawn and reference parameters are shaped alike."""
    drawn = QMIX(QmixConfig(hypernet_layers=layers)).init(jax.random.key(0), mixer_inputs())["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(np.shape, qmix_params(layers))


QPLEX_W = [[0.04443597, 0.11917661, 0.11005213], [0.04070681, 0.09630143, 0.07878948]]
QPLEX_V = [[-0.13330206, -0.1125223, -0.01802617], [-0.09686056, -0.07268704, 0.00646771]]
QPLEX_LAMBDA = [[0.02895389, 0.02753081, 0.02660151], [0.02372419, 0.02286217, 0.02192981]]
QPLEX_BRANCHES = {
    # (is_minus_one, weighted_head): (V, A)
    (True, True): ([-0.06278672, -0.28359109], [0.16507237, 0.00993527]),
    (True, False): ([2.35167915, -1.42279286], [1.45963309, 0.24406895]),
    (False, True): ([-0.06278672, -0.28359109], [-0.00456807, -0.00024143]),
    (False, False): ([2.35167915, -1.42279286], [-0.04036691, -0.00593105]),
}


@pytest.mark.parametrize(("is_minus_one", "weighted_head"), QPLEX_BRANCHES)
def test_qplex_reproduces_the_reference(float64, is_minus_one, weighted_head):
    """Values, lambda, w and v in every variant."""
    config = QplexConfig(num_kernels=2, adv_layers=2, is_minus_one=is_minus_one, weighted_head=weighted_head)
    params = jax.tree.map(jnp.asarray, qplex_params(2))
    q_tot, sown = QPLEX(config).apply({"params": params}, mixer_inputs(), mutable=["intermediates"])
    value, advantage = QPLEX_BRANCHES[is_minus_one, weighted_head]
    np.testing.assert_allclose(q_tot[:, 0], np.add(value, advantage), atol=1e-6)
    intermediates = {name: jnp.asarray(values[0]) for name, values in sown["intermediates"].items()}
    np.testing.assert_allclose(intermediates["lambda"], QPLEX_LAMBDA, atol=1e-6)
    if weighted_head:
        np.testing.assert_allclose(intermediates["w"], QPLEX_W, atol=1e-6)
        np.testing.assert_allclose(intermediates["v"], QPLEX_V, atol=1e-6)


@pytest.mark.parametrize(("depth", "parameters"), [(1, 1314), (2, 5908), (3, 30_868)])
def test_qplex_parameters_have_the_declared_shapes(depth, parameters):
    """Drawn and reference parameters are shaped alike, at every depth."""
    drawn = QPLEX(QplexConfig(num_kernels=2, adv_layers=depth)).init(jax.random.key(0), mixer_inputs())["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(np.shape, qplex_params(depth))
    assert count(drawn) == parameters


def test_agent_reproduces_the_reference(float64):
    """Values over time and parameter count."""
    params = {
        "hidden_1": reference.dense(H, reference.STATE_SIZE, 1),
        "gru": reference.gru(H, H),
        "output": reference.dense(reference.NUM_ACTIONS, H, 2),
    }
    inputs = jnp.asarray([(t + 1) * reference.STATE for t in range(3)])
    network = AgentNetwork(reference.NUM_ACTIONS, AgentConfig())
    q, _ = network.apply({"params": jax.tree.map(jnp.asarray, params)}, inputs, jnp.zeros(3, bool), jnp.zeros((reference.ROWS, H)))
    expected = [
        [[-0.09375544, -0.07526939, 0.00127544, 0.0775753], [-0.09274273, -0.07409118, 0.00206502, 0.0776049]],
        [[-0.09284526, -0.07421989, 0.00197066, 0.07758927], [-0.09031109, -0.07127773, 0.00393708, 0.0776551]],
    ]
    np.testing.assert_allclose(q[:2], expected, atol=1e-6)
    assert count(params) == 25_604
    drawn = network.init(jax.random.key(0), inputs, jnp.zeros(3, bool), jnp.zeros((reference.ROWS, H)))["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(np.shape, params)


def test_gru_forgets_at_starts_and_only_there():
    """One unroll over a start equals two unrolls."""
    layer = GRU(8)
    inputs = jax.random.normal(jax.random.key(1), (6, 2, 3))
    starts = jnp.zeros((6, 2), bool).at[3, 0].set(True)
    params = layer.init(jax.random.key(0), inputs, starts, jnp.zeros((2, 8)))
    whole, _ = layer.apply(params, inputs, starts, jnp.ones((2, 8)))
    second, _ = layer.apply(params, inputs[3:], jnp.zeros((3, 2), bool), jnp.zeros((2, 8)))
    first, carried = layer.apply(params, inputs[:3], starts[:3], jnp.ones((2, 8)))
    rest, _ = layer.apply(params, inputs[3:], jnp.zeros((3, 2), bool), carried)
    np.testing.assert_allclose(whole[:3], first, atol=1e-6)
    np.testing.assert_allclose(whole[3:, 0], second[:, 0], atol=1e-6)
    np.testing.assert_allclose(whole[3:, 1], rest[:, 1], atol=1e-6)


ROWS, AGENTS, ACTIONS, STATES = 4, 2, 3, 5
JOINTS = np.array(list(itertools.product(range(ACTIONS), repeat=AGENTS)))


def _random_mixing(mixer, seed):
    """A mixer with random (not merely initial) weights, random states `[rows, G]` and random agent values `[rows, A, U]`."""
    rng = np.random.default_rng(seed)
    state, q = jnp.asarray(rng.normal(size=(ROWS, STATES))), jnp.asarray(3 * rng.normal(size=(ROWS, AGENTS, ACTIONS)))
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), _mixing(q, jnp.zeros((ROWS, AGENTS), int), state))
    return jax.tree.map(lambda shape: jnp.asarray(0.5 * rng.normal(size=shape.shape)), shapes), state, q


def _mixing(q, actions, state):
    """What a mixer is fed for given joint actions."""
    one_hot = jax.nn.one_hot(actions, ACTIONS)
    return MixerInputs((q * one_hot).sum(-1), jax.lax.stop_gradient(q.max(-1)), one_hot, state)


@functools.cache
def _qmix_slopes(config):
    """By seed: dQ_tot/dq_i, and how Q_tot changes when every q_i grows by one."""

    def slopes(params, state, q):
        inputs = _mixing(q, jnp.zeros((ROWS, AGENTS), int), state)

        def total(chosen):
            return jnp.asarray(QMIX(config).apply(params, inputs._replace(chosen_q=chosen)))[:, 0]

        return jax.grad(lambda q: total(q).sum())(inputs.chosen_q), total(inputs.chosen_q + 1) - total(inputs.chosen_q)

    return jax.jit(slopes)


@functools.cache
def _qplex_joint_values(config):
    """By seed: Q_tot of every joint action `[rows, U ** A]`, and that of the agents' own greedy actions `[rows]`."""

    def values(params, state, q):
        def value(actions):
            return jnp.asarray(QPLEX(config).apply(params, _mixing(q, actions, state)))[:, 0]

        every = jax.vmap(lambda joint: value(jnp.broadcast_to(joint, (ROWS, AGENTS))))(jnp.asarray(JOINTS)).T
        return every, value(q.argmax(-1))

    return jax.jit(values)


@functools.cache
def _qplex_gradients(config):
    """By seed: dQ_tot/dq_i and w for random actions, and the gradient of the parameters on rows where all act greedily."""

    def gradients(params, state, q, taken):

        def total(params, q, actions):
            out, sown = QPLEX(config).apply(params, _mixing(q, actions, state), mutable=["intermediates"])
            return out.sum(), sown["intermediates"]["w"][0]

        by_q, w = jax.grad(total, argnums=1, has_aux=True)(params, q, taken)
        return by_q.sum(-1), w, jax.grad(total, has_aux=True)(params, q, q.argmax(-1))[0]["params"]

    return jax.jit(gradients)


SMALL: dict[str, Any] = {"num_kernels": 3, "adv_size": 8, "hypernet_size": 8}
seeds = st.integers(0, 2**31 - 1)
several = hypothesis.settings(max_examples=50, deadline=None)


@several
@hypothesis.given(seeds, st.sampled_from([1, 2]))
def test_qmix_is_monotone_in_every_agent(seed, layers):
    """By slope and by difference."""
    config = QmixConfig(embed_size=8, hypernet_size=8, hypernet_layers=layers)
    slopes, change = _qmix_slopes(config)(*_random_mixing(QMIX(config), seed))
    assert slopes.min() >= 0
    assert change.min() >= -1e-4


@several
@hypothesis.given(seeds, st.booleans(), st.sampled_from([1, 3]))
def test_qplex_has_igm_over_all_joint_actions(seed, weighted_head, depth):
    """The joint argmax is made of the agents' own."""
    config = QplexConfig(**SMALL, weighted_head=weighted_head, adv_layers=depth)
    values, at_greedy = _qplex_joint_values(config)(*_random_mixing(QPLEX(config), seed))
    np.testing.assert_allclose(values.max(-1), at_greedy, rtol=1e-5, atol=1e-5)


@several
@hypothesis.given(seeds)
def test_qplex_gradient_identities(seed):
    """dQ_tot/dq_i is w_i; the lambda-net learns nothing where all act greedily."""
    config = QplexConfig(**SMALL)
    taken = np.random.default_rng(seed).integers(ACTIONS, size=(ROWS, AGENTS))
    by_q, w, by_params = _qplex_gradients(config)(*_random_mixing(QPLEX(config), seed), taken)
    np.testing.assert_allclose(by_q, w, rtol=1e-5, atol=1e-6)
    lambda_net = {name: grads for name, grads in by_params.items() if name.startswith(("key", "agents", "action"))}
    assert len(lambda_net) == 6
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(lambda_net))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(by_params))


def test_vdn_sums_and_independent_learners_do_not():
    """The two mixers without parameters."""
    inputs = mixer_inputs()
    np.testing.assert_allclose(jnp.asarray(VDN().apply({}, inputs))[:, 0], reference.CHOSEN_Q.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(jnp.asarray(Independent().apply({}, inputs)), reference.CHOSEN_Q, rtol=1e-6)


@pytest.mark.parametrize(("name", "bound"), [("torch_uniform", 0.25), ("orthogonal", None), ("flax", None)])
def test_initializers_follow_their_law(name, bound):
    """Bounds, orthogonality and spread; stacked layers are drawn apart."""
    params = Dense(256, Initializer(name, 0.5), stack=3).init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
    kernel, offsets = np.asarray(params["kernel"]), np.asarray(params["bias"])
    assert kernel.shape == (3, 16, 256)
    assert not np.allclose(kernel[0], kernel[1])
    if name == "torch_uniform":
        assert np.abs(kernel).max() <= bound < np.abs(kernel).max() * 1.01
        assert np.abs(offsets).max() <= bound < np.abs(offsets).max() * 1.01
    else:
        assert (offsets == 0).all()
    if name == "orthogonal":
        np.testing.assert_allclose(kernel[0] @ kernel[0].T, 0.25 * np.eye(16), atol=1e-5)
    if name == "flax":
        np.testing.assert_allclose(kernel.std(), 16**-0.5, rtol=0.05)


@pytest.mark.parametrize("name", ["flax", "orthogonal"])
def test_lapack_is_given_one_matrix_at_a_time(name):
    """All seeds' networks drawn together, on processors: two batches at once would never return. To the bits of seeds drawn alone."""
    given = Initializer(name, 2.0)

    def draw(key):
        return given.kernel((16, 16), 16).draw(key), given.gates((8, 3, 8), 8, recurrent=True).draw(key)

    keys = jax.random.split(jax.random.key(0), (2, 2))
    drawn = jax.vmap(jax.vmap(draw))
    calls = [line for line in jax.jit(drawn).trace(keys).lower(lowering_platforms=("cpu",)).as_text().splitlines() if "@lapack_" in line]
    assert calls
    assert not [line for line in calls if re.search(r"tensor<\d+x\d+x\d+x", line)]
    kernel, gates = draw(keys[1, 0])
    np.testing.assert_array_equal(drawn(keys)[0][1, 0], kernel)
    np.testing.assert_array_equal(drawn(keys)[1][1, 0], gates)


@pytest.mark.parametrize("name", ["flax", "orthogonal"])
def test_gru_gates_are_drawn_one_by_one(name):
    """Flax's defaults: every recurrent gate orthogonal, every input gate with the spread of its fan in."""
    inputs = jnp.zeros((1, 2, 64))
    params = GRU(16, Initializer(name, 0.1)).init(jax.random.key(0), inputs, jnp.zeros((1, 2), bool), jnp.zeros((2, 16)))["params"]
    for gate in range(3):
        recurrent = np.asarray(params["hidden_kernel"])[:, gate]
        np.testing.assert_allclose(recurrent.T @ recurrent, np.eye(16), atol=1e-5)
        np.testing.assert_allclose(np.asarray(params["input"]["kernel"])[:, gate].std(), 64**-0.5, rtol=0.1)


def test_qplex_leaves_out_agents_that_do_not_exist():
    """Neither their transformed value nor their shift is part of the team value."""
    params, state, q = _random_mixing(QPLEX(), 0)
    inputs = _mixing(q, jnp.zeros((ROWS, AGENTS), int), state)
    first_only = jnp.tile(jnp.array([True, False]), (ROWS, 1))
    out, sown = QPLEX().apply(params, inputs._replace(agent_mask=first_only), mutable=["intermediates"])
    w, v, lam, advantage = (jnp.asarray(sown["intermediates"][name][0]) for name in ("w", "v", "lambda", "advantage"))
    blank = first_only.astype(float)
    expected = (blank * (w * inputs.chosen_q + v)).sum(-1) + (advantage * (lam - 1)).sum(-1)
    np.testing.assert_allclose(jnp.asarray(out)[:, 0], expected, rtol=1e-5)


def test_agent_inputs_hold_what_the_configuration_says():
    """View, last action, identity, task, in this order."""
    from envs.base import Observation

    views = jnp.full((2, 3, 4), 7.0)
    observation = Observation(views, jnp.zeros((2, 5)), jnp.ones((2, 3, 6), bool), jnp.ones((2, 3), bool))
    last, starts = jnp.full((2, 3), 5), jnp.array([True, False])
    inputs = agent_inputs(AgentConfig(), observation, last, starts, jnp.array([[0.0, 1.0], [1.0, 0.0]]))
    assert inputs.shape == (2, 3, 4 + 6 + 3 + 2)
    np.testing.assert_array_equal(inputs[0, :, 4:10], np.zeros((3, 6)))
    np.testing.assert_array_equal(inputs[1, :, 4:10], np.tile(np.eye(6)[5], (3, 1)))
    np.testing.assert_array_equal(inputs[1, :, 10:13], np.eye(3))
    np.testing.assert_array_equal(inputs[1, :, 13:], np.tile([1.0, 0.0], (3, 1)))
    bare = agent_inputs(AgentConfig(last_action=False, agent_id=False), observation, last, starts)
    np.testing.assert_array_equal(bare, views)
    assert initial_hidden(AgentConfig(recurrent=False), (2, 3)).shape == (2, 3, 0)

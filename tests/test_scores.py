"""Scores of units against plain loops, and the taps that gather them against activations computed by hand."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from knife_jax.config import AgentConfig, QplexConfig
from knife_jax.networks import agents
from knife_jax.networks.mixers import QPLEX, MixerInputs
from knife_jax.networks.neurons import Dense, dense_layer
from knife_jax.plasticity import lift as lifting
from knife_jax.plasticity import scores, taps
from knife_jax.plasticity.graph import flat, make_graph
from knife_jax.plasticity.method import none

ROWS, INPUTS, UNITS = 12, 4, 5
NAMES = ("net/first", "net/second")


class Network(nn.Module):
    """Two hidden layers; the first is called once per given input, and all calls are summed."""

    @nn.compact
    def __call__(self, *inputs):
        """One output."""
        first, second, head = Dense(UNITS, name="first"), Dense(UNITS, name="second"), Dense(1, name="head")
        return sum(head(nn.relu(second(nn.relu(first(values))))) for values in inputs)


@functools.cache
def network():
    """The module, its graph and its parameters."""
    draw = jax.jit(lambda key: {"net": Network().init(key, jnp.zeros((1, INPUTS)))["params"]})
    graph = make_graph([dense_layer("net", "first", "second", UNITS), dense_layer("net", "second", "head", UNITS)], draw)
    return graph, draw(jax.random.key(0))


def random_like(params, seed):
    """Numbers in the shape of the parameters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


def watched(scale=1.0, blank=None, decay=None):
    """A window of three gradients, all zero in the blank layer."""
    graph, params = network()
    window = scores.new_window(graph)
    for seed in range(3):
        grads = jax.tree.map(lambda leaf: scale * leaf, random_like(params, seed))
        grads = {"net": grads["net"] | ({blank: jax.tree.map(jnp.zeros_like, grads["net"][blank])} if blank else {})}
        window = scores.watch(window, graph, flat(grads), flat(random_like(params, 10 + seed)), decay)
    return window


def activity_by_hand(seed, layer):
    """`||g|| / (||w|| + eps)` of every unit's incoming weights, one by one."""
    _, params = network()
    grads, weights = (np.asarray(random_like(params, s)["net"][layer]["kernel"]) for s in (seed, 10 + seed))
    return np.array([np.sqrt((grads[:, unit] ** 2).sum()) / (np.sqrt((weights[:, unit] ** 2).sum()) + 1e-8) for unit in range(UNITS)])


def test_relative_activity_is_a_mean_over_time_over_its_mean_over_the_layer():
    """RUA against a loop over units: averaged over time first, biases outside; its mean over a layer is 1."""
    relative = scores.relative_activity(watched())
    for name in NAMES:
        mean = np.mean([activity_by_hand(seed, name.split("/")[1]) for seed in range(3)], axis=0)
        np.testing.assert_allclose(relative[name], mean / mean.mean(), rtol=1e-5)
        np.testing.assert_allclose(relative[name].mean(), 1.0, rtol=1e-6)
        np.testing.assert_array_equal(scores.stagnant(relative[name], 0.9), mean / mean.mean() < 0.9)
        np.testing.assert_array_equal(scores.volatile(relative[name], 1.1), mean / mean.mean() > 1.1)


@pytest.mark.parametrize("reference", ["layer", "network", "history"])
def test_relative_activity_does_not_depend_on_the_size_of_the_loss(reference):
    """A loss times 1000 gives the same scores."""
    for name, values in scores.relative_activity(watched(), reference).items():
        np.testing.assert_allclose(scores.relative_activity(watched(1e3), reference)[name], values, rtol=1e-5)


def test_references():
    """What activity is divided by: the mean over all layers, the largest mean so far, the given error."""
    window = watched()
    means = {name: np.asarray(values) for name, values in scores.activity(window).items()}
    whole = np.mean(list(means.values()))
    louder = scores.restart(watched(3.0))
    for name in NAMES:
        np.testing.assert_allclose(scores.relative_activity(window, "network")[name], means[name] / whole, rtol=1e-5)
        np.testing.assert_allclose(scores.relative_activity(window, "history")[name], means[name] / means[name].mean(), rtol=1e-5)
        later = window._replace(peak=louder.peak)
        np.testing.assert_allclose(scores.relative_activity(later, "history")[name], means[name] / means[name].mean() / 3, rtol=1e-5)
        np.testing.assert_allclose(scores.relative_activity(window, "error", jnp.array(0.5))[name], means[name] / 0.5, rtol=1e-5)
        assert (louder.total[name] == 0).all() and louder.count == 0
    with pytest.raises(ValueError, match="needs the root mean square"):
        scores.relative_activity(window, "error")


def test_a_layer_without_gradients():
    """It gives no NaN in masks; nobody in it is judged under `layer`, all are stagnant under the other references."""
    window = watched(blank="second")._replace(peak=watched().peak | {"net/second": jnp.array(2.0)})
    for reference in get_args(scores.Reference):
        relative = scores.relative_activity(window, reference, jnp.array(1.0))["net/second"]
        assert (np.asarray(scores.stagnant(relative)) == (reference != "layer")).all()
        assert not scores.volatile(relative).any()
    silent = scores.new_window(network()[0])
    for reference in get_args(scores.Reference):
        for values in scores.relative_activity(silent, reference, jnp.array(0.0)).values():
            assert not scores.stagnant(values).any() and not scores.volatile(values).any()


def test_exponential_average():
    """Later gradients weigh more, by powers of the decay."""
    window, weights = watched(decay=0.5), np.array([0.25, 0.5, 1.0])
    for name in NAMES:
        history = np.stack([activity_by_hand(seed, name.split("/")[1]) for seed in range(3)])
        np.testing.assert_allclose(scores.activity(window)[name], weights @ history / weights.sum(), rtol=1e-5)


def test_dormant_units():
    """Mean |h| at most tau times the layer's mean; a layer that never fires is dormant."""
    values = jnp.array([[0.0, 0.05, 1.0, 2.0, 2.0], [0.0] * 5])
    np.testing.assert_array_equal(scores.dormant(values), [[True, True, False, False, False], [True] * 5])
    np.testing.assert_array_equal(scores.dormant(values, 0.0)[0], [True, False, False, False, False])


@functools.cache
def recurrent_agent():
    """A recurrent agent, its graph, parameters and inputs `[T, B, A, I]`."""
    config = AgentConfig(hidden_size=UNITS)
    module = agents.AgentNetwork(3, config)
    inputs, starts = jax.random.normal(jax.random.key(1), (4, 3, 2, INPUTS)), jnp.zeros((4, 3), bool).at[2, 1].set(True)
    args = (inputs, starts, agents.initial_hidden(config, (3, 2)))
    draw = jax.jit(lambda key: {"agent": module.init(key, *args)["params"]})
    return module, make_graph(agents.neuron_layers(config), draw), draw(jax.random.key(0)), args


def test_update_activity_of_recurrent_and_stacked_units():
    """All gates of both kernels of a GRU belong to a unit; members of a stack have units of their own."""
    _, graph, params, _ = recurrent_agent()
    grads = random_like(params, 0)
    got = scores.update_activity(flat(grads), flat(params), graph.layers[1])
    for unit in range(UNITS):
        norms = []
        for tree in (grads, params):
            gru = tree["agent"]["gru"]
            kernels = (np.asarray(gru["input"]["kernel"]), np.asarray(gru["hidden_kernel"]))
            norms.append(np.sqrt(sum((kernel[:, :, unit] ** 2).sum() for kernel in kernels)))
        np.testing.assert_allclose(got[unit], norms[0] / (norms[1] + 1e-8), rtol=1e-5)
    layer = dense_layer("net", "a", "b", UNITS, (3,))
    kernels = np.random.default_rng(0).normal(size=(2, 3, INPUTS, UNITS)).astype(np.float32)
    leaves = [{("net", "a", "kernel"): jnp.asarray(kernel)} for kernel in kernels]
    expected = np.linalg.norm(kernels[0], axis=1) / (np.linalg.norm(kernels[1], axis=1) + 1e-8)
    np.testing.assert_allclose(scores.update_activity(leaves[0], leaves[1], layer), expected, rtol=1e-5)
    np.testing.assert_allclose(scores.weight_gradient(leaves[0], layer), np.abs(kernels[0]).mean(1), rtol=1e-5)


STATISTICS = ("absolute_gradient", "absolute", "signed", "fired", "centred", "gram")


def measured(graph, apply, params, args, mask=None, weigh=None, prefix=("net",)):
    """What the taps of a graph's layers hold after the gradient of a weighed sum of outputs."""
    blank = taps.zeros(graph, STATISTICS)
    blank = {name: tap | {"centre": jnp.full_like(tap["absolute"], 0.1)} for name, tap in blank.items()}
    lifted = lifting.lift(graph, apply, prefix)

    def loss(tapped):
        extra = {} if mask is None else {"tap_mask": mask}
        outputs = lifted({"params": params, "taps": tapped, **extra}, *args)
        return jnp.sum(outputs * weigh if weigh is not None else outputs)

    return jax.jit(jax.grad(loss))(blank)


def check_statistics(got, activations, gradients, mask):
    """Sums over masked samples `[N, ..., H]` of what the names say; gradients are summed as they are."""
    activations, gradients = np.asarray(activations), np.asarray(gradients)
    axes, kept = tuple(range(activations.ndim - got["absolute"].ndim)), activations * mask
    expected = {
        "absolute_gradient": np.abs(gradients) * mask,
        "absolute": np.abs(kept),
        "signed": kept,
        "fired": (activations > 0) * mask,
        "centred": np.abs(activations - 0.1) * mask,
        "count": np.broadcast_to(mask, (*activations.shape[:-1], 1)),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values.sum(axes), rtol=1e-4, atol=1e-5, err_msg=name)
    outer = np.einsum("...i,...j->...ij", kept, activations)
    np.testing.assert_allclose(got["gram"], outer.sum(axes), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        taps.means({"absolute": got["absolute"], "count": got["count"]})["absolute"],
        expected["absolute"].sum(axes) / expected["count"].sum(axes),
        rtol=1e-5,
    )


def by_hand(params, inputs):
    """Activations of both layers of `Network`."""
    net = jax.tree.map(np.asarray, params["net"])
    first = np.maximum(np.asarray(inputs) @ net["first"]["kernel"] + net["first"]["bias"], 0)
    return first, np.maximum(first @ net["second"]["kernel"] + net["second"]["bias"], 0)


def test_taps_hold_statistics_of_activations():
    """Sums over the samples that count; |dL/dh| sample by sample, so that samples of opposite sign do not cancel."""
    graph, params = network()
    inputs = jax.random.normal(jax.random.key(3), (ROWS, INPUTS))
    signs = jnp.where(jnp.arange(ROWS) % 2 == 0, 1.0, -1.0)[:, None]
    inputs = inputs.at[1::2].set(inputs[::2])
    mask = np.arange(ROWS) < 8
    got = measured(graph, Network().apply, params["net"], (inputs,), jnp.asarray(mask), signs)
    first, second = by_hand(params, inputs)
    head, kernel = np.asarray(params["net"]["head"]["kernel"]), np.asarray(params["net"]["second"]["kernel"])
    slope = np.asarray(signs) * head[:, 0]
    check_statistics(got["net/second"], second, slope, mask[:, None])
    back = (slope * (second > 0)) @ kernel.T
    np.testing.assert_allclose(back.sum(0), 0, atol=1e-5)
    check_statistics(got["net/first"], first, back, mask[:, None])
    assert (got["net/first"]["absolute_gradient"] > 1e-3).any()


def test_calls_of_one_layer_add_up():
    """Two calls in one pass give the sum of what each gives."""
    graph, params = network()
    first, second = jax.random.normal(jax.random.key(3), (2, ROWS, INPUTS))
    both = measured(graph, Network().apply, params["net"], (first, second))
    apart = [measured(graph, Network().apply, params["net"], (values,)) for values in (first, second)]
    total = taps.add(apart[0], apart[1])
    for name in NAMES:
        for statistic in (*STATISTICS, "count"):
            np.testing.assert_allclose(both[name][statistic], total[name][statistic], rtol=1e-4, atol=1e-5)


def test_taps_of_recurrent_agents():
    """Features and GRU states of all agents, over the steps that count."""
    module, graph, params, args = recurrent_agent()
    mask = np.arange(12).reshape(4, 3) % 3 != 1
    got = measured(graph, lambda *a, **k: module.apply(*a, **k)[0], params["agent"], args, jnp.asarray(mask), prefix=("agent",))
    own = params["agent"]
    features = np.maximum(np.asarray(args[0]) @ np.asarray(own["hidden_1"]["kernel"]) + np.asarray(own["hidden_1"]["bias"]), 0)
    _, watched = module.apply({"params": own}, *args, capture_intermediates=lambda module, _: module.name == "gru")
    states = np.asarray(watched["intermediates"]["gru"]["__call__"][0][0])
    for name, values in (("agent/hidden_1", features), ("agent/gru", states)):
        kept = values[mask].reshape(-1, UNITS)
        np.testing.assert_allclose(got[name]["absolute"], np.abs(kept).sum(0), rtol=1e-4)
        np.testing.assert_allclose(got[name]["gram"], kept.T @ kept, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[name]["count"], mask.sum() * 2)
    slope = np.abs(np.asarray(own["output"]["kernel"]).sum(1)) * mask.sum() * 2
    np.testing.assert_allclose(got["agent/gru"]["absolute_gradient"], slope, rtol=1e-4)


def test_taps_of_stacked_layers():
    """Every member of a stack has its own statistics, `[K, H]`."""
    module, states, agents_count, actions = QPLEX(QplexConfig(num_kernels=3, adv_size=UNITS)), 4, 2, 3
    rng = np.random.default_rng(0)
    one_hot = jnp.asarray(np.eye(actions, dtype=np.float32)[rng.integers(actions, size=(ROWS, agents_count))])
    state, q = jnp.asarray(rng.normal(size=(ROWS, states)), jnp.float32), jnp.asarray(rng.normal(size=(ROWS, agents_count)), jnp.float32)
    inputs = MixerInputs(q, q + 1, one_hot, state)
    draw = jax.jit(lambda key: {"mixer": module.init(key, inputs)["params"]})
    layer = dense_layer("mixer", "action_hidden_1", "action_output", UNITS, (3,))
    params = draw(jax.random.key(0))
    graph, mask = make_graph([layer], draw), np.arange(ROWS) < 7
    got = measured(graph, module.apply, params["mixer"], (inputs,), jnp.asarray(mask), prefix=("mixer",))[layer.name]
    joint = np.concatenate([state, np.asarray(one_hot).reshape(ROWS, -1)], axis=-1)
    kernel, bias = (np.asarray(params["mixer"]["action_hidden_1"][name]) for name in ("kernel", "bias"))
    values = np.maximum(np.einsum("ni,kih->nkh", joint, kernel) + bias, 0)
    assert got["absolute"].shape == (3, UNITS)
    np.testing.assert_allclose(got["absolute"], np.abs(values[mask]).sum(0), rtol=1e-4)
    np.testing.assert_allclose(got["fired"], (values[mask] > 0).sum(0))
    np.testing.assert_allclose(got["gram"], np.einsum("nki,nkj->kij", values[mask], values[mask]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["count"], np.full((3, 1), mask.sum()))


def test_nothing_changes_what_a_network_computes():
    """No cure and no collections, or taps alone: the same bits."""
    graph, params = network()
    inputs = jax.random.normal(jax.random.key(3), (ROWS, INPUTS))
    expected = Network().apply({"params": params["net"]}, inputs)
    np.testing.assert_array_equal(none().lift(Network().apply, ("net",))({"params": params["net"]}, inputs), expected)
    lifted = lifting.lift(graph, Network().apply, ("net",))
    np.testing.assert_array_equal(lifted({"params": params["net"]}, inputs), expected)
    tapped = lifted({"params": params["net"], "taps": taps.zeros(graph, ("absolute",))}, inputs)
    np.testing.assert_array_equal(tapped, expected)

"""Cures that work at every update or rewrite nothing, against their definitions in numpy."""

import re
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from knife_jax.networks.neurons import Dense, NeuronLayer, dense_layer
from knife_jax.plasticity.continual_backprop import continual_backprop
from knife_jax.plasticity.graph import make_graph
from knife_jax.plasticity.method import Trees, chain
from knife_jax.plasticity.recycle import Rule, recycle, redo
from knife_jax.plasticity.regularisers import l2_init, layer_norm, spectral, weight_decay
from knife_jax.plasticity.self_normalized_resets import BINS, self_normalized_resets
from tests.cures import (
    FRESH,
    GRAPH,
    KEPT,
    LAYERS,
    MLP,
    SEEDS,
    assert_ages,
    assert_close,
    assert_same,
    batches,
    compiled,
    gradient,
    hidden,
    net_with_extremes,
    random_net,
    recycled,
    rewritten,
    run,
    unstack,
)

STEPS, RHO, MATURITY, DECAY = 5, 0.15, 2, 0.7
METHODS = {
    **{
        utility: lambda utility=utility: continual_backprop(GRAPH, RHO, MATURITY, DECAY, utility=utility)
        for utility in ("contribution", "zero_contribution", "adaptable_contribution")
    },
    "resets": lambda: self_normalized_resets(GRAPH, 0.2, threshold_updates=3, max_threshold=4.0),
}


@cache
def function(name):
    """The compiled run of a method, which may intervene after each of its gradients."""
    return compiled(METHODS[name](), 1, STEPS)


@cache
def outcome(name):
    """What it gives on networks with extreme units."""
    return run(function(name), nets())


def nets():
    """One network per seed."""
    return [net_with_extremes(seed) for seed in range(SEEDS)]


class Continual:
    """Continual backprop, unit by unit, in float64."""

    def __init__(self, net, utility):
        """Starts with a network."""
        self.net, self.utility, self.replaced = net, utility, {layer: np.zeros(8, bool) for layer in LAYERS}
        self.age, self.use, self.mean = ({layer: np.zeros(8) for layer in LAYERS} for _ in range(3))
        self.owed = dict.fromkeys(LAYERS, 0.0)

    def step(self, inputs):
        """One batch, and one intervention."""
        activations = hidden(self.net, inputs)
        for layer in LAYERS:
            self.watch(layer, activations[layer])
        masks = {layer: self.choose(layer) for layer in LAYERS}
        compensated = {name: dict(module) for name, module in self.net.items()}
        for layer, (_, read) in LAYERS.items():
            mean = np.where(masks[layer], self.corrected(self.mean, layer), 0)
            compensated[read]["bias"] = self.net[read]["bias"] + mean @ self.net[read]["kernel"]
        self.net = recycled(compensated, masks, zero_bias=True)
        for layer, mask in masks.items():
            for memory in (self.age, self.use, self.mean):
                memory[layer][mask] = 0
            self.replaced[layer] |= mask
        return masks

    def corrected(self, average, layer):
        """An average without its bias towards zero."""
        age = self.age[layer]
        return np.where(age > 0, average[layer] / np.where(age > 0, 1 - DECAY**age, 1), 0)

    def watch(self, layer, h):
        """Averages over one more batch."""
        made, read = LAYERS[layer]
        centre = self.corrected(self.mean, layer) if self.utility != "contribution" else 0
        use = np.abs(self.net[read]["kernel"]).mean(axis=1) * np.abs(h - centre).mean(axis=0)
        if self.utility == "adaptable_contribution":
            use = use / np.abs(self.net[made]["kernel"]).mean(axis=0)
        self.age[layer] += 1
        self.use[layer] = DECAY * self.use[layer] + (1 - DECAY) * use
        self.mean[layer] = DECAY * self.mean[layer] + (1 - DECAY) * h.mean(axis=0)

    def choose(self, layer):
        """The mature units with the lowest utility, as many as are owed."""
        mature = self.age[layer] > MATURITY
        self.owed[layer] += RHO * mature.sum()
        number = int(self.owed[layer] + 1e-9)
        self.owed[layer] -= number
        order = np.argsort(np.where(mature, self.corrected(self.use, layer), np.inf), kind="stable")
        return mature & np.isin(np.arange(8), order[:number])


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable_contribution"])
def test_continual_backprop(utility):
    """Weights, biases of readers, ages, averages and what is owed follow the definition through five updates, for every seed."""
    _, trees, report, state = outcome(utility)
    for seed, net in enumerate(nets()):
        definition = Continual(net, utility)
        masks = [definition.step(inputs) for inputs in batches(STEPS)[0]][-1]
        assert_close(unstack(trees.variables["params"], seed), definition.net, rtol=1e-4)
        for layer in LAYERS:
            assert definition.replaced[layer].sum() >= 2
            assert report[f"{layer}/treated"][seed] == masks[layer].sum()
            np.testing.assert_array_equal(state.age[layer][seed], definition.age[layer])
            np.testing.assert_allclose(state.utility[layer][seed], definition.use[layer], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state.owed[layer][seed], definition.owed[layer], atol=1e-5)
        assert_same(unstack(trees.target["params"], seed), random_net(50 + seed))
        young = unstack(trees.opt_state.second, seed)
        for name, entries in rewritten(definition.replaced).items():
            assert all((young[name][leaf] > 0).sum() == entries[leaf].sum() for leaf in entries)


def test_continual_backprop_keeps_the_mean_of_what_readers_read():
    """With the bias correction the mean pre-activation of the next layer, over the averaged batches, stays what it was."""
    method = continual_backprop(GRAPH, 0.5, 0, 0.0, layers="net/a")
    net = net_with_extremes(1)
    params = {"net": jax.tree.map(jnp.asarray, net)}
    inputs = batches(1)[0][0]
    h = hidden(net, inputs)["net/a"]
    taps = {"net/a": {"absolute": np.abs(h).sum(axis=0), "signed": h.sum(axis=0), "count": np.full(1, float(KEPT))}}
    state = method.observe(method.init({"params": params}), {"params": params}, None, jax.tree.map(jnp.float32, taps))
    _, trees, report = method.apply(jax.random.key(0), state, Trees({"params": params}))
    new = jax.tree.map(np.asarray, trees.variables["params"]["net"])
    before, after = (hidden(each, inputs)["net/a"].mean(axis=0) @ each["b"]["kernel"] + each["b"]["bias"] for each in (net, new))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert report["net/a/treated"] == 4


def test_continual_backprop_reaches_the_biases_of_gates():
    """A reader's bias of another shape (a GRU's [3, units]) gets what its kernel gave, and a toss replaces a fraction."""
    layer = NeuronLayer("n/h", 4, (("n", "h", "kernel"),), (("n", "h", "bias"),), (("n", "g", "kernel"),), (("n", "g", "bias"),))
    shapes = {"h": {"kernel": (2, 4), "bias": (4,)}, "g": {"kernel": (4, 3, 5), "bias": (3, 5)}}
    draw = lambda key: {"n": jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple))}  # noqa: E731
    method = continual_backprop(make_graph([layer], draw), 0.3, 0, 0.0, accumulate=False, bias="drawn")
    variables = {"params": jax.tree.map(lambda leaf: 2 * leaf, draw(None))}
    state = method.init(variables)
    seen = {"n/h": {"absolute": jnp.arange(4.0), "signed": jnp.array([3.0, 2, 2, 2]), "count": jnp.ones(1)}}
    state = method.observe(state, variables, None, seen)
    keys = jax.random.split(jax.random.key(0), 200)
    _, trees, report = jax.vmap(lambda key: method.apply(key, state, Trees(variables)))(keys)
    treated, params = np.asarray(report["n/h/treated"]), trees.variables["params"]["n"]
    assert set(treated) == {1.0, 2.0}  # 1.2 on average
    assert abs(treated.mean() - 1.2) < 4 * 0.4 / np.sqrt(200)
    given = np.where(treated == 1, 2 + 2 * 3, 2 + 2 * 3 + 2 * 2)
    np.testing.assert_allclose(params["g"]["bias"], np.broadcast_to(given[:, None, None], (200, 3, 5)))
    np.testing.assert_array_equal(params["h"]["bias"][:, 0], 1)


def test_self_normalized_resets_follow_their_definition():
    """Ages, thresholds and resets of units that fire at random, through two updates of thresholds."""
    eta, every, most, steps = 0.25, 40, 30.0, 100
    method = self_normalized_resets(GRAPH, eta, threshold_updates=every, max_threshold=most)
    rng = np.random.default_rng(2)
    fired = (rng.random((steps, 8)) < np.array([0.9, 0.6, 0.5, 0.3, 0.3, 0.2, 0.1, 0.0])).astype(np.float32)
    params = {"net": jax.tree.map(jnp.asarray, random_net(0))}

    def step(state, fires):
        taps = {layer: {"fired": fires, "count": jnp.ones(1)} for layer in LAYERS}
        state = method.observe(state, {}, None, taps)
        state, _, report = method.apply(jax.random.key(0), state, Trees({"params": params}))
        return state, (report["net/b/treated"], state.threshold["net/b"])

    state, (treated, thresholds) = jax.jit(lambda: jax.lax.scan(step, method.init({"params": params}), jnp.asarray(fired)))()
    age, threshold, silences = np.zeros(8, int), np.full(8, most), [[] for _ in range(8)]
    edges = np.concatenate([[0], most ** np.linspace(0, 1, BINS - 1)])
    for number, fires in enumerate(fired):
        for unit in np.flatnonzero(fires):
            silences[unit].append(age[unit])
        age = np.where(fires > 0, 0, age + 1)
        reset = age >= threshold - 1e-4
        for unit in np.flatnonzero(reset):
            silences[unit].append(age[unit])
        age = np.where(reset, 0, age)
        if (number + 1) % every == 0:
            for unit, lengths in enumerate(silences):
                if lengths:
                    quantile = np.sort(lengths)[int(np.ceil((1 - eta) * len(lengths) - 1e-9)) - 1]
                    rounded = edges[np.searchsorted(edges, quantile - 1e-4)]
                    threshold[unit] = np.clip(rounded if rounded < threshold[unit] - 1e-4 else 2 * threshold[unit], 1, most)
            silences = [[] for _ in range(8)]
        assert treated[number] == reset.sum()
        np.testing.assert_allclose(thresholds[number], threshold, rtol=1e-5)
    np.testing.assert_array_equal(state.age["net/b"], age)
    assert treated[:29].sum() == 0 < treated.sum()
    assert (threshold < most).any()


def test_self_normalized_resets_recycle_units_that_never_fire():
    """Silent for four batches, a unit is recycled with a zero bias; those that fire stay as they are."""
    _, trees, _, state = outcome("resets")
    for seed, net in enumerate(nets()):
        dead = {layer: np.ones(8, bool) for layer in LAYERS}
        for inputs in batches(4)[0]:
            dead = {layer: dead[layer] & (values <= 0).all(axis=0) for layer, values in hidden(net, inputs).items()}
        assert dead["net/a"].sum() == 2
        assert_same(unstack(trees.variables["params"], seed), recycled(net, dead, zero_bias=True))
        np.testing.assert_allclose(unstack(trees.opt_state.second, seed)["a"]["bias"], np.where(dead["net/a"], 0.999, 0), rtol=1e-5)
        assert (np.asarray(state.threshold["net/a"][seed])[dead["net/a"]] == 4).all()


@pytest.mark.parametrize("name", ["adaptable_contribution", "resets"])
def test_seeds_do_not_see_each_other(name):
    """Another network in the first seed changes no bit of the others."""
    others = run(function(name), [random_net(11), *nets()[1:]])
    for seed in (1, 2):
        one, other = (jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf[seed]), result) for result in (outcome(name), others))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    first, changed = (unstack(result[1].variables["params"], 0) for result in (outcome(name), others))
    assert (first["a"]["kernel"] != changed["a"]["kernel"]).any()


def test_l2_init_pulls_to_the_beginning():
    """The penalty is the squared distance from the first parameters, in buffers of its own."""
    params, moved = ({"net": jax.tree.map(jnp.asarray, random_net(seed))} for seed in (0, 1))
    method = l2_init(GRAPH, 0.3)
    state = method.init({"params": params})
    distance = sum(np.square(one - other).sum() for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True))
    np.testing.assert_allclose(method.penalty(moved, state), 0.3 * distance, rtol=1e-5)
    assert method.penalty(params, state) == 0
    first = jax.tree.leaves(params)[0].unsafe_buffer_pointer()
    assert first != jax.tree.leaves(state)[0].unsafe_buffer_pointer()


def test_weight_decay_after_and_before_the_optimizer():
    """Decoupled, a share of every parameter goes, whatever the gradient; else the penalty's gradient is twice the strength."""
    params = {"net": jax.tree.map(jnp.asarray, random_net(0))}
    tx = weight_decay(GRAPH, 0.01).wrap_optimizer(optax.adam(0.1))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert_close(updates, jax.tree.map(lambda leaf: -0.01 * leaf, params))
    penalty = weight_decay(GRAPH, 0.01, decoupled=False).penalty
    assert_close(jax.grad(penalty)(params, ()), jax.tree.map(lambda leaf: 0.02 * leaf, params))


def test_weight_decay_chained_with_ages():
    """Behind a method that keeps ages, decay is left out of their corrections."""
    params = {"net": jax.tree.map(jnp.asarray, random_net(0))}
    method = chain(redo(GRAPH, 1e6), weight_decay(GRAPH, 0.01))
    state = method.init({"params": params})
    tx = method.wrap_optimizer(optax.sgd(0.1))
    seen = {name: {"absolute": jnp.ones(8), "count": jnp.ones(1)} for name in LAYERS}
    state = method.observe(state, {"params": params}, None, seen)
    _, trees, _ = method.apply(jax.random.key(0), state, Trees({"params": params}, None, tx.init(params)), tx)
    params, opt_state = trees.variables["params"], cast(Any, trees.opt_state)
    assert_ages(jax.tree.map(lambda leaf: leaf[None], opt_state[0]), rewritten({name: np.ones(8, bool) for name in LAYERS}), 0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
    assert_close(updates, jax.tree.map(lambda leaf: -0.01 * leaf, params))


def test_spectral_penalty_against_the_singular_value_decomposition():
    """After many iterations it is the definition; its gradient is that of the singular values."""
    params = {"net": jax.tree.map(jnp.asarray, random_net(3))}
    method = spectral(GRAPH, 0.5, power=3)
    observe = jax.jit(lambda state: jax.lax.fori_loop(0, 300, lambda _, s: method.observe(s, {"params": params}, None, {}), state))
    state = observe(method.init({"params": params}))

    def definition(net):
        sizes = [jnp.linalg.norm(module["kernel"], ord=2) for module in net.values()]
        biases = [jnp.square(module["bias"]).sum() ** 3 for module in net.values()]
        return 0.5 * (sum((size**3 - 1) ** 2 for size in sizes) + sum(biases))

    value, grads = jax.jit(jax.value_and_grad(method.penalty))(params, state)
    expected, by_definition = jax.jit(jax.value_and_grad(definition))(params["net"])
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3), grads["net"], by_definition)


def test_spectral_counts_members_of_a_stack_and_gates_as_matrices():
    """Every kernel of QPLEX's lambda-net counts by itself; a bias is no matrix, however many axes it has."""
    stacked = dense_layer("n", "a", "b", 4, (3,))
    rng = np.random.default_rng(0)
    shapes = {"a": ((3, 2, 4), (3, 4)), "b": ((3, 4, 2), (3, 2)), "g": ((5, 3, 4), (3, 4))}
    net = {
        name: {leaf: rng.normal(size=shape).astype(np.float32) for leaf, shape in zip(("kernel", "bias"), pair, strict=True)}
        for name, pair in shapes.items()
    }
    params = {"n": jax.tree.map(jnp.asarray, net)}
    gates = NeuronLayer("n/g", 4, (("n", "g", "kernel"),), (("n", "g", "bias"),), (), kind="gru")
    graph = make_graph([stacked, gates], lambda key: params)
    method = spectral(graph, 1.0)
    state = jax.lax.fori_loop(0, 300, lambda _, s: method.observe(s, {"params": params}, None, {}), method.init({"params": params}))
    matrices = [*net["a"]["kernel"], *net["b"]["kernel"], net["g"]["kernel"].reshape(5, 12)]
    biases = [*net["a"]["bias"], *net["b"]["bias"], net["g"]["bias"]]
    expected = sum((np.linalg.norm(matrix, 2) ** 2 - 1) ** 2 for matrix in matrices) + sum(np.square(bias).sum() ** 2 for bias in biases)
    np.testing.assert_allclose(method.penalty(params, state), expected, rtol=1e-4)


def test_layer_norm_normalises_pre_activations():
    """Outputs are those of a network normalised by hand, with the scale and bias that `allocate` added; they get gradients."""
    method = layer_norm(GRAPH)
    net = random_net(4)
    variables = method.allocate({"params": {"net": jax.tree.map(jnp.asarray, net)}})
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.testing.assert_array_equal(variables["params"]["net"][name]["norm_scale"], np.ones(8))
        np.testing.assert_array_equal(variables["params"]["net"][name]["norm_bias"], np.zeros(8))
        for leaf in ("norm_scale", "norm_bias"):
            net[name][leaf] = rng.normal(size=8).astype(np.float32)
    assert "norm_scale" not in variables["params"]["net"]["c"]
    inputs, targets = (values[0] for values in batches(1))
    h = inputs
    for name in ("a", "b"):
        z = h @ net[name]["kernel"] + net[name]["bias"]
        z = (z - z.mean(axis=-1, keepdims=True)) / np.sqrt(z.var(axis=-1, keepdims=True) + 1e-5)
        h = np.maximum(z * net[name]["norm_scale"] + net[name]["norm_bias"], 0)
    params = {"net": jax.tree.map(jnp.asarray, net)}
    apply = method.lift(MLP().apply, ("net",))
    outputs = apply({"params": params["net"]}, jnp.asarray(inputs))
    np.testing.assert_allclose(outputs, h @ net["c"]["kernel"] + net["c"]["bias"], rtol=1e-4, atol=1e-5)
    grads, _ = gradient(method, {"params": params}, (), jnp.asarray(inputs), jnp.asarray(targets))
    assert (np.asarray(grads["net"]["a"]["norm_scale"]) != 0).any()


def test_layer_norm_on_a_stack():
    """Every member of a stack is normalised over its own units."""
    network = Dense(4, stack=3)
    graph = make_graph([dense_layer("n", "a", "b", 4, (3,))], lambda key: {"n": {"a": stacked_params(), "b": stacked_params()}})
    variables = layer_norm(graph).allocate({"params": graph.draw(jax.random.key(0))})
    inputs = jnp.asarray(batches(1)[0][0][:, :4])
    plain = np.asarray(network.apply({"params": stacked_params()}, inputs))
    lifted = layer_norm(graph).lift(network.apply, ("n", "a"))({"params": variables["params"]["n"]["a"]}, inputs)
    expected = (plain - plain.mean(axis=-1, keepdims=True)) / np.sqrt(plain.var(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(lifted, expected, rtol=1e-3, atol=1e-4)


def stacked_params():
    """Kernels and biases of three layers of four units."""
    rng = np.random.default_rng(5)
    return {"kernel": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32), "bias": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}


def test_recycled_units_get_a_fresh_normalisation():
    """Chained with `layer_norm`, a recycled unit's scale and bias are what they were at first; others keep theirs."""
    variables = layer_norm(GRAPH).allocate({"params": {"net": jax.tree.map(jnp.asarray, random_net(0))}})
    variables = jax.tree.map(lambda leaf: leaf + 3, variables)
    mask = np.arange(8) < 3
    masks = {layer: jnp.asarray(mask) for layer in LAYERS}
    trees = recycle(GRAPH, masks, jax.random.key(0), Trees(variables), None, Rule())
    module = trees.variables["params"]["net"]["b"]
    np.testing.assert_array_equal(module["norm_scale"], np.where(mask, 1, 4))
    np.testing.assert_array_equal(module["norm_bias"], np.where(mask, 0, 3))
    np.testing.assert_array_equal(np.asarray(module["bias"])[mask], FRESH["b"]["bias"][mask])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: continual_backprop(GRAPH, 1.5), "rho: expected a number at least 0 and at most 1, got 1.5"),
        (lambda: continual_backprop(GRAPH, maturity=-1), "maturity: expected a number at least 0"),
        (lambda: continual_backprop(GRAPH, decay=1.0), "decay: expected a number at least 0 and below 1"),
        (lambda: continual_backprop(GRAPH, utility="contributions"), "did you mean 'contribution'"),
        (lambda: continual_backprop(GRAPH, bias="zero"), "did you mean 'zeros'"),
        (lambda: self_normalized_resets(GRAPH, 0.0), "eta: expected a number above 0 and below 1"),
        (lambda: self_normalized_resets(GRAPH, threshold_updates=0), "threshold_updates: expected a number at least 1"),
        (lambda: self_normalized_resets(GRAPH, max_threshold=1.0), "max_threshold: expected a number above 1"),
        (lambda: self_normalized_resets(smooth_graph(), layers="net/a"), "only ReLU units fire or stay silent"),
        (lambda: l2_init(GRAPH, -1.0), "strength: expected a number at least 0"),
        (lambda: weight_decay(GRAPH, 2.0), "strength: expected a number at least 0 and at most 1"),
        (lambda: spectral(GRAPH, power=0), "power: expected a number at least 1"),
        (lambda: layer_norm(GRAPH, epsilon=0.0), "epsilon: expected a number above 0"),
        (lambda: layer_norm(make_graph([layer._replace(normalised=True) for layer in GRAPH.layers], GRAPH.draw)), "on any of all"),
    ],
)
def test_refusals(make, message):
    """What cannot work is refused when the method is made."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def smooth_graph():
    """The graph with units that never are silent."""
    return make_graph([layer._replace(activation=jax.nn.elu) for layer in GRAPH.layers], GRAPH.draw)

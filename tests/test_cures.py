"""Cures on a schedule against their definitions in numpy: ReDo, ReGraMa, ReBorn, resets, shrink and perturb."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax.config import AgentConfig
from knife_jax.networks import agents
from knife_jax.plasticity.graph import make_graph
from knife_jax.plasticity.method import Trees, chain
from knife_jax.plasticity.reborn import join_at_random, reborn, take_in_turn
from knife_jax.plasticity.recycle import redo, regrama
from knife_jax.plasticity.regularisers import layer_norm
from knife_jax.plasticity.resets import reset, shrink_perturb
from knife_jax.plasticity.self_normalized_resets import self_normalized_resets
from tests.cures import (
    FRESH,
    GRAPH,
    KEPT,
    LAYERS,
    SEEDS,
    assert_ages,
    assert_close,
    assert_moments,
    assert_same,
    batches,
    compiled,
    filled,
    gradients,
    hidden,
    net_with_extremes,
    random_net,
    recycled,
    rewritten,
    run,
    unstack,
)

STEPS = 3
METHODS = {
    "redo": lambda: redo(GRAPH, 0.5),
    "redo_target": lambda: redo(GRAPH, 0.5, window="last", max_fraction=0.25, optimizer_state="zeros", target=True),
    "regrama": lambda: regrama(GRAPH, 0.4),
    "regrama_code": lambda: regrama(GRAPH, 0.4, score="weights", outgoing="keep", optimizer_state="keep"),
    "reborn": lambda: reborn(GRAPH, "paper", 0.3, 2.0, layers="net/b", window="window", optimizer_state="fresh"),
    "reborn_code": lambda: reborn(GRAPH, "code", 0.3, 2.0, layers="net/b", window="window"),
    "reset": lambda: reset(GRAPH, "last"),
    "reset_all": lambda: reset(GRAPH, "all", optimizer_state="keep", target=False),
    "shrink_perturb": lambda: shrink_perturb(GRAPH, "ash_adams", 0.7, 0.1),
    "shrink_perturb_initial": lambda: shrink_perturb(GRAPH, "initial", 0.6, target=True),
    "shrink_perturb_continuous": lambda: shrink_perturb(GRAPH, "continuous", 0.5, 0.25),
}


@cache
def function(name):
    """The compiled run of a method: three gradients, then an intervention."""
    return compiled(METHODS[name](), STEPS, STEPS)


@cache
def outcome(name):
    """What it gives on networks with extreme units."""
    return run(function(name), nets())


def nets():
    """One network per seed."""
    return [net_with_extremes(seed) for seed in range(SEEDS)]


def mean_absolute(net, first=0):
    """Mean |h| of every unit over the batches from a given one on."""
    found = [hidden(net, inputs) for inputs in batches(STEPS)[0][first:]]
    return {layer: np.concatenate([h[layer] for h in found]).mean(axis=0) for layer in LAYERS}


def below(values, tau):
    """Units of at most tau times the mean of their layer."""
    return {layer: value <= tau * value.mean() for layer, value in values.items()}


def lowest_two(masks, values):
    """The two masked units with the lowest values, the first among equals."""
    order = {layer: np.argsort(np.where(masks[layer], values[layer], np.inf), kind="stable") for layer in masks}
    return {layer: masks[layer] & np.isin(np.arange(8), order[layer][:2]) for layer in masks}


def test_redo_recycles_dormant_units_and_ages_their_entries():
    """Masks, weights, moments and ages are those of the definition, for every seed; the target network is left alone."""
    before, trees, report, state = outcome("redo")
    for seed, net in enumerate(nets()):
        masks = below(mean_absolute(net), 0.5)
        assert masks["net/a"][[seed, seed + 1, 5]].all()
        assert_same(unstack(trees.variables["params"], seed), recycled(net, masks))
        assert_same(unstack(trees.target["params"], seed), random_net(50 + seed))
        assert_moments(before, trees.opt_state, rewritten(masks), seed)
        assert_ages(trees.opt_state, rewritten(masks), seed)
        for layer, mask in masks.items():
            assert report[f"{layer}/treated"][seed] == report[f"{layer}/dormant"][seed] == mask.sum()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state))


def test_redo_with_a_limit_on_the_last_batch_and_the_target_network():
    """The least active two of eight are treated, the target gets the same draw, moments are cleared without an age."""
    before, trees, report, _ = outcome("redo_target")
    for seed, net in enumerate(nets()):
        activity = mean_absolute(net, STEPS - 1)
        masks = lowest_two(below(activity, 0.5), activity)
        assert_same(unstack(trees.variables["params"], seed), recycled(net, masks))
        assert_same(unstack(trees.target["params"], seed), recycled(random_net(50 + seed), masks))
        assert_moments(before, trees.opt_state, rewritten(masks), seed)
        assert not hasattr(trees.opt_state, "first")
        assert report["net/a/treated"][seed] == 2 < report["net/a/dormant"][seed]


def test_regrama_takes_the_mean_absolute_gradient_of_the_last_batch():
    """Of activations, each sample's own; units that are sampled out do not cancel."""
    _, trees, report, _ = outcome("regrama")
    inputs, targets = batches(STEPS)
    for seed, net in enumerate(nets()):
        per_sample, _ = gradients(net, inputs[-1], targets[-1])
        masks = below({layer: np.abs(values).mean(axis=0) for layer, values in per_sample.items()}, 0.4)
        assert sum(mask.sum() for mask in masks.values()) > 0
        assert_same(unstack(trees.variables["params"], seed), recycled(net, masks))
        assert_ages(trees.opt_state, rewritten(masks), seed)
        assert report["net/b/inactive"][seed] == masks["net/b"].sum()


def test_regrama_as_its_code_has_it():
    """The mean absolute weight gradient judges; outgoing weights and optimizer state stay."""
    before, trees, _, _ = outcome("regrama_code")
    inputs, targets = batches(STEPS)
    for seed, net in enumerate(nets()):
        _, kernels = gradients(net, inputs[-1], targets[-1])
        masks = below({layer: np.abs(values).mean(axis=0) for layer, values in kernels.items()}, 0.4)
        assert masks["net/a"][seed]
        assert_same(unstack(trees.variables["params"], seed), recycled(net, masks, keep_outgoing=True))
        assert_moments(before, trees.opt_state, rewritten(masks), seed, cleared=False)


@pytest.mark.parametrize("name", ["reborn", "reborn_code"])
def test_reborn_loses_what_dormant_units_gave_and_nothing_else(name):
    """On any input, the output plus the dormant units' old contributions is the old output; the rest is as defined."""
    before, trees, report, _ = outcome(name)
    inputs = 5 * np.random.default_rng(3).normal(size=(KEPT, 5)).astype(np.float32)
    for seed, net in enumerate(nets()):
        new, activity = unstack(trees.variables["params"], seed), mean_absolute(net)["net/b"]
        dormant, over = activity <= 0.3 * activity.mean(), activity > 2 * activity.mean()
        was, now = hidden(net, inputs)["net/b"] @ net["c"]["kernel"], hidden(new, inputs)["net/b"] @ new["c"]["kernel"]
        lost = hidden(net, inputs)["net/b"][:, dormant] @ net["c"]["kernel"][dormant]
        np.testing.assert_allclose(now + lost, was, rtol=1e-4, atol=1e-4 * np.abs(was).max())
        joined = dormant & (new["c"]["kernel"] != 0).any(axis=1)
        rest = {"net/a": np.zeros(8, bool), "net/b": dormant & ~joined}
        assert_same_where(new, recycled(net, rest), ~(joined | over))
        assert joined.sum() == report["net/b/reborn"][seed] >= 2
        assert dormant.sum() == report["net/b/dormant"][seed]
        assert over.sum() == report["net/b/over_active"][seed] >= 1
        assert_same(unstack(trees.target["params"], seed), random_net(50 + seed))
        if name == "reborn":
            split = over & (new["c"]["kernel"] != net["c"]["kernel"]).any(axis=1)
            assert_ages(trees.opt_state, rewritten({"net/a": rest["net/a"], "net/b": dormant | split}), seed)
        else:
            assert_moments(before, trees.opt_state, filled(True), seed, cleared=False)
            np.testing.assert_array_equal(new["b"]["kernel"][:, over], net["b"]["kernel"][:, over])


def assert_same_where(given, expected, units):
    """Asserts that two networks are equal but for the weights of some units of layer b."""
    np.testing.assert_array_equal(given["b"]["kernel"][:, units], expected["b"]["kernel"][:, units])
    np.testing.assert_array_equal(given["b"]["bias"][units], expected["b"]["bias"][units])
    np.testing.assert_array_equal(given["c"]["kernel"][units], expected["c"]["kernel"][units])
    jax.tree.map(np.testing.assert_array_equal, (given["a"], given["c"]["bias"]), (expected["a"], expected["c"]["bias"]))


@pytest.mark.parametrize(("assign", "least"), [(take_in_turn, 2), (join_at_random, 0)])
def test_reborn_gives_no_unit_more_than_five_dependants(assign, least):
    """Of 30 dormant units at most 5 join each of 3 over-active ones, at least 2 in the paper's mode; with 40 over-active all join."""
    place = np.random.default_rng(0).permutation(73)
    for over_active in (3, 40):
        dormant, over = place < 30, (place >= 30) & (place < 30 + over_active)
        owners = np.asarray(jax.jit(jax.vmap(assign, in_axes=(0, None, None)))(jax.random.split(jax.random.key(1), 20), dormant, over))
        assert (owners[:, ~dormant] == 73).all()
        assert over[owners[owners < 73]].all()
        for row in owners:
            dependants = np.bincount(row[row < 73], minlength=73)[over]
            assert dependants.max() <= 5
            assert sorted(dependants)[-1 if over_active == 40 else 0] >= least
            assert dependants.sum() == 30 if over_active == 40 else dependants.sum() <= 15
    assert len({tuple(row) for row in owners}) == 20


def test_reset_of_the_last_layer():
    """Only the head is drawn anew, in both networks, with moments and ages; the count goes on."""
    before, trees, report, _ = outcome("reset")
    heads = filled(False) | {"c": filled(True)["c"]}
    for seed, net in enumerate(nets()):
        assert_same(unstack(trees.variables["params"], seed), net | {"c": FRESH["c"]})
        assert_same(unstack(trees.target["params"], seed), random_net(50 + seed) | {"c": FRESH["c"]})
        assert_moments(before, trees.opt_state, heads, seed)
        assert_ages(trees.opt_state, heads, seed)
        assert report["all/treated"][seed] == 27


def test_reset_of_everything_but_the_target_network():
    """Every parameter is drawn anew, the optimizer's state and the target network stay if asked to."""
    before, trees, _, _ = outcome("reset_all")
    for seed in range(SEEDS):
        assert_same(unstack(trees.variables["params"], seed), FRESH)
        assert_same(unstack(trees.target["params"], seed), random_net(50 + seed))
        assert_moments(before, trees.opt_state, filled(True), seed, cleared=False)


def test_reset_can_leave_recurrent_weights():
    """What a recurrent layer reads through stays, its readers and all others are drawn anew."""
    config = AgentConfig()
    layers = agents.neuron_layers(config)
    network = agents.AgentNetwork(4, config)
    arguments = (jnp.zeros((1, 2, 3)), jnp.zeros((1,), bool), agents.initial_hidden(config, (2,)))
    graph = make_graph(layers, lambda key: {"agent": network.init(key, *arguments)["params"]})
    params = jax.tree.map(jnp.ones_like, graph.draw(jax.random.key(0)))
    method = reset(graph, "except_recurrent", optimizer_state="keep")
    _, trees, _ = method.apply(jax.random.key(1), (), Trees({"params": params}))
    kept = jax.tree.map(lambda leaf: bool((leaf == 1).all()), trees.variables["params"]["agent"])
    assert all(jax.tree.leaves(kept["gru"]))
    assert not any(jax.tree.leaves((kept["hidden_1"], kept["output"])))


def test_the_three_ways_to_shrink_and_perturb():
    """Ash and Adams add a share of a fresh draw, MARR of the initial parameters, the continuous one noise of the given size."""
    for seed, net in enumerate(nets()):
        before, trees, _, _ = outcome("shrink_perturb")
        expected = jax.tree.map(lambda old, new: np.float32(0.7) * old + np.float32(0.1) * new, net, FRESH)
        assert_close(unstack(trees.variables["params"], seed), expected)
        assert_same(unstack(trees.target["params"], seed), random_net(50 + seed))
        assert_moments(before, trees.opt_state, filled(True), seed, cleared=False)

        _, trees, _, state = outcome("shrink_perturb_initial")
        assert_same(unstack(state, seed), net)
        assert_close(unstack(trees.variables["params"], seed), net)
        expected = jax.tree.map(lambda old, first: 0.6 * old + 0.4 * first, random_net(50 + seed), net)
        assert_close(unstack(trees.target["params"], seed), expected)

        _, trees, _, _ = outcome("shrink_perturb_continuous")
        noise = jax.tree.map(lambda new, old: (new - 0.5 * old) / 0.25, unstack(trees.variables["params"], seed), net)
        values = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(noise)])
        assert abs(values.mean()) < 5 / np.sqrt(values.size)
        assert 0.7 < values.std() < 1.3
    assert METHODS["shrink_perturb_continuous"]().every_update
    assert not METHODS["shrink_perturb"]().every_update


@pytest.mark.parametrize("name", ["redo", "regrama", "reborn_code", "shrink_perturb_continuous"])
def test_seeds_do_not_see_each_other(name):
    """Another network in the first seed changes no bit of the others; one seed by itself gets what it gets among others."""
    others = run(function(name), [random_net(11), *nets()[1:]])
    alone = run(function(name), [nets()[2]] * SEEDS)
    for seed in (1, 2):
        one, other = (jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf[seed]), result) for result in (outcome(name), others))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert_same(unstack(alone[1].variables["params"], 2), unstack(outcome(name)[1].variables["params"], 2))
    first, changed = (unstack(result[1].variables["params"], 0) for result in (outcome(name), others))
    assert any((one != other).any() for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(changed), strict=True))


def test_nothing_happens_before_the_first_batch():
    """Without a batch since the last intervention nobody is judged, and not a bit changes."""
    params = {"net": jax.tree.map(jnp.asarray, nets()[0])}
    for name in ("redo", "regrama", "regrama_code", "reborn_code"):
        method = METHODS[name]()
        _, trees, report = jax.jit(method.apply)(jax.random.key(0), method.init({"params": params}), Trees({"params": params}))
        jax.tree.map(np.testing.assert_array_equal, trees.variables["params"], params)
        assert all(value == 0 for value in report.values())


def test_a_traced_threshold_gives_what_a_number_gives():
    """Thresholds can be swept inside one compiled program."""
    state = {name: {"absolute": jnp.arange(8.0), "count": jnp.ones(1)} for name in LAYERS}
    params = {"net": jax.tree.map(jnp.asarray, nets()[0])}

    def treated(tau):
        return redo(GRAPH, tau).apply(jax.random.key(0), state, Trees({"params": params}))[2]["net/a/treated"]

    np.testing.assert_array_equal(jax.vmap(treated)(jnp.array([0.0, 0.3, 10.0])), [1, 2, 8])


def test_activations_are_tried_out_even_while_something_else_is_traced():
    """A method may be made inside a traced and mapped function."""
    graph = make_graph([layer._replace(activation=lambda x: jnp.maximum(x, 0)) for layer in GRAPH.layers], GRAPH.draw)

    def both(tau):
        return len({reborn(graph, tau=tau).name, self_normalized_resets(graph, tau).name})

    np.testing.assert_array_equal(jax.jit(jax.vmap(both, out_axes=None))(jnp.array([0.1, 0.2])), 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: redo(GRAPH, -0.1), "tau: expected a number at least 0, got -0.1"),
        (lambda: redo(GRAPH, window="lst"), "unknown window 'lst'; did you mean 'last'"),
        (lambda: redo(GRAPH, max_fraction=0.0), "max_fraction: expected a number above 0 and at most 1"),
        (lambda: redo(GRAPH, layers="net/x"), "no layer or network 'net/x'"),
        (lambda: regrama(GRAPH, score="activations"), "did you mean 'activation'"),
        (lambda: regrama(GRAPH, outgoing="zero"), "did you mean 'zeros'"),
        (lambda: reborn(GRAPH, "papers"), "did you mean 'paper'"),
        (lambda: reborn(GRAPH, tau=0.5, beta=0.4), "beta: expected a number at least 0.5"),
        (lambda: reborn(smooth_graph(), layers="net/a"), "no ReBorn on net/a: its activation must satisfy"),
        (lambda: reborn(smooth_graph()), "no ReBorn on any of all"),
        (lambda: reset(GRAPH, "lats"), "did you mean 'last'"),
        (lambda: shrink_perturb(GRAPH, "ash"), "did you mean 'ash_adams'"),
        (lambda: shrink_perturb(GRAPH, shrink=1.5), "shrink: expected a number at least 0 and at most 1"),
        (lambda: shrink_perturb(GRAPH, "initial", perturb=0.1), "leave it out"),
        (lambda: shrink_perturb(GRAPH, "continuous", optimizer_state="fresh"), "take 'keep'"),
        (lambda: chain(layer_norm(GRAPH), reborn(GRAPH)), "chain: reborn keeps what its units give together"),
    ],
)
def test_refusals(make, message):
    """What cannot work is refused when the method is made."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def smooth_graph():
    """The graph with activations for which ReBorn is not exact."""
    return make_graph([layer._replace(activation=jax.nn.elu) for layer in GRAPH.layers], GRAPH.draw)

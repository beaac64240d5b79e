"""KNIFE's bookkeeping, one intervention at a time: slots, reports, recycling, gradients, options, refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from knife_jax.config import AgentConfig
from knife_jax.networks import agents, mixers
from knife_jax.networks.neurons import dense_layer
from knife_jax.plasticity.graph import make_graph
from knife_jax.plasticity.knife import knife
from knife_jax.plasticity.method import Trees
from tests.composites import ACTIONS, INPUTS, ROWS, Stack, applied, drawing, firing, stack_graph, stacked, trained


class Small:
    """KNIFE on two hidden layers, compiled once per set of options."""

    def __init__(self, **options):
        self.module, self.graph = stack_graph((8, 6))
        self.method = knife(self.graph, **{"reserve": 1.0, "max_fraction": 1.0, "reference": "error"} | options)
        self.tx = self.method.wrap_optimizer(optax.adam(1e-2))
        self.lifted = applied(self.method, self.module)
        self.values = jax.jit(self.lifted)
        self.draw = drawing((8, 6))
        self.fire = jax.jit(self._fire)
        self.measure = jax.jit(self._measure)
        self.data = jnp.asarray(np.random.default_rng(7).normal(size=(ROWS, INPUTS)), float)

    def start(self, seed=0):
        """Variables and optimizer state."""
        variables = self.method.allocate({"params": self.draw(jax.random.key(seed))})
        return variables, self.tx.init(variables["params"])

    def masks(self, *units):
        """For each layer, a mask of the given units."""
        return {
            layer.name: jnp.zeros(layer.size, bool).at[jnp.array(u, int)].set(True)
            for layer, u in zip(self.graph.layers, units, strict=True)
        }

    def _measure(self, variables):
        """The state after one gradient on the data."""
        state = self.method.init(variables)

        def loss(params, taps):
            return jnp.square(self.lifted(variables | {"params": params, "taps": taps}, self.data)).mean()

        grads, taps = jax.grad(loss, argnums=(0, 1))(variables["params"], self.method.taps(state))
        return self.method.observe(state, variables, grads, taps | {"error": jnp.ones(())})

    def _fire(self, key, state, masks, variables, opt_state):
        """Variables, optimizer state and report after a firing on the masks."""
        activity = {name: jnp.where(mask, 0.0, 1e3) + 1e-3 * jnp.arange(mask.size) for name, mask in masks.items()}
        _, trees, report = self.method.apply(key, firing(state, activity), Trees(variables, None, opt_state), self.tx)
        return trees.variables, trees.opt_state, report


@functools.cache
def small(**options):
    """See `Small`."""
    return Small(**options)


def moved(variables, seed=0, size=0.1):
    """The same variables with every live weight moved."""
    leaves, structure = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(seed)
    noise = [leaf + size * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return variables | {"params": structure.unflatten(noise)}


def same_bits(first, second):
    """Whether two trees are equal bit for bit."""
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), first, second)))


def test_nothing_fires_nothing_changes_and_seeds_keep_their_own_masks():
    """Seeds side by side: each takes the slots its own mask asks for; those that do not fire keep every bit."""
    net = small(layers="net/hidden_0")
    variables, opt_state = stacked(*(net.start(seed) for seed in range(3)))
    variables = moved(variables)
    fired = [{"net/hidden_0": jnp.arange(8) < number} for number in (2, 0, 3)]
    fire = jax.jit(jax.vmap(lambda key, masks, v, o: net._fire(key, net.method.init(v), masks, v, o)))
    after, opt_after, report = fire(jax.random.split(jax.random.key(1), 3), stacked(*fired), variables, opt_state)
    np.testing.assert_array_equal(report["net/hidden_0/reserve_in_use"], [2, 0, 3])
    for tree, new in ((variables, after), (opt_state, opt_after)):
        assert same_bits(*(jax.tree.map(lambda leaf: leaf[1], side) for side in (tree, new)))
        assert not same_bits(*(jax.tree.map(lambda leaf: leaf[0], side) for side in (tree, new)))


def test_reserve_never_moves():
    """100 steps with momentum, decay and clipping: no gradient, no optimizer memory for it; its units compute what they did."""
    net = small()
    variables, opt_state = net.start()
    variables, _, _ = net.fire(jax.random.key(1), net.method.init(variables), net.masks(range(4), range(3)), variables, opt_state)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.adamw(1e-2, weight_decay=0.1))

    def loss(params, reserve):
        return jnp.square(net.lifted({"params": params, "reserve": reserve}, net.data) - 1.0).mean()

    grads = jax.eval_shape(jax.grad(loss), variables["params"], variables["reserve"])
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    after, _ = jax.jit(lambda v: trained(tx, loss, v, tx.init(v["params"]), 100))(variables)
    assert same_bits(variables["reserve"], after["reserve"])
    assert not same_bits(variables["params"]["net"]["hidden_0"], after["params"]["net"]["hidden_0"])
    errors = [float(jnp.square(net.values(state, net.data) - 1.0).mean()) for state in (variables, after)]
    assert errors[1] < 0.5 * errors[0]


def test_unmoved_unit_uses_its_slot_again():
    """Fired twice in a row it takes one slot; moved in between, two."""
    net, report = small(), {}
    for move, slots in ((False, 2), (True, 4)):
        variables, opt_state = net.start()
        for round_key in jax.random.split(jax.random.key(2)):
            before = net.values(variables, net.data)
            variables, opt_state, report = net.fire(round_key, net.method.init(variables), net.masks([1, 3], []), variables, opt_state)
            np.testing.assert_allclose(net.values(variables, net.data), before, rtol=0, atol=1e-6 * float(jnp.abs(before).max()))
            variables = moved(variables) if move else variables
        assert int(report["net/hidden_0/reserve_in_use"]) == slots
        assert int(report["net/hidden_0/reused"]) == (0 if move else 2)
        assert int(report["net/hidden_0/treated"]) == 2


def test_dead_units_need_no_slot():
    """Units silent on the whole window get fresh incoming and zero outgoing weights; the function stays on what the window saw."""
    net = small()
    variables, opt_state = net.start()
    layer = variables["params"]["net"]["hidden_0"]
    layer["bias"] = layer["bias"].at[jnp.array([2, 5])].set(-100.0)
    before = net.values(variables, net.data)
    after, _, report = net.fire(jax.random.key(3), net.measure(variables), net.masks([1, 2], []), variables, opt_state)
    counts = {name: int(report[f"net/hidden_0/{name}"]) for name in ("treated", "dead", "reserve_in_use", "stagnant")}
    assert counts == {"treated": 2, "dead": 1, "reserve_in_use": 1, "stagnant": 2}
    new = after["params"]["net"]
    assert (new["hidden_1"]["kernel"][2] == 0).all()
    assert new["hidden_0"]["bias"][5] == -100.0 < new["hidden_0"]["bias"][2]
    np.testing.assert_allclose(net.values(after, net.data), before, rtol=0, atol=1e-6 * float(jnp.abs(before).max()))


@pytest.mark.parametrize("select", ["dormant", "inactive"])
def test_units_low_in_another_measure_are_treated(select):
    """Silent units are dormant, and units that nobody reads are inactive: two are found, others are left alone, the function stays."""
    net = small(select=select, threshold=1e-6, layers="net/hidden_0", dead_units=False)
    variables, opt_state = net.start()
    layer, reader = (variables["params"]["net"][name] for name in ("hidden_0", "hidden_1"))
    if select == "dormant":
        layer["bias"] = layer["bias"].at[jnp.array([2, 5])].set(-100.0)
    else:
        reader["kernel"] = reader["kernel"].at[jnp.array([2, 5])].set(0.0)
    before, state = net.values(variables, net.data), net.measure(variables)
    _, trees, report = jax.jit(lambda key: net.method.apply(key, state, Trees(variables, None, opt_state), net.tx))(jax.random.key(3))
    assert int(report["net/hidden_0/treated"]) == 2
    redrawn = (trees.variables["params"]["net"]["hidden_0"]["bias"] != layer["bias"]).nonzero()[0]
    np.testing.assert_array_equal(redrawn, [2, 5])
    np.testing.assert_allclose(net.values(trees.variables, net.data), before, rtol=0, atol=1e-6 * float(jnp.abs(before).max()))


def test_reports_add_up():
    """Stagnant and not make the layer; treated and reserve_full make what was chosen; slots in use grow by what needed one."""
    net = small(reserve=0.5, max_fraction=0.75, layers="net/hidden_1")
    variables, opt_state = net.start()
    in_use, full = 0, 0
    for seed in range(4):
        mask = jnp.asarray(np.random.default_rng(seed).random(6) < 0.8)
        fired = {"net/hidden_1": mask}
        variables, opt_state, report = net.fire(jax.random.key(seed), net.method.init(variables), fired, variables, opt_state)
        said = {name.rsplit("/")[-1]: int(value) for name, value in report.items()}
        assert said["stagnant"] == int(mask.sum()) == 6 - said["not_stagnant"]
        assert said["treated"] + said["reserve_full"] == min(said["stagnant"], 4)
        assert said["reserve_in_use"] - in_use == said["treated"] - said["reused"] - said["dead"]
        in_use, full = said["reserve_in_use"], full + said["reserve_full"]
        variables = moved(variables, seed)
    assert in_use == 3
    assert full > 0


def test_recycling_frees_what_contributes_least_and_bounds_the_error():
    """Slots with the least mean |h| times outgoing norm are emptied; the report bounds the mean change of what the next layer reads."""
    net = small(layers="net/hidden_1", when_full="recycle", dead_units=False)
    variables, opt_state = net.start()
    for seed in range(2):
        units = range(3 * seed, 3 * seed + 3)
        fired = {"net/hidden_1": jnp.zeros(6, bool).at[jnp.array(units)].set(True)}
        variables, opt_state, _ = net.fire(jax.random.key(seed), net.measure(variables), fired, variables, opt_state)
        variables = moved(variables, seed, 0.3)
    fired, before, old = {"net/hidden_1": jnp.arange(6) < 2}, net.values(variables, net.data), variables["reserve"]
    after, _, report = net.fire(jax.random.key(9), net.measure(variables), fired, variables, opt_state)
    said = {name.rsplit("/")[-1]: float(value) for name, value in report.items()}
    assert (said["recycled"], said["reserve_full"], said["treated"], said["reserve_in_use"]) == (2, 0, 2, 6)
    cost = _costs(variables, net.data)
    freed = np.flatnonzero((old["net/hidden_1"]["columns"] != after["reserve"]["net/hidden_1"]["columns"]).any(0)[:6])
    np.testing.assert_array_equal(np.sort(freed), np.sort(np.argsort(cost)[:2]))
    np.testing.assert_allclose(said["recycle_error"], np.sort(cost)[:2].sum(), rtol=1e-4)
    change = np.asarray(net.values(after, net.data) - before)
    assert 1e-4 < np.linalg.norm(change, axis=-1).mean() <= said["recycle_error"] * (1 + 1e-5)


def test_history_fires_when_a_whole_layer_falls_behind_until_the_reserve_is_used_up():
    """All units equally stuck: none is below the layer's mean; below what the layer once did all are, half a layer at a time."""
    said = {}
    for reference in ("layer", "history"):
        net = small(reference=reference, layers="net/hidden_1", max_fraction=0.5, reserve=0.75, dead_units=False)
        variables, opt_state = net.start()
        state = net.method.init(variables)
        stuck = {"net/hidden_1": jnp.full(6, 1e-3)}
        state = state._replace(window=state.window._replace(peak={"net/hidden_1": jnp.ones(())}))
        fire = jax.jit(lambda key, state, *trees, net=net: net.method.apply(key, state, Trees(trees[0], None, trees[1]), net.tx))
        for number in range(3):
            state = state._replace(window=state.window._replace(total=stuck, count=jnp.ones(())))
            state, trees, report = fire(jax.random.key(number), state, moved(variables, number), opt_state)
            variables, opt_state = trees.variables, trees.opt_state
            counts = ("stagnant", "treated", "reserve_full", "reserve_in_use")
            said[reference, number] = [int(report[f"net/hidden_1/{name}"]) for name in counts]
    assert [said["layer", number] for number in range(3)] == [[0, 0, 0, 0]] * 3
    assert [said["history", number] for number in range(3)] == [[6, 3, 0, 3], [6, 2, 1, 5], [6, 0, 3, 5]]


def _costs(variables, data):
    """Of every slot of `hidden_1`, mean |h| of K and of C times the norms of their rows; layers before it are plain."""
    params, reserve = jax.tree.map(np.asarray, (variables["params"]["net"], variables["reserve"]))
    features = np.maximum(np.asarray(data) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    block, rows = reserve["net/hidden_1"], reserve["net/output"]["rows"]
    means = np.maximum(features @ block["columns"] + block["bias"], 0).mean(0)
    return (means * np.linalg.norm(rows, axis=-1)).reshape(2, -1).sum(0)


def test_recycling_spares_the_slots_of_units_that_use_theirs_again():
    """A reserve full of unmoved pairs, fired again: nothing is recycled and the function stays."""
    net = small(layers="net/hidden_1", when_full="recycle", dead_units=False)
    variables, opt_state = net.start()
    fired = {"net/hidden_1": jnp.arange(6) < 3}
    for units in (fired["net/hidden_1"], ~fired["net/hidden_1"]):
        masks = {"net/hidden_1": units}
        variables, opt_state, _ = net.fire(jax.random.key(1), net.measure(variables), masks, variables, opt_state)
    kernel = variables["params"]["net"]["hidden_1"]["kernel"]
    variables["params"]["net"]["hidden_1"]["kernel"] = kernel.at[:, 3:].add(0.3)
    before = net.values(variables, net.data)
    everyone = {"net/hidden_1": jnp.ones(6, bool)}
    after, _, report = net.fire(jax.random.key(2), net.measure(variables), everyone, variables, opt_state)
    said = {name.rsplit("/")[-1]: float(value) for name, value in report.items()}
    assert said["reused"] == 3 == said["recycled"]
    change = np.linalg.norm(np.asarray(net.values(after, net.data) - before), axis=-1).mean()
    assert change <= said["recycle_error"] * (1 + 1e-5)


def plain_composite(variables, inputs, composite):
    """Values by the definition, no partners: live units plus K minus C; the reserve's weights take no gradient."""
    params, reserve = variables["params"]["net"], jax.lax.stop_gradient(variables["reserve"])
    frozen_inputs = jnp.zeros((*inputs.shape[:-1], 0))
    for index in range(2):
        layer, block = params[f"hidden_{index}"], reserve[f"net/hidden_{index}"]
        everything = jnp.concatenate([inputs, frozen_inputs], axis=-1)
        kernel = jnp.concatenate([layer["kernel"], block["rows"]]) if "rows" in block else layer["kernel"]
        live = nn.relu(everything @ kernel + layer["bias"][None])
        knowledge, compensation = jnp.split(nn.relu(everything @ block["columns"] + block["bias"][None]), 2, axis=-1)
        if composite == "separate":
            inputs, frozen_inputs = live, jnp.concatenate([knowledge, -compensation], axis=-1)
        else:
            inputs = live + (knowledge - compensation) @ (jax.nn.one_hot(block["owner"], live.shape[-1]) * block["used"][:, None])
    rows = reserve["net/output"]["rows"] if composite == "separate" else jnp.zeros((0, ACTIONS))
    kernel = jnp.concatenate([params["output"]["kernel"], rows])
    return jnp.concatenate([inputs, frozen_inputs], axis=-1) @ kernel + params["output"]["bias"][None]


@pytest.mark.parametrize("composite", ["separate", "shared"])
def test_gradients_are_those_of_the_definition(composite):
    """Values and gradients, for live weights and inputs, equal those of h_A V_A - h_C V_C + h_K V_K written out, after two firings."""
    net = small(composite=composite)
    variables, opt_state = net.start()
    for seed in range(2):
        masks = net.masks([0, 1, 2], [1, 2])
        variables, opt_state, _ = net.fire(jax.random.key(seed), net.method.init(variables), masks, variables, opt_state)
        variables = moved(variables, seed, 0.3)

    def loss(function):
        return lambda params, inputs: jnp.square(function(variables | {"params": params}, inputs)).mean()

    at = (variables["params"], net.data)
    lifted = jax.jit(jax.value_and_grad(loss(net.lifted), argnums=(0, 1)))(*at)
    plain = jax.jit(jax.value_and_grad(loss(lambda v, x: plain_composite(v, x, composite)), argnums=(0, 1)))(*at)
    for got, expected in zip(jax.tree.leaves(lifted), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_frozen_weights_cost_no_gradient():
    """The compiled gradient has the matrix products of live weights and of what passes through frozen ones, and no others."""
    rows, inputs, size = 128, 48, 32
    module = Stack((size, size))
    draw = lambda key: {"net": module.init(key, jnp.zeros((1, inputs)))["params"]}  # noqa: E731
    layers = [dense_layer("net", "hidden_0", "hidden_1", size), dense_layer("net", "hidden_1", "output", size)]
    method = knife(make_graph(layers, draw), reserve=1.0)
    variables, data = method.allocate({"params": draw(jax.random.key(0))}), jnp.ones((rows, inputs))
    values = applied(method, module)

    def gradient(params, reserve):
        return jax.grad(lambda p: values({"params": p, "reserve": reserve}, data).sum())(params)

    compiled = jax.jit(gradient).lower(variables["params"], variables["reserve"]).compile()
    extended = size + 2 * size  # live, K and C
    forward = inputs * extended + extended * extended + extended * ACTIONS
    weights = inputs * size + size * size + size * ACTIONS
    through = extended * extended + extended * ACTIONS
    frozen_weights = forward - weights
    measured = dict(compiled.cost_analysis() or {})["flops"] / (2 * rows)
    assert 0.97 * (forward + weights) < measured < 1.06 * (forward + weights + through)
    assert measured < forward + weights + through + 0.2 * frozen_weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "net/hiden_0"}, "did you mean 'net/hidden_0'"),
        ({"reserve": 0.0}, "reserve: a positive number"),
        ({"reserve": -1.0}, "reserve: a positive number"),
        ({"reserve": 1.0, "interventions": 5}, "may run out"),
        ({"interventions": 100}, "may run out"),
        ({"max_fraction": 0.0}, "max_fraction"),
        ({"max_fraction": 1.5}, "max_fraction"),
    ],
)
def test_options_that_cannot_be(options, message):
    """Unknown layers, reserves that are nothing or must run out, fractions that are none."""
    with pytest.raises(ValueError, match=message):
        knife(stack_graph((8, 6))[1], **options)


def test_planned_reserves_are_taken():
    """Enough for what is planned, or less if it was said what happens then."""
    graph = stack_graph((8, 6))[1]
    planned: list[tuple[dict[str, Any], int]] = [({"interventions": 5}, 10), ({"interventions": 100, "when_full": "skip"}, 24), ({}, 8)]
    for options, slots in planned:
        variables = jax.eval_shape(knife(graph, **options).allocate, {"params": jax.eval_shape(graph.draw, jax.random.key(0))})
        assert variables["reserve"]["net/hidden_0"]["used"].shape == (slots,)


def test_layers_that_cannot_carry_composites():
    """By name they are refused with the reason; among all they are left out; kernels must fit."""
    config = AgentConfig(hidden_size=8)
    agent = agents.AgentNetwork(ACTIONS, config)
    views, starts = jnp.zeros((1, 1, 1, INPUTS)), jnp.zeros((1, 1), bool)
    hidden = agents.initial_hidden(config, (1, 1))
    graph = make_graph(
        agents.neuron_layers(config), lambda key: {"agent": agent.init(key, views, starts, hidden)["params"]}, mixers.REFUSED
    )
    with pytest.raises(ValueError, match="agent/gru: with shared outgoing weights"):
        knife(graph, layers="agent/gru", composite="shared")
    with pytest.raises(ValueError, match="mixer/mixing: the units of the monotone mixing layer"):
        knife(graph, layers="mixer/mixing")
    variables = graph.draw(jax.random.key(0))
    assert set(knife(graph).allocate({"params": variables})["reserve"]) == {"agent/hidden_1", "agent/gru/input"}
    _, stack = stack_graph((8, 6))
    for change, message in (({"normalised": True}, "normalisation"), ({"leaks": True}, "read by more")):
        changed = make_graph([stack.layers[0]._replace(**change), stack.layers[1]], stack.draw)
        with pytest.raises(ValueError, match=message):
            knife(changed, layers="net/hidden_0")
        assert [layer.name for layer in make_graph([changed.layers[1]], stack.draw).layers] == ["net/hidden_1"]
        assert "net/hidden_0" not in knife(changed).allocate({"params": stack.draw(jax.random.key(0))})["reserve"]
    with pytest.raises(ValueError, match=r"net/output/kernel has shape \(6, 3\), expected 8 units on the first axis"):
        make_graph([stack.layers[0]._replace(outgoing=(("net", "output", "kernel"),))], stack.draw)

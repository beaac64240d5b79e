"""Composites on QMIX's mixing units: the same team value at the mean of the agents' values, monotone always; and how open the units are."""

import functools
from dataclasses import replace
from typing import Any, Literal

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from knife_jax.config import Config, LearnerConfig, QmixConfig
from knife_jax.networks import mixers
from knife_jax.networks.mixers import QMIX, MixerInputs
from knife_jax.plasticity import chain, diagnostics, taps
from knife_jax.plasticity.graph import flat, make_graph
from knife_jax.plasticity.knife import knife
from knife_jax.plasticity.knife_mixing import knife_mixing
from knife_jax.plasticity.method import Trees
from tests.composites import stacked
from tests.test_knife import same_bits

ROWS, AGENTS, ACTIONS, STATES, UNITS = 16, 3, 2, 4, 8
NAME = "mixer/mixing"


class Net:
    """A small QMIX under `knife_mixing`, compiled once per set of options."""

    def __init__(self, hypernet_layers: Literal[1, 2] = 2, **options: Any):
        settings = QmixConfig(embed_size=UNITS, hypernet_size=6, hypernet_layers=hypernet_layers)
        config = Config(learner=LearnerConfig(mixer="qmix"), qmix=settings)
        self.module = QMIX(settings)
        self.graph = make_graph(mixers.neuron_layers(config), self._draw, mixers.REFUSED, mixers.mixing_layer(config))
        defaults: dict[str, Any] = {"threshold": 1e9, "reserve": 1.0, "max_fraction": 0.5}
        self.method = knife_mixing(self.graph, **defaults | options)
        self.tx = self.method.wrap_optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2, weight_decay=1e-2)))
        self.lifted = self.method.lift(self.module.apply, ("mixer",))
        self.draw, self.fire, self.values = jax.jit(self._draw), jax.jit(self._fire), jax.jit(self.total)
        self.learn, self.slopes = jax.jit(self._learn), jax.jit(self._slopes)

    def _draw(self, key):
        q, state = jnp.zeros((1, AGENTS)), jnp.zeros((1, STATES))
        return {"mixer": self.module.init(key, MixerInputs(q, q, jnp.zeros((1, AGENTS, ACTIONS)), state))["params"]}

    def start(self, seed, scale=1.0):
        """Variables and optimizer state, weights so many times as large as drawn."""
        variables = self.method.allocate({"params": jax.tree.map(lambda leaf: scale * leaf, self.draw(jax.random.key(seed)))})
        return variables, self.tx.init(variables["params"])

    def total(self, variables, q, state):
        """Q_tot `[N]`."""
        inputs = MixerInputs(q, q, jnp.zeros((*q.shape, ACTIONS)), state)
        return self.lifted(variables | {"params": variables["params"]["mixer"]}, inputs)[:, 0]

    def _slopes(self, variables, q, state):
        return jax.grad(lambda q: self.total(variables, q, state).sum())(q)

    def observed(self, variables, q, state):
        """The cure's state after one gradient on the data."""
        memory = self.method.init(variables)

        def loss(params, seen):
            return jnp.square(self.total(variables | {"params": params, "taps": seen}, q, state)).mean()

        grads, seen = jax.grad(loss, argnums=(0, 1))(variables["params"], self.method.taps(memory))
        return self.method.observe(memory, variables, grads, seen | {"error": jnp.ones(())})

    def _fire(self, key, variables, target, opt_state, q, state):
        """Both networks, optimizer state and report after an intervention on what the data showed."""
        _, trees, said = self.method.apply(key, self.observed(variables, q, state), Trees(variables, target, opt_state), self.tx)
        return trees.variables, trees.target, trees.opt_state, {name.removeprefix(f"{NAME}/"): value for name, value in said.items()}

    def _learn(self, variables, opt_state, q, state):
        """Variables and optimizer state after 20 steps."""

        def step(carry, _):
            params, opt_state = carry
            grads = jax.grad(lambda params: jnp.square(self.total(variables | {"params": params}, q, state) - 3.0).mean())(params)
            updates, opt_state = self.tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = jax.lax.scan(step, (variables["params"], opt_state), length=20)
        return variables | {"params": params}, opt_state


net = functools.cache(Net)


def data(seed, mean=-2.0):
    """Agents' values `[N, A]` and states `[N, G]`."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(mean + rng.normal(size=(ROWS, AGENTS)), float), jnp.asarray(rng.normal(size=(ROWS, STATES)), float)


@pytest.mark.parametrize(("hypernet_layers", "centred"), [(2, False), pytest.param(1, True, marks=pytest.mark.slow)])
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 1.0, 5.0]))
def test_team_value_stays_at_the_mean_and_monotone_everywhere(hypernet_layers, centred, seed, scale):
    """Firing after firing with training between, online and target: the same where every q is its mean, in any state; no negative slope."""
    small = net(hypernet_layers, centred=centred)
    (variables, opt_state), (target, _) = small.start(seed, scale), small.start(seed + 1, scale)
    for number in range(3):
        q, state = data(seed + number)
        at_mean, far = jnp.broadcast_to(q.mean(axis=0), q.shape), 10 * q
        before = [small.values(side, at_mean, state) for side in (variables, target)]
        fired = small.fire(jax.random.key(seed + number), variables, target, opt_state, q, state)
        for old, side, variables_before in zip(before, fired[:2], (variables, target), strict=True):
            size = jnp.maximum(jnp.abs(old).max(), 1.0)
            assert jnp.abs(small.values(side, at_mean, state) - old).max() <= 3e-6 * size
            assert number > 1 or not same_bits(side["params"], variables_before["params"])
        variables, target, opt_state, said = fired
        assert said["treated"] == (4 if number < 2 else 0)
        variables, opt_state = small.learn(variables, opt_state, q, state)
        assert same_bits(variables["reserve"], fired[0]["reserve"])
        for side in (variables, target):
            assert min(small.slopes(side, values, state).min() for values in (q, far, -far)) >= 0


@pytest.mark.parametrize("hypernet_layers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_change_elsewhere_is_within_the_reported_bound(hypernet_layers):
    """For one state, and values one spread away from their mean: no larger than what is reported, and not zero."""
    small = net(hypernet_layers)
    variables, opt_state = small.start(3)
    _, state = data(0)
    state = jnp.broadcast_to(state[:1], state.shape)
    spread = jnp.array([0.5, 1.0, 2.0])
    q = jnp.where(jnp.arange(ROWS)[:, None] % 2 == 0, -2.0, -2.0 + 2 * spread[None])
    after, *_, said = small.fire(jax.random.key(1), variables, None, opt_state, q, state)
    change = jnp.abs(small.values(after, q, state) - small.values(variables, q, state))
    assert 1e-3 < change.max() <= said["change"] + 1e-5


def test_no_fire_no_change_and_seeds_keep_their_own_masks():
    """Seeds side by side with thresholds of their own: none, some and all of half the units; who does not fire keeps every bit."""
    starts, (q, state) = [net().start(seed) for seed in range(3)], data(5)

    def fire(threshold, key, variables, opt_state):
        small = Net.__new__(Net)
        small.__dict__ = net().__dict__ | {"method": knife_mixing(net().graph, threshold, 1.0, max_fraction=0.5)}
        return small._fire(key, variables, variables, opt_state, q, state)

    variables, opt_state = (stacked(*trees) for trees in zip(*starts, strict=True))
    run = jax.jit(jax.vmap(fire))
    after, target, opt_after, said = run(jnp.array([0.0, 1e9, 1e9]), jax.random.split(jax.random.key(0), 3), variables, opt_state)
    np.testing.assert_array_equal(said["treated"], [0, 4, 4])
    np.testing.assert_array_equal(said["reserve_in_use"], [0, 4, 4])
    for old, new in ((variables, after), (variables, target), (opt_state, opt_after)):
        assert same_bits(*(jax.tree.map(lambda leaf: leaf[0], side) for side in (old, new)))
        assert not same_bits(*(jax.tree.map(lambda leaf: leaf[1], side) for side in (old, new)))


def closed(variables, units):
    """The same network with mixing units that are far below zero for all inputs."""
    params = variables["params"]["mixer"]
    bias = params["b1_output"]["bias"].at[jnp.array(units)].set(-50.0)
    return variables | {"params": {"mixer": params | {"b1_output": params["b1_output"] | {"bias": bias}}}}


@pytest.mark.parametrize("choose", ["saturated", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stagnant", "random"))])
def test_who_is_treated(choose):
    """Closed units by their slope and by their activity, and as many others at random."""
    small = net(threshold=1e-3 if choose == "stagnant" else 1e-6, choose=choose)
    variables, opt_state = small.start(0)
    variables, (q, state) = closed(variables, [1, 4]), data(0, mean=2.0)
    treated = []
    for seed in range(4):
        after, *_, said = small.fire(jax.random.key(seed), variables, None, opt_state, q, state)
        moved = (after["params"]["mixer"]["b1_output"]["kernel"] != variables["params"]["mixer"]["b1_output"]["kernel"]).all(axis=0)
        assert moved.sum() == said["treated"] == 2
        treated.append(tuple(np.flatnonzero(moved)))
    assert (set(treated) == {(1, 4)}) == (choose != "random")
    weights = [side["params"]["mixer"]["w1_output"]["kernel"].reshape(-1, AGENTS, UNITS) for side in (variables, after)]
    assert set(np.flatnonzero((weights[0] != weights[1]).all(axis=(0, 1)))) == set(treated[-1])


@pytest.mark.slow
def test_history_sees_what_the_layer_does_not():
    """Where all units are equally stuck, none is below the layer's mean, all are below what the layer once did."""
    small = {name: net(choose="stagnant", reference=name, threshold=0.25) for name in ("layer", "history")}
    (variables, _), (q, state) = small["layer"].start(0), data(0)
    treated = {}
    for name, made in small.items():
        memory = made.observed(variables, q, state)
        total = {NAME: jnp.full(UNITS, 1e-3)}
        memory = memory._replace(window=memory.window._replace(total=total, peak={NAME: jnp.ones(())}))
        said = jax.jit(lambda memory, made=made: made.method.apply(jax.random.key(0), memory, Trees(variables), made.tx)[2])(memory)
        treated[name] = int(said[f"{NAME}/stagnant"])
    assert treated == {"layer": 0, "history": UNITS}


@pytest.mark.slow
def test_centred_units_start_open_however_large_the_values():
    """At values of -60 fresh units as drawn are closed, centred ones are not."""
    openness = {}
    for is_centred in (False, True):
        small = net(centred=is_centred, max_fraction=1.0)
        (variables, opt_state), (q, state) = small.start(0), data(0, mean=-60.0)
        state = jnp.broadcast_to(state[:1], state.shape)
        after = small.fire(jax.random.key(1), variables, None, opt_state, q, state)[0]
        seen = small.observed(after, q, state).seen[NAME]
        openness[is_centred] = float(taps.means(seen)["slope"].mean())
    assert openness[False] < 0.1 and openness[True] > 0.5


def test_a_full_reserve_leaves_units_alone():
    """What finds no slot is counted and keeps every bit."""
    small = net(reserve=0.25, max_fraction=0.25)
    (variables, opt_state), (q, state) = small.start(0), data(0)
    first, *_, said = small.fire(jax.random.key(0), variables, None, opt_state, q, state)
    assert (said["treated"], said["reserve_full"], said["reserve_in_use"]) == (2, 0, 2)
    second, *_, said = small.fire(jax.random.key(1), first, None, opt_state, q, state)
    assert (said["treated"], said["reserve_full"], said["reserve_in_use"]) == (0, 2, 2)
    assert same_bits(first, second)


def test_refusals():
    """No mixing layer, options that do not exist, a reserve that must run out, and two owners of the reserve."""
    graph = net().graph
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_fraction": 0.0}, "max_fraction"),
        ({"reserve": 0.5, "interventions": 10}, "reserve: .*may run out"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            knife_mixing(graph, **options)
    with pytest.raises(ValueError, match="knife_mixing: these networks have no monotone mixing layer"):
        knife_mixing(replace(graph, mixing=None))
    with pytest.raises(ValueError, match="knife and knife_mixing both put frozen units on mixer/w1_output, mixer/w2_output; part them"):
        chain(knife(graph), knife_mixing(graph))


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_chained_with_composites_on_other_layers(turned):
    """Both fire at once, in either order, each in its part of the reserve: the team value at the mean stays."""
    other = {"layers": "mixer/v_hidden", "threshold": 1e9, "reserve": 1.0, "dead_units": False}
    plain, (q, state) = net(), data(0)
    at_mean = jnp.broadcast_to(q.mean(axis=0), q.shape)
    parts = [knife(plain.graph, **other), plain.method]
    small = Net.__new__(Net)
    small.__dict__ = plain.__dict__ | {"method": chain(*(parts[::-1] if turned else parts))}
    small.lifted, small.tx = small.method.lift(small.module.apply, ("mixer",)), small.method.wrap_optimizer(optax.adam(1e-2))
    variables, opt_state = small.start(0)
    after, *_, said = jax.jit(small._fire)(jax.random.key(0), variables, None, opt_state, q, state)
    assert (said["knife/mixer/v_hidden/treated"], said["knife_mixing/mixer/mixing/treated"]) == (2, 4)
    values = jax.jit(small.total)
    np.testing.assert_allclose(values(after, at_mean, state), values(variables, at_mean, state), atol=3e-6)
    assert jnp.abs(values(after, q, state) - values(variables, q, state)).max() > 1e-3


def test_openness_of_the_mixing_layer():
    """Shares and slopes as numpy has them, over the samples that count; NaN without any."""
    small, (q, state) = net(), data(1)
    params = closed(small.start(2)[0], [0, 3])["params"]
    inputs = MixerInputs(q, q, jnp.zeros((*q.shape, ACTIONS)), state)

    def seen(counts):
        def total(blank):
            return small.lifted({"params": params["mixer"], "taps": blank, "tap_mask": counts}, inputs).sum()

        lifted_taps = {NAME: diagnostics.blank_taps(small.graph)[NAME]}
        return diagnostics.openness(jax.grad(total)(lifted_taps)[NAME])

    counts = np.arange(ROWS) < 11
    leaves = {"/".join(path[1:]): np.asarray(leaf, np.float64) for path, leaf in flat(params).items()}

    def head(name, features):
        return features @ leaves[f"{name}_output/kernel"] + leaves[f"{name}_output/bias"]

    features = np.maximum(np.asarray(state) @ leaves["w1_hidden/kernel"] + leaves["w1_hidden/bias"], 0)
    w1 = np.abs(head("w1", features)).reshape(ROWS, AGENTS, UNITS)
    given = (np.einsum("na,nau->nu", np.asarray(q), w1) + head("b1", np.asarray(state)))[counts]
    expected = {
        "saturated": (given < -3).all(axis=0).mean(),
        "saturation": (given < -3).mean(),
        "openness": np.exp(np.minimum(given, 0)).mean(),
    }
    got = jax.jit(seen)(jnp.asarray(counts))
    assert 0 < expected["saturated"] <= expected["saturation"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    assert all(np.isnan(value) for value in jax.jit(seen)(jnp.zeros(ROWS, bool)).values())

"""Slow release: the function is kept when a unit fires and then drifts to the live network's; slots come free again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax import Config, learner
from knife_jax.plasticity import reserve as frozen
from knife_jax.plasticity.knife import knife
from knife_jax.plasticity.method import Trees, chain, no_fading
from knife_jax.plasticity.regularisers import l2_init
from tests.composites import stack_graph, stacked
from tests.test_cures_in_training import ALWAYS, SMALL, VDN, primed
from tests.test_knife import moved, same_bits, small
from tests.test_knife_gru import BATCH, INPUTS, STARTS, TEAM, TIME, memory, moved_network, naive, unroller
from tests.test_knife_mixing import data, net

HALF_LIFE = 5.0


def live_alone(variables):
    """The same network with an empty reserve."""
    zeros = {"rows", "columns", "bias", "w2_kernel", "w2_bias"}
    blank = {
        name: {part: jnp.zeros_like(values) if part in zeros or part.startswith("ready_") else values for part, values in block.items()}
        for name, block in variables["reserve"].items()
    }
    return variables | {"reserve": blank}


@functools.cache
def fading(fade):
    """Compiled fading over so many gradient steps."""
    return jax.jit(lambda reserve, steps: jax.lax.fori_loop(0, steps, lambda _, reserve: fade(reserve), reserve))


def faded(method, variables, steps):
    """A network after so many gradient steps without learning."""
    return variables | {"reserve": fading(method.fade)(variables["reserve"], steps)}


def fire(made, variables, opt_state, masks, seed=0):
    """Variables and optimizer state after a firing on the masks, and what it said of `hidden_1`."""
    variables, opt_state, said = made.fire(jax.random.key(seed), made.method.init(variables), masks, variables, opt_state)
    return variables, opt_state, {name.rsplit("/")[-1]: int(value) for name, value in said.items() if "hidden_1" in name}


@pytest.mark.parametrize("age", [0, 3, 12])
def test_values_drift_from_the_old_function_to_that_of_the_live_units(age):
    """Behind the last layer exactly: f times what they were and 1 - f times what live units give alone, with f = 2^(-age / half-life)."""
    made = small(layers="net/hidden_1", dead_units=False, release_updates=HALF_LIFE)
    variables, opt_state = made.start()
    before = made.values(variables, made.data)
    after, *_ = fire(made, variables, opt_state, {"net/hidden_1": jnp.arange(6) < 4})
    np.testing.assert_allclose(made.values(after, made.data), before, atol=1e-6)
    alone, share = made.values(live_alone(after), made.data), 0.5 ** (age / HALF_LIFE)
    assert jnp.abs(alone - before).max() > 0.05
    later = made.values(faded(made.method, after, age), made.data)
    np.testing.assert_allclose(later, share * before + (1 - share) * alone, atol=2e-6)


def test_two_layers_end_as_live_units_alone():
    """Two layers fired twice, with other weights between: kept at each firing, and nothing but live units after many half-lives."""
    made = small(dead_units=False, release_updates=HALF_LIFE)
    variables, opt_state = made.start()
    for seed in range(2):
        variables = faded(made.method, moved(variables, seed), 2)
        before = made.values(variables, made.data)
        variables, opt_state, _ = fire(made, variables, opt_state, made.masks([0, 1, 2], [1, 2]), seed)
        np.testing.assert_allclose(made.values(variables, made.data), before, atol=3e-6)
    prepared = frozen.prepare(made.graph, variables["reserve"])
    jax.tree.map(np.testing.assert_array_equal, variables["reserve"], prepared)
    alone = made.values(live_alone(variables), made.data)
    gap = [float(jnp.abs(made.values(faded(made.method, variables, steps), made.data) - alone).max()) for steps in (0, 25, 100)]
    assert gap[0] > 0.05 and gap[0] > gap[1] > gap[2] and gap[2] < 1e-5
    once = fading(made.method.fade)(variables["reserve"], 1)
    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-6), once, frozen.prepare(made.graph, once))


def test_slots_are_free_again_after_ten_half_lives():
    """Not before; a unit that fires again meanwhile takes a slot of its own; what emptying a slot changes is a thousandth of its share."""
    made = small(layers="net/hidden_1", dead_units=False, release_updates=HALF_LIFE, reserve=0.5)
    variables, opt_state = made.start()
    three, nobody = {"net/hidden_1": jnp.arange(6) < 3}, {"net/hidden_1": jnp.zeros(6, bool)}
    after, opt_state, said = fire(made, variables, opt_state, three)
    assert (said["treated"], said["reserve_in_use"], said["released"]) == (3, 3, 0)
    gap = jnp.abs(made.values(after, made.data) - made.values(live_alone(after), made.data)).max()
    run = jax.jit(lambda age, masks, v, o: made._fire(jax.random.key(1), _aged(made, v, age), masks, v, o))
    for age, expected in ((49, (0, 3, 0)), (50, (3, 3, 3))):
        later = faded(made.method, after, age)
        _, _, said = run(float(age), three, later, opt_state)
        assert tuple(int(said[f"net/hidden_1/{name}"]) for name in ("treated", "reserve_in_use", "released")) == expected
    emptied, _, said = run(50.0, nobody, later, opt_state)
    assert (said["net/hidden_1/released"], said["net/hidden_1/reserve_in_use"]) == (3, 0)
    assert jnp.abs(made.values(emptied, made.data) - made.values(later, made.data)).max() <= gap / 1000
    assert same_bits(emptied["params"], later["params"])


def _aged(made, variables, age):
    state = made.method.init(variables)
    return state._replace(age={name: values + age for name, values in state.age.items()})


def test_without_release_nothing_fades_and_seeds_fade_apart():
    """No fading is the default, in chains too; of two seeds side by side only the one that fired moves."""
    _, graph = stack_graph((8, 6))
    assert knife(graph).fade is no_fading
    assert chain(l2_init(graph), knife(graph)).fade is no_fading
    releasing = chain(l2_init(graph), knife(graph, release_updates=10.0))
    assert releasing.fade is not no_fading
    made = small(layers="net/hidden_1", dead_units=False, release_updates=HALF_LIFE)
    starts = [made.start(seed) for seed in range(2)]
    fired = [fire(made, *starts[0], {"net/hidden_1": jnp.arange(6) < 3})[0]["reserve"], starts[1][0]["reserve"]]
    after = jax.jit(jax.vmap(made.method.fade))(stacked(*fired))
    assert same_bits(jax.tree.map(lambda leaf: leaf[1], after), fired[1])
    assert not same_bits(jax.tree.map(lambda leaf: leaf[0], after), fired[0])


def test_the_mixing_layer_fades_alike():
    """The team value drifts linearly to that of live units, monotone all the way; slots come free."""
    made, (q, state) = net(release_updates=HALF_LIFE), data(0)
    variables, opt_state = made.start(0)
    after, *_, said = made.fire(jax.random.key(0), variables, None, opt_state, q, state)
    assert (said["reserve_in_use"], said["released"]) == (4, 0)
    before, alone = made.values(after, q, state), made.values(live_alone(after), q, state)
    assert jnp.abs(before - alone).max() > 1e-2
    later = faded(made.method, after, 7)
    share = 0.5 ** (7 / HALF_LIFE)
    np.testing.assert_allclose(made.values(later, q, state), share * before + (1 - share) * alone, atol=1e-5)
    assert made.slopes(later, q, state).min() >= 0
    old = made.observed(later, q, state)._replace(age=jnp.full(8, 50.0))
    _, trees, said = jax.jit(lambda key, *args: made.method.apply(key, *args, made.tx))(jax.random.key(1), old, Trees(later))
    assert (said["mixer/mixing/released"], said["mixer/mixing/reserve_in_use"]) == (4, 4)
    assert trees.variables["reserve"]["mixer/mixing"]["used"].sum() == 4


def test_recurrent_units_fade_where_others_read_them_and_keep_their_memory():
    """Against K, A and C written out with rows of f times what they were, over whole sequences; after many half-lives live units alone."""
    with jax.enable_x64(True):
        method, variables = moved_network(when_full="skip", release_updates=HALF_LIFE)
        views = jnp.asarray(np.random.default_rng(5).normal(size=(TIME, BATCH, TEAM, INPUTS)))
        run = jax.jit(lambda variables: unroller(method)(variables, views, STARTS, memory(method, BATCH, TEAM))[0])
        written_out = jax.jit(lambda reserve: naive(variables["params"]["agent"], reserve, views, STARTS)[0])
        values = {}
        for steps in (0, 4, 200):
            share = 0.5 ** (steps / HALF_LIFE)
            scaled = dict(variables["reserve"])
            for name in ("agent/gru", "agent/output"):
                scaled[name] = scaled[name] | {"rows": share * scaled[name]["rows"]}
            assert scaled["agent/gru"]["rows"].shape[0] == scaled["agent/output"]["rows"].shape[0] > 0
            values[steps] = run(faded(method, variables, steps))
            np.testing.assert_allclose(values[steps], written_out(scaled), rtol=1e-8, atol=1e-11)
        assert jnp.abs(values[4] - values[0]).max() > 0.01
        np.testing.assert_allclose(values[200], run(live_alone(variables)), atol=1e-9)


@pytest.mark.slow
def test_training_fades_the_online_network_and_the_target_follows():
    """Every gradient step fades the online reserve alone; a copy brings the target along."""
    cure = {**ALWAYS, "layers": "agent/hidden_2", "release_updates": 4.0}
    config = Config.from_dict({**SMALL, **VDN, "plasticity": cure})
    program, state, batch = primed(config)

    @jax.jit
    def stepped(learned):
        learned = learned._replace(cure=learned.cure._replace(window=jax.tree.map(jnp.ones_like, learned.cure.window)))
        fired = learner.intervene(jax.random.key(0), learned, {}, program.networks, config.hyper)[0]
        after = learner.gradient_step(fired, program.networks, batch, config.hyper)[0]
        return fired, after, learner.update_target(after, program.networks, jnp.int32(200), config.hyper)

    fired, after, copied = stepped(state.learner)
    rows = fired.reserve["agent/output"]["rows"]
    assert jnp.abs(rows).max() > 0
    np.testing.assert_allclose(after.reserve["agent/output"]["rows"], 0.5**0.25 * rows, rtol=1e-6)
    assert same_bits(after.target_reserve, fired.target_reserve)
    assert same_bits(copied.target_reserve, after.reserve)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release_updates": 0.0}, "release_updates: expected a number above 0"),
        ({"release_updates": 10.0, "composite": "shared"}, "release_updates: with composite='shared'"),
    ],
)
def test_refusals(options, message):
    """A half-life that is none, and outgoing weights that cannot fade by themselves."""
    with pytest.raises(ValueError, match=message):
        knife(stack_graph((8, 6))[1], **options)

"""KNIFE leaves the function alone: over random networks, masks, optimizers and repeated firing; and its bookkeeping, options, refusals."""

import functools
import itertools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import strategies as st

from knife_jax.config import AgentConfig, Config, LearnerConfig, QmixConfig, QplexConfig
from knife_jax.networks import agents, mixers
from knife_jax.networks.neurons import Dense, dense_layer
from knife_jax.plasticity import reserve as frozen
from knife_jax.plasticity.graph import flat, make_graph, nested
from knife_jax.plasticity.knife import knife
from knife_jax.plasticity.method import Trees

INPUTS, ACTIONS, ROWS = 5, 3, 64
FIRINGS, STEPS = 4, 5


class Stack(nn.Module):
    """Dense-ReLU layers `hidden_0`, `hidden_1`, ... and an affine head `output`."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs):
        """Action values."""
        for index, width in enumerate(self.widths):
            inputs = nn.relu(Dense(width, name=f"hidden_{index}")(inputs))
        return Dense(ACTIONS, name="output")(inputs)


@functools.cache
def stack_graph(widths):
    """A stack's module and the graph of its hidden layers, whose parameters lie under `net`."""
    module = Stack(widths)
    names = [*(f"hidden_{index}" for index in range(len(widths))), "output"]
    layers = [dense_layer("net", made, read, width) for made, read, width in zip(names[:-1], names[1:], widths, strict=True)]
    return module, make_graph(layers, lambda key: {"net": module.init(key, jnp.zeros((1, INPUTS)))["params"]})


@functools.cache
def drawing(widths):
    """The compiled drawing of a stack's parameters."""
    return jax.jit(stack_graph(widths)[1].draw)


def applied(method, module):
    """The stack's values from a method's variables and inputs."""
    lifted = method.lift(module.apply, ("net",))
    return lambda variables, inputs: lifted(variables | {"params": variables["params"]["net"]}, inputs)


def firing(state, activity):
    """A state after which, under the reference `error`, the units with less activity than 25 are stagnant."""
    return state._replace(window=state.window._replace(total=activity, count=jnp.ones(())), error=jnp.ones(()) * 100.0)


def random_activity(rng, graph, share, *leading):
    """Activity of every unit, random and below 1 for a random share of them, above 1000 for the others."""
    shapes = {layer.name: (*leading, *layer.stack, layer.size) for layer in graph.layers}
    return {name: jnp.asarray(rng.random(shape) + 1e3 * (rng.random(shape) >= share)) for name, shape in shapes.items()}


def random_orders(rng, graph, *leading):
    """Eight random orders of the units of every layer."""
    return {layer.name: jnp.asarray(rng.random((*leading, 8, layer.size)).argsort(-1)) for layer in graph.layers}


def permuted(variables, layer, graph, order):
    """The same network with a layer's live units in another order, the same one for every member of a stack."""
    modules, leaves, reserve = frozen.modules(graph), flat(variables["params"]), dict(variables["reserve"])
    made, place = modules[layer.module], jnp.argsort(order)
    leaves |= {path: leaves[path][..., order] for path in (*layer.incoming, *layer.biases)}
    leaves |= {path: jnp.take(leaves[path], order, axis=len(layer.stack)) for path in layer.outgoing}
    block, size = dict(reserve[made.name]), layer.size
    block["inverse"] = jnp.concatenate([block["inverse"][..., order], block["inverse"][..., size:]], axis=-1)
    for name in ("partner", "owner"):
        block[name] = jnp.where(block[name] < size, place[jnp.minimum(block[name], size - 1)], block[name])
    if "rows" in block:
        block["rows"] = block["rows"][..., order]
    reserve[made.name] = block
    for path in layer.outgoing:
        name = modules[path[:-1]].name
        if "columns" in reserve.get(name, {}):
            columns = reserve[name]["columns"]
            reserve[name] = reserve[name] | {"columns": jnp.concatenate([columns[..., order, :], columns[..., size:, :]], axis=-2)}
    return {"params": nested(leaves), "reserve": frozen.prepare(graph, reserve)}


def permutation_noise(variables, graph, orders, function):
    """The largest changes of what `function(variables)` gives when units are put in other orders."""

    def change(order):
        reordered = variables
        for layer in graph.layers:
            reordered = permuted(reordered, layer, graph, order[layer.name])
        return jax.tree.map(lambda new, old: jnp.abs(new - old).max(), function(reordered), function(variables))

    return jax.tree.map(jnp.max, jax.vmap(change)(orders))


def polyak(online, target):
    """A soft target update of all floating numbers, reserve included."""
    return jax.tree.map(lambda new, old: old + 0.5 * (new - old) if jnp.issubdtype(old.dtype, jnp.floating) else old, online, target)


VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {"composite": "separate"},
    "drawn": {"composite": "separate", "into_frozen": "drawn"},
    "shared": {"composite": "shared"},
}
OPTIMIZERS = {
    "rmsprop": lambda: optax.rmsprop(3e-3, 0.99, 1e-5, eps_in_sqrt=False),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-2),
    "momentum": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1e-1, momentum=0.9)),
    "schedule": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-2, 1e-3, 20))),
}


def stacked(*trees):
    """Trees side by side."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def trained(tx, loss, variables, opt_state, steps):
    """Variables and optimizer state after so many steps on `loss(params, reserve)`."""

    def learn(carry, _):
        variables, opt_state = carry
        grads = jax.grad(loss)(variables["params"], variables["reserve"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        return (variables | {"params": optax.apply_updates(variables["params"], updates)}, opt_state), None

    return jax.lax.scan(learn, (variables, opt_state), length=steps)[0]


@functools.cache
def episode(widths, variant, optimizer, x64=False):
    """Firing after firing until the reserve is full, with training and target updates between them.

    By seed, scale of the live weights and share of masked units: action values before and after every firing, of the online and the
    target network `[F, 2, N, U]`, and how much merely permuting the units changes `[F, 2]`.
    """
    module, graph = stack_graph(widths)
    method = knife(graph, reserve=1.0, max_fraction=1.0, reference="error", **VARIANTS[variant])
    tx, values = method.wrap_optimizer(OPTIMIZERS[optimizer]()), applied(method, module)

    def run(online, target, data, wanted, steps):
        def loss(params, reserve):
            return jnp.square(values({"params": params, "reserve": reserve}, data) - wanted).mean()

        def fire(carry, step):
            online, target, opt_state = carry
            key, activity, orders = step
            networks, now = stacked(online, target), lambda variables: values(variables, data)
            before, noise = jax.vmap(now)(networks), jnp.zeros(2)
            if not x64:
                noise = jax.vmap(lambda network: permutation_noise(network, graph, orders, now))(networks)
            state = firing(method.init(online), activity)
            _, (online, target, opt_state), _ = method.apply(key, state, Trees(online, target, opt_state), tx)
            after = jax.vmap(now)(stacked(online, target))
            online, opt_state = trained(tx, loss, online, opt_state, STEPS)
            return (online, polyak(online, target), opt_state), (before, after, noise)

        return jax.lax.scan(fire, (online, target, tx.init(online["params"])), steps)[1]

    draw, compiled = drawing(widths), jax.jit(run)

    def seeded(seed, scale, share):
        with jax.enable_x64(x64):
            rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), FIRINGS + 2)
            networks = [method.allocate({"params": jax.tree.map(lambda w: scale * w, draw(key))}) for key in keys[:2]]
            data, wanted = jnp.asarray(rng.normal(size=(ROWS, INPUTS)), float), jnp.asarray(rng.normal(size=(ROWS, ACTIONS)), float)
            steps = keys[2:], random_activity(rng, graph, share, FIRINGS), random_orders(rng, graph, FIRINGS)
            return jax.tree.map(np.asarray, compiled(*networks, data, wanted, steps))

    return seeded


def assert_same(before, after, tolerance=1e-6, allowed=0.0):
    """Values `[..., N, U]` agree relative to the largest, or up to what is allowed, and the greedy actions where they differ by more."""
    size, change = np.abs(before).max((-1, -2)), np.abs(after - before).max((-1, -2))
    assert np.isfinite(after).all()
    assert (change <= np.maximum(tolerance * size, allowed)).all()
    clear = np.ptp(np.sort(before)[..., -2:], axis=-1) > 2 * change[..., None]
    assert (before.argmax(-1) == after.argmax(-1))[clear].all()


def assert_like_permuting(before, after, noise):
    """Values `[..., N, U]` change by no more than a few times what permuting units changes, or a few roundings."""
    size, change = np.abs(before).max((-1, -2)), np.abs(after - before).max((-1, -2))
    assert (change <= 6 * np.maximum(noise, np.finfo(before.dtype).eps * size)).all()


seeds, scales, shares = st.integers(0, 2**31 - 1), st.sampled_from([0.05, 1.0, 20.0]), st.sampled_from([0.25, 0.5, 1.0])
FEW = [((8, 6), "separate", "schedule"), ((8, 6), "drawn", "rmsprop"), ((8, 6), "shared", "adamw")]
ALL = list(itertools.product([(9,), (8, 6), (5, 7, 4)], VARIANTS, OPTIMIZERS))


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
@hypothesis.given(st.sampled_from(FEW), seeds, scales, shares)
def test_function_stays(case, seed, scale, share):
    """Online and target, adjacent layers at once, again and again: at most 1e-6 of the largest value, and what permuting units changes."""
    before, after, noise = episode(*case)(seed, scale, share)
    assert_same(before, after)
    assert_like_permuting(before, after, noise)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_function_stays_in_every_variant(case):
    """The same over depths, variants and optimizers.

    Of three layers at 0.05 times the initial scale, about one firing in a thousand changes the values by 1.1e-6 of the largest: h_A - h_C
    of a unit that moved is rounded at the size of h, which is 20 times that of the other units.
    """
    for seed, scale, share in itertools.product(range(20), (0.05, 1.0, 20.0), (0.25, 0.5, 1.0)):
        before, after, noise = episode(*case)(seed, scale, share)
        assert_same(before, after, tolerance=1.5e-6, allowed=6 * noise)


def test_function_stays_in_float64():
    """In double precision to 1e-12."""
    for seed, scale in itertools.product(range(3), (0.05, 1.0, 20.0)):
        before, after, _ = episode((8, 6), "separate", "adamw", x64=True)(seed, scale, 0.5)
        assert before.dtype == np.float64
        assert_same(before, after, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_function_stays_in_float64_in_every_variant(variant):
    """In double precision to 1e-12, over more networks."""
    for seed, scale, share in itertools.product(range(20), (0.05, 1.0, 20.0), (0.25, 1.0)):
        before, after, _ = episode((5, 7, 4), variant, "rmsprop", x64=True)(seed, scale, share)
        assert_same(before, after, tolerance=1e-12)


TEAM, TIME, BATCH, STATES = 2, 3, 6, 5
JOINTS = np.array(list(itertools.product(range(ACTIONS), repeat=TEAM)))


@functools.cache
def team(mixer, recurrent, layers="all", composite: Any = "separate", adv_layers: Any = 2):
    """The real networks under KNIFE, with firings, training and target updates.

    By seed and scale, per firing: Q_i and Q_tot before and after, what permuting units changes of them, and what the mixer promises.
    """
    agent_config = AgentConfig(hidden_size=8, recurrent=recurrent)
    qplex = QplexConfig(num_kernels=2, adv_layers=adv_layers, adv_size=6, hypernet_size=6)
    config = Config(learner=LearnerConfig(mixer=mixer), agent=agent_config, qmix=QmixConfig(embed_size=4, hypernet_size=6), qplex=qplex)
    agent, mixing = agents.AgentNetwork(ACTIONS, agent_config), mixers.make_mixer(config)
    starts, hidden = jnp.zeros((TIME, BATCH), bool).at[2, 0].set(True), agents.initial_hidden(agent_config, (BATCH, TEAM))

    def fed(q, actions, state):
        one_hot = jax.nn.one_hot(actions, ACTIONS)
        return mixers.MixerInputs((q * one_hot).sum(-1), jax.lax.stop_gradient(q.max(-1)), one_hot, state)

    def draw(key):
        views, state = jnp.zeros((TIME, BATCH, TEAM, INPUTS)), jnp.zeros((TIME, BATCH, STATES))
        params = mixing.init(key, fed(jnp.zeros((TIME, BATCH, TEAM, ACTIONS)), jnp.zeros((TIME, BATCH, TEAM), int), state))["params"]
        return {"agent": agent.init(key, views, starts, hidden)["params"], "mixer": params}

    graph = make_graph((*agents.neuron_layers(agent_config), *mixers.neuron_layers(config)), draw, mixers.REFUSED)
    graph = graph.select(layers)
    method = knife(graph, reserve=1.0, max_fraction=1.0, reference="error", composite=composite)
    tx = method.wrap_optimizer(OPTIMIZERS["schedule"]())
    lifted = {"agent": method.lift(agent.apply, ("agent",)), "mixer": method.lift(mixing.apply, ("mixer",))}

    def part(variables, name, *args):
        return lifted[name]({"params": variables["params"][name], "reserve": variables["reserve"]}, *args)

    def run(online, target, views, state, taken, wanted, steps):
        def values(variables):
            q, _ = part(variables, "agent", views, starts, hidden)
            return q, part(variables, "mixer", fed(q, taken, state))

        def loss(params, reserve):
            return jnp.square(values({"params": params, "reserve": reserve})[1] - wanted).mean()

        def promises(variables):
            """What must not be negative: QMIX's slopes; the value of QPLEX's greedy actions less that of the best, but for rounding."""
            q = 3 * views[..., :ACTIONS]
            if mixer == "qmix":
                inputs = fed(q, taken, state)
                return jax.grad(lambda chosen: part(variables, "mixer", inputs._replace(chosen_q=chosen)).sum())(inputs.chosen_q)
            joints = jnp.broadcast_to(jnp.asarray(JOINTS)[:, None, None], (len(JOINTS), *taken.shape))
            every = jax.lax.map(
                lambda actions: part(variables, "mixer", fed(q, actions, state)), jnp.concatenate([joints, q.argmax(-1)[None]])
            )
            return every[-1] - every[:-1].max(0) + 1e-5 * jnp.abs(every).max()

        def fire(carry, step):
            online, target, opt_state = carry
            key, activity, orders = step
            networks = stacked(online, target)
            before = jax.vmap(values)(networks)
            noise = jax.vmap(lambda network: permutation_noise(network, graph, orders, values))(networks)
            fired = firing(method.init(online), activity)
            _, (online, target, opt_state), report = method.apply(key, fired, Trees(online, target, opt_state), tx)
            after = jax.vmap(values)(stacked(online, target))
            online, opt_state = trained(tx, loss, online, opt_state, STEPS)
            treated = sum(value for name, value in report.items() if name.endswith("/treated"))
            return (online, polyak(online, target), opt_state), (before, after, noise, promises(online), treated)

        return jax.lax.scan(fire, (online, target, tx.init(online["params"])), steps)[1]

    drawn, compiled = jax.jit(draw), jax.jit(run)

    def seeded(seed, scale):
        rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 5)
        networks = [method.allocate({"params": jax.tree.map(lambda w: scale * w, drawn(key))}) for key in keys[:2]]
        shapes = (TIME, BATCH, TEAM, INPUTS), (TIME, BATCH, STATES), (TIME, BATCH, 1)
        views, state, wanted = (jnp.asarray(rng.normal(size=shape), float) for shape in shapes)
        taken = jnp.asarray(rng.integers(ACTIONS, size=(TIME, BATCH, TEAM)))
        steps = keys[2:], random_activity(rng, graph, 0.5, 3), random_orders(rng, graph, 3)
        return jax.tree.map(np.asarray, compiled(*networks, views, state, taken, wanted, steps))

    return seeded


def check_team(record, scale):
    """Values stay, the mixer keeps its promises.

    Where weights are 20 times their initial scale, a recurrent agent amplifies any rounding, of Q_i to 2e-6 or 3e-6 of the largest, and
    the parts of QPLEX's Q_tot cancel, so that permuting its units changes up to 4e-5. There, 5e-6 is allowed, and 6 times the most that
    eight permutations change.
    """
    before, after, noise, promised, treated = record
    tolerance, times = (5e-6, 6.0) if scale > 1 else (1e-6, 0.0)
    for old, new, changed in zip(before, after, noise, strict=True):
        old, new = (np.reshape(values, (3, 2, TIME * BATCH, -1)) for values in (old, new))
        assert_same(old, new, tolerance, times * changed)
    assert (treated[0] > 0).all()
    assert promised.min() >= 0


@pytest.mark.parametrize(
    ("mixer", "recurrent", "layers"),
    [("qmix", True, ("agent", "mixer/w1_hidden")), ("qplex", False, ("mixer/w_hidden", "mixer/action_hidden_1"))],
)
def test_agents_and_mixers_stay(mixer, recurrent, layers):
    """Q_i and Q_tot of recurrent agents, stacked kernels; QMIX stays monotone, QPLEX keeps IGM, through firings and updates."""
    for seed, scale in enumerate((0.05, 1.0, 20.0)):
        check_team(team(mixer, recurrent, layers)(seed, scale), scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "recurrent", "composite"), list(itertools.product(("qmix", "qplex"), (True, False), ("separate", "shared")))
)
def test_agents_and_mixers_stay_in_every_variant(mixer, recurrent, composite):
    """The same, deeper and over more networks."""
    for seed, scale in itertools.product(range(10), (0.05, 1.0, 20.0)):
        check_team(team(mixer, recurrent, "all", composite, adv_layers=3)(seed, scale), scale)


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
    with pytest.raises(ValueError, match="agent/gru: recurrent units"):
        knife(graph, layers="agent/gru")
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

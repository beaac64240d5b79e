"""KNIFE on a GRU's units: the function stays over whole sequences and from running states in the middle of one; what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from knife_jax import Config, learner, make_program, make_train
from knife_jax.config import AgentConfig
from knife_jax.networks import agents
from knife_jax.networks.neurons import Dense, GateProjection
from knife_jax.plasticity import reserve as frozen
from knife_jax.plasticity.composite import gather, scatter
from knife_jax.plasticity.graph import flat, make_graph, nested
from knife_jax.plasticity.knife import knife
from knife_jax.plasticity.method import Trees, chain
from knife_jax.plasticity.registry import METHODS

INPUTS, ACTIONS, SIZE = 5, 3, 6
TEAM, BATCH, TIME, MIDDLE = 2, 8, 10, 5
FIRINGS, STEPS = 5, 5
LAYERS = ("agent/hidden_1", "agent/gru")
CONFIG = AgentConfig(hidden_size=SIZE)
AGENT = agents.AgentNetwork(ACTIONS, CONFIG)
STARTS = jnp.zeros((TIME, BATCH), bool).at[3, 0].set(True).at[7, 1].set(True)


@functools.cache
def agent_graph():
    """The recurrent agents' hidden layers."""
    starts = jnp.zeros((1, 1), bool)

    def draw(key):
        return {"agent": AGENT.init(key, jnp.zeros((1, 1, 1, INPUTS)), starts, agents.initial_hidden(CONFIG, (1, 1)))["params"]}

    return make_graph(agents.neuron_layers(CONFIG), draw)


def method_for(layers=LAYERS, name="knife", **options):
    """KNIFE, or what is like it, on given layers."""
    return METHODS[name](agent_graph(), **{"reserve": 1.0, "max_fraction": 1.0, "reference": "error", "layers": layers} | options)


def memory(method, *batch):
    """Zero states for agents under a method."""
    return agents.initial_hidden(CONFIG, batch, method.state_sizes.get(agents.RECURRENT))


def unroller(method):
    """`(variables, views, starts, hidden) -> (values, hidden)`."""
    lifted = method.lift(AGENT.apply, ("agent",))
    return lambda variables, *args: lifted(variables | {"params": variables["params"]["agent"]}, *args)


def firing(method, variables, activity):
    """A state after which the units with less activity than 25 are stagnant."""
    state = method.init(variables)
    return state._replace(window=state.window._replace(total=activity, count=jnp.ones(())), error=jnp.ones(()) * 100.0)


def random_activity(rng, method, variables, share, *leading):
    """Activity of every unit, random and below 1 for a random share of them, above 1000 for the others."""
    sizes = {name: total.shape for name, total in method.init(variables).window.total.items()}
    return {name: jnp.asarray(rng.random((*leading, *s)) + 1e3 * (rng.random((*leading, *s)) >= share)) for name, s in sizes.items()}


def polyak(online, target):
    """A soft target update of all floating numbers, reserve included."""
    return jax.tree.map(lambda new, old: old + 0.5 * (new - old) if jnp.issubdtype(old.dtype, jnp.floating) else old, online, target)


def permuted(variables, layer, graph, order):
    """The same network with a layer's live units in another order."""
    modules, place, size = frozen.modules(graph), jnp.argsort(order), layer.size
    side = gather(flat(variables["params"]), variables["reserve"], layer, modules)

    def made(end):
        rows = None if end.rows is None else end.rows[..., order]
        return end._replace(kernel=end.kernel[..., order], bias=end.bias[..., order], rows=rows)

    def read(end):
        columns = None if end.columns is None else jnp.concatenate([end.columns[order], end.columns[size:]])
        return end._replace(kernel=end.kernel[order], columns=columns)

    links = dict(side.links)
    links["inverse"] = jnp.concatenate([links["inverse"][order], links["inverse"][size:]])
    for name in ("partner", "owner"):
        links[name] = jnp.where(links[name] < size, place[jnp.minimum(links[name], size - 1)], links[name])
    own = tuple(made(read(end)) for end in side.own)
    side = side._replace(links=links, makers=tuple(map(made, side.makers)), own=own, readers=tuple(map(read, side.readers)))
    leaves, reserve = scatter(flat(variables["params"]), variables["reserve"], layer, modules, side)
    return {"params": nested(leaves, variables["params"]), "reserve": frozen.prepare(graph, reserve)}


def permutation_noise(variables, graph, orders, function):
    """The largest change of what `function(variables)` gives when units are put in other orders, `{layer: [P, H]}`."""

    def change(order):
        reordered = variables
        for layer in graph.layers:
            reordered = permuted(reordered, layer, graph, order[layer.name])
        return jnp.abs(function(reordered) - function(variables)).max()

    return jax.vmap(change)(orders).max()


def trained(tx, unroll, hidden, carry, views, wanted, steps=STEPS):
    """Variables and optimizer state after so many steps on whole sequences."""

    def learn(carry, _):
        variables, opt_state = carry

        def loss(params):
            return jnp.square(unroll(variables | {"params": params}, views, STARTS, hidden)[0] - wanted).mean()

        updates, opt_state = tx.update(jax.grad(loss)(variables["params"]), opt_state, variables["params"])
        return (variables | {"params": optax.apply_updates(variables["params"], updates)}, opt_state), None

    return jax.lax.scan(learn, carry, length=steps)[0]


@functools.cache
def episode(layers=LAYERS, x64=False, **options):
    """Firing after firing until the reserve is full, with training and target updates between them.

    By seed, scale of the live weights and share of masked units: for every firing what the online and the target network give before and
    after, from zero states `[F, 2, T, B, A, U]`; what the online network gives from the middle of the sequences on, with states rewritten;
    how much merely permuting units changes `[F, 2]`; and the report.
    """
    method, graph = method_for(layers, **options), agent_graph().select(layers)
    unroll, tx = unroller(method), method.wrap_optimizer(optax.rmsprop(3e-3, 0.99, 1e-5, eps_in_sqrt=False))

    def run(online, target, views, wanted, steps):
        hidden = jnp.asarray(memory(method, BATCH, TEAM), views.dtype)

        def whole(variables):
            return unroll(variables, views, STARTS, hidden)[0]

        def rest(variables, states):
            return unroll(variables, views[MIDDLE:], STARTS[MIDDLE:], states)[0]

        def fire(carry, step):
            key, activity, orders = step
            online, target, opt_state = carry
            networks = stacked(online, target)
            before, noise = jax.vmap(whole)(networks), jnp.zeros(2)
            if not x64:
                noise = jax.vmap(lambda variables: permutation_noise(variables, graph, orders, whole))(networks)
            half = unroll(online, views[:MIDDLE], STARTS[:MIDDLE], hidden)[1]
            trees = Trees(online, target, opt_state, {agents.RECURRENT: half})
            _, (new, new_target, opt_state, states), report = method.apply(key, firing(method, online, activity), trees, tx)
            assert states is not None
            after, later = jax.vmap(whole)(stacked(new, new_target)), (rest(online, half), rest(new, states[agents.RECURRENT]))
            new, opt_state = trained(tx, unroll, hidden, (new, opt_state), views, wanted)
            return (new, polyak(new, new_target), opt_state), (before, after, later, noise, report)

        return jax.lax.scan(fire, (online, target, tx.init(online["params"])), steps)[1]

    compiled, draw = jax.jit(run), jax.jit(agent_graph().draw)

    def seeded(seed, scale, share):
        rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), FIRINGS + 2)
        drawn = [draw(key) for key in keys[:2]]
        with jax.enable_x64(x64):
            networks = [method.allocate({"params": jax.tree.map(lambda w: scale * jnp.asarray(w, float), params)}) for params in drawn]
            views, wanted = (jnp.asarray(rng.normal(size=(TIME, BATCH, TEAM, last)), float) for last in (INPUTS, ACTIONS))
            orders = {layer.name: jnp.asarray(rng.random((FIRINGS, 3, layer.size)).argsort(-1)) for layer in graph.layers}
            steps = keys[2:], random_activity(rng, method, networks[0], share, FIRINGS), orders
            return jax.tree.map(np.asarray, compiled(*networks, views, wanted, steps))

    return seeded


def stacked(*trees):
    """Trees side by side."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def relative_changes(record):
    """Changes relative to the largest value: from zero states and from running ones; and what permuting units changes, `[F, 2]` each."""
    before, after, (rest_before, rest_after), noise, _ = record
    assert np.isfinite(after).all() and np.isfinite(rest_after).all()
    axes, size = (-1, -2, -3, -4), np.abs(before).max((-1, -2, -3, -4))
    running = np.abs(rest_after - rest_before).max(axes) / size[:, 0]
    return np.abs(after - before).max(axes) / size, np.stack([running, np.zeros_like(running)], axis=1), noise / size


@pytest.mark.parametrize("layers", [("agent/gru",), LAYERS], ids=["gru", "both"])
def test_function_stays_over_sequences(layers):
    """Online and target, from zero states and from running ones, firing until the reserve is full: 1e-6, or what permuting units changes.

    Weights at 20 times their initial scale make the recurrence amplify any rounding; at 0.05 times, states of fresh units that have moved
    are rounded at 20 times the size of the others.
    """
    full = 0
    for seed, scale, share in itertools.product(range(4), (0.05, 1.0, 20.0), (0.5, 1.0)):
        record = episode(layers)(seed, scale, share)
        zero, running, noise = relative_changes(record)
        allowed = np.maximum(1e-6, 6 * noise)
        assert (zero <= allowed).all() and (running <= allowed).all()
        full += record[-1]["agent/gru/reserve_full"].sum()
    assert full > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("knife", {}, id="knife"),
        pytest.param("knife", {"into_frozen": "drawn"}, id="drawn", marks=pytest.mark.slow),
        pytest.param("freeze_and_zero", {}, id="zero", marks=pytest.mark.slow),
    ],
)
def test_function_stays_over_sequences_in_float64(name, options):
    """In double precision to 1e-12."""
    for seed, scale in itertools.product(range(2), (0.05, 1.0, 20.0)):
        zero, running, _ = relative_changes(episode(LAYERS, x64=True, name=name, **options)(seed, scale, 0.5))
        assert max(zero.max(), running.max()) <= 1e-12


def naive(params, reserve, views, starts):
    """The agents with every K, A and C on its own, C with a minus sign: values, and the states of all units."""
    gru, inputs, recurrence = params["gru"], reserve["agent/gru/input"], reserve["agent/gru"]
    features = jax.nn.relu(views @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"][None, None, None])
    kernel = jnp.concatenate([gru["input"]["kernel"], inputs["columns"]], axis=-1)
    columns = jnp.concatenate([jnp.concatenate([gru["hidden_kernel"], recurrence["rows"]]), recurrence["columns"]], axis=-1)
    biases = [
        jnp.concatenate([live, block["bias"]], axis=-1)
        for live, block in ((gru["input"]["bias"], inputs), (gru["hidden_bias"], recurrence))
    ]
    slots = inputs["used"].shape[0]
    sign = jnp.concatenate([jnp.ones(SIZE + slots), -jnp.ones(slots)])

    def step(state, now):
        features, start = now
        state = jnp.where(start[:, None, None], 0.0, state)
        given = jnp.einsum("...i,igh->g...h", features, kernel) + biases[0][:, None, None]
        read = jnp.einsum("...i,igh->g...h", state * sign[None, None], columns) + biases[1][:, None, None]
        reset, update = jax.nn.sigmoid(given[:2] + read[:2])
        state = (1 - update) * jnp.tanh(given[2] + reset * read[2]) + update * state
        return state, state

    everyone = jax.lax.scan(step, jnp.zeros((*views.shape[1:-1], SIZE + 2 * slots)), (features, starts))[1]
    outgoing = jnp.concatenate([params["output"]["kernel"], reserve["agent/output"]["rows"]])
    return (everyone * sign[None, None, None]) @ outgoing + params["output"]["bias"][None, None, None], everyone


@functools.cache
def moved_network(**options):
    """A method on the GRU, and its variables after two firings, each followed by a change of the live weights; in double precision."""
    method, rng = method_for(("agent/gru",), **options), np.random.default_rng(3)
    variables = method.allocate({"params": jax.tree.map(lambda w: jnp.asarray(w, float), agent_graph().draw(jax.random.key(3)))})
    for step in range(2):
        activity = random_activity(rng, method, variables, 0.5)
        trees = Trees(variables, states={agents.RECURRENT: memory(method, 0, TEAM)})
        _, trees, _ = method.apply(jax.random.key(step), firing(method, variables, activity), trees)
        params = jax.tree.map(lambda w: w + 0.1 * jnp.asarray(rng.normal(size=w.shape)), trees.variables["params"])
        variables = trees.variables | {"params": params}
    return method, variables


def test_values_and_gradients_are_those_of_separate_neurons():
    """Against K, A and C written out, after they moved apart: values, gradients of every live weight, and the taps' sums."""
    with jax.enable_x64(True):
        method, variables = moved_network(when_full="recycle")
        assert variables["reserve"]["agent/gru/input"]["used"].sum() > 1
        rng = np.random.default_rng(5)
        views, weights = (jnp.asarray(rng.normal(size=(TIME, BATCH, TEAM, last))) for last in (INPUTS, ACTIONS))
        hidden = memory(method, BATCH, TEAM)

        def lifted(params, taps):
            values = unroller(method)(variables | {"params": params, "taps": taps}, views, STARTS, hidden)[0]
            return (weights * values).sum(), values

        def written_out(params):
            values, states = naive(params["agent"], variables["reserve"], views, STARTS)
            return (weights * values).sum(), (values, states)

        taps = method.taps(method.init(variables))
        (got, seen), values = jax.jit(jax.grad(lifted, argnums=(0, 1), has_aux=True))(variables["params"], taps)
        expected, (wanted, states) = jax.jit(jax.grad(written_out, has_aux=True))(variables["params"])
        np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, expected)
        sums = np.abs(states).sum((0, 1, 2))
        for name, part in zip(("", "/knowledge", "/compensation"), np.split(sums, 3), strict=True):
            np.testing.assert_allclose(seen[f"agent/gru{name}"]["absolute"], part, rtol=1e-9)


def test_recycled_slots_lose_what_they_gave_and_no_more():
    """When the reserve is full, emptied slots change the function; with nothing to empty it stays, and it stays finite."""
    with jax.enable_x64(True):
        method, variables = moved_network(when_full="recycle")
        state = firing(method, variables, {agents.RECURRENT: jnp.zeros(SIZE)})
        trees = Trees(variables, states={agents.RECURRENT: memory(method, 0, TEAM)})
        _, trees, report = method.apply(jax.random.key(9), state, trees)
        used = int(variables["reserve"]["agent/gru/input"]["used"].sum())
        assert report["agent/gru/treated"] == SIZE and report["agent/gru/recycled"] == used
        views = jnp.asarray(np.random.default_rng(5).normal(size=(TIME, BATCH, TEAM, INPUTS)))
        values = unroller(method)(trees.variables, views, STARTS, memory(method, BATCH, TEAM))[0]
        expected, _ = naive(trees.variables["params"]["agent"], trees.variables["reserve"], views, STARTS)
        np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)


def test_running_states_are_asked_for():
    """Composites on the GRU say how many states there are, and refuse to rewrite its units, or to run, without them."""
    method = method_for()
    variables = method.allocate({"params": agent_graph().draw(jax.random.key(0))})
    assert method.state_sizes == {"agent/gru": 3 * SIZE} == chain(METHODS["l2_init"](agent_graph()), method).state_sizes
    assert not knife(agent_graph()).state_sizes
    with pytest.raises(ValueError, match=r"trees\.states: no composites on the recurrent units of agent/gru without their running states"):
        method.apply(jax.random.key(0), method.init(variables), Trees(variables))
    views, starts = jnp.zeros((1, 1, TEAM, INPUTS)), jnp.zeros((1, 1), bool)
    with pytest.raises(ValueError, match=r"hidden: agent/gru has a reserve and 18 running states .*, got 6"):
        unroller(method)(variables, views, starts, agents.initial_hidden(CONFIG, (1, TEAM)))


class Handmade(nn.Module):
    """Recurrent units that are not those of `GRU`."""

    @nn.compact
    def __call__(self, inputs):
        """Values."""
        kernel = self.param("hidden_kernel", nn.initializers.normal(), (SIZE, 3, SIZE))
        bias = self.param("hidden_bias", nn.initializers.normal(), (3, SIZE))
        gates = GateProjection(SIZE, name="input")(inputs).joint() + bias.reshape(1, -1)
        return Dense(ACTIONS, name="output")(gates[..., :SIZE] @ kernel[:, 0])


def test_only_the_gru_is_known():
    """A graph may declare recurrent units of any module; composites say so where that module does not take frozen units along."""
    module, inputs = Handmade(), jnp.zeros((2, INPUTS))
    (units,) = (layer for layer in agents.neuron_layers(CONFIG) if layer.kind == "gru")
    paths = {"incoming": units.incoming, "biases": units.biases, "outgoing": units.outgoing, "outgoing_biases": units.outgoing_biases}
    moved = {name: tuple(tuple(part for part in path if part != "gru") for path in group) for name, group in paths.items()}
    graph = make_graph([units._replace(**moved)], lambda key: {"agent": module.init(key, inputs)["params"]})
    method = knife(graph, layers="agent/gru", reserve=1.0)
    variables = method.allocate({"params": graph.draw(jax.random.key(0))})
    with pytest.raises(ValueError, match=r"agent/gru: composites on recurrent units are known to the module networks\.neurons\.GRU alone"):
        method.lift(module.apply, ("agent",))(variables | {"params": variables["params"]["agent"]}, inputs)


def test_other_methods_leave_running_states_alone():
    """Whatever is passed comes back, from methods that know nothing of it and from a chain."""
    graph, states = agent_graph(), {agents.RECURRENT: jnp.ones((BATCH, TEAM, SIZE))}
    variables = {"params": graph.draw(jax.random.key(0))}
    for method in (METHODS["redo"](graph), METHODS["reset"](graph), METHODS["none"](graph), chain(METHODS["redo"](graph), knife(graph))):
        allocated = method.allocate(variables)
        tx = method.wrap_optimizer(optax.adam(1e-3))
        trees = Trees(allocated, allocated, tx.init(allocated["params"]), states)
        apply = jax.eval_shape(
            lambda trees, method=method, tx=tx: method.apply(jax.random.key(0), method.init(trees.variables), trees, tx), trees
        )
        assert apply[1].states is not None and apply[1].states[agents.RECURRENT].shape == (BATCH, TEAM, SIZE)


RUN = {
    "env": {"name": "matrix", "scenario": "mmdp"},
    "learner": {"mixer": "vdn"},
    "agent": {"hidden_size": 6},
    "collect": {"num_envs": 4, "rollout_length": 3},
    "replay": {"capacity_env_steps": 64, "batch_size": 4, "sequence_length": 2},
    "train": {"env_steps_per_task": 156},
    "evaluation": {"episodes": 1, "per_task": 1},
    "optimizer": {"learning_rate": 1e-30},
}
CURE = {
    "name": "knife",
    "layers": ["agent"],
    "threshold": 1e9,
    "reserve": 1.0,
    "interval_updates": 2,
    "dead_units": False,
    "diagnostics": False,
}
NO_CURE = {"name": "none", "diagnostics": False}


@pytest.mark.slow
def test_agents_at_play_do_not_notice():
    """Through `make_train` with a learning rate of nothing, KNIFE on all agent units in the middle of one long episode: the run without.

    Every unit's first K carries on with the state that the unit has in the run without; what the agents do is the same.
    """
    cure = CURE | {"layers": list(LAYERS), "repeat": False, "when_full": "skip"}
    runs = [jax.jit(make_train(RUN | {"plasticity": plasticity}))(jax.random.key(1)) for plasticity in (NO_CURE, cure)]
    plain, treated = (run["runner_state"] for run in runs)
    assert treated.learner.report["agent/gru/treated"] >= 4 and treated.learner.report["agent/hidden_1/treated"] >= 4
    links = treated.learner.reserve["agent/gru/input"]
    assert not np.asarray(plain.collector.actors.starts).any() and runs[0]["metrics"]["train/episodes"][-1] == 0
    expected, got = np.asarray(plain.collector.actors.hidden), np.asarray(treated.collector.actors.hidden)
    assert got.shape[-1] == 3 * expected.shape[-1]
    kept = got[..., :6].copy()
    for slot in np.flatnonzero(links["used"]):
        kept[..., links["owner"][slot]] = got[..., 6 + slot]
    np.testing.assert_allclose(kept, expected, atol=1e-6)
    for name in ("train/q_tot", "train/loss", "train/td_error", "eval/return"):
        np.testing.assert_allclose(runs[1]["metrics"][name], runs[0]["metrics"][name], rtol=1e-4, atol=1e-6)


MATRIX = {
    "env": {"name": "matrix", "scenario": "permuted"},
    "learner": {"mixer": "vdn"},
    "agent": {"hidden_size": 6},
    "collect": {"num_envs": 4, "rollout_length": 2},
    "replay": {"capacity_env_steps": 64, "batch_size": 4, "sequence_length": 1},
    "train": {"env_steps_per_task": 64},
    "evaluation": {"episodes": 1, "per_task": 1},
}


def test_matrix_game_runs():
    """Recurrent agents on a matrix game, two seeds, KNIFE on their GRU again and again, with slots emptied when all are taken."""
    train = make_train(MATRIX | {"plasticity": CURE | {"layers": "agent/gru", "when_full": "recycle"}})
    learned = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 2))["runner_state"].learner
    assert (learned.report["agent/gru/treated"] > 6).all() and (learned.report["agent/gru/recycled"] > 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learned.variables))


def test_the_reserve_never_moves_under_the_optimizer():
    """Rounds of learning without an intervention change the weights and no number of the reserve."""
    config = Config.from_dict(MATRIX | {"plasticity": CURE | {"layers": list(LAYERS), "interval_updates": 9, "when_full": "skip"}})
    program, hyper = make_program(config), config.hyper

    @jax.jit
    def run(key):
        state = program.begin_task(program.init(key, hyper), jnp.int32(0), hyper)
        acting = program.networks.running_states(state.collector.actors.hidden)
        active = state.learner.cure._replace(window=jax.tree.map(jnp.ones_like, state.learner.cure.window))
        learned, _ = learner.intervene(key, state.learner._replace(cure=active), acting, program.networks, hyper)
        return learned, program.train_rounds(state._replace(learner=learned), jnp.int32(0), hyper)[0]

    before, state = run(jax.random.key(2))
    assert 0 < state.counters.updates < 9 and before.report["agent/gru/treated"] > 0
    jax.tree.map(np.testing.assert_array_equal, before.reserve, state.learner.reserve)
    kernels = [np.asarray(params["agent"]["gru"]["input"]["kernel"]) for params in (before.params, state.learner.params)]
    assert (kernels[0] != kernels[1]).any()

"""Cures inside `make_train`: schedules, both networks, seeds apart, and refusals before anything compiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from knife_jax import Config, collect, learner, make_program, make_train, replay
from knife_jax.plasticity.graph import make_graph
from knife_jax.plasticity.registry import METHODS

SMALL = {
    "preset": "matrix_drift",
    "env": {"name": "matrix", "scenario": "permuted"},
    "agent": {"recurrent": False, "last_action": False, "hidden_size": 8},
    "qmix": {"embed_size": 8, "hypernet_size": 8},
    "qplex": {"num_kernels": 2, "adv_size": 8, "hypernet_size": 8},
    "collect": {"num_envs": 8, "rollout_length": 1},
    "replay": {"capacity_env_steps": 256, "batch_size": 8, "sequence_length": 1},
    "train": {"env_steps_per_task": 160},
    "evaluation": {"episodes": 1, "per_task": 2},
}
ALWAYS = {"name": "knife", "threshold": 1e9, "reserve": 3.0, "dead_units": False, "diagnostics": False}
"""KNIFE that treats a quarter of every layer whenever it may."""
HUNTING = {
    **SMALL,
    "env": {"name": "predator_prey", "scenario": "wqmix", "options": {"max_steps": 10}},
    "agent": {"hidden_size": 8},
    "collect": {"num_envs": 4, "rollout_length": 8},
    "replay": {"capacity_env_steps": 512, "batch_size": 4, "sequence_length": 4},
    "train": {"env_steps_per_task": 256},
}
SMAX = {**HUNTING, "env": {"name": "smax", "scenario": "3m"}}
VDN = {"learner": {"mixer": "vdn"}}
"""For what does not depend on the mixer; compiles faster."""
UNSCHEDULED = ("none", "l2_init", "spectral", "weight_decay", "layer_norm", "wide_none")
"""Methods that act through the loss or the network."""
_COMPOSITES = (
    "knife",
    "random_neurons",
    "knife_without_knowledge",
    "knife_without_active",
    "knife_without_compensation",
    "freeze_and_zero",
    "knife_mixing",
)
ALIKE = {*_COMPOSITES, "l2_init", "spectral", "weight_decay", "regrama"} - {"knife", "knife_mixing", "l2_init"}
"""Methods whose program another one's stands for."""
EAGER = {
    **{name: {"threshold": 1e9, "when_full": "skip"} for name in _COMPOSITES},
    "redo": {"tau": 1e9},
    "regrama": {"tau": 1e9},
    "reborn": {"tau": 0.9, "beta": 1.1},
    "continual_backprop": {"rho": 0.5, "maturity": 0},
    "self_normalized_resets": {"max_threshold": 1.01},
}
"""Options with which methods treat units that are well."""


def _config(plasticity, **sections):
    return Config.from_dict({**SMALL, **sections, "plasticity": plasticity})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_part_of_the_one_program(name):
    """The whole run traces with every cure at its defaults, and returns what it did."""
    config = _config({"name": name, "interval_updates": 20, "diagnostics": False}, **({} if name == "knife_mixing" else VDN))
    out = jax.eval_shape(make_train(config), jax.random.key(0))
    assert out["metrics"]["eval/won"].shape == (18,)
    assert any(measure.startswith("cure/") for measure in out["metrics"]) == (name not in UNSCHEDULED)


def test_units_treated_once_are_left_alone_where_asked():
    """With `repeat: false` a layer of 8 is treated for good after four interventions of 2, although there are more."""
    config = _config({**ALWAYS, "repeat": False}, **VDN)
    program, state, _ = primed(config)
    intervene = jax.jit(lambda key, state: learner.intervene(key, state, {}, program.networks, config.hyper)[0])
    learned = state.learner
    for number in range(6):
        window = jax.tree.map(jnp.ones_like, learned.cure.window)
        learned = intervene(jax.random.key(number), learned._replace(cure=learned.cure._replace(window=window)))
    assert (learned.report["agent/hidden_1/treated"], learned.report["agent/hidden_1/reserve_in_use"]) == (8, 8)


def run_to_the_end(name, game):
    """Recurrent agents and QMIX: the cure acted, the last evaluation is there, everything is finite."""
    train = make_train({**game, "plasticity": {"name": name, "interval_updates": 2, **EAGER.get(name, {})}})
    out = jax.jit(train, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    learned, metrics = out["runner_state"].learner, out["metrics"]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((learned.variables, learned.target_variables)))
    assert all(np.isfinite(metrics[measure][-1]) for measure in ("train/loss", "train/grad_norm", "eval/return"))
    treated = [value for measure, value in learned.report.items() if measure.endswith("/treated")]
    assert bool(treated) == (name not in UNSCHEDULED)
    assert not treated or sum(treated) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ALIKE])
def test_methods_run_on_predator_prey(name):
    """Every method, but of those that differ in what they draw or penalise only one; all of them run on the matrix game."""
    run_to_the_end(name, HUNTING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knife", "layer_norm"])
def test_methods_run_on_smax(name):
    """Composites, and what acts through the loss or the network; all others on predator-prey."""
    run_to_the_end(name, SMAX)


def _gradient_step_without_cure(params, target, opt_state, networks, batch, hyper):
    """One gradient step as it would be written if there were no cures."""
    optimizer = learner.optimizer_of(networks, hyper)

    def objective(params):
        return learner.loss_fn({"params": params}, {"params": target}, networks, batch, hyper)

    grads, metrics = jax.grad(objective, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, {**metrics, "grad_norm": learner.global_norm(grads)}


def primed(config):
    """A program, its state with a filled replay, and a batch."""
    program = make_program(config)
    hyper, key = config.hyper, jax.random.key(1)

    @jax.jit
    def start(key):
        state = program.begin_task(program.init(key, hyper), jnp.int32(0), hyper)
        keys = jax.random.split(key, (16 * program.plan.rollout_length, 1 + config.collect.num_envs))
        collector, rollout, _ = collect.explore(keys, state.learner.variables, program.networks, state.collector, jnp.int32(0), hyper)
        return state._replace(collector=collector, replay=replay.add(state.replay, rollout))

    state, plan = start(key), program.plan
    batch = replay.sample(key, state.replay, config.replay.batch_size, plan.sequence_slots, plan.sequence_stride, 0)
    return program, state, batch


def test_without_a_cure_the_step_is_the_one_without_cures():
    """With `none` the jaxpr of the gradient step is, equation for equation, that of a step that knows no cure."""
    config = _config({"name": "none"})
    program, state, batch = primed(config)
    learned, networks = state.learner, program.networks

    def ours(params, target, opt_state):
        stepped, metrics = learner.gradient_step(
            learner.LearnerState(params, target, opt_state, {}, {}, (), {}), networks, batch, config.hyper
        )
        return stepped.params, stepped.opt_state, metrics

    def plain(params, target, opt_state):
        return _gradient_step_without_cure(params, target, opt_state, networks, batch, config.hyper)

    args = (learned.params, learned.target_params, learned.opt_state)
    assert str(jax.make_jaxpr(ours)(*args)) == str(jax.make_jaxpr(plain)(*args))
    assert not jax.tree.leaves((learned.reserve, learned.target_reserve, learned.cure, learned.report))


@pytest.mark.parametrize(
    ("mixer", "recurrent", "composite"),
    [("qmix", False, "separate"), pytest.param("qplex", True, "separate", marks=pytest.mark.slow), ("qmix", True, "shared")],
)
def test_an_intervention_leaves_every_value_as_it_was(mixer, recurrent, composite):
    """Q_tot of the actions taken and of the next greedy ones, online and target, three interventions with learning in between."""
    config = _config({**ALWAYS, "composite": composite}, learner={"mixer": mixer}, agent={"recurrent": recurrent, "hidden_size": 8})
    program, state, batch = primed(config)
    networks, hyper = program.networks, config.hyper
    observation = learner.observed(networks, batch)

    @jax.jit
    def values(state):
        swapped = learner.team_values(state.target_variables, state.variables, networks, batch, observation).online
        return learner.team_values(state.variables, state.target_variables, networks, batch, observation).online, swapped

    step = jax.jit(lambda state: learner.gradient_step(state, networks, batch, hyper)[0])
    intervene = jax.jit(lambda key, state: learner.intervene(key, state, {}, networks, hyper)[0])
    learned = state.learner
    for number in range(3):
        for _ in range(3):
            learned = step(learned)
        before = values(learned)
        learned = intervene(jax.random.key(number), learned)
        for old, new in zip(before, values(learned), strict=True):
            assert float(jnp.abs(new - old).max()) <= 1e-6 * float(jnp.abs(old).max())
    assert learned.report["agent/hidden_1/treated"] == 6
    assert learned.report["agent/hidden_1/reserve_in_use"] > 0


def test_interventions_come_on_schedule_and_seeds_are_treated_apart():
    """Every 40 steps of 114 (three tasks of 38): two interventions, on each seed's own units; the threshold may be swept."""
    config = _config({**ALWAYS, "interval_updates": 40}, env={"name": "matrix", "tasks": ({"payoff": [[1, 0], [0, 2]]},) * 3}, **VDN)
    train = make_train(config)
    thresholds = {"plasticity": {"threshold": jnp.array([0.0, 1e9])}}
    out = jax.jit(jax.vmap(jax.vmap(train, in_axes=(0, None)), in_axes=(None, {"plasticity": {"threshold": 0}})))(
        jax.random.split(jax.random.key(0), 2), thresholds
    )
    treated = out["metrics"]["cure/agent/hidden_1/treated"]
    updates = np.asarray(out["metrics"]["updates"][0, 0])
    assert (treated[0][:, [1, 2, 4, 5, 7, 8]] == 0).all()
    expected = 2.0 * ((updates[[1, 2, 4, 5, 7, 8]] - 1) // 40)
    np.testing.assert_array_equal(treated[1], np.stack([np.insert(expected, [0, 2, 4], np.nan)] * 2))
    owner = out["runner_state"].learner.reserve["agent/hidden_1"]["owner"][1]
    assert (owner[0] != owner[1]).any()


def test_cond_survives_with_a_cure_on_schedule():
    """Under a vmap over seeds the intervention stays a branch, as learning and diagnosis do."""
    train = make_train(_config({**ALWAYS, "interval_updates": 10, "diagnostics": True}, **VDN))
    single = jax.make_jaxpr(train)(jax.random.key(0))
    seeds = jax.make_jaxpr(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    conds = len(re.findall(r"\bcond\[", str(single)))
    assert conds >= 4
    assert len(re.findall(r"\bcond\[", str(seeds))) == conds


def test_diagnostics_of_every_layer_are_logged():
    """Shares lie in [0, 1], ranks between 1 and the number of units; nothing is said before a task's first step."""
    metrics = jax.jit(make_train(_config({"name": "none"})))(jax.random.key(0))["metrics"]
    known = slice(1, None, 3)
    for layer in ("agent/hidden_1", "agent/hidden_2", "mixer/w1_hidden", "mixer/w2_hidden", "mixer/v_hidden"):
        for share in ("stagnant", "volatile", "dormant", "inactive"):
            values = np.asarray(metrics[f"plasticity/{layer}/{share}"])
            assert np.isnan(values[::3]).all()
            assert (values[known] >= 0).all() and (values[known] <= 1).all()
        ranks = np.asarray(metrics[f"plasticity/{layer}/effective_rank"])[known]
        assert ((ranks > 0.99) & (ranks < 8.01)).all()
    assert (np.asarray(metrics["plasticity/agent/weight_norm"])[known] > 0).all()
    mixing = [np.asarray(metrics[f"plasticity/mixer/mixing/{name}"])[known] for name in ("saturated", "saturation", "openness")]
    assert all((values >= 0).all() and (values <= 1).all() for values in mixing) and (mixing[0] <= mixing[1]).all()


@pytest.mark.slow
def test_averaged_targets_cover_the_reserve():
    """Polyak averaging moves the target's frozen numbers towards the online ones and leaves the links between neurons alone."""
    config = _config(ALWAYS, learner={"mixer": "qmix", "target_update": "polyak", "polyak_tau": 0.25})
    program, state, _ = primed(config)
    intervene = jax.jit(lambda state: learner.intervene(jax.random.key(0), state, {}, program.networks, config.hyper)[0])
    learned = intervene(state.learner)
    other = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, learned.target_reserve)
    moved = learner.update_target(learned._replace(target_reserve=other), program.networks, jnp.int32(1), config.hyper)
    for name, block in learned.reserve.items():
        for part, values in block.items():
            share = 0.25 if jnp.issubdtype(values.dtype, jnp.floating) else 1
            np.testing.assert_allclose(moved.target_reserve[name][part], share * values, rtol=1e-6)


def test_the_wide_control_is_as_wide_as_composites():
    """Live, knowledge and compensation neurons together: three times as many units at one pair per unit, the GRU apart."""
    config = _config({"name": "wide_none", "reserve": 1.0}, agent={"recurrent": True, "hidden_size": 8})
    sizes = {layer.name: layer.size for layer in make_program(config).networks.graph.layers}
    assert sizes == {"agent/hidden_1": 24, "agent/gru": 8, "mixer/w1_hidden": 24, "mixer/w2_hidden": 24, "mixer/v_hidden": 24}


def test_chains_take_options_per_method():
    """`a+b` is both; each has its own section."""
    config = _config({"name": "layer_norm+redo", "redo": {"tau": 0.3}, "interval_updates": 10})
    assert config.hyper["plasticity"] == {"redo.tau": 0.3}
    assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"plasticity\.options.*partly at every update"):
        make_program(_config({"name": "continual_backprop+redo"}))


@pytest.mark.parametrize(
    ("plasticity", "message"),
    [
        ({"name": "knif"}, r"plasticity\.name: unknown method 'knif'; did you mean 'knife'"),
        ({"name": "knife", "treshold": 1.0}, r"plasticity\.options: knife: unknown option 'treshold'; did you mean 'threshold'"),
        ({"name": "none", "interval_update": 3}, r"did you mean 'interval_updates'"),
        ({"name": "knife", "max_fraction": "many"}, r"plasticity\.options: knife\.max_fraction"),
        ({"name": "knife", "max_fraction": 1.5}, r"plasticity\.options: max_fraction"),
        ({"name": "knife", "reserve": 0.0}, r"plasticity\.options: reserve: a positive number"),
        ({"name": "knife", "reserve": -1.0}, r"plasticity\.options: reserve: a positive number"),
        ({"name": "knife", "reserve": 0.5, "interval_updates": 10}, r"plasticity\.options: reserve: .*may run out"),
        ({"name": "knife", "interval_updates": 1000}, r"plasticity\.interval_updates: 1000 never comes in a run of \d+"),
        ({"name": "knife", "layers": "agent/hidden_3"}, r"plasticity\.options: layers: no layer or network 'agent/hidden_3'; did you mean"),
        ({"name": "knife", "layers": "mixer/mixing"}, r"plasticity\.options: layers: mixer/mixing: .*monotone"),
        ({"name": "knife_mixing", "choose": "saturate"}, r"plasticity\.options: knife_mixing\.choose: Input should be 'saturated'"),
        ({"name": "knife_mixing", "reference": "network"}, r"plasticity\.options: knife_mixing\.reference"),
        ({"name": "layer_norm+knife"}, r"plasticity\.options: chain: knife .* layer_norm"),
    ],
)
def test_bad_cures_are_refused_before_anything_compiles(plasticity, message):
    """With the field's path and the nearest name."""
    with pytest.raises(ValueError, match=message):
        make_program(_config(plasticity))


@pytest.mark.parametrize("name", ["knife", "redo"])
def test_recurrent_units_are_treated_when_named(name):
    """By composites and by re-drawing; a composite with shared outgoing weights cannot be."""
    recurrent = {"agent": {"recurrent": True, "hidden_size": 8}}
    assert make_program(_config({"name": name, "layers": "agent/gru"}, **recurrent)).schedule.count > 0
    with pytest.raises(ValueError, match=r"plasticity\.options: layers: no composites on agent/gru: with shared outgoing weights"):
        make_program(_config({"name": "knife", "layers": "agent/gru", "composite": "shared"}, **recurrent))


def test_task_switches_need_more_than_one_task():
    """A single task never switches."""
    with pytest.raises(ValueError, match=r"plasticity\.when: 'task_switch' never comes"):
        make_program(_config({"name": "reset", "when": "task_switch"}, env={"name": "matrix", "scenario": "qtran"}))


def test_a_kernel_of_another_shape_is_no_reader():
    """A declared graph is checked against the parameters."""
    networks = make_program(_config({"name": "none"})).networks
    first, *others = networks.graph.layers
    with pytest.raises(ValueError, match=r"agent/hidden_1: mixer/v_hidden/kernel has shape .*expected 8 units on the first axis"):
        make_graph([first._replace(outgoing=(("mixer", "v_hidden", "kernel"),)), *others], networks.graph.draw)

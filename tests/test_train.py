"""The compiled program: purity, transformations, schedules, memory."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax import RunnerState, make_program, make_train
from knife_jax.plan import make_plan
from knife_jax.replay import ReplayState

MATRIX = {
    "env": {"name": "matrix", "scenario": "permuted", "options": {"num_tasks": 2}},
    "agent": {"recurrent": False, "hidden_size": 8},
    "qmix": {"embed_size": 8, "hypernet_size": 8},
    "collect": {"num_envs": 4, "rollout_length": 2},
    "replay": {"capacity_env_steps": 64, "batch_size": 8, "sequence_length": 1},
    "train": {"env_steps_per_task": 160},
    "evaluation": {"episodes": 1, "per_task": 2},
    "plasticity": {"diagnostics": False},
}
VDN = {**MATRIX, "learner": {"mixer": "vdn"}}
"""For what does not depend on the mixer; compiles faster."""
TWO_STEP = {
    **MATRIX,
    "env": {"name": "matrix", "scenario": "two_step"},
    "agent": {"recurrent": True, "hidden_size": 8},
    "replay": {"capacity_env_steps": 256, "batch_size": 8, "sequence_length": 4},
    "evaluation": {"episodes": 2, "per_task": 3},
}


def _keys(count):
    return jax.random.split(jax.random.key(0), count)


def _leaves_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_metrics_have_their_declared_shapes_and_schedule():
    """One evaluation before each task's first step, `per_task` after it, all tasks at each end; counters count."""
    out = jax.jit(make_train(MATRIX))(jax.random.key(0))
    metrics = out["metrics"]
    assert metrics["eval/return"].shape == metrics["train/loss"].shape == (9,)
    assert metrics["all_tasks/won"].shape == (3, 2)
    np.testing.assert_array_equal(metrics["position"], np.repeat([0, 1, 2], 3))
    np.testing.assert_array_equal(metrics["task"], np.repeat([0, 1, 0], 3))
    np.testing.assert_array_equal(metrics["rounds"], [0, 10, 20, 20, 30, 40, 40, 50, 60])
    np.testing.assert_array_equal(np.isnan(metrics["train/return"]), [True, False, False] * 3)
    np.testing.assert_array_equal(metrics["train/env_steps"][1:3], [80, 80])
    np.testing.assert_array_equal(metrics["updates"], [0, 10, 20, 20, 30, 40, 40, 50, 60])
    here = [metrics["all_tasks/return"][position, task] for position, task in enumerate([0, 1, 0])]
    np.testing.assert_array_equal(metrics["eval/return"][jnp.array([2, 5, 8])], jnp.array(here))
    assert out["runner_state"].replay is None
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), out["runner_state"].learner.params))


def test_replay_is_returned_only_when_asked():
    """`return_replay` keeps the buffer."""
    out = jax.eval_shape(make_train(TWO_STEP, return_replay=True), jax.random.key(0))
    assert out["runner_state"].replay.slots.reward.shape == (4, 64)


def test_same_key_same_bits_and_one_trace():
    """The same compiled program gives the same bits; a second call with another key does not trace again."""
    traces = []
    train = make_train(TWO_STEP)

    def traced(key):
        traces.append(1)
        return train(key)

    compiled = jax.jit(traced)
    first, other, second = compiled(jax.random.key(3)), compiled(jax.random.key(4)), compiled(jax.random.key(3))
    _leaves_equal(first["metrics"], second["metrics"])
    _leaves_equal(first["runner_state"].learner, second["runner_state"].learner)
    assert not np.array_equal(first["metrics"]["train/loss"], other["metrics"]["train/loss"], equal_nan=True)
    assert len(traces) == 1


@pytest.mark.parametrize("config", [VDN, TWO_STEP], ids=["one_step", "recurrent"])
def test_vmapped_equals_single_over_the_first_updates(config):
    """To 1e-6 over the first 20 updates; later they may drift apart."""
    config = {**config, "env": {"name": "matrix", "scenario": "qtran"}} if config is VDN else config
    config = {**config, "train": {"env_steps_per_task": 8 * 22}, "evaluation": {"episodes": 1, "per_task": 1}}
    train = make_train(config)
    keys = _keys(3)
    together = jax.jit(jax.vmap(train))(keys)["runner_state"].learner.params
    alone = jax.jit(train)
    for index in range(3):
        single = alone(keys[index])
        assert 15 <= single["metrics"]["updates"][-1] <= 22
        compare = lambda a, b, index=index: np.testing.assert_allclose(a[index], b, atol=1e-6, rtol=0)  # noqa: E731
        jax.tree.map(compare, together, single["runner_state"].learner.params)


def test_cond_survives_vmap_over_seeds_and_hyperparameters():
    """Neither learning nor the target's copy turns into a select when seeds, or sweeps, are batched."""
    train = make_train(TWO_STEP)
    rates = {"optimizer": {"learning_rate": jnp.array([1e-3, 1e-4])}, "exploration": {"epsilon_finish": jnp.array([0.1, 0.2])}}
    swept = jax.make_jaxpr(jax.vmap(jax.vmap(train, in_axes=(0, None)), in_axes=(None, 0)))(_keys(4), rates)
    single = jax.make_jaxpr(train)(jax.random.key(0))
    conds = len(re.findall(r"\bcond\[", str(single)))
    assert conds >= 2
    assert len(re.findall(r"\bcond\[", str(swept))) == conds


def test_nested_vmap_and_sweeps_equal_single_runs():
    """A vmap over learning rates of a vmap over seeds holds the runs that would be made one by one."""
    train = make_train({**VDN, "train": {"env_steps_per_task": 80}})
    rates, keys = jnp.array([1e-3, 1e-5]), _keys(2)
    nested = jax.jit(jax.vmap(jax.vmap(lambda rate, key: train(key, {"optimizer": {"learning_rate": rate}}), (None, 0)), (0, None)))
    out = nested(rates, keys)["metrics"]["train/q_tot"]
    single = jax.jit(train)(keys[1], {"optimizer": {"learning_rate": 1e-5}})["metrics"]["train/q_tot"]
    assert out.shape == (2, 2, 9)
    np.testing.assert_allclose(out[1, 1][1:3], single[1:3], rtol=1e-4)
    assert not np.allclose(out[0, 1][1:3], out[1, 1][1:3], rtol=1e-4)


def test_what_cannot_be_swept_is_refused():
    """Shapes and schedules are no arguments of the program."""
    with pytest.raises(ValueError, match=r"collect\.num_envs.*did you mean"):
        make_train(MATRIX)(jax.random.key(0), {"collect": {"num_envs": 3}})


def test_callback_fires_once_per_event_for_all_seeds_together():
    """Also under nested vmap, in order, with every seed's numbers; and it changes no result."""
    events = []
    logged = make_train(VDN, callback=events.append)
    keys = _keys(6).reshape(2, 3)
    out = jax.block_until_ready(jax.jit(jax.vmap(jax.vmap(logged)))(keys))
    jax.effects_barrier()
    assert len(events) == 9
    assert all(event["eval/return"].shape == (2, 3) for event in events)
    events.sort(key=lambda event: (int(event["position"][0, 0]), int(event["rounds"][0, 0])))
    np.testing.assert_array_equal([event["eval/return"][1, 2] for event in events], out["metrics"]["eval/return"][1, 2])
    silent = jax.jit(jax.vmap(jax.vmap(make_train(VDN))))(keys)
    np.testing.assert_array_equal(silent["metrics"]["eval/return"], out["metrics"]["eval/return"])


RINGS_COPIED = re.compile(r"= \w+\[3,4,100000[^=]*copy\(")
"""A copy of a whole ring of three seeds' four environments in a compiled program's text."""


def test_the_replay_is_updated_in_place():
    """Inside the scans there is one replay, never a second: temporaries beside it stay far below its size, for vmapped seeds too."""
    config = {**TWO_STEP, "replay": {"capacity_env_steps": 400_000, "batch_size": 8, "sequence_length": 4}}
    train = make_train(config)
    sizes = jax.eval_shape(jax.vmap(make_train(config, return_replay=True)), _keys(3))["runner_state"].replay
    replay_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sizes))
    compiled = jax.jit(jax.vmap(train)).lower(_keys(3)).compile()
    assert replay_bytes > 3 * 400_000 * 9
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None and text is not None
    assert analysis.temp_size_in_bytes < 1.1 * replay_bytes
    assert not RINGS_COPIED.findall(text)


def test_a_donated_chunk_updates_the_replay_in_place():
    """A chunk of rounds with donated state aliases the replays' memory from input to output, for vmapped seeds too."""
    program = make_program(_resolved({**TWO_STEP, "replay": {"capacity_env_steps": 400_000, "batch_size": 8, "sequence_length": 4}}))
    config = _resolved(TWO_STEP)
    axes = RunnerState._make((0, 0, ReplayState._make((0, None, None)), None, 0, 0))
    state = jax.eval_shape(jax.vmap(lambda key: program.init(key, config.hyper), out_axes=axes), _keys(3))
    rounds = jax.vmap(lambda state: program.train_rounds(state, jnp.int32(0), config.hyper), in_axes=(axes,), out_axes=(axes, 0))
    chunk = jax.jit(rounds, donate_argnums=0)
    compiled = chunk.lower(state).compile()
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    replay_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.replay))
    assert analysis is not None and text is not None
    assert replay_bytes > 3 * 400_000 * 9
    assert analysis.alias_size_in_bytes >= replay_bytes
    assert analysis.temp_size_in_bytes < 0.1 * replay_bytes
    assert not RINGS_COPIED.findall(text)


def _resolved(config):
    from knife_jax.config import resolve

    return resolve(config)


@cache
def _switched(**switch):
    """A run over three tasks, with its replay."""
    fields = {
        "replay": {"capacity_env_steps": 4096, "batch_size": 8, "sequence_length": 1},
        "exploration": {"anneal_env_steps": 160},
        "optimizer": {"name": "adam"},
    }
    return jax.jit(make_train({**VDN, **fields, "switch": switch}, return_replay=True))(jax.random.key(0))


def _restarted():
    return _switched(replay="clear", exploration="restart", optimizer="keep")


def _continued():
    return _switched(replay="keep", exploration="continue", optimizer="reset")


@pytest.mark.parametrize("kept", [False, True])
def test_switching_tasks_clears_or_keeps_the_replay(kept):
    """And slots remember the task under which they were made."""
    replay = (_continued if kept else _restarted)()["runner_state"].replay
    assert int(replay.size) == (120 if kept else 40)
    tasks = np.asarray(replay.slots.task[:, : int(replay.size)])
    np.testing.assert_array_equal(tasks, np.broadcast_to(np.repeat([0, 1, 0], 40) if kept else np.zeros(40), tasks.shape))


def test_switching_tasks_restarts_or_continues_exploration():
    """Epsilon anneals anew at every task, or once."""
    assert _restarted()["metrics"]["train/epsilon"][4] > 0.5
    np.testing.assert_allclose(_continued()["metrics"]["train/epsilon"][4], 0.05, rtol=1e-5)


def test_switching_tasks_keeps_or_resets_the_optimizer():
    """Its counter goes on, or begins anew with the last task."""
    counts = [
        max(int(leaf) for leaf in jax.tree.leaves(out["runner_state"].learner.opt_state) if leaf.dtype == jnp.int32)
        for out in (_restarted(), _continued())
    ]
    assert counts == [60, 20]


def test_a_switch_restarts_exploration_and_keeps_the_rest():
    """Unless told otherwise."""
    switch = _resolved(MATRIX).switch
    assert (switch.replay, switch.exploration, switch.optimizer) == ("clear", "restart", "keep")


def test_agents_may_see_the_task():
    """The task's one-hot widens what agents and mixer are fed, and nothing else."""
    plain = jax.eval_shape(make_train(MATRIX), jax.random.key(0))["runner_state"].learner.params
    told = jax.eval_shape(make_train({**MATRIX, "switch": {"observe_task": True}}), jax.random.key(0))["runner_state"].learner.params
    assert told["agent"]["hidden_1"]["kernel"].shape[0] == plain["agent"]["hidden_1"]["kernel"].shape[0] + 2
    assert told["mixer"]["w1_hidden"]["kernel"].shape[0] == plain["mixer"]["w1_hidden"]["kernel"].shape[0] + 2


@pytest.mark.parametrize(
    ("mixer", "mode"),
    [
        ("none", "continuous"),
        ("vdn", "rollout"),
        ("qmix", "episode"),
        ("qplex", "continuous"),
        pytest.param("qplex", "episode", marks=pytest.mark.slow),
    ],
)
def test_every_mixer_and_every_mode_trains(mixer, mode):
    """Finite numbers, and parameters that move."""
    config = {
        **TWO_STEP,
        "learner": {"mixer": mixer, "td_lambda": 0.5},
        "qplex": {"num_kernels": 2, "adv_size": 8, "hypernet_size": 8},
        "collect": {"mode": mode, "num_envs": 4, "rollout_length": 4},
    }
    train = make_train(config)
    out = jax.jit(train)(jax.random.key(0))
    start = make_program(_resolved(config)).init(jax.random.key(0), _resolved(config).hyper).learner.params
    assert np.isfinite(out["metrics"]["train/loss"][-1])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), out["runner_state"].learner.params["agent"], start["agent"])
    assert all(jax.tree.leaves(moved))


def test_learning_waits_for_a_sequence_in_every_ring():
    """With more environments than batch entries, each ring must hold a sequence before any is sampled."""
    config = {
        **TWO_STEP,
        "collect": {"num_envs": 32, "rollout_length": 2},
        "replay": {"capacity_env_steps": 2048, "batch_size": 2, "sequence_length": 4},
        "train": {"env_steps_per_task": 384},
        "evaluation": {"episodes": 1, "per_task": 6},
    }
    assert make_program(_resolved(config)).plan.slots_before_learning == 32 * 5
    updates = jax.jit(make_train(config))(jax.random.key(0))["metrics"]["updates"]
    np.testing.assert_array_equal(updates, [0, 0, 0, 1, 2, 3, 4])


def test_plan_of_each_mode():
    """Sizes of rollouts, rings and sequences, rounded as documented."""
    program = make_program(
        _resolved({**TWO_STEP, "collect": {"mode": "episode", "num_envs": 4}, "replay": {"capacity_episodes": 100, "batch_size": 8}})
    )
    assert program.plan[:4] == (3, 75, 3, 3)
    program = make_program(_resolved({**TWO_STEP, "collect": {"mode": "rollout", "num_envs": 4, "rollout_length": 5}}))
    assert program.plan[:4] == (5, 60, 5, 5)
    plan = make_plan(_resolved(TWO_STEP), program.networks.env)
    assert plan[:4] == (2, 64, 5, 1)
    assert plan.env_steps_per_task == 168
    np.testing.assert_array_equal(plan.env_steps_at_evaluations(2), [[0, 56, 112, 168], [168, 224, 280, 336]])

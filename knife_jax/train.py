"""`make_train`: collect, store, learn and evaluate over a sequence of tasks, as one pure function of a key.

Shapes: P tasks in the order met, K distinct tasks, N evaluations of a whole run.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int, PRNGKeyArray

from envs.wrappers import AutoReset
from knife_jax import collect, learner, replay
from knife_jax.config import Config, merge_hyper, resolve
from knife_jax.learner import Hyper, LearnerState, Metrics, Networks
from knife_jax.plan import Plan, make_game, make_plan

Callback = Callable[[dict[str, Any]], None]


class Counters(NamedTuple):
    """What schedules look at. Nothing here depends on the key, so that under `vmap` over seeds every `cond` stays a branch."""

    rounds: Int[Array, ""]
    updates: Int[Array, ""]


class RunnerState(NamedTuple):
    """Everything that a run carries from one round to the next; `train` returns it without the replay unless asked."""

    learner: LearnerState
    collector: collect.CollectorState
    replay: replay.ReplayState
    counters: Counters
    key: PRNGKeyArray


class Program(NamedTuple):
    """The pieces of a run, each a pure function; `make_train` joins them into one.

    Attributes:
        networks: modules, environment and tasks.
        plan: static sizes.
        init: `(key, hyper)` to the first state, with no task begun.
        begin_task: `(state, task, hyper)` to the state at the task's first step.
        train_rounds: `(state, task, hyper)` to the state after `plan.rounds_per_evaluation` rounds, and `train/` metrics over them.
        evaluate: `(state, task)` to the state and `eval/` metrics of that task.
        evaluate_all: `state` to the state and `eval/` metrics `[K]` of every distinct task.
    """

    networks: Networks
    plan: Plan
    init: Callable[..., RunnerState]
    begin_task: Callable[..., RunnerState]
    train_rounds: Callable[..., tuple[RunnerState, Metrics]]
    evaluate: Callable[..., tuple[RunnerState, Metrics]]
    evaluate_all: Callable[..., tuple[RunnerState, Metrics]]


def make_train(
    config: Config | Mapping[str, Any] | str, *, callback: Callback | None = None, return_replay: bool = False
) -> Callable[..., dict[str, Any]]:
    """Makes the whole of a run one pure function.

    Args:
        config: a `Config`, a nested dict (whose key `preset` may name a base) or a preset's name.
        callback: called on the host once per evaluation, for all vmapped seeds together, with `{name: array}`: the metrics below with the
            vmapped axes in front. It has no effect on results.
        return_replay: also return the replay in `runner_state`.

    Returns:
        `train(key, hyper=None)`, which may be jitted, and vmapped over keys and over leaves of `hyper` (`{section: {field: value}}`, over
        `config.hyper`). It returns `{"runner_state": RunnerState, "metrics": {...}}`, where N = P (per_task + 1) evaluations are one before
        each task's first step and `evaluation.per_task` evenly after it:

        * `eval/{return,won,length,optimum_share}` `[N]`: greedy play of the current task;
        * `train/*` `[N]`: means since the last evaluation, NaN before a task's first step and where there was nothing to average;
        * `position`, `task`, `rounds`, `updates` `[N]`: index into the task order, into the distinct tasks, rounds and gradient steps
          so far;
        * `all_tasks/*` `[P, K]`: greedy play of every distinct task at every task's end.

    Raises:
        ValueError: for a configuration that cannot be run, with the field's path.

    Examples:
        >>> small = {"env": {"scenario": "qtran"}, "train": {"env_steps_per_task": 64}, "agent": {"recurrent": False}}
        >>> train = make_train({**small, "evaluation": {"per_task": 2, "episodes": 1}})
        >>> jax.jit(train)(jax.random.key(0))["metrics"]["eval/return"].shape
        (3,)
    """
    config = resolve(config)
    program = make_program(config)
    emit = make_logger(callback) if callback is not None else None
    order = jnp.asarray(program.networks.tasks.order, jnp.int32)

    def train(key: PRNGKeyArray, hyper: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        swept = merge_hyper(config, hyper)
        state = program.init(key, swept)
        no_metrics = _nan_like(jax.eval_shape(program.train_rounds, state, order[0], swept)[1])

        def one_task(state: RunnerState, place: tuple[Array, Array]) -> tuple[RunnerState, tuple[Metrics, Metrics]]:
            position, task = place

            def one_period(carry: tuple[RunnerState, Metrics], _: None) -> tuple[tuple[RunnerState, Metrics], Metrics]:
                state, since_last = carry
                state, evaluated = program.evaluate(state, task)
                row = _row(state, position, task, evaluated, since_last, emit)
                return program.train_rounds(state, task, swept), row

            begun = program.begin_task(state, task, swept)
            (state, since_last), rows = jax.lax.scan(one_period, (begun, no_metrics), length=program.plan.evaluations_per_task)
            state, everywhere = program.evaluate_all(state)
            here = jax.tree.map(lambda values: values[task], everywhere)
            last = _row(state, position, task, here, since_last, emit)
            rows = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), rows, last)
            return state, (rows, everywhere)

        state, (rows, everywhere) = jax.lax.scan(one_task, state, (jnp.arange(len(order)), order))
        metrics = {name: values.reshape(-1) for name, values in rows.items()}
        metrics |= {name.replace("eval/", "all_tasks/"): values for name, values in everywhere.items()}
        kept = state if return_replay else state._replace(replay=None)  # pyright: ignore[reportArgumentType]
        return {"runner_state": kept, "metrics": metrics}

    return train


def make_program(config: Config) -> Program:
    """Builds the pieces of a run.

    Raises:
        ValueError: for a configuration that cannot be run, with the field's path.
    """
    env, tasks = make_game(config)
    plan = make_plan(config, env)
    networks = learner.make_networks(config, env, tasks)
    acting = collect.acting_environment(env, config.collect.mode)

    def fresh_actors(key: PRNGKeyArray, task: Array) -> collect.ActorState:
        return collect.init_actors(key, networks, acting, config.collect.num_envs, tasks.at(task))

    def init(key: PRNGKeyArray, hyper: Hyper) -> RunnerState:
        key, key_learner, key_actors = jax.random.split(key, 3)
        actors = fresh_actors(key_actors, jnp.int32(tasks.order[0]))
        slot = _example_slot(networks, acting, actors)
        return RunnerState(
            learner.init(key_learner, networks, hyper),
            collect.CollectorState(actors, jnp.zeros(())),
            replay.init(slot, config.collect.num_envs, plan.ring_capacity),
            Counters(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
            key,
        )

    def begin_task(state: RunnerState, task: Array, hyper: Hyper) -> RunnerState:
        key, key_actors = jax.random.split(state.key)
        restart = config.switch.exploration == "restart"
        explored = jnp.zeros(()) if restart else state.collector.explored_env_steps
        collector = collect.CollectorState(fresh_actors(key_actors, task), explored)
        stored = replay.clear(state.replay) if config.switch.replay == "clear" else replay.cut(state.replay)
        learned = state.learner
        if config.switch.optimizer == "reset":
            learned = learned._replace(opt_state=learner.make_optimizer(config, hyper).init(learned.params))
        return RunnerState(learned, collector, stored, state.counters, key)

    def one_round(state: RunnerState, task: Array, hyper: Hyper) -> tuple[RunnerState, tuple[Metrics, Metrics]]:
        key, key_reset, key_explore, key_learn = jax.random.split(state.key, 4)
        collector = state.collector
        if config.collect.mode != "continuous":
            collector = collector._replace(actors=fresh_actors(key_reset, task))
        collector, rollout, played = collect.explore(
            key_explore, state.learner.params, networks, collector, task, plan.rollout_length, hyper
        )
        if config.collect.mode == "rollout":
            rollout = collect.cut_rollout(rollout)
        stored = replay.add(state.replay, rollout)
        learned, updates, summed = _learn(key_learn, state, stored, networks, plan, hyper)
        counters = Counters(state.counters.rounds + 1, updates)
        return RunnerState(learned, collector, stored, counters, key), (played, summed)

    def train_rounds(state: RunnerState, task: Array, hyper: Hyper) -> tuple[RunnerState, Metrics]:
        updates = state.counters.updates
        state, (played, learned) = jax.lax.scan(lambda state, _: one_round(state, task, hyper), state, length=plan.rounds_per_evaluation)
        return state, _train_metrics(played, learned, state.counters.updates - updates)

    def evaluate(state: RunnerState, task: Array) -> tuple[RunnerState, Metrics]:
        key, key_play = jax.random.split(state.key)
        metrics = collect.evaluate(key_play, state.learner.params, networks, task, config.evaluation.episodes)
        return state._replace(key=key), {f"eval/{name}": value for name, value in metrics.items()}

    def evaluate_all(state: RunnerState) -> tuple[RunnerState, Metrics]:
        indices = jnp.arange(len(tasks.names))
        (keys, metrics) = jax.vmap(lambda task: evaluate(state, task))(indices)
        return state._replace(key=keys.key[0]), metrics

    return Program(networks, plan, init, begin_task, train_rounds, evaluate, evaluate_all)


def make_logger(write: Callback) -> Callable[[dict[str, Array]], tuple[()]]:
    """Wraps a host function so that it is called once per event with the whole vmapped batch.

    The batching rule of `jax.debug.callback` would unroll over the batch; this one hands the batched arrays to another call of itself, so
    that nested vmaps add one leading axis each.
    """

    @custom_vmap
    def log(event: dict[str, Array]) -> tuple[()]:
        jax.debug.callback(write, event)
        return ()

    @log.def_vmap
    def batched(axis_size: int, in_batched: list[Any], event: dict[str, Array]) -> tuple[tuple[()], tuple[()]]:
        def full(value: Array, is_batched: bool) -> Array:
            return value if is_batched else jnp.broadcast_to(value, (axis_size, *jnp.shape(value)))

        log(jax.tree.map(full, event, in_batched[0]))
        return (), ()

    return log


def _learn(
    key: PRNGKeyArray, state: RunnerState, stored: replay.ReplayState, networks: Networks, plan: Plan, hyper: Hyper
) -> tuple[LearnerState, Array, Metrics]:
    """The gradient steps of one round, once enough is stored; metrics are summed over them."""
    settings = networks.config

    def one_update(carry: tuple[LearnerState, Array], key: PRNGKeyArray) -> tuple[tuple[LearnerState, Array], Metrics]:
        learned, updates = carry
        batch = replay.sample(key, stored, settings.replay.batch_size, plan.sequence_slots, plan.sequence_stride, settings.replay.burn_in)
        learned, metrics = learner.gradient_step(learned, networks, batch, hyper)
        return (learner.update_target(learned, networks, updates + 1, hyper), updates + 1), metrics

    def learn() -> tuple[LearnerState, Array, Metrics]:
        keys = jax.random.split(key, settings.train.updates_per_round)
        (learned, updates), metrics = jax.lax.scan(one_update, (state.learner, state.counters.updates), keys)
        return learned, updates, jax.tree.map(lambda values: values.sum(axis=0), metrics)

    def skip() -> tuple[LearnerState, Array, Metrics]:
        nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(learn)[2])
        return state.learner, state.counters.updates, nothing

    ready = stored.size * settings.collect.num_envs >= plan.slots_before_learning
    return jax.lax.cond(ready, learn, skip)


def _train_metrics(played: Metrics, learned: Metrics, updates: Array) -> Metrics:
    """Means over several rounds, of sums per round `[rounds]`."""
    metrics = {name: values.sum() / updates for name, values in learned.items()}
    episodes = played["episodes"].sum()
    metrics |= {name: played[name].sum() / episodes for name in ("return", "won", "length")}
    metrics |= {"episodes": episodes, "env_steps": played["env_steps"].sum(), "epsilon": played["epsilon"][-1]}
    return {f"train/{name}": value for name, value in metrics.items()}


def _row(
    state: RunnerState, position: Array, task: Array, evaluated: Metrics, since_last: Metrics, emit: Callable[..., Any] | None
) -> Metrics:
    """One evaluation's metrics, which are also handed to the callback."""
    row = {"position": position, "task": task, **state.counters._asdict(), **evaluated, **since_last}
    if emit is not None:
        emit(row)
    return row


def _nan_like(shapes: Any) -> Metrics:
    return jax.tree.map(lambda shape: jnp.full(shape.shape, jnp.nan, shape.dtype), shapes)


def _example_slot(networks: Networks, acting: AutoReset, actors: collect.ActorState) -> replay.Slot:
    """One slot, blank."""
    env = networks.env

    def record(states: Any) -> Any:
        return acting.record(jax.tree.map(lambda leaf: leaf[0], states))

    return replay.Slot(
        jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(record, actors.env)),
        jnp.zeros(env.num_agents, collect.action_dtype(env.num_actions)),
        jnp.zeros(()),
        jnp.zeros((), jnp.int8),
        jnp.zeros((), jnp.int16),
    )

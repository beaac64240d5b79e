"""The pieces of a run: what happens at a task's start, in a round of training, and at an evaluation.

Shapes: K distinct tasks.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from envs.context import in_one_context
from envs.wrappers import AutoReset
from knife_jax import collect, diagnose, learner, replay
from knife_jax.bundle import Bundle, blank, bundled
from knife_jax.config import Config
from knife_jax.learner import LearnerState, Metrics
from knife_jax.model import Hyper, Networks, States, make_networks
from knife_jax.networks.agents import RECURRENT
from knife_jax.plan import Plan, Schedule, make_game, make_plan, make_schedule
from knife_jax.plasticity.method import Variables, no_intervention
from knife_jax.split import Split

_CURE, _DIAGNOSIS = 2**31 - 1, 2**31 - 2
"""Folded into keys for what must not change the draws of a run without it; far from what splitting reaches."""


Place = tuple[Int[Array, ""], Int[Array, ""]]
"""An index into the order of tasks, and the distinct task met there."""


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
    stagnant: diagnose.Masks


class Row(NamedTuple):
    """One evaluation.

    Attributes:
        where: position, task, rounds and updates.
        metrics: all else.
    """

    where: Metrics
    metrics: Bundle

    def unpacked(self) -> dict[str, Any]:
        """All in one dict."""
        return {**self.where, **self.metrics.unpacked()}


class Period(NamedTuple):
    """What is added up from one evaluation to the next, round by round, so that a period may be cut anywhere without changing a bit.

    Attributes:
        played: sums over the rounds of what collecting tells, but the last round's `epsilon`.
        learned: sums over the gradient steps of what learning tells.
        updates: gradient steps, the same for every seed.
    """

    played: Bundle
    learned: Bundle
    updates: Int[Array, ""]


class Learning(NamedTuple):
    """What the gradient steps of a round change.

    Attributes:
        learner: the learner.
        updates: gradient steps so far.
        acting: the memory of the agents at play, as far as an intervention rewrites it.
    """

    learner: LearnerState
    updates: Int[Array, ""]
    acting: States


@dataclass(frozen=True)
class Program:
    """The pieces of a run, each a pure function; `make_train` joins them into one.

    Attributes:
        config: the configuration.
        networks: modules, environment and tasks.
        plan: static sizes.
        schedule: when the cure intervenes.
    """

    config: Config
    networks: Networks
    plan: Plan
    schedule: Schedule

    @in_one_context
    def init(self, key: PRNGKeyArray, hyper: Hyper) -> RunnerState:
        """The first state: parameters drawn, nothing stored, no task begun and nobody at play."""
        key, key_learner = jax.random.split(key)
        num_envs = self.config.collect.num_envs
        actors = _blank(jax.eval_shape(lambda: self._fresh_actors(jax.random.split(key, num_envs), jnp.int32(0))))
        slot = _blank_slot(self.networks, self._acting, actors)
        return RunnerState(
            learner.init(key_learner, self.networks, hyper),
            collect.CollectorState(actors, jnp.zeros(())),
            replay.init(slot, num_envs, self.plan.ring_capacity),
            Counters(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
            key,
            diagnose.blank_masks(self.networks) if self._diagnoses else {},
        )

    @in_one_context
    def begin_task(self, state: RunnerState, task: Int[Array, ""], hyper: Hyper) -> RunnerState:
        """The state at a task's first step: environments reset, and what `config.switch` says of replay, exploration and optimizer."""
        switch = self.config.switch
        keys = jax.random.split(state.key, 1 + self.config.collect.num_envs)
        key, keys_reset = keys[0], keys[1:]
        explored = jnp.zeros(()) if switch.exploration == "restart" else state.collector.explored_env_steps
        collector = collect.CollectorState(self._fresh_actors(keys_reset, task), explored)
        stored = replay.clear(state.replay) if switch.replay == "clear" else replay.cut(state.replay)
        learned = state.learner
        if switch.optimizer == "reset":
            learned = learned._replace(opt_state=learner.optimizer_of(self.networks, hyper).init(learned.params))
        if self._intervenes(hyper) == "task_switch":
            key, key_cure = jax.random.split(key)
            acting = self.networks.running_states(collector.actors.hidden)
            learned, acting = self._intervene_if(state.counters.updates > 0, key_cure, learned, acting, hyper)
            collector = _acting_on(collector, acting)
        return RunnerState(learned, collector, stored, state.counters, key, state.stagnant)

    @in_one_context
    def train_rounds(self, state: RunnerState, task: Int[Array, ""], hyper: Hyper) -> tuple[RunnerState, Bundle]:
        """`plan.rounds_per_evaluation` rounds of collecting and learning, with `train/` metrics over them and `plasticity/` after them."""

        def next_round(carry: tuple[RunnerState, Period], _: None) -> tuple[tuple[RunnerState, Period], None]:
            return self.one_round(*carry, task, hyper), None

        start = (state, new_period())
        (state, period), _ = jax.lax.scan(next_round, start, length=self.plan.rounds_per_evaluation)
        return self.end_period(state, period, hyper)

    def one_round(self, state: RunnerState, period: Period, task: Int[Array, ""], hyper: Hyper) -> tuple[RunnerState, Period]:
        """One round of collecting and learning, and what it adds to the period."""
        before = state.counters.updates
        state, (played, learned) = self._round(state, task, hyper)
        so_far = jnp.where(collect.IS_LAST, played.values, period.played.values + played.values)
        summed = Bundle(learned.names, period.learned.values + learned.values)
        return state, Period(Bundle(played.names, so_far), summed, period.updates + state.counters.updates - before)

    def end_period(self, state: RunnerState, period: Period, hyper: Hyper) -> tuple[RunnerState, Bundle]:
        """What a period comes to: `train/` metrics over it, `cure/` and `plasticity/` ones at its end."""
        metrics = bundled(_train_metrics(period) | {f"cure/{name}": value for name, value in state.learner.report.items()})
        if not self._diagnoses:
            return state, metrics
        measures, stagnant = self._diagnose(jax.random.fold_in(state.key, _DIAGNOSIS), state, hyper)
        return state._replace(stagnant=stagnant), metrics | measures

    def no_metrics(self, state: RunnerState) -> Bundle:
        """What stands for the metrics of `end_period` before a task's first step: NaN."""
        names = [f"train/{name}" for name in (*collect.METRICS, *learner.METRICS)] + [f"cure/{name}" for name in state.learner.report]
        metrics = blank(names, jnp.nan)
        return metrics | blank(diagnose.names(self.networks), jnp.nan) if self._diagnoses else metrics

    def _diagnose(self, key: PRNGKeyArray, state: RunnerState, hyper: Hyper) -> tuple[Bundle, diagnose.Masks]:
        """What the hidden units are like; NaN before there is enough to learn from."""
        args = (state.learner, self.networks, state.replay, self.plan, hyper, state.stagnant)

        def measured() -> tuple[Bundle, diagnose.Masks]:
            measures, stagnant = diagnose.diagnose(key, *args)
            return bundled(measures), stagnant

        def unknown() -> tuple[Bundle, diagnose.Masks]:
            return blank(diagnose.names(self.networks), jnp.nan), state.stagnant

        return jax.lax.cond(self._can_learn(state.replay), measured, unknown)

    def _can_learn(self, stored: replay.ReplayState) -> Array:
        """Whether enough is stored for a gradient step; the same for every seed."""
        return stored.size * self.config.collect.num_envs >= self.plan.slots_before_learning

    @property
    def _diagnoses(self) -> bool:
        return self.config.plasticity.diagnostics and bool(self.networks.graph.layers)

    @in_one_context
    def evaluate(self, state: RunnerState, task: Int[Array, ""]) -> tuple[RunnerState, Metrics]:
        """`eval/` metrics of one task."""
        key, key_play = jax.random.split(state.key)
        return state._replace(key=key), self._play(key_play, state.learner.variables, task)

    @in_one_context
    def evaluate_all(self, state: RunnerState) -> tuple[RunnerState, Metrics]:
        """`eval/` metrics of every distinct task, `[K]`."""
        key, key_play = jax.random.split(state.key)
        tasks = jnp.arange(len(self.networks.tasks.names))
        return state._replace(key=key), jax.vmap(self._play, in_axes=(None, None, 0))(key_play, state.learner.variables, tasks)

    def _intervenes(self, hyper: Hyper) -> str:
        """When the cure rewrites anything: `never`, `every_update`, `task_switch` or `interval`."""
        cure = self.networks.cure(hyper)
        if cure.apply is no_intervention:
            return "never"
        if cure.every_update:
            return "every_update"
        return "interval" if self.schedule.every_updates is not None else "task_switch"

    def _intervene_if(
        self, due: Array, key: PRNGKeyArray, learned: LearnerState, acting: States, hyper: Hyper
    ) -> tuple[LearnerState, States]:
        return jax.lax.cond(due, lambda: learner.intervene(key, learned, acting, self.networks, hyper), lambda: (learned, acting))

    def _is_due(self, updates: Array) -> Array:
        """Whether an intervention comes before the gradient step after so many."""
        interval = self.schedule.every_updates
        assert interval is not None
        if self.schedule.only_once:
            return updates == interval
        return (updates % interval == 0) & (updates > 0)

    @property
    def _acting(self) -> AutoReset:
        return collect.acting_environment(self.networks.env, self.config.collect.mode)

    def _fresh_actors(self, keys: Array, task: Array) -> collect.ActorState:
        return collect.init_actors(keys, self.networks, self._acting, self.networks.tasks.at(task))

    def _play(self, key: PRNGKeyArray, variables: Variables, task: Array) -> Metrics:
        metrics = collect.evaluate(key, variables, self.networks, task, self.config.evaluation.episodes)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _round(self, state: RunnerState, task: Array, hyper: Hyper) -> tuple[RunnerState, tuple[Bundle, Bundle]]:
        """Collects and stores one rollout, then learns; metrics are sums over the round."""
        num_envs, length, updates = self.config.collect.num_envs, self.plan.rollout_length, self.config.train.updates_per_round
        keys = jax.random.split(state.key, 1 + updates + num_envs + length * (1 + num_envs))
        key, keys_learn, keys_reset, keys_explore = jnp.split(keys, np.cumsum([1, updates, num_envs]))
        collector, mode = state.collector, self.config.collect.mode
        if mode != "continuous":
            collector = collector._replace(actors=self._fresh_actors(keys_reset, task))
        keys_explore = keys_explore.reshape(length, 1 + num_envs)
        collector, rollout, played = collect.explore(keys_explore, state.learner.variables, self.networks, collector, task, hyper)
        if mode == "rollout":
            rollout = collect.cut_rollout(rollout)
        stored = replay.add(state.replay, rollout)
        start = Learning(state.learner, state.counters.updates, self.networks.running_states(collector.actors.hidden))
        learning, summed = self._learn(keys_learn, start, stored, task, hyper)
        counters = Counters(state.counters.rounds + 1, learning.updates)
        collector = _acting_on(collector, learning.acting)
        return RunnerState(learning.learner, collector, stored, counters, key[0], state.stagnant), (played, summed)

    def _learn(self, keys: Array, start: Learning, stored: replay.ReplayState, task: Array, hyper: Hyper) -> tuple[Learning, Bundle]:
        """The gradient steps of one round, once enough is stored; the replay is only read inside the `cond`."""
        settings, plan, intervenes = self.config, self.plan, self._intervenes(hyper)
        only = task if settings.switch.replay == "clear" else None

        def one_update(carry: Learning, key: PRNGKeyArray) -> tuple[Learning, Bundle]:
            learned, updates, acting = carry
            batch_size, burn_in = settings.replay.batch_size, settings.replay.burn_in
            split = self.networks.split
            batch = replay.sample(key, stored, batch_size, plan.sequence_slots, plan.sequence_stride, burn_in, split)._replace(task=only)
            if intervenes == "interval":
                learned, acting = self._intervene_if(self._is_due(updates), jax.random.fold_in(key, _CURE), learned, acting, hyper)
            learned, metrics = learner.gradient_step(learned, self.networks, batch, hyper)
            if intervenes == "every_update":
                learned, acting = learner.intervene(jax.random.fold_in(key, _CURE), learned, acting, self.networks, hyper)
            return Learning(learner.update_target(learned, self.networks, updates + 1, hyper), updates + 1, acting), bundled(metrics)

        def learn() -> tuple[Learning, Bundle]:
            learning, of_updates = jax.lax.scan(one_update, start, keys)
            return learning, Bundle(of_updates.names, of_updates.values.sum(axis=0))

        def skip() -> tuple[Learning, Bundle]:
            return start, blank(learner.METRICS)

        return jax.lax.cond(self._can_learn(stored), learn, skip)


def make_program(config: Config, parts: int = 1) -> Program:
    """Builds the pieces of a run.

    Args:
        config: the configuration.
        parts: over how many devices a seed is split; see `split`.

    Raises:
        ValueError: for a configuration that cannot be run, with the field's path, or whose batches cannot be split evenly.
    """
    if config.replay.batch_size % parts:
        raise ValueError(f"devices: {parts} for one seed cannot share its replay.batch_size of {config.replay.batch_size} evenly")
    env, tasks = make_game(config)
    plan = make_plan(config, env)
    schedule = make_schedule(config, plan, len(tasks.order))
    networks = make_networks(config, env, tasks, schedule.count)._replace(split=Split(parts))
    return Program(config, networks, plan, schedule)


def new_period() -> Period:
    """Nothing added up yet."""
    return Period(blank(collect.METRICS), blank(learner.METRICS), jnp.zeros((), jnp.int32))


def make_row(state: RunnerState, place: Place, evaluated: Metrics, since_last: Bundle) -> Row:
    """One evaluation's metrics: where in the run it was, what it found, and what the period before it came to."""
    return Row({"position": place[0], "task": place[1], **state.counters._asdict()}, bundled(evaluated) | since_last)


def _acting_on(collector: collect.CollectorState, acting: States) -> collect.CollectorState:
    """The collector with the memory that an intervention left."""
    actors = collector.actors
    return collector._replace(actors=actors._replace(hidden=acting.get(RECURRENT, actors.hidden)))


def _train_metrics(period: Period) -> Metrics:
    """Means over a period; NaN where there is nothing to average."""
    played = period.played.unpacked()
    episodes = played["episodes"]
    metrics = Bundle(period.learned.names, period.learned.values / period.updates).unpacked()
    metrics |= {name: played[name] / episodes for name in ("return", "won", "length")}
    metrics |= {name: played[name] for name in ("episodes", "env_steps", "epsilon")}
    return {f"train/{name}": value for name, value in metrics.items()}


def _blank(shapes: Any) -> Any:
    """Zeros, and for keys such as are made of 0."""

    def of(shape: jax.ShapeDtypeStruct) -> Array:
        is_key = jnp.issubdtype(shape.dtype, jax.dtypes.prng_key)
        return jnp.broadcast_to(jax.random.key(0), shape.shape) if is_key else jnp.zeros(shape.shape, shape.dtype)

    return jax.tree.map(of, shapes)


def _blank_slot(networks: Networks, acting: AutoReset, actors: collect.ActorState) -> replay.Slot:
    """One slot of zeros."""
    env = networks.env

    def record(states: Any) -> Any:
        return acting.record(jax.tree.map(lambda leaf: leaf[0], states))

    return replay.Slot(
        _blank(jax.eval_shape(record, actors.env)),
        jnp.zeros(env.num_agents, collect.action_dtype(env.num_actions)),
        jnp.zeros(()),
        jnp.zeros((), jnp.int8),
        jnp.zeros((), jnp.int16),
    )

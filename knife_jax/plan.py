"""The static sizes and schedule of a run, worked out from a configuration before anything compiles."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from envs import registry
from envs.base import Environment, Tasks
from knife_jax.config import Config


class Plan(NamedTuple):
    """Sizes and counts that shape the compiled program.

    Attributes:
        rollout_length: slots collected from each environment per round.
        ring_capacity: slots held for each environment.
        sequence_slots: slots of a training sequence, the one bootstrapped from included.
        sequence_stride: slots between possible beginnings of sequences.
        slots_before_learning: slots stored, over all environments, before the first gradient step.
        rounds_per_evaluation: rounds between two evaluations.
        evaluations_per_task: evaluations after the one before the task's first step.
        round_env_steps: slots collected per round, over all environments.
        samples_per_update: observations that a gradient step passes through the agents' network.
    """

    rollout_length: int
    ring_capacity: int
    sequence_slots: int
    sequence_stride: int
    slots_before_learning: int
    rounds_per_evaluation: int
    evaluations_per_task: int
    round_env_steps: int
    samples_per_update: int

    @property
    def env_steps_per_task(self) -> int:
        """Slots collected in each task, after rounding up."""
        return self.rounds_per_evaluation * self.evaluations_per_task * self.round_env_steps

    def env_steps_at_evaluations(self, num_tasks: int) -> np.ndarray:
        """Slots collected before each evaluation of a sequence of tasks, `[num_tasks, evaluations_per_task + 1]`, 64 bits."""
        within = np.arange(self.evaluations_per_task + 1, dtype=np.int64) * self.rounds_per_evaluation * self.round_env_steps
        return np.arange(num_tasks, dtype=np.int64)[:, None] * self.env_steps_per_task + within


class Schedule(NamedTuple):
    """When interventions happen.

    Attributes:
        every_updates: before every gradient step whose number so far is a multiple of it; None at task switches only.
        only_once: whether the first multiple is the only one.
        count: how many there will be in a whole run.
    """

    every_updates: int | None
    only_once: bool
    count: int


def make_schedule(config: Config, plan: Plan, num_positions: int) -> Schedule:
    """Works out when a cure intervenes.

    Args:
        config: the configuration.
        plan: its sizes.
        num_positions: length of the task order.

    Raises:
        ValueError: for an interval as long as the run, or task switches of a single task, with the field's path.
    """
    settings = config.plasticity
    nominal = plan.rounds_per_evaluation * plan.evaluations_per_task * config.train.updates_per_round
    if settings.when == "task_switch":
        if num_positions == 1:
            raise ValueError(
                "plasticity.when: 'task_switch' never comes in a run of one task; take 'interval' or 'once', or a task sequence"
            )
        return Schedule(None, False, num_positions - 1)
    waiting = (-(-plan.slots_before_learning // plan.round_env_steps) - 1) * config.train.updates_per_round
    times_waiting = num_positions if config.switch.replay == "clear" else 1
    total = nominal * num_positions - waiting * times_waiting
    interval = settings.interval_updates or (nominal if num_positions > 1 else min(1000, max(1, total // 2)))
    if interval >= total and settings.interval_updates is not None and settings.name != "none":
        raise ValueError(f"plasticity.interval_updates: {interval} never comes in a run of {total} gradient steps")
    once = settings.when == "once"
    return Schedule(interval, once, 1 if once else (total - 1) // interval)


def make_game(config: Config) -> tuple[Environment, Tasks]:
    """The environment and tasks that a configuration names.

    Raises:
        ValueError: for an unknown game, scenario or option, with the field's path.
    """
    settings = config.env
    for reserved in ("name", "scenario", "tasks"):
        if reserved in settings.options:
            raise ValueError(f"env.options: {reserved!r} is a field of env itself, give it as env.{reserved}")
    try:
        return registry.make(settings.name, settings.scenario, settings.tasks, **settings.options)
    except ValueError as error:
        raise ValueError(f"env.{_blamed_field(str(error), settings.options)}: {error}") from error


def _blamed_field(message: str, options: Mapping[str, Any]) -> str:
    """The field of `env` that an error of the registry speaks of."""
    if message.startswith("tasks["):
        return "tasks"
    if message.startswith("unknown game"):
        return "name"
    if message.startswith(("unknown scenario", "scenario")):
        return "scenario"
    return "options" if options else "name"


def make_plan(config: Config, env: Environment) -> Plan:
    """Works out the sizes of a run.

    Raises:
        ValueError: if the replay cannot hold what a batch asks for, or fields contradict each other, with the field's path.
    """
    collect, replay = config.collect, config.replay
    one_step = env.max_steps == 1
    episode_slots = 1 if one_step else env.max_steps + 1
    rollout_length = episode_slots if collect.mode == "episode" else collect.rollout_length
    if collect.mode == "continuous":
        sequence_slots, stride = replay.sequence_length + (0 if one_step else 1), 1
    else:
        sequence_slots = stride = rollout_length
    if collect.mode == "rollout" and rollout_length == 1 and not one_step:
        raise ValueError("collect.rollout_length: a rollout of 1 slot, cut at its end, holds no transition to learn from; take at least 2")
    round_env_steps = collect.num_envs * rollout_length
    ring_capacity = _ring_capacity(config, rollout_length)
    stored = ring_capacity * collect.num_envs
    if sequence_slots > ring_capacity or replay.batch_size * sequence_slots > stored:
        raise ValueError(
            f"replay.batch_size: {replay.batch_size} sequences of {sequence_slots} slots do not fit the replay, which holds "
            f"{stored} slots ({collect.num_envs} environments of {ring_capacity}); enlarge replay.capacity_env_steps"
        )
    if config.train.learning_starts_env_steps > stored:
        raise ValueError(f"train.learning_starts_env_steps: {config.train.learning_starts_env_steps} slots never fit the replay's {stored}")
    if replay.burn_in >= sequence_slots - (0 if one_step else 1) and replay.burn_in > 0:
        raise ValueError(f"replay.burn_in: {replay.burn_in} leaves nothing to train on in sequences of {sequence_slots} slots")
    per_task = config.evaluation.per_task
    rounds = -(-config.train.env_steps_per_task // (round_env_steps * per_task))
    needed = max(config.train.learning_starts_env_steps, max(replay.batch_size, collect.num_envs) * sequence_slots)
    if config.switch.replay == "clear" and rounds * per_task * round_env_steps < needed:
        raise ValueError(
            f"train.env_steps_per_task: {config.train.env_steps_per_task} slots end before the first gradient step, for which the replay "
            f"must hold {needed} (train.learning_starts_env_steps, and a sequence per batch entry and per environment)"
        )
    samples = replay.batch_size * sequence_slots * env.num_agents
    return Plan(rollout_length, ring_capacity, sequence_slots, stride, needed, rounds, per_task, round_env_steps, samples)


def _ring_capacity(config: Config, rollout_length: int) -> int:
    """Slots per environment, a multiple of the rollout's length."""
    collect, replay = config.collect, config.replay
    if replay.capacity_episodes is not None:
        if collect.mode != "episode":
            raise ValueError(f"replay.capacity_episodes: counts episodes of the mode 'episode', but collect.mode is {collect.mode!r}")
        rollouts, field = replay.capacity_episodes // collect.num_envs, "capacity_episodes"
    else:
        rollouts, field = replay.capacity_env_steps // (collect.num_envs * rollout_length), "capacity_env_steps"
    if rollouts == 0:
        raise ValueError(f"replay.{field}: holds less than one round of {collect.num_envs} environments x {rollout_length} slots")
    return rollouts * rollout_length

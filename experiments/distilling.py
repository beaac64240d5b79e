"""Can a network still learn a fixed target? A sequence of tasks, a cure at its end, and then supervised learning, as functions of a key.

After a whole sequence of tasks a network learns what a teacher says of the team values of a fixed set of stored situations, with the
learner's own optimizer, by gradient steps on all of them at once. Nothing drifts any more, nobody explores, no target moves: what a
network does not learn here, it has become unable to learn.

Shapes: S seeds, T slots, B sequences, P positions in the order of tasks, N records.

References:
    Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023, figure 8. There the target is a trained network's
    values; here that, and those of a network that learned nothing.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from experiments import cells
from experiments.cells import Cell
from knife_jax import learner, replay
from knife_jax.config import Config, PlasticityConfig, parse_yaml
from knife_jax.cores import compile_wide
from knife_jax.learner import LearnerState
from knife_jax.model import Networks, draw_params, make_networks, observe
from knife_jax.program import Program, RunnerState, make_program
from knife_jax.provenance import environment_facts
from knife_jax.replay import Continuation, Sequences
from knife_jax.runner import seed_keys

TEACHERS = ("its own first task", "random network")
"""What the network itself gave at the end of its first task, which the sequence returns to; and freshly drawn weights' values."""
SHARES = tuple(f"plasticity/{network}/{share}" for network in ("agent", "mixer") for share in ("stagnant", "dormant", "inactive"))
SEQUENCES = 64
"""B, of the fixed data."""
WATCHED = 16
"""Batches of the last task from which a cure judges the units."""
RECORDS = 40
_TINY = 1e-6


class Lesson(NamedTuple):
    """What a learner is after a sequence of tasks, and what it is to learn now.

    Attributes:
        learned: the learner.
        stored: its replay, of the last task.
        data: stored sequences, with actions drawn anew, uniformly from those available.
        targets: what each teacher says of them, with the mean and the spread of what the first says.
        shares: of stuck units at every task's end.
    """

    learned: LearnerState
    stored: replay.ReplayState
    data: Sequences
    targets: Float[Array, "2 T B 1"]
    shares: dict[str, Float[Array, "P"]]


def make_lesson(config: Config) -> Callable[[PRNGKeyArray], Lesson]:
    """A learner's whole life without a cure, as a pure function of a key.

    Raises:
        ValueError: for a configuration that cannot be run, or a sequence that does not end with its first task.
    """
    program = make_program(config)
    networks, order = program.networks, program.networks.tasks.order
    if len(order) == 1 or order[0] != order[-1]:
        raise ValueError(
            f"env.scenario: a sequence of tasks that ends with its first is needed; {config.env.scenario!r} has the order {order}"
        )

    def lesson(key: PRNGKeyArray) -> Lesson:
        key, key_data, key_teacher = jax.random.split(key, 3)
        state, first, shares = _live(program, key)
        data = _draw(key_data, program, state.replay)
        own, random = (_values({"params": params, "reserve": {}}, networks, data) for params in (first, draw_params(key_teacher, networks)))
        return Lesson(state.learner, state.replay, data, _alike(own, random, _counts(data)), shares)

    return lesson


def make_student(config: Config, steps: int) -> Callable[[PRNGKeyArray, Lesson], Float[Array, "2 N+1"]]:
    """A cure at the end of a sequence, and then supervised learning.

    Args:
        config: with the cure.
        steps: gradient steps; N of them, evenly spaced, are recorded, and what was before the first.

    Returns:
        `(key, lesson) -> unexplained`: the mean squared error over the variance of each teacher's targets.

    Raises:
        ValueError: for a cure that these networks cannot have.
    """
    program = make_program(config)
    networks = make_networks(config, program.networks.env, program.networks.tasks, interventions=1)

    def student(key: PRNGKeyArray, lesson: Lesson) -> Float[Array, "2 N+1"]:
        treated = _treated(key, lesson, networks, program)
        return jax.vmap(partial(_distilled, treated, networks, lesson.data, steps=steps))(lesson.targets)

    return student


def steps_of(config: Config) -> int:
    """As many gradient steps as a task has."""
    plan = make_program(config).plan
    return plan.rounds_per_evaluation * plan.evaluations_per_task * config.train.updates_per_round


def teach(cell: Cell, path: Path) -> None:
    """Makes the file of a cell: `unexplained` `[S, 2, N+1]` at `steps` `[N+1]`, and `shares/...` `[S, P]` before the cure.

    All cures of a setting and a mixer start from the same networks, which are trained once.
    """
    began = time.perf_counter()
    keys = seed_keys(cell.seeds, cell.first_seed)
    without = replace(cell.config, plasticity=PlasticityConfig())
    lessons, steps = _lessons(without.to_yaml(), cell.seeds, cell.first_seed), steps_of(cell.config)
    student = jax.jit(jax.vmap(make_student(cell.config, steps)))
    unexplained = compile_wide(student.lower(keys, lessons))(keys, lessons)
    arrays = {"unexplained": np.asarray(unexplained), "steps": np.arange(RECORDS + 1) * (steps // RECORDS)}
    arrays |= {f"shares/{name.removeprefix('plasticity/')}": np.asarray(values) for name, values in lessons.shares.items()}
    facts = {"seeds": cell.seeds, "first_seed": cell.first_seed, "run_seconds": round(time.perf_counter() - began, 3)}
    cells.write(cell, arrays, {**facts, **environment_facts()}, path)


@lru_cache(maxsize=1)
def _lessons(config: str, seeds: int, first_seed: int) -> Lesson:
    """The lessons of many seeds."""
    lesson, keys = jax.jit(jax.vmap(make_lesson(Config.from_dict(parse_yaml(config))))), seed_keys(seeds, first_seed)
    return compile_wide(lesson.lower(keys))(keys)


def _live(program: Program, key: PRNGKeyArray) -> tuple[RunnerState, Any, dict[str, Float[Array, "P"]]]:
    """The state after all tasks, the parameters after the first, and the shares at each one's end."""
    hyper = program.config.hyper

    def one_task(state: RunnerState, task: Array) -> tuple[RunnerState, tuple[Any, dict[str, Array]]]:
        def one_period(state: RunnerState, _: None) -> tuple[RunnerState, dict[str, Array]]:
            state, metrics = program.train_rounds(state, task, hyper)
            return state, {name: metrics.unpacked()[name] for name in SHARES}

        begun = program.begin_task(state, task, hyper)
        state, shares = jax.lax.scan(one_period, begun, length=program.plan.evaluations_per_task)
        return state, (state.learner.params, jax.tree.map(lambda values: values[-1], shares))

    order = jnp.asarray(program.networks.tasks.order, jnp.int32)
    state, (ends, shares) = jax.lax.scan(one_task, program.init(key, hyper), order)
    return state, jax.tree.map(lambda leaf: leaf[0], ends), shares


def _draw(key: PRNGKeyArray, program: Program, stored: replay.ReplayState) -> Sequences:
    """Stored sequences of the last task, with other actions."""
    networks, plan = program.networks, program.plan
    key_sample, key_actions = jax.random.split(key)
    data = _sample(key_sample, program, stored, SEQUENCES)
    mask = observe(networks, data.slots.record, data.slots.task, data.task).action_mask
    actions = jax.random.categorical(key_actions, jnp.where(mask, 0.0, -jnp.inf)).astype(data.slots.actions.dtype)
    assert actions.shape == (plan.sequence_slots, SEQUENCES, networks.env.num_agents)
    return data._replace(slots=data.slots._replace(actions=actions))


def _sample(key: PRNGKeyArray, program: Program, stored: replay.ReplayState, number: int) -> Sequences:
    plan, config = program.plan, program.config
    only = jnp.int32(program.networks.tasks.order[-1]) if config.switch.replay == "clear" else None
    return replay.sample(key, stored, number, plan.sequence_slots, plan.sequence_stride, config.replay.burn_in)._replace(task=only)


def _counts(data: Sequences) -> Bool[Array, "T B 1"]:
    return ((data.slots.continuation != Continuation.CUT) & ~data.burn_in)[..., None]


def _values(variables: Any, networks: Networks, data: Sequences) -> Float[Array, "T B 1"]:
    observation = learner.observed(networks, data)
    return learner.team_values(variables, variables, networks, data, observation).online


def _alike(first: Float[Array, "T B 1"], second: Float[Array, "T B 1"], counts: Bool[Array, "T B 1"]) -> Float[Array, "2 T B 1"]:
    """Both, the second with the mean and the spread of the first."""
    means = [values.mean(where=counts) for values in (first, second)]
    spreads = [values.std(where=counts) for values in (first, second)]
    return jnp.stack([first, means[0] + (second - means[1]) * spreads[0] / jnp.maximum(spreads[1], _TINY)])


def _treated(key: PRNGKeyArray, lesson: Lesson, networks: Networks, program: Program) -> LearnerState:
    """The learner once its cure has watched some batches, at weights that do not move, and acted."""
    hyper, cure = networks.config.hyper, networks.cure(networks.config.hyper)
    key_watch, key_cure = jax.random.split(key)
    both = [cure.allocate({"params": params, "reserve": {}}) for params in (lesson.learned.params, lesson.learned.target_params)]
    params, reserve = both[0]["params"], both[0]["reserve"]
    opt_state = learner.optimizer_of(networks, hyper).init(params)
    start = LearnerState(params, both[1]["params"], opt_state, reserve, both[1]["reserve"], cure.init(both[0]), {})

    def watch(state: LearnerState, key: PRNGKeyArray) -> tuple[LearnerState, None]:
        batch = _sample(key, program, lesson.stored, networks.config.replay.batch_size)
        return state._replace(cure=learner.gradient_step(state, networks, batch, hyper)[0].cure), None

    watched, _ = jax.lax.scan(watch, start, jax.random.split(key_watch, WATCHED))
    nobody = networks.running_states(networks.initial_hidden((0,)))
    return learner.intervene(key_cure, watched, nobody, networks, hyper)[0]


def _distilled(start: LearnerState, networks: Networks, data: Sequences, targets: Float[Array, "T B 1"], steps: int) -> Float[Array, "N+1"]:
    """Learns the targets with a fresh state of the optimizer; the unexplained share of their variance along the way."""
    hyper, counts = networks.config.hyper, _counts(data)
    tx = learner.optimizer_of(networks, hyper)
    spread = jnp.maximum(targets.var(where=counts), _TINY**2)

    def loss(params: Any) -> Array:
        values = _values({"params": params, "reserve": start.reserve}, networks, data)
        return jnp.square(values - targets).mean(where=counts)

    def one_step(carry: tuple[Any, optax.OptState], _: None) -> tuple[tuple[Any, optax.OptState], None]:
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def record(carry: tuple[Any, optax.OptState], _: None) -> tuple[tuple[Any, optax.OptState], Array]:
        return jax.lax.scan(one_step, carry, length=steps // RECORDS)[0], loss(carry[0])

    (params, _), before = jax.lax.scan(record, (start.params, tx.init(start.params)), length=RECORDS)
    return jnp.append(before, loss(params)) / spread

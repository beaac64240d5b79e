"""A run cut into compiled chunks: the same pieces as in `make_train`, with the host between them.

A chunk is any number of rounds within a task. How many is an argument of one compiled program, so that the host may change its mind
without compiling anything, and however a run is cut its bits are the same.

Shapes: S seeds, R evaluations that a chunk has room for, K distinct tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int, PRNGKeyArray

from knife_jax.bundle import Bundle
from knife_jax.config import merge_hyper
from knife_jax.learner import Metrics
from knife_jax.model import Hyper
from knife_jax.program import Period, Place, Program, Row, RunnerState, make_row, new_period
from knife_jax.split import WHOLE

MOST_ROWS = 64
"""A chunk has room for the metrics of so many evaluations."""

Swept = Mapping[str, Mapping[str, Any]]


class Carry(NamedTuple):
    """What a chunk passes to the next one of the same task.

    Attributes:
        state: everything that a run carries.
        period: what was added up since the last evaluation.
        since_last: the metrics of the period that ended last; NaN before a task's first step.
    """

    state: RunnerState
    period: Period
    since_last: Bundle


class Rows(NamedTuple):
    """The evaluations of a chunk, `[R]` in front, and how many of them there were."""

    metrics: Row
    count: Int[Array, ""]


class _Loop(NamedTuple):
    carry: Carry
    rows: Rows
    rounds_left: Int[Array, ""]


@dataclass(frozen=True)
class Pieces:
    """The pure functions, for one seed, of which the host makes a run.

    They are called in this order: `init`, then for every task `begin`, `advance` again and again, `finish`.

    `swept` holds leaves of `config.hyper` that are arguments, `{section: {field: value}}`.
    """

    program: Program

    @property
    def rounds_per_task(self) -> int:
        """Rounds in each task."""
        return self.program.plan.rounds_per_evaluation * self.program.plan.evaluations_per_task

    @property
    def most_rounds(self) -> int:
        """Rounds after which a chunk's room for evaluations may be full."""
        return self.program.plan.rounds_per_evaluation * min(self.program.plan.evaluations_per_task, MOST_ROWS)

    def init(self, key: PRNGKeyArray, swept: Swept) -> RunnerState:
        """The state before the first task."""
        return self.program.init(key, self._hyper(swept))

    def begin(self, state: RunnerState, swept: Swept, place: Place) -> Carry:
        """A task's first step."""
        hyper = self._hyper(swept)
        state = self.program.begin_task(state, place[1], hyper)
        return Carry(state, new_period(), self.program.no_metrics(state))

    def advance(self, carry: Carry, swept: Swept, place: Place, rounds: Int[Array, ""]) -> tuple[Carry, Rows]:
        """So many rounds, at most `most_rounds` and not beyond the task, with the evaluations that come before any of them."""
        hyper = self._hyper(swept)

        def until_evaluation(loop: _Loop) -> _Loop:
            within = self._within_period(loop.carry.state)
            carry, rows = self._evaluate_if(within == 0, loop.carry, loop.rows, place)
            here = jnp.minimum(self.program.plan.rounds_per_evaluation - within, loop.rounds_left)
            carry = self._some_rounds(carry, place, hyper, here)
            carry = self._end_period_if(self._within_period(carry.state) == 0, carry, hyper)
            return _Loop(carry, rows, loop.rounds_left - here)

        start = _Loop(carry, self._no_rows(carry, place), rounds)
        end = jax.lax.while_loop(lambda loop: loop.rounds_left > 0, until_evaluation, start)
        return end.carry, end.rows

    def finish(self, state: RunnerState, since_last: Bundle, place: Place) -> tuple[RunnerState, Row, Metrics]:
        """A task's end: the state, the last row on the task, and greedy play of every distinct task `[K]`."""
        state, everywhere = self.program.evaluate_all(state)
        here = jax.tree.map(lambda values: values[place[1]], everywhere)
        return state, make_row(state, place, here, since_last), everywhere

    def _hyper(self, swept: Swept) -> Hyper:
        return merge_hyper(self.program.config, swept)

    def _within_period(self, state: RunnerState) -> Array:
        """Rounds since the last evaluation; tasks and runs are whole numbers of periods."""
        return state.counters.rounds % self.program.plan.rounds_per_evaluation

    def _evaluated(self, carry: Carry, place: Place) -> tuple[PRNGKeyArray, Row]:
        state, evaluated = self.program.evaluate(carry.state, place[1])
        return state.key, make_row(state, place, evaluated, carry.since_last)

    def _no_rows(self, carry: Carry, place: Place) -> Rows:
        shapes = jax.eval_shape(self._evaluated, carry, place)[1]
        room = min(self.program.plan.evaluations_per_task, MOST_ROWS)
        return Rows(jax.tree.map(lambda shape: jnp.zeros((room, *shape.shape), shape.dtype), shapes), jnp.zeros((), jnp.int32))

    def _evaluate_if(self, due: Array, carry: Carry, rows: Rows, place: Place) -> tuple[Carry, Rows]:
        """Evaluates and writes the next row; what is written where none is due will be overwritten, or lies beyond the count."""
        blank = jax.tree.map(lambda values: jnp.zeros_like(values[0]), rows.metrics)
        key, row = jax.lax.cond(due, lambda: self._evaluated(carry, place), lambda: (carry.state.key, blank))
        written = jax.tree.map(lambda values, new: values.at[rows.count].set(new), rows.metrics, row)
        return carry._replace(state=carry.state._replace(key=key)), Rows(written, rows.count + due)

    def _some_rounds(self, carry: Carry, place: Place, hyper: Hyper, rounds: Array) -> Carry:
        def one_round(_: Array, pair: tuple[RunnerState, Period]) -> tuple[RunnerState, Period]:
            return self.program.one_round(*pair, place[1], hyper)

        state, period = jax.lax.fori_loop(0, rounds, one_round, (carry.state, carry.period))
        return Carry(state, period, carry.since_last)

    def _end_period_if(self, due: Array, carry: Carry, hyper: Hyper) -> Carry:
        """Closes a period and begins the next; the replay is only read inside the `cond`."""

        def end() -> tuple[Any, Bundle]:
            state, metrics = self.program.end_period(carry.state, carry.period, hyper)
            return state.stagnant, metrics

        stagnant, since_last = jax.lax.cond(due, end, lambda: (carry.state.stagnant, carry.since_last))
        period = jax.tree.map(lambda total: jnp.where(due, 0, total).astype(total.dtype), carry.period)
        return Carry(carry.state._replace(stagnant=stagnant), period, since_last)


def seed_axes(pieces: Pieces, key: PRNGKeyArray, swept: Swept) -> Carry:
    """Where the seeds' axis of every leaf of a `Carry` is: 0, or None for what is the same for every seed.

    A counter that entered a chunk with a seeds' axis would turn every `cond` on it into a select of both branches, so what never depends on
    the key has to stay without. Which leaves do is found by tracing two tasks under `vmap`. What a run gives back, variables and the cure's
    report, has the axis whatever it depends on: `reset` says the same number for every seed. So has all that the devices which share a seed
    exchange of its play.
    """
    split, pieces = pieces.program.networks.split, _unsplit(pieces)
    found: list[Any] = []

    @custom_vmap
    def watch(state: RunnerState) -> RunnerState:
        return state

    @watch.def_vmap
    def batched(axis_size: int, in_batched: list[RunnerState], state: RunnerState) -> tuple[RunnerState, RunnerState]:
        found.append(in_batched[0])
        return state, in_batched[0]

    def one_task(state: RunnerState, place: Place) -> tuple[RunnerState, None]:
        hyper = pieces._hyper(swept)
        state = pieces.program.begin_task(state, place[1], hyper)
        return watch(pieces.program.one_round(state, new_period(), place[1], hyper)[0]), None

    def two_tasks(key: PRNGKeyArray) -> RunnerState:
        return jax.lax.scan(one_task, pieces.init(key, swept), (jnp.arange(2), jnp.zeros(2, jnp.int32)))[0]

    jax.eval_shape(jax.vmap(two_tasks), key[None])
    anywhere = jax.tree.map(lambda *leaves: any(leaves), *found)
    axes = jax.tree.map(lambda depends: 0 if depends else None, anywhere)
    axes = axes._replace(stagnant=0, learner=axes.learner._replace(params=0, reserve=0, report=0))
    if split != WHOLE:
        axes = axes._replace(collector=0, replay=axes.replay._replace(slots=0))
    return Carry(axes, Period(0, 0, None), 0)  # pyright: ignore[reportArgumentType]


def _unsplit(pieces: Pieces) -> Pieces:
    """The same functions, of the same shapes, for one device and outside of `shard_map`."""
    return Pieces(replace(pieces.program, networks=pieces.program.networks._replace(split=WHOLE)))

"""The host's loop: batches of seeds, tasks, chunks, and the one place where a run can be left and taken up again.

Shapes: S seeds of a batch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from knife_jax import hosts
from knife_jax.chunks import Carry, Swept
from knife_jax.compiled import Compiled
from knife_jax.journal import Arrays, Journal
from knife_jax.pace import Pace
from knife_jax.program import RunnerState


class Batch(NamedTuple):
    """Seeds that are trained side by side.

    Attributes:
        keys: one for each, `[S]`.
        kept: the first so many count; the others only fill the batch up.
        swept: numbers that differ between them, `{section: {field: [S]}}`.
    """

    keys: Key[Array, "S"]
    kept: int
    swept: Swept


class Point(NamedTuple):
    """How far a run has come: the batch of seeds, the position in the order of tasks, and the rounds done there."""

    batch: int
    position: int
    rounds: int


class Status(NamedTuple):
    """What is new.

    Attributes:
        point: how far the run has come.
        updates: gradient steps of the present batch so far.
        rows: the evaluations `{name: [kept]}` that were made on the way here.
        seconds: how long it took.
    """

    point: Point
    updates: int
    rows: Sequence[Arrays]
    seconds: float


class Learned(NamedTuple):
    """What is kept of a batch of seeds that is done: metrics as in `make_train`, variables of the online networks, the cure's report."""

    metrics: Arrays
    variables: Any
    report: Arrays


class Snapshot(NamedTuple):
    """All that it takes to go on from a point to the same bits.

    Attributes:
        point: how far the run has come.
        carry: the state between two chunks.
        metrics: those of the present batch so far.
        learned: what earlier batches left.
    """

    point: Point
    carry: Carry
    metrics: Arrays
    learned: tuple[Learned, ...]


def _snapshot(point: Point, carry: Carry, journal: Journal, learned: tuple[Learned, ...]) -> Snapshot:
    return Snapshot(point, carry, journal.metrics, learned)


def _ignore(*_: Any) -> None:
    """For what nobody wants to hear of."""


@dataclass
class Loop:
    """Trains batches of seeds one after the other.

    Attributes:
        compiled: the program.
        batches: the seeds.
        pace: how many rounds a chunk holds.
        on_status: told what is new, after every chunk and at every task's end.
        after_chunk: told the status after every chunk, with a function that takes a snapshot there, good until the next chunk. What it
            raises ends the run.
    """

    compiled: Compiled
    batches: Sequence[Batch]
    pace: Pace = field(default_factory=Pace)
    on_status: Callable[[Status], None] = _ignore
    after_chunk: Callable[[Status, Callable[[], Snapshot]], None] = _ignore

    def run(self, start: Snapshot | None = None) -> tuple[Learned, ...]:
        """Trains everything, or what is left of it after `start`."""
        learned = start.learned if start else ()
        for index in range(len(learned), len(self.batches)):
            learned = (*learned, self._train(index, learned, start))
            start = None
        return learned

    def _train(self, index: int, learned: tuple[Learned, ...], start: Snapshot | None) -> Learned:
        """One batch over all tasks."""
        compiled, kept = self.compiled, self.batches[index].kept
        keys, swept = compiled.placed(self.batches[index].keys), compiled.placed(self.batches[index].swept)
        journal = Journal(kept, start.metrics if start else None)
        order = compiled.pieces.program.networks.tasks.order
        state = None if start else compiled.init(keys, swept)
        for position in range(start.point.position if start else 0, len(order)):
            place = (np.int32(position), np.int32(order[position]))
            if start is not None:
                snapshot, start = start, None
            else:
                snapshot = Snapshot(Point(index, position, 0), compiled.begin(state, swept, place), {}, learned)
            state = self._train_on_task(snapshot, swept, place, journal)
        assert state is not None
        everything = hosts.gathered((state.learner.variables, state.learner.report))
        variables, report = jax.tree.map(lambda leaf: leaf[:kept], everything)
        return Learned(journal.metrics, variables, report)

    def _train_on_task(self, start: Snapshot, swept: Swept, place: tuple[np.int32, np.int32], journal: Journal) -> RunnerState:
        """Chunks to the end of a task, and its last evaluation."""
        compiled, (batch, position, rounds), carry = self.compiled, start.point, start.carry
        pieces = compiled.pieces
        while rounds < pieces.rounds_per_task:
            within = rounds % pieces.program.plan.rounds_per_evaluation
            count = self.pace.rounds(min(pieces.rounds_per_task - rounds, pieces.most_rounds - within))
            began = time.perf_counter()
            carry, rows = compiled.advance(carry, swept, place, np.int32(count))
            evaluations = int(rows.count)
            metrics = hosts.gathered(rows.metrics).unpacked() if evaluations else {}
            (seconds,) = hosts.most(time.perf_counter() - began)  # chunks are as long on all of them
            self.pace.took(count, seconds)
            rounds += count
            point = Point(batch, position, rounds)
            status = Status(point, int(carry.state.counters.updates), journal.write(metrics, evaluations), seconds)
            self.on_status(status)
            self.after_chunk(status, partial(_snapshot, point, carry, journal, start.learned))
        began, updates = time.perf_counter(), int(carry.state.counters.updates)
        state, row, everywhere = compiled.finish(carry.state, carry.since_last, place)
        row, everywhere = hosts.gathered((row, everywhere))
        rows = journal.write_end(row.unpacked(), everywhere)
        self.on_status(Status(Point(batch, position, rounds), updates, rows, time.perf_counter() - began))
        return state

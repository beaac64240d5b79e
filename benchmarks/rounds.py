"""Whole rounds of training of many seeds, compiled and ready to be timed."""

import time
from functools import partial
from typing import Any

import jax

from knife_jax import RunnerState
from knife_jax.compiled import seeds_mesh, specs
from knife_jax.cores import compile_start, compile_training, without_collecting
from knife_jax.groups import vmap_in_groups
from knife_jax.program import Program
from knife_jax.replay import ReplayState
from knife_jax.runner import seed_keys

AXES: Any = RunnerState._make((0, 0, ReplayState._make((0, None, None)), None, 0, 0))
"""The seeds' axis of everything that a run carries; what schedules look at has none, so that branches stay branches."""


class Rounds:
    """A chunk of `plan.rounds_per_evaluation` rounds on a run's first task, without its evaluations.

    Attributes:
        program: the pieces of the run.
        seeds: how many run at once.
        compile_wall: seconds of wall time that compiling took, beginning and rounds together.
        compile_cpu: those of processor time.
        state: the run's state, which every chunk replaces in place; none before `begin`.
    """

    def __init__(self, program: Program, seeds: int, group: int | None = None, devices: int = 1) -> None:
        """Compiles; `group` is how many seeds are worked on at once, all of a device if None; the seeds are split over so many devices."""
        self.program, self.seeds, self.state = program, seeds, None
        hyper, task, self._keys = program.config.hyper, jax.numpy.int32(0), seed_keys(seeds)
        group = group or seeds // devices
        begun = vmap_in_groups(lambda _, key: ((), program.begin_task(program.init(key, hyper), task, hyper)), ((), 0), ((), AXES), group)
        rounds = vmap_in_groups(lambda state: program.train_rounds(state, task, hyper), (AXES,), (AXES, 0), group)

        def begin(keys: Any) -> Any:
            return begun((), keys)[1]

        if devices > 1:
            split = partial(jax.shard_map, mesh=seeds_mesh(devices), check_vma=False)
            begin = split(begin, in_specs=specs(0), out_specs=specs(AXES))
            rounds = split(rounds, in_specs=(specs(AXES),), out_specs=specs((AXES, 0)))
        wall, cpu = time.perf_counter(), time.process_time()
        with without_collecting():
            start = jax.jit(begin)
            self._start = compile_start(start.lower(self._keys))
            lowered = jax.jit(rounds, donate_argnums=0).lower(jax.eval_shape(start, self._keys))
            self._advance = compile_training(lowered, program.plan.samples_per_update)
        self.compile_wall, self.compile_cpu = time.perf_counter() - wall, time.process_time() - cpu

    @property
    def updates(self) -> int:
        """Gradient steps of a chunk once learning has begun, of all seeds."""
        return self.seeds * self.program.plan.rounds_per_evaluation * self.program.config.train.updates_per_round

    @property
    def env_steps(self) -> int:
        """Environment steps of a chunk, of all seeds."""
        return self.seeds * self.program.plan.rounds_per_evaluation * self.program.plan.round_env_steps

    def begin(self) -> None:
        """Starts anew."""
        self.state = jax.block_until_ready(self._start(self._keys))

    def advance(self) -> None:
        """One chunk."""
        self.state = jax.block_until_ready(self._advance(self.state)[0])

    def begin_learning(self) -> None:
        """Starts anew, and goes on to the first chunk all of whose rounds learn."""
        self.begin()
        before, done = 0, 0
        while done - before < self.updates // self.seeds:
            self.advance()
            before, done = done, int(self.state.counters.updates)  # pyright: ignore[reportOptionalMemberAccess]

"""The host's side of a run: seeds in batches, compiled chunks with the host between them, and what comes back as numpy arrays.

Shapes: S seeds, N evaluations, P positions in the order of tasks.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from knife_jax.chunks import Pieces
from knife_jax.compiled import compile_pieces, seeds_mesh
from knife_jax.config import Config, resolve
from knife_jax.interrupts import RunStoppedError
from knife_jax.loop import Batch, Learned, Loop, Status
from knife_jax.pace import Pace
from knife_jax.plan import make_game, make_plan
from knife_jax.program import make_program
from knife_jax.provenance import environment_facts
from knife_jax.run_directory import RunDirectory, Saving
from knife_jax.run_result import RunResult
from knife_jax.sweep import Combination, Sweep, combinations, groups, lanes, parts
from knife_jax.sweep_directory import Place, places, read_finished
from knife_jax.wandb_log import WandbSettings

Watcher = Callable[[Status], None]


def seed_keys(seeds: int, first_seed: int = 0) -> Key[Array, "S"]:
    """One key per seed; seed 17 has the same key alone or among others."""
    return jax.vmap(jax.random.key)(np.arange(first_seed, first_seed + seeds))


def run(
    config: Config | Mapping[str, Any] | str,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    seeds_per_batch: int | None = None,
    devices: int | None = None,
    chunk_rounds: int | None = None,
    progress: Watcher | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    saving: Saving | None = None,
    wandb: WandbSettings | None = None,
) -> RunResult:
    """Trains all seeds in compiled chunks, with the numbers of `make_train` (bit for bit on a processor, for batches of the same size).

    With a directory to write to, the run can be stopped (Ctrl-C or SIGTERM: once to save first, twice to leave at once) or killed, and
    resumed to the same bits.

    Args:
        config: a `Config`, a nested dict or a preset's name.
        seeds: S, how many seeds.
        first_seed: the first of them.
        seeds_per_batch: how many seeds are trained side by side, at most; the batches, as even as possible, follow one another through one
            compiled program, and seeds that fill the last one up are thrown away. All of them if None.
        devices: over how many devices the seeds are spread, each with as many; as many as there are (and no more than seeds) if None. A
            multiple of the seeds side by side has several devices share each of them, as `make_train` says of its `devices`.
        chunk_rounds: rounds between two looks at the host; as many as last about two seconds if None. No result depends on it.
        progress: told what is new after every chunk and at every task's end.
        out: a new directory for checkpoints while the run goes on, and results when it is done; None writes nothing.
        resume: go on with the run that is in `out`, from its newest checkpoint that is whole.
        saving: how often checkpoints are written, and how many stay.
        wandb: what goes to Weights & Biases; it needs `out`.

    Raises:
        ValueError: for a configuration that cannot be run, or one that is not that of the run to resume, before anything compiles.
        OSError: if `out` exists (unless resuming) or cannot be written.
        RunStoppedError: if the run was stopped by a signal; it says how to resume.
    """
    options = {"seeds": seeds, "first_seed": first_seed, "seeds_per_batch": seeds_per_batch, "devices": devices}
    options |= {"chunk_rounds": chunk_rounds, "progress": progress, "out": out, "resume": resume, "saving": saving, "wandb": wandb}
    (result,) = run_sweep(config, {}, **options).values()  # pyright: ignore[reportArgumentType]
    return result


def run_sweep(
    config: Config | Mapping[str, Any] | str,
    sweep: Sweep,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    seeds_per_batch: int | None = None,
    devices: int | None = None,
    chunk_rounds: int | None = None,
    progress: Watcher | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    saving: Saving | None = None,
    wandb: WandbSettings | None = None,
) -> dict[str, RunResult]:
    """Trains every combination of some settings with all seeds.

    Numbers in `config.hyper` are swept side by side in one compiled program; of anything else (shapes, intervals, the cure) every value
    takes a program of its own, and these follow one another.

    Args:
        config: a `Config`, a nested dict or a preset's name.
        sweep: `{"section.field": values}`.
        seeds: S, how many seeds each combination has.
        first_seed: the first of them.
        seeds_per_batch: how many lanes, each a combination with a seed, are trained side by side, at most.
        devices: as in `run`, over lanes.
        chunk_rounds: as in `run`.
        progress: as in `run`.
        out: as in `run`; every combination has its results in a directory of its own there, those of a program of its own in the
            directory of that program's run.
        resume: as in `run`.
        saving: as in `run`.
        wandb: as in `run`; the names of metrics begin with the combination's.

    Returns:
        The result of every combination by its label, such as `optimizer.learning_rate=0.0005`. Programs that were done before a sweep was
        resumed give what is in their files, which is without the cure's report.

    Raises:
        ValueError: for a field or a value that does not exist, with the reason; else as `run`.
        OSError: as `run`.
        RunStoppedError: as `run`; of a program of a sweep, it says how to go on with the sweep.
    """
    _check_counts(seeds=seeds, seeds_per_batch=seeds_per_batch, devices=devices, chunk_rounds=chunk_rounds)
    if resume and out is None:
        raise ValueError("resume: needs the directory of the run in out")
    if wandb is not None and wandb.mode != "disabled" and out is None:
        raise ValueError("wandb: needs a directory in out")
    config = resolve(config)
    setting = {"seeds": seeds, "first_seed": first_seed, "seeds_per_batch": seeds_per_batch, "devices": devices}
    options = {"chunk_rounds": chunk_rounds, "progress": progress, "saving": saving, "wandb": wandb}
    finished: dict[str, RunResult] = {}
    for place in sweep_places(config, sweep, Path(out) if out is not None else None, resume, seeds, first_seed):
        finished |= run_part(place, **setting, **options)
    return finished


def sweep_places(config: Config, sweep: Sweep, out: Path | None, resume: bool, seeds: int, first_seed: int) -> Iterator[Place]:
    """The programs of a sweep, each with its place; see `run_sweep`.

    Raises:
        ValueError: for what cannot be swept or run, before the first program is yielded; else as `sweep_directory.places`.
    """
    programs = parts(config, sweep)
    for part in programs:
        make_program(part.config)  # refuses what cannot be run before the first hour is spent
    named = {name: list(values) for name, values in sweep.items()}
    identity = {"config": config.to_dict(), "seeds": seeds, "first_seed": first_seed, "sweep": named}
    return places(programs, out, resume, identity)


def run_part(
    place: Place,
    *,
    seeds: int,
    first_seed: int,
    seeds_per_batch: int | None = None,
    devices: int | None = None,
    chunk_rounds: int | None = None,
    progress: Watcher | None = None,
    saving: Saving | None = None,
    wandb: WandbSettings | None = None,
) -> dict[str, RunResult]:
    """Runs one program of a sweep, or reads what it left if it was done before; arguments, results and errors as in `run_sweep`."""
    if place.done:
        return place.part.labelled(read_finished(place))
    chosen = combinations(place.part.config, place.part.sweep)
    total = len(chosen) * seeds
    devices = choose_devices(total, seeds_per_batch, devices)
    parts = parts_of_a_seed(total, seeds_per_batch, devices)
    width = batch_width(total, seeds_per_batch, devices // parts)
    pieces = Pieces(make_program(place.part.config, parts))
    setting = {"seeds": seeds, "first_seed": first_seed, "seeds_per_batch": width, "devices": devices}
    setting |= {"sweep": {name: list(values) for name, values in place.part.sweep.items()}} if place.part.sweep else {}
    batches = _batches(chosen, seeds, first_seed, width)
    directory = None
    if place.out is not None:
        named = _named_groups(chosen, seeds, width, batches)
        directory = RunDirectory(place.out, pieces, setting, saving or Saving(), wandb or WandbSettings(), named, place.resume)
    started = time.perf_counter()
    compiled = compile_pieces(pieces, batches[0].keys, batches[0].swept, seeds_mesh(devices, parts))
    compiled_at = time.perf_counter()
    loop = Loop(compiled, batches, Pace(chunk_rounds), on_status=progress or (lambda status: None))

    def results_of(learned: Sequence[Learned], seconds: float) -> dict[str, RunResult]:
        times = {"compile_seconds": round(compiled_at - started, 3), "run_seconds": round(seconds, 3)}
        provenance = {**setting, **times, **environment_facts(pieces.program.plan.samples_per_update)}
        return _results(pieces, chosen, seeds, learned, provenance)

    if directory is None:
        return place.part.labelled(results_of(loop.run(), time.perf_counter() - compiled_at))
    try:
        return place.part.labelled(_recorded(loop, directory, results_of))
    except RunStoppedError as stopped:
        raise stopped.of_sweep(directory.path.parent) if place.part.label else stopped from None


def _named_groups(chosen: Sequence[Combination], seeds: int, width: int, batches: Sequence[Batch]) -> list[list[tuple[str, slice]]]:
    """The parts of every batch that are logged apart: combinations or, of a single one, batches."""
    named = [groups(chosen, seeds, index * width, batch.kept) for index, batch in enumerate(batches)]
    if chosen[0].label or len(batches) == 1:
        return named
    return [[(f"batch_{index + 1}", part) for _, part in found] for index, found in enumerate(named)]


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: at least 1, got {count}")


def _recorded(
    loop: Loop, directory: RunDirectory, results_of: Callable[[Sequence[Learned], float], dict[str, RunResult]]
) -> dict[str, RunResult]:
    """Runs a loop with logs, checkpoints and signals, and writes what it leaves."""
    watch = loop.on_status

    def on_status(status: Status) -> None:
        directory.on_status(status)
        watch(status)

    loop.on_status, loop.after_chunk = on_status, directory.after_chunk
    try:
        start = directory.start(loop.compiled.carry)
        with directory.interruptions:
            learned = loop.run(start)
        finished = results_of(learned, directory.seconds)
        directory.finish(finished)
    finally:
        directory.close()
    return finished


def choose_devices(seeds: int, seeds_per_batch: int | None, devices: int | None) -> int:
    """Over how many devices the seeds are spread; of several processes each has as many of them.

    Raises:
        ValueError: if more are asked for than there are, or the seeds side by side or the processes cannot share them evenly.
    """
    together, processes = min(seeds, seeds_per_batch or seeds), jax.process_count()
    if together < processes:
        raise ValueError(f"seeds: {together} side by side are fewer than the {processes} processes")
    if devices is None:
        return min(jax.device_count(), together) // processes * processes
    if devices % processes:
        raise ValueError(f"devices: {processes} processes cannot share {devices} evenly")
    if devices > jax.device_count():
        raise ValueError(f"devices: there are {jax.device_count()}, not {devices}")
    if devices > together and devices % together:
        raise ValueError(f"devices: {devices} are more than the {together} seeds that are trained side by side, and no multiple of them")
    if devices > together and together % processes:
        raise ValueError(f"devices: {processes} processes cannot share {together} seeds, each split over devices, evenly")
    return devices


def parts_of_a_seed(seeds: int, seeds_per_batch: int | None, devices: int) -> int:
    """Over how many devices each seed is split: one, unless there are more devices than seeds side by side."""
    return max(1, devices // min(seeds, seeds_per_batch or seeds))


def batch_width(seeds: int, seeds_per_batch: int | None, devices: int = 1) -> int:
    """How many seeds are trained side by side: a multiple of the devices, at most `seeds_per_batch`, with as few left over as possible.

    Devices that share a seed count as one.
    """
    on_each = -(-seeds // devices)
    most = on_each if seeds_per_batch is None else max(1, min(on_each, seeds_per_batch // devices))
    batches = -(-seeds // (most * devices))
    return devices * -(-seeds // (batches * devices))


def _batches(chosen: Sequence[Combination], seeds: int, first_seed: int, width: int) -> list[Batch]:
    """All lanes in batches of one width; the last is filled up with the first lanes."""
    total = len(chosen) * seeds
    batches = []
    for first in range(0, total, width):
        numbers, swept = lanes(chosen, seeds, np.arange(first, first + width) % total)
        batches.append(Batch(jax.vmap(jax.random.key)(first_seed + numbers), min(width, total - first), swept))
    return batches


def _results(
    pieces: Pieces, chosen: Sequence[Combination], seeds: int, learned: Sequence[Learned], provenance: dict[str, Any]
) -> dict[str, RunResult]:
    """The batches side by side, cut into combinations."""
    program = pieces.program
    tasks = program.networks.tasks
    whole = jax.tree.map(lambda *batches: np.concatenate(batches), *learned)
    env_steps = program.plan.env_steps_at_evaluations(len(tasks.order)).reshape(-1)
    finished = {}
    for index, combination in enumerate(chosen):
        own: Learned = jax.tree.map(lambda leaf, index=index: leaf[index * seeds : (index + 1) * seeds], whole)
        metrics = {**own.metrics, "env_steps": env_steps}
        facts = (tasks.names, tasks.order, own.variables, own.report, provenance)
        finished[combination.label] = RunResult(combination.config, metrics, *facts)
    return finished


def describe_plan(config: Config, seeds: int) -> str:
    """One line about a run for people."""
    env, tasks = make_game(config)
    plan = make_plan(config, env)
    scenario = f"/{config.env.scenario}" if config.env.scenario else ""
    cure = "" if config.plasticity.name == "none" else f" with {config.plasticity.name}"
    return (
        f"{config.learner.mixer}{cure} on {config.env.name}{scenario}: {seeds} seeds x {len(tasks.order)} tasks x "
        f"{plan.env_steps_per_task:,} env steps, {plan.evaluations_per_task + 1} evaluations per task"
    )

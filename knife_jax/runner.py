"""The host's side of a run: seeds in batches, compiled chunks with the host between them, and what comes back as numpy arrays.

Shapes: S seeds, N evaluations, P positions in the order of tasks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from knife_jax.chunks import Pieces
from knife_jax.compiled import compile_pieces, seeds_mesh
from knife_jax.config import Config, resolve
from knife_jax.journal import Arrays
from knife_jax.loop import Batch, Learned, Loop, Point
from knife_jax.pace import Pace
from knife_jax.plan import Plan, make_game, make_plan
from knife_jax.program import make_program
from knife_jax.provenance import environment_facts

Watcher = Callable[[Arrays], None]


class RunResult(NamedTuple):
    """A finished run.

    Attributes:
        config: the resolved configuration.
        metrics: `{name: [S, ...]}`, see `make_train`; plus `env_steps` `[N]`, slots collected before each evaluation.
        task_names: the distinct tasks.
        task_order: the distinct task met at each position.
        variables: `{"params": {"agent": ..., "mixer": ...}, "reserve": ...}` of the online networks, with the seed axis in front.
        report: what the cure did over the whole run, `{"<layer>/<measure>": [S]}`; empty without one.
        provenance: seeds, how many of them side by side, times, versions, device and code revision.
    """

    config: Config
    metrics: dict[str, np.ndarray]
    task_names: tuple[str, ...]
    task_order: tuple[int, ...]
    variables: Any
    report: dict[str, np.ndarray]
    provenance: dict[str, Any]


def seed_keys(seeds: int, first_seed: int = 0) -> Key[Array, "S"]:
    """One key per seed; seed 17 has the same key alone or among others."""
    return jax.vmap(jax.random.key)(np.arange(first_seed, first_seed + seeds))


def run(
    config: Config | Mapping[str, Any] | str,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    seeds_per_batch: int | None = None,
    chunk_rounds: int | None = None,
    progress: Watcher | None = None,
) -> RunResult:
    """Trains all seeds in compiled chunks, with the numbers of `make_train` (bit for bit on a processor, for batches of the same size).

    Args:
        config: a `Config`, a nested dict or a preset's name.
        seeds: S, how many seeds.
        first_seed: the first of them.
        seeds_per_batch: how many seeds are trained side by side, at most; the batches, as even as possible, follow one another through one
            compiled program, and seeds that fill the last one up are thrown away. All of them if None.
        chunk_rounds: rounds between two looks at the host; as many as last about two seconds if None. No result depends on it.
        progress: called after every evaluation with its metrics, each `[seeds of the batch]`.

    Raises:
        ValueError: for a configuration that cannot be run, before anything compiles.
    """
    for name, count in (("seeds", seeds), ("seeds_per_batch", seeds_per_batch), ("chunk_rounds", chunk_rounds)):
        if count is not None and count < 1:
            raise ValueError(f"{name}: at least 1, got {count}")
    config = resolve(config)
    pieces = Pieces(make_program(config))
    width = batch_width(seeds, seeds_per_batch)
    started = time.perf_counter()
    compiled = compile_pieces(pieces, seed_keys(width), {}, seeds_mesh(jax.devices()[:1]))
    compiled_at = time.perf_counter()
    batches = [Batch(seed_keys(width, first_seed + first), min(width, seeds - first)) for first in range(0, seeds, width)]
    told = {} if progress is None else {"on_rows": _tell(progress)}
    learned = Loop(compiled, batches, Pace(chunk_rounds), **told).run()
    finished = time.perf_counter()
    provenance = {
        "seeds": seeds,
        "first_seed": first_seed,
        "seeds_per_batch": width,
        "compile_seconds": round(compiled_at - started, 3),
        "run_seconds": round(finished - compiled_at, 3),
        **environment_facts(),
    }
    return _result(pieces, learned, provenance)


def batch_width(seeds: int, seeds_per_batch: int | None) -> int:
    """How many seeds are trained side by side: at most `seeds_per_batch`, with as few left over as possible."""
    batches = -(-seeds // min(seeds, seeds_per_batch or seeds))
    return -(-seeds // batches)


def _tell(progress: Watcher) -> Callable[[Point, Sequence[Arrays]], None]:
    def on_rows(point: Point, rows: Sequence[Arrays]) -> None:
        del point
        for row in rows:
            progress(row)

    return on_rows


def _result(pieces: Pieces, learned: Sequence[Learned], provenance: dict[str, Any]) -> RunResult:
    """The batches side by side."""
    program = pieces.program
    tasks = program.networks.tasks

    def join(*batches: np.ndarray) -> np.ndarray:
        return np.concatenate(batches)

    metrics, variables, report = jax.tree.map(join, *learned)
    metrics["env_steps"] = program.plan.env_steps_at_evaluations(len(tasks.order)).reshape(-1)
    return RunResult(program.config, metrics, tasks.names, tasks.order, variables, report, provenance)


def describe_plan(config: Config, seeds: int) -> tuple[Plan, str]:
    """The plan of a run and one line about it for people."""
    env, tasks = make_game(config)
    plan = make_plan(config, env)
    scenario = f"/{config.env.scenario}" if config.env.scenario else ""
    cure = "" if config.plasticity.name == "none" else f" with {config.plasticity.name}"
    text = (
        f"{config.learner.mixer}{cure} on {config.env.name}{scenario}: {seeds} seeds x {len(tasks.order)} tasks x "
        f"{plan.env_steps_per_task:,} env steps, {plan.evaluations_per_task + 1} evaluations per task"
    )
    return plan, text

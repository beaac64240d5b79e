"""What the host's part of a run costs: chunks against the single program, and logs against the run that is logged.

    python -m benchmarks.runner_overhead --out runner_overhead.json
    python -m benchmarks.runner_overhead --chunk-seeds 4 --log-seeds 8 --env-steps 1600 --repeats 1
    python -m benchmarks.runner_overhead --parts logs

`chunks`: the same run as one compiled program and as `runner.run` cuts it, in turn in one process; `ratio_*` is chunks over single, the
least times of each (processor and wall). Programs are compiled before, and results of both are dropped.

`logs`: a run of many seeds into a directory, without Weights & Biases and with its client offline. `files_share` and `wandb_share` are the
parts of the wall time between the first and the last evaluation that went into writing each; `wandb_start_end_seconds` are beside it, once
a run. `compile_seconds` of both are there to be compared: the compiled program does not know of logs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import interleaved, significant
from benchmarks.report import Row, add_output, refuse_existing, say, use_processor, write
from knife_jax import Config, make_train, runner
from knife_jax.chunks import Pieces
from knife_jax.compiled import compile_pieces, seeds_mesh
from knife_jax.cores import compile_training
from knife_jax.loop import Batch, Loop, Status
from knife_jax.program import make_program
from knife_jax.rows import LogFiles
from knife_jax.wandb_log import WandbLog, WandbSettings


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("chunks", "logs"), default=["chunks", "logs"])
    parser.add_argument("--preset", default="matrix_drift")
    parser.add_argument("--scenario", default="paper", help="of the preset's game, a single task")
    parser.add_argument("--env-steps", type=int, default=16_000, help="slots of each seed; evaluations come as often as in the preset")
    parser.add_argument("--chunk-seeds", type=int, default=16, help="seeds of the comparison of chunks")
    parser.add_argument("--log-seeds", type=int, default=1024, help="seeds of the logged run")
    parser.add_argument("--log-env-steps", type=int, help="slots of each seed of the logged run; --env-steps if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, help="use only so many processor cores; all if left out")
    add_output(parser, plot=False)
    return parser.parse_args()


def configuration(settings: argparse.Namespace, env_steps: int) -> Config:
    """The preset on one task, cut to so many slots, with evaluations as far apart as it has them."""
    whole = Config.from_dict({"preset": settings.preset})
    per_task = max(1, whole.evaluation.per_task * env_steps // whole.train.env_steps_per_task)
    game = {"name": whole.env.name, "scenario": settings.scenario}
    return Config.from_dict({"env": game, "train": {"env_steps_per_task": env_steps}, "evaluation": {"per_task": per_task}}, whole)


def chunks_row(config: Config, seeds: int, repeats: int) -> Row:
    """The single program and the host's loop, in turn."""
    keys = runner.seed_keys(seeds)
    program = make_program(config)
    single = compile_training(jax.jit(jax.vmap(make_train(config))).lower(keys), program.plan.samples_per_update)
    compiled = compile_pieces(Pieces(program), keys, {}, seeds_mesh(1))
    programs: dict[str, Callable[[int], Any]] = {
        "single": lambda _: jax.device_get(single(keys)),
        "chunks": lambda _: Loop(compiled, [Batch(keys, seeds, {})]).run(),
    }
    times = interleaved(programs, repeats)
    ratios = {f"ratio_{kind}": getattr(times["chunks"], kind) / getattr(times["single"], kind) for kind in ("least_cpu", "least_wall")}
    seconds = {f"{name}_seconds": significant(timed.least_wall) for name, timed in times.items()}
    return {"part": "chunks", "seeds": seeds, **{name: significant(ratio) for name, ratio in ratios.items()}, **seconds}


class Stopwatch:
    """Adds up the seconds that calls of a method take."""

    def __init__(self, owner: type, *names: str) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*values, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def logs_row(config: Config, seeds: int, mode: Any, watches: dict[str, Stopwatch]) -> Row:
    """A run into a directory that is thrown away."""
    moments: list[float] = []
    spent: list[dict[str, float]] = [_read(watches)]

    def note(status: Status) -> None:
        if status.rows:
            moments.append(time.perf_counter())
            spent.append(_read(watches))

    with tempfile.TemporaryDirectory() as directory:
        result = runner.run(
            config,
            seeds=seeds,
            out=Path(directory) / "run",
            wandb=WandbSettings(mode=mode),
            progress=note,
        )
    training = moments[-1] - moments[0]
    row: Row = {"part": "logs", "seeds": seeds, "wandb": mode, "evaluations": len(result.metrics["rounds"][0])}
    row |= {"train_seconds": significant(training), "compile_seconds": result.provenance["compile_seconds"]}
    row |= {f"{name}_share": significant((spent[-1][name] - spent[1][name]) / training) for name in ("files", "wandb")}
    return row | {"wandb_start_end_seconds": significant(_read(watches)["ends"] - spent[0]["ends"])}


def _read(watches: dict[str, Stopwatch]) -> dict[str, float]:
    return {name: watch.seconds for name, watch in watches.items()}


def main() -> None:
    """Prints a row per part, and writes them if asked to."""
    settings = arguments()
    refuse_existing(settings.out)
    use_processor(settings.cores)
    rows: list[Row] = []
    if "chunks" in settings.parts:
        rows.append(chunks_row(configuration(settings, settings.env_steps), settings.chunk_seeds, settings.repeats))
        say(rows[-1])
    watches = {"files": Stopwatch(LogFiles, "write"), "wandb": Stopwatch(WandbLog, "log"), "ends": Stopwatch(WandbLog, "open", "close")}
    for mode in ("disabled", "offline") if "logs" in settings.parts else ():
        config = configuration(settings, settings.log_env_steps or settings.env_steps)
        rows.append(logs_row(config, settings.log_seeds, mode, watches))
        say(rows[-1])
    given = {name: value for name, value in vars(settings).items() if name != "out"}
    write(rows, settings.out, **given)


if __name__ == "__main__":
    main()

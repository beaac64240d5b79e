"""Throughput and memory of one compiled program over 1 to 4096 seeds.

    python -m benchmarks.seeds_scaling --cores 2 --out seeds_scaling.json --plot seeds_scaling.png
    python -m benchmarks.seeds_scaling --games predator_prey --seeds 16 256
    python -m benchmarks.seeds_scaling --games matrix --seeds 4096 --group 128

Each row is a fresh process. A round collects, stores and makes one gradient step per seed, as `make_train` does; rounds before the first
gradient step are not timed. Rates are over all seeds together, per second of wall time (`_wall`) and of processor time (`_cpu`).
`estimated_mb` is what `knife_jax.memory` expects before anything compiles, `used_mb` by how much the process grew beyond what it held once
the program was compiled (on an accelerator, its peak). Rows whose estimate does not fit the free memory are left out and say so.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.measure import significant
from benchmarks.process_memory import Growth
from benchmarks.report import Row, add_output, draw, refuse_existing, say, use_processor, write
from benchmarks.rounds import Rounds
from knife_jax import Config, make_program
from knife_jax.memory import available_memory, seed_memory

SHARED: dict[str, Any] = {
    "train": {"env_steps_per_task": 10**9, "updates_per_round": 1},
    "plasticity": {"diagnostics": False},
}
RECURRENT: dict[str, Any] = {
    "collect": {"num_envs": 8, "rollout_length": 16},
    "replay": {"capacity_env_steps": 20_480, "batch_size": 8, "sequence_length": 16},
}
GAMES: dict[str, dict[str, Any]] = {
    "matrix": {"preset": "matrix_drift"},
    "predator_prey": {"env": {"name": "predator_prey", "scenario": "wqmix"}, **RECURRENT},
    "smax": {"env": {"name": "smax", "scenario": "3m"}, **RECURRENT},
}
"""Each with QMIX at the default sizes (hidden 64) unless its preset says otherwise."""

SEEDS = {"matrix": (1, 16, 128, 1024, 4096), "predator_prey": (1, 16, 128, 1024), "smax": (1, 16, 128, 1024)}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--seeds", nargs="+", type=int, help="widths; each game's own if left out")
    parser.add_argument("--capacity", type=int, help="slots of each seed's replay")
    parser.add_argument("--batch-size", type=int, help="sequences of each gradient step")
    parser.add_argument("--group", type=int, help="seeds worked on at once inside the program, see knife_jax.groups; all if left out")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each row is timed, at least one call")
    parser.add_argument("--cores", type=int, help="use only so many processor cores; all if left out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_output(parser)
    return parser.parse_args()


def configuration(settings: argparse.Namespace, game: str, seeds: int) -> dict[str, Any]:
    """The configuration of one row.

    Narrow programs do more rounds per call, for calls of a like length; groups of seeds do a few, since they are copied once per call.
    """
    base = {**GAMES[game], **SHARED}
    replay = {**base.get("replay", {})}
    if settings.capacity:
        replay["capacity_env_steps"] = settings.capacity
    if settings.batch_size:
        replay["batch_size"] = settings.batch_size
    slots = 8 if game == "matrix" else RECURRENT["collect"]["num_envs"] * RECURRENT["collect"]["rollout_length"]
    rounds = min(max(1024 // seeds, 4 if settings.group else 1), 64)
    evaluations = 100_000
    train = {**SHARED["train"], "env_steps_per_task": rounds * slots * evaluations}
    return {**base, "replay": replay, "train": train, "evaluation": {"episodes": 1, "per_task": evaluations}}


def measured(settings: argparse.Namespace, game: str, seeds: int) -> Row:
    """One row, in this process."""
    config = Config.from_dict(configuration(settings, game, seeds))
    program = make_program(config)
    memory, available = seed_memory(program), available_memory()
    group = min(settings.group or seeds, seeds)
    estimated = memory.of(seeds, group)
    row: Row = {"game": game, "seeds": seeds, "group": group, "estimated_mb": _mb(estimated), "replay_mb": _mb(seeds * memory.replay)}
    if estimated > 0.9 * available:
        return row | {"skipped": f"{_mb(available)} MB are free"}
    rounds = Rounds(program, seeds, group)
    row["compile_s"] = round(rounds.compile_wall, 1)
    growth = Growth()
    rounds.begin_learning()
    calls, wall, cpu = 0, time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - wall < settings.seconds:
        rounds.advance()
        calls += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    updates, env_steps = calls * rounds.updates, calls * rounds.env_steps
    row |= {"used_mb": _mb(growth.peak()), "estimate_over_used": round(estimated / growth.peak(), 3)}
    row |= {"env_steps_per_s_wall": significant(env_steps / wall), "env_steps_per_s_cpu": significant(env_steps / cpu)}
    return row | {"updates_per_s_wall": significant(updates / wall), "updates_per_s_cpu": significant(updates / cpu)}


def in_a_child(settings: argparse.Namespace, game: str, seeds: int) -> Row:
    """One row, in a process of its own, whose peak memory is that of this row alone; one that dies makes a row that says so."""
    command = [sys.executable, "-m", "benchmarks.seeds_scaling", "--child", "--games", game, "--seeds", str(seeds)]
    for flag in ("capacity", "batch_size", "group", "seconds"):
        if getattr(settings, flag) is not None:
            command += [f"--{flag.replace('_', '-')}", str(getattr(settings, flag))]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        return {"game": game, "seeds": seeds, "failed": f"exit status {child.returncode}", "stderr": child.stderr[-500:]}
    return json.loads(child.stdout.splitlines()[-1])


def paint(figure: Any, rows: list[Row]) -> None:
    """Throughput and memory over seeds, both logarithmic."""
    figure.set_size_inches(9, 4)
    throughput, memory = figure.subplots(1, 2)
    for index, game in enumerate(dict.fromkeys(row["game"] for row in rows)):
        mine = [row for row in rows if row["game"] == game and "used_mb" in row]
        seeds = [row["seeds"] for row in mine]
        throughput.loglog(seeds, [row["updates_per_s_wall"] for row in mine], "o-", color=f"C{index}", label=game)
        memory.loglog(seeds, [row["used_mb"] for row in mine], "o-", color=f"C{index}", label=f"{game}, used")
        memory.loglog(seeds, [row["estimated_mb"] for row in mine], "x:", color=f"C{index}", label=f"{game}, estimated")
    throughput.set(xlabel="seeds", ylabel="gradient steps per second, all seeds")
    memory.set(xlabel="seeds", ylabel="memory (MB)")
    for axes in (throughput, memory):
        axes.legend()
        axes.grid(alpha=0.3)


def _mb(size: float) -> float:
    return round(size / 1e6, 1)


def main() -> None:
    """Prints a JSON line per row; writes and draws them where asked."""
    settings = arguments()
    use_processor(settings.cores)
    refuse_existing(settings.out, settings.plot)
    rows = []
    for game in settings.games:
        for seeds in settings.seeds or SEEDS[game]:
            rows.append((measured if settings.child else in_a_child)(settings, game, seeds))
            say(rows[-1])
    write(rows, settings.out, cores=settings.cores, games={game: configuration(settings, game, 1024) for game in settings.games})
    draw(rows, settings.plot, paint)


if __name__ == "__main__":
    main()

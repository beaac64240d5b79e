"""What cures cost: time of a training step with each method over its time without, in one process, with interleaved repeats.

    python -m benchmarks.cure_overhead --game predator_prey
    python -m benchmarks.cure_overhead --game smax --repeats 10 --out overhead.json

A step is a round of `make_train`: collecting, storing, and gradient steps, with the cure watching and no intervention due (those run in a
branch taken once in a thousand steps). FLOPs are those of the matrix products of one gradient step, counted in its jaxpr with the lengths
of its scans, so that they are the same on every device.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.measure import count_flops
from knife_jax import Config, learner, replay
from knife_jax.cores import compile_training
from knife_jax.plasticity.graph import Graph
from knife_jax.plasticity.knife import knife
from knife_jax.plasticity.method import Method, method
from knife_jax.plasticity.registry import METHODS
from knife_jax.program import Program, make_program
from knife_jax.results import new_directory
from knife_jax.runner import environment_facts

GAMES = {
    "predator_prey": {"env": {"name": "predator_prey", "scenario": "wqmix"}, "collect": {"num_envs": 8, "rollout_length": 16}},
    "smax": {"preset": "smax_qmix", "env": {"name": "smax", "scenario": "3m"}, "collect": {"num_envs": 8, "rollout_length": 16}},
}
SHARED = {
    "replay": {"capacity_env_steps": 8192, "batch_size": 32, "sequence_length": 16},
    "train": {"env_steps_per_task": 4 * 128 * 100_000, "updates_per_round": 4},
    "evaluation": {"per_task": 100_000, "episodes": 1},
}
RESERVES = (0.25, 1.0, 3.0)


class Case(NamedTuple):
    """One line of the table: a label, and the plasticity section of its configuration."""

    label: str
    plasticity: dict[str, Any]


class Prepared(NamedTuple):
    """A compiled round with its input, and what is known without running it."""

    run: Any
    state: Any
    compile_seconds: float
    flops: float
    weights: int


def cases() -> list[Case]:
    """`none` first, then what scoring alone costs, KNIFE by reserve and composite, and every other method at its defaults."""
    knife = {"name": "knife", "when_full": "skip"}
    listed = [Case("none", {"name": "none"})]
    listed += [Case("scores alone", {"name": "scores_alone"}), Case("scores and dead units", {"name": "scores_and_dead_units"})]
    for composite in ("separate", "shared"):
        listed += [Case(f"knife {composite} {size:g}", {**knife, "reserve": size, "composite": composite}) for size in RESERVES]
    own_options = {"l2_init": {"strength": 1e-3}, "weight_decay": {"strength": 1e-3}, "spectral": {"strength": 1e-3}}
    others = [name for name in METHODS if name not in ("none", "knife") and not name.startswith(("knife_", "random", "freeze", "scores"))]
    return listed + [Case(name, {"name": name, **own_options.get(name, {})}) for name in others]


def _watching(graph: Graph, dead_units: bool) -> Method:
    """What KNIFE watches, without a reserve and without interventions."""
    watch = knife(graph, when_full="skip", dead_units=dead_units)
    return method(
        "watching", lift=watch.lift, taps=watch.taps, init=lambda variables: watch.init(watch.allocate(variables)), observe=watch.observe
    )


METHODS["scores_alone"] = lambda graph: _watching(graph, dead_units=False)
METHODS["scores_and_dead_units"] = lambda graph: _watching(graph, dead_units=True)


def prepare(game: str, case: Case) -> Prepared:
    """Compiles one case's round and brings it to where learning has begun."""
    section = {"diagnostics": False, "interval_updates": 100_000} | case.plasticity
    config = Config.from_dict({**GAMES[game], **SHARED, "plasticity": section})
    program = make_program(config)
    hyper, key = config.hyper, jax.random.key(0)
    state = jax.jit(lambda key: program.begin_task(program.init(key, hyper), jnp.int32(0), hyper))(key)
    started = time.process_time()
    lowered = jax.jit(lambda state: program.train_rounds(state, jnp.int32(0), hyper)[0]).lower(state)
    run = compile_training(lowered, program.plan.samples_per_update)
    compiled_in = time.process_time() - started
    while int(state.counters.updates) == 0:
        state = run(state)
    learned = state.learner
    weights = sum(leaf.size for leaf in jax.tree.leaves((learned.params, learned.reserve)))
    return Prepared(run, state, compiled_in, gradient_flops(program, state), weights)


def gradient_flops(program: Program, state: Any) -> float:
    """Matrix-product FLOPs of one gradient step."""
    plan, settings = program.plan, program.config.replay

    def step(state: Any) -> Any:
        batch = replay.sample(state.key, state.replay, settings.batch_size, plan.sequence_slots, plan.sequence_stride, settings.burn_in)
        return learner.gradient_step(state.learner, program.networks, batch, program.config.hyper)

    return count_flops(jax.make_jaxpr(step)(state).jaxpr)


def measure(prepared: dict[str, Prepared], repeats: int) -> dict[str, list[float]]:
    """Seconds of every case, all of them once per repeat in an order that turns."""
    seconds: dict[str, list[float]] = {label: [] for label in prepared}
    labels = list(prepared)
    for repeat in range(repeats + 1):
        for label in labels[repeat % len(labels) :] + labels[: repeat % len(labels)]:
            started = time.perf_counter()
            jax.block_until_ready(prepared[label].run(prepared[label].state))
            if repeat:
                seconds[label].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Prints the table; writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", choices=GAMES, default="predator_prey")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="*", help="only the cases whose label begins with one of these; none always")
    parser.add_argument("--out", type=Path, help="a new directory for overhead.json")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if case.label == "none" or not arguments.cases or case.label.startswith(tuple(arguments.cases))]
    console = Console(width=120)
    prepared = {}
    for case in chosen:
        prepared[case.label] = prepare(arguments.game, case)
        console.print(f"compiled {case.label} in {prepared[case.label].compile_seconds:.0f} s")
    rows = summarise(prepared, measure(prepared, arguments.repeats))
    console.print(as_table(arguments.game, rows))
    if arguments.out:
        facts = environment_facts() | {"processors": os.cpu_count(), "game": arguments.game, "repeats": arguments.repeats}
        with new_directory(arguments.out) as unfinished:
            (unfinished / "overhead.json").write_text(json.dumps({"rows": rows, "provenance": facts}, indent=2) + "\n")


def summarise(prepared: dict[str, Prepared], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Ratios to `none`: of each repeat's times (median and range), FLOPs, weights and compile times."""
    base, rows = prepared["none"], []
    for label, case in prepared.items():
        ratios = [mine / none for mine, none in zip(seconds[label], seconds["none"], strict=True)]
        rows.append(
            {
                "case": label,
                "milliseconds": 1e3 * median(seconds[label]),
                "time_ratio": median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "flop_ratio": case.flops / base.flops,
                "weight_ratio": case.weights / base.weights,
                "compile_ratio": case.compile_seconds / base.compile_seconds,
            }
        )
    return rows


def as_table(game: str, rows: list[dict[str, Any]]) -> Table:
    """The table for a terminal."""
    table = Table(title=f"A round of QMIX on {game}, over one without a cure", title_justify="left")
    for column in ("case", "ms", "time", "range", "gradient FLOPs", "weights", "compile time"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        low, high = row["time_ratio_range"]
        ratios = (f"{row[name]:.2f}" for name in ("flop_ratio", "weight_ratio", "compile_ratio"))
        table.add_row(row["case"], f"{row['milliseconds']:.1f}", f"{row['time_ratio']:.2f}", f"{low:.2f}-{high:.2f}", *ratios)
    return table


if __name__ == "__main__":
    main()

"""What lower precision does to learning: the same seeds with each choice.

    python -m benchmarks.precision_learning storage --seeds 10 --env-steps 160000 --out storage_learning.json --plot storage_learning.png
    python -m benchmarks.precision_learning compute --seeds 16 --env-steps 16000 --out compute_learning.json --plot compute_learning.png
    python -m benchmarks.precision_learning compute --game smax --seeds 5 --env-steps 150000

`storage` stores compact observations of an adapter game (QMIX on JaxMARL's MPE_simple_spread_v3); `compute` computes the networks of
gradient steps in bfloat16 (QMIX and QPLEX on the drifting matrix game, with so many slots a task, or QMIX on SMAX 3m). One JSON line per
choice: the greedy return over all evaluations and over the last quarter of them, its mean over seeds with a 95 % interval (bootstrapped),
and its difference from `float32` paired by seed; for `storage` also the bytes of a stored slot.
"""

import argparse
from typing import Any

import numpy as np

from benchmarks.report import Row, add_output, draw, refuse_existing, say, use_processor, write

EXACT = "float32"
Choices = dict[str, dict[str, Any]]
STORAGES: Choices = {
    EXACT: {},
    "float16": {"env": {"options": {"storage": "float16"}}},
    "int8": {"env": {"options": {"storage": "int8", "storage_bound": 4.0}}},
}
DTYPES: Choices = {EXACT: {}, "bfloat16": {"learner": {"compute_dtype": "bfloat16"}}}
SPREAD: dict[str, Any] = {
    "env": {"name": "jaxmarl", "scenario": "MPE_simple_spread_v3"},
    "collect": {"num_envs": 8, "rollout_length": 26},
    "replay": {"capacity_env_steps": 52_000, "batch_size": 32, "sequence_length": 25},
    "learner": {"td_lambda": 0.6, "target_interval_updates": 100},
    "optimizer": {"name": "adam", "learning_rate": 1e-3},
    "exploration": {"anneal_env_steps": 60_000},
    "plasticity": {"diagnostics": False},
    "evaluation": {"episodes": 64, "per_task": 16},
}
QPLEX: dict[str, Any] = {"learner": {"mixer": "qplex"}, "qplex": {"num_kernels": 4, "adv_layers": 1}}
GAMES: dict[str, dict[str, dict[str, Any]]] = {
    "storage": {"spread": SPREAD},
    "compute": {
        "matrix": {"preset": "matrix_drift"},
        "matrix_qplex": {"preset": "matrix_drift", **QPLEX},
        "smax": {"preset": "smax_qmix", "env": {"scenario": "3m"}, "evaluation": {"episodes": 64, "per_task": 16}},
    },
}
CHOICES = {"storage": STORAGES, "compute": DTYPES}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=CHOICES)
    parser.add_argument(
        "--game", help="the study's first if left out: " + "; ".join(f"{study}: {', '.join(GAMES[study])}" for study in GAMES)
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--env-steps", type=int, default=160_000, help="slots per seed and task")
    parser.add_argument("--cores", type=int, help="use only so many processor cores; all if left out")
    add_output(parser)
    given = parser.parse_args()
    given.game = given.game or next(iter(GAMES[given.study]))
    if given.game not in GAMES[given.study]:
        parser.error(f"--game: {given.study} has {', '.join(GAMES[given.study])}, not {given.game}")
    return given


def trained(settings: argparse.Namespace, choice: str) -> Row:
    """One row; its curve is that of the mean over seeds."""
    from knife_jax import Config
    from knife_jax.memory import seed_memory
    from knife_jax.runner import run

    base = Config.from_dict({**GAMES[settings.study][settings.game], "train": {"env_steps_per_task": settings.env_steps}})
    config = Config.from_dict(CHOICES[settings.study][choice], base=base)
    result = run(config, seeds=settings.seeds)
    curve = result.metrics["eval/return"].astype(np.float64)
    all_of_them, last = curve.mean(axis=1), curve[:, -(curve.shape[1] // 4) :].mean(axis=1)
    row: Row = {"game": settings.game, settings.study: choice, "seeds": settings.seeds, "env_steps": settings.env_steps}
    if settings.study == "storage":
        row["bytes_per_slot"] = round(seed_memory(config).replay / config.replay.capacity_env_steps, 1)
    returns = {"returns": all_of_them.round(3).tolist(), "last_returns": last.round(3).tolist()}
    return row | returns | {"curve": curve.mean(axis=0).round(3).tolist()}


def compared(row: Row, exact: Row) -> Row:
    """A row with its statistics, and its difference from the row of `float32`."""
    from knife_jax.statistics import mean_estimate

    estimates = {}
    for name in ("returns", "last_returns"):
        returns = np.array(row[name])
        estimates[f"mean_of_{name}"] = mean_estimate(returns)
        if row is not exact:
            estimates[f"{name}_less_those_of_float32"] = mean_estimate(returns - exact[name])
    return row | {name: [round(end, 3) for end in estimate] for name, estimate in estimates.items()}


def paint(figure: Any, rows: list[Row]) -> None:
    """Mean returns over training."""
    axes = figure.subplots()
    for row in rows:
        label = f"{row['storage']}: {row['bytes_per_slot']} B/slot" if "storage" in row else row["compute"]
        axes.plot(np.linspace(0, 1, len(row["curve"])), row["curve"], label=label)
    axes.set(xlabel="share of training", ylabel=f"greedy return, mean of {rows[0]['seeds']} seeds", title=rows[0]["game"])
    axes.legend()


def main() -> None:
    """Prints a JSON line per choice; writes and draws them where asked."""
    settings = arguments()
    use_processor(settings.cores)
    refuse_existing(settings.out, settings.plot)
    rows: list[Row] = []
    for choice in CHOICES[settings.study]:
        row = trained(settings, choice)
        rows.append(compared(row, rows[0] if rows else row))
        say(rows[-1])
    write(rows, settings.out, config=GAMES[settings.study][settings.game])
    draw(rows, settings.plot, paint)


if __name__ == "__main__":
    main()

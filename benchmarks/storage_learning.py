"""What compact observations of adapter games save, and what they do to learning: the same seeds with each storage.

    python -m benchmarks.storage_learning --seeds 10 --env-steps 160000 --out storage_learning.json --plot storage_learning.png

QMIX on JaxMARL's MPE_simple_spread_v3. One JSON line per storage: bytes of a stored slot, and the greedy return over the last quarter of
the evaluations, its mean over seeds with a 95 % interval (bootstrapped), and its difference from `float32` paired by seed.
"""

import argparse
from typing import Any

import numpy as np

from benchmarks.report import Row, add_output, draw, refuse_existing, say, use_processor, write

STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"storage": "float16"},
    "int8": {"storage": "int8", "storage_bound": 4.0},
}
BASE: dict[str, Any] = {
    "env": {"name": "jaxmarl", "scenario": "MPE_simple_spread_v3"},
    "collect": {"num_envs": 8, "rollout_length": 26},
    "replay": {"capacity_env_steps": 52_000, "batch_size": 32, "sequence_length": 25},
    "learner": {"td_lambda": 0.6, "target_interval_updates": 100},
    "optimizer": {"name": "adam", "learning_rate": 1e-3},
    "exploration": {"anneal_env_steps": 60_000},
    "plasticity": {"diagnostics": False},
}
EVALUATIONS = 16


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--env-steps", type=int, default=160_000, help="slots per seed")
    parser.add_argument("--cores", type=int, help="use only so many processor cores; all if left out")
    add_output(parser)
    return parser.parse_args()


def trained(storage: str, seeds: int, env_steps: int) -> Row:
    """One row; its curve is that of the mean over seeds."""
    from knife_jax import Config
    from knife_jax.memory import seed_memory
    from knife_jax.runner import run

    env = {**BASE["env"], "options": STORAGES[storage]}
    train, evaluation = {"env_steps_per_task": env_steps}, {"episodes": 64, "per_task": EVALUATIONS}
    config = Config.from_dict({**BASE, "env": env, "train": train, "evaluation": evaluation})
    result = run(config, seeds=seeds)
    curve = result.metrics["eval/return"].astype(np.float64)
    last = curve[:, -EVALUATIONS // 4 :].mean(axis=1)
    bytes_per_slot = seed_memory(config).replay / config.replay.capacity_env_steps
    facts = {"storage": storage, "seeds": seeds, "env_steps": env_steps, "bytes_per_slot": round(bytes_per_slot, 1)}
    return facts | {"last_returns": last.round(3).tolist(), "curve": curve.mean(axis=0).round(3).tolist()}


def compared(row: Row, exact: Row) -> Row:
    """A row with its statistics, and its difference from the row of `float32`."""
    from knife_jax.statistics import mean_estimate

    returns = np.array(row["last_returns"])
    estimates = {"mean": mean_estimate(returns)}
    if row is not exact:
        estimates["difference_from_float32"] = mean_estimate(returns - exact["last_returns"])
    return row | {name: [round(end, 3) for end in estimate] for name, estimate in estimates.items()}


def paint(figure: Any, rows: list[Row]) -> None:
    """Mean returns over training."""
    axes = figure.subplots()
    for row in rows:
        axes.plot(
            np.linspace(0, row["env_steps"], len(row["curve"])), row["curve"], label=f"{row['storage']}: {row['bytes_per_slot']} B/slot"
        )
    axes.set(xlabel="env steps per seed", ylabel=f"greedy return, mean of {rows[0]['seeds']} seeds", title=BASE["env"]["scenario"])
    axes.legend()


def main() -> None:
    """Prints a JSON line per storage; writes and draws them where asked."""
    settings = arguments()
    use_processor(settings.cores)
    refuse_existing(settings.out, settings.plot)
    rows: list[Row] = []
    for storage in dict.fromkeys(["float32", *settings.storages]):
        row = trained(storage, settings.seeds, settings.env_steps)
        rows.append(compared(row, rows[0] if rows else row))
        say(rows[-1])
    write(rows, settings.out, config=BASE)
    draw(rows, settings.plot, paint)


if __name__ == "__main__":
    main()

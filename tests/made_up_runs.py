"""Finished runs with made-up numbers, for tests of what is done with results."""

from typing import Any

import numpy as np

from experiments.cells import Cell
from knife_jax.config import Config
from knife_jax.plan import make_game, make_plan, make_schedule
from knife_jax.run_result import RunResult

SMALL: dict[str, Any] = {
    "preset": "matrix_drift",
    "env": {"options": {"num_tasks": 2}},
    "agent": {"hidden_size": 4},
    "qmix": {"embed_size": 4, "hypernet_size": 4},
    "train": {"env_steps_per_task": 800},
    "evaluation": {"per_task": 2},
}
"""Two tasks and the first again, three evaluations each."""
LAYERS = ("agent/hidden_1", "mixer/w1_hidden")


def small_config(**plasticity: Any) -> Config:
    """`SMALL` with a cure."""
    return Config.from_dict({**SMALL, "plasticity": {"name": "none", **plasticity}})


def made_up(config: Config, seeds: int, first_seed: int = 0, won: np.ndarray | None = None) -> RunResult:
    """A run of random numbers; `won` is performance `[S, P, N]` if it is to be something in particular."""
    env, tasks = make_game(config)
    plan, positions = make_plan(config, env), len(tasks.order)
    make_schedule(config, plan, positions)
    within = plan.evaluations_per_task + 1
    rng = np.random.default_rng(first_seed)
    rows = (seeds, positions * within)
    metrics: dict[str, np.ndarray] = {
        f"eval/{name}": rng.random(rows).astype(np.float32) for name in ("won", "return", "optimum_share", "length")
    }
    if won is not None:
        metrics["eval/won"] = won.reshape(seeds, -1).astype(np.float32)
    metrics |= {
        f"all_tasks/{name}": rng.random((seeds, positions, len(tasks.names))).astype(np.float32)
        for name in ("won", "return", "optimum_share")
    }
    updates = plan.rounds_per_evaluation * config.train.updates_per_round
    steps = updates * (np.arange(within) + (within - 1) * np.arange(positions)[:, None]).ravel()
    metrics["updates"] = np.broadcast_to(steps, rows)
    metrics["env_steps"] = plan.env_steps_at_evaluations(positions).ravel()
    names = [
        f"{network}/{share}" for network in ("agent", "mixer") for share in ("stagnant", "dormant", "inactive", "grad_norm", "weight_norm")
    ]
    names += [f"{layer}/{share}" for layer in LAYERS for share in ("stagnant", "dormant", "inactive")]
    metrics |= {f"plasticity/{name}": rng.random(rows).astype(np.float32) for name in names}
    provenance = {"seeds": seeds, "first_seed": first_seed, "run_seconds": 1.0, "compile_seconds": 1.0}
    return RunResult(config, metrics, tasks.names, tasks.order, {}, {"agent/hidden_1/treated": np.arange(float(seeds))}, provenance)


def cell_of(config: Config, seeds: int = 3, first_seed: int = 0, method: str = "none") -> Cell:
    """A cell of that configuration."""
    return Cell("small", config.learner.mixer, method, config, first_seed, seeds)

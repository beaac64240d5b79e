"""The host's side of a run: seeds, compilation, progress, and what comes back as numpy arrays."""

import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from knife_jax.config import Config, resolve
from knife_jax.plan import Plan, make_game, make_plan
from knife_jax.train import Callback, make_train


class RunResult(NamedTuple):
    """A finished run.

    Attributes:
        config: the resolved configuration.
        metrics: `{name: [S, ...]}`, see `make_train`; plus `env_steps` `[N]`, slots collected before each evaluation.
        task_names: the distinct tasks.
        task_order: the distinct task met at each position.
        variables: `{"params": {"agent": ..., "mixer": ...}, "reserve": ...}` of the online networks, with the seed axis in front.
        report: what the cure did over the whole run, `{"<layer>/<measure>": [S]}`; empty without one.
        provenance: seeds, times, versions, device and code revision.
    """

    config: Config
    metrics: dict[str, np.ndarray]
    task_names: tuple[str, ...]
    task_order: tuple[int, ...]
    variables: Any
    report: dict[str, np.ndarray]
    provenance: dict[str, Any]


def seed_keys(seeds: int, first_seed: int = 0) -> jax.Array:
    """One key per seed; seed 17 has the same key alone or among others."""
    return jax.vmap(jax.random.key)(np.arange(first_seed, first_seed + seeds))


def run(config: Config | Mapping[str, Any] | str, *, seeds: int = 1, first_seed: int = 0, progress: Callback | None = None) -> RunResult:
    """Trains all seeds in one compiled program.

    Args:
        config: a `Config`, a nested dict or a preset's name.
        seeds: S, how many seeds.
        first_seed: the first of them.
        progress: called after every evaluation with its metrics, each `[S]`.

    Raises:
        ValueError: for a configuration that cannot be run, before anything compiles.
    """
    if seeds < 1:
        raise ValueError(f"seeds: at least 1, got {seeds}")
    config = resolve(config)
    train = make_train(config, callback=progress)
    keys = seed_keys(seeds, first_seed)
    started = time.perf_counter()
    compiled = jax.jit(jax.vmap(train)).lower(keys).compile()
    compiled_at = time.perf_counter()
    out = jax.block_until_ready(compiled(keys))
    jax.effects_barrier()
    finished = time.perf_counter()
    env, tasks = make_game(config)
    metrics = {name: np.asarray(values) for name, values in out["metrics"].items()}
    metrics["env_steps"] = make_plan(config, env).env_steps_at_evaluations(len(tasks.order)).reshape(-1)
    provenance = {
        "seeds": seeds,
        "first_seed": first_seed,
        "compile_seconds": round(compiled_at - started, 3),
        "run_seconds": round(finished - compiled_at, 3),
        **environment_facts(),
    }
    learned = out["runner_state"].learner
    report = {name: np.asarray(values) for name, values in learned.report.items()}
    return RunResult(config, metrics, tasks.names, tasks.order, learned.variables, report, provenance)


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


def environment_facts() -> dict[str, Any]:
    """What a result file must say about where it came from: versions, device, processor, code revision."""
    packages = ("knife-jax", "jax", "jaxlib", "flax", "optax", "distrax", "jaxmarl", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "processor": platform.processor() or platform.machine(),
        "revision": _revision(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The git commit of this source tree, marked if it has uncommitted changes; None outside a checkout."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        is_ours = Path(git("rev-parse", "--show-toplevel")).resolve() == package.parent
        return git("describe", "--always", "--dirty", "--abbrev=12") if is_ours else None
    except (OSError, subprocess.SubprocessError):
        return None

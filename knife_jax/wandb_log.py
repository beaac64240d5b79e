"""Weights & Biases: a run over all seeds with intervals and, if asked for, one more per seed.

The client is imported only when it is wanted. A resumed run goes on in the same W&B run, after the last evaluation logged there.

Shapes: S seeds, N evaluations.
"""

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from knife_jax.rows import Evaluation
from knife_jax.run_result import RunResult

STATE_FILE = "wandb.json"


@dataclass(frozen=True)
class WandbSettings:
    """What goes to Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """`offline` writes into the run's directory, from where `wandb sync` sends it."""
    project: str = "knife-jax"
    """The project."""
    entity: str | None = None
    """The team or user; yours if not given."""
    name: str | None = None
    """The run's name; that of its directory if not given."""
    per_seed: bool = False
    """Also one run per seed, in a group of the run's name, once all is done."""

    def check(self) -> None:
        """Finds what is missing before anything compiles.

        Raises:
            ImportError: if the client is not installed.
            ValueError: if it has no key to send anything with.
        """
        if self.mode == "disabled":
            return
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("wandb.mode: the client is not installed; pip install 'knife-jax[wandb]'")
        if self.mode == "online":
            import wandb

            if not wandb.api.api_key:
                raise ValueError("wandb.mode: there is no API key; run `wandb login`, set WANDB_API_KEY, or take --wandb.mode offline")


class WandbLog:
    """Writes evaluations to a W&B run.

    Args:
        settings: what and where.
        directory: of the run; the client's files go there too.
        config: shown as the run's configuration.
    """

    def __init__(self, settings: WandbSettings, directory: Path, config: Mapping[str, Any]) -> None:
        self._settings, self._directory, self._config = settings, directory, dict(config)
        self._name = settings.name or directory.name
        self._state = _read_state(directory) or {"id": uuid.uuid4().hex[:12], "logged": 0}
        self._run: Any = None

    def open(self) -> None:
        """Starts the run, or goes on with it."""
        self._run = self._start(self._state["id"], self._name, "seeds", self._config)
        self._write_state()

    def log(self, first: int, evaluations: Sequence[Evaluation]) -> None:
        """Logs evaluations, of which the first has the number `first` in the whole run; those that are there already are left out."""
        for index, evaluation in enumerate(evaluations, first):
            if index >= self._state["logged"]:
                self._run.log(self._content(evaluation), step=index)
                self._state["logged"] = index + 1
        self._write_state()

    def finish(self, results: Mapping[str, RunResult]) -> None:
        """Ends the run, and writes those of the seeds."""
        self.close(0)
        if self._settings.per_seed:
            for index, (label, result) in enumerate(results.items()):
                for seed in range(len(result.metrics["rounds"])):
                    self._write_seed(index, label, result, seed)

    def _write_seed(self, index: int, label: str, result: RunResult, seed: int) -> None:
        """A run of one seed's own curves."""
        number, env_steps = result.provenance["first_seed"] + seed, result.metrics["env_steps"]
        name = "-".join(part for part in (self._name, label, f"seed{number}") if part)
        run = self._start(f"{self._state['id']}-{index}-{number}", name, "seed", {**self._config, "seed": number, "group": label})
        curves = {name: values[seed] for name, values in result.metrics.items() if values.shape[1:] == env_steps.shape}
        for step, steps in enumerate(env_steps):
            run.log({"env_steps": int(steps), **_finite({name: values[step] for name, values in curves.items()})}, step=step)
        run.finish(exit_code=0)

    def close(self, exit_code: int) -> None:
        """Ends the run; it may be resumed."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None

    def _start(self, identity: str, name: str, job_type: str, config: Mapping[str, Any]) -> Any:
        import wandb

        settings = self._settings
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=identity,
            name=name,
            group=self._name if settings.per_seed else None,
            job_type=job_type,
            config=dict(config),
            dir=str(self._directory),
            mode=settings.mode,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        run.define_metric("env_steps")
        run.define_metric("*", step_metric="env_steps")
        return run

    def _content(self, evaluation: Evaluation) -> dict[str, Any]:
        """Means over seeds under the metrics' names, intervals beside them; `task/begins` marks the boundaries.

        The names of what is one group among several begin with the group's.
        """
        counters = evaluation.counters
        prefix = f"{evaluation.group}/" if evaluation.group else ""
        content: dict[str, Any] = {
            "env_steps": evaluation.env_steps,
            "updates": counters["updates"],
            "rounds": counters["rounds"],
            "task/position": counters["position"],
            "task/name": evaluation.task_name,
            "task/begins": int(np.isnan(evaluation.row["train/env_steps"]).all()),
        }
        for name, (value, low, high) in evaluation.estimates.items():
            content |= _finite({f"{prefix}{name}": value, f"{prefix}{name}/low": low, f"{prefix}{name}/high": high})
        return content

    def _write_state(self) -> None:
        partial = self._directory / f".{STATE_FILE}"
        partial.write_text(json.dumps(self._state))
        os.replace(partial, self._directory / STATE_FILE)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is a number, as Python's own."""
    return {name: np.asarray(value).item() for name, value in values.items() if np.isfinite(value)}


def _read_state(directory: Path) -> dict[str, Any] | None:
    path = directory / STATE_FILE
    return json.loads(path.read_text()) if path.exists() else None

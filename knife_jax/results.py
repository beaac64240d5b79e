"""What a run leaves behind: metrics, configuration, summary and learning curve, all or nothing."""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from knife_jax import continual, policy
from knife_jax.config import Config
from knife_jax.plan import make_game
from knife_jax.run_result import RunResult
from knife_jax.statistics import Estimate, iqm_estimate, mean_estimate

FEWEST_SEEDS = 5
"""With fewer seeds no verdict is given; intervals from so few cover the truth too seldom."""


class TaskSummary(NamedTuple):
    """One position of the task order, over seeds; success is None in games without a notion of winning."""

    position: int
    name: str
    success: Estimate | None
    success_iqm: Estimate | None
    success_area: Estimate | None
    episode_return: Estimate
    optimum_share: Estimate


class Summary(NamedTuple):
    """A run in numbers.

    Attributes:
        tasks: one row per position.
        plasticity_loss: a sentence that compares the return to a task with its first time; None if no task returns.
        seeds: how many.
    """

    tasks: tuple[TaskSummary, ...]
    plasticity_loss: str | None
    seeds: int


def curves_of(result: RunResult, name: str) -> np.ndarray:
    """A metric as `[S, P, N]`: seeds, positions, evaluations within the task."""
    values = result.metrics[name]
    return values.reshape(len(values), len(result.task_order), -1)


def summarise(result: RunResult, reports_wins: bool = True) -> Summary:
    """Aggregates final performance per task over seeds.

    Args:
        result: the run.
        reports_wins: whether the game's `won` means anything.
    """
    rows = []
    won = curves_of(result, "eval/won")
    area = continual.area_under_curve(won)
    for position, task in enumerate(result.task_order):
        final = won[:, position, -1]
        success = (mean_estimate(final), iqm_estimate(final), iqm_estimate(area[:, position])) if reports_wins else (None, None, None)
        returns = iqm_estimate(curves_of(result, "eval/return")[:, position, -1])
        share = iqm_estimate(curves_of(result, "eval/optimum_share")[:, position, -1])
        rows.append(TaskSummary(position, result.task_names[task], *success, returns, share))
    return Summary(tuple(rows), _verdict(rows, result.task_order, len(won)), len(won))


def _verdict(rows: list[TaskSummary], order: tuple[int, ...], seeds: int) -> str | None:
    again = continual.returns_to(order)
    if again is None:
        return None
    first, last = rows[again[0]], rows[again[1]]
    before, after = (first.success, last.success) if first.success and last.success else (first.episode_return, last.episode_return)
    measure = "success" if first.success else "return"
    if seeds < FEWEST_SEEDS:
        judgement = f"undecided: fewer than {FEWEST_SEEDS} seeds"
    elif after.below(before):
        judgement = "plasticity loss: the intervals are apart"
    elif before.below(after):
        judgement = "better on return: the intervals are apart"
    else:
        judgement = "undecided: the intervals overlap"
    return f"{first.name}: {measure} {before} the first time, {after} on return; {judgement}"


def as_table(summary: Summary) -> Table:
    """The summary for a terminal."""
    table = Table(title=f"Final greedy performance over {summary.seeds} seeds, 95 % intervals", title_justify="left")
    for column in ("", "task", "success", "success IQM", "success area IQM", "return IQM", "share of optimum IQM"):
        table.add_column(column, justify="left" if column in ("", "task") else "right")
    for row in summary.tasks:
        cells = (row.success, row.success_iqm, row.success_area, row.episode_return, row.optimum_share)
        table.add_row(str(row.position + 1), row.name, *(_cell(cell) for cell in cells))
    return table


def _cell(estimate: Estimate | None) -> str:
    return "-" if estimate is None or np.isnan(estimate.value) else str(estimate)


def plot_learning_curve(result: RunResult, reports_wins: bool = True) -> Figure:
    """Success (or return) against environment steps: mean over seeds with its interval, and the boundaries of tasks."""
    name, label = ("eval/won", "greedy success") if reports_wins else ("eval/return", "greedy return")
    curves = curves_of(result, name)
    steps = result.metrics["env_steps"].reshape(len(result.task_order), -1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for position, task in enumerate(result.task_order):
        estimates = np.array([mean_estimate(column) for column in curves[:, position].T])
        color = matplotlib.colormaps["tab10"](task % 10)
        axes.plot(steps[position], estimates[:, 0], color=color)
        axes.fill_between(steps[position], estimates[:, 1], estimates[:, 2], color=color, alpha=0.25, linewidth=0)
    if reports_wins:
        axes.set_ylim(-0.03, 1.03)
    mark_tasks(axes, result)
    axes.set_xlabel("environment steps (slots, resets included)")
    axes.set_ylabel(label)
    cure = "" if result.config.plasticity.name == "none" else f" with {result.config.plasticity.name}"
    title = f"{result.config.learner.mixer}{cure}, {len(curves)} seeds: mean and 95 % interval"
    axes.set_title(title, pad=20, fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def mark_tasks(axes: Axes, result: RunResult) -> None:
    """Names the tasks above a plot over environment steps, and draws the boundaries between them."""
    steps = result.metrics["env_steps"].reshape(len(result.task_order), -1)
    for position, task in enumerate(result.task_order):
        middle = (steps[position, 0] + steps[position, -1]) / 2
        axes.annotate(result.task_names[task], (middle, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
        if position:
            axes.axvline(steps[position, 0], color="0.4", linestyle=":", linewidth=1)
    axes.set_xlim(steps[0, 0], steps[-1, -1])


def save(result: RunResult, directory: str | Path, reports_wins: bool = True) -> Path:
    """Writes the files of a run into a new directory, all or nothing; see `write` and `new_directory`.

    Raises:
        FileExistsError: if the directory exists.
    """
    with new_directory(directory) as unfinished:
        write(result, unfinished, reports_wins)
    return Path(directory)


def write(result: RunResult, directory: Path, reports_wins: bool = True) -> None:
    """Writes `metrics.npz`, `config.yaml`, `summary.json`, `learning_curve.png` and the policy into a directory that exists."""
    arrays = {name.replace("/", "."): values for name, values in result.metrics.items()}
    np.savez_compressed(directory / "metrics.npz", **arrays)  # pyright: ignore[reportArgumentType]
    (directory / "config.yaml").write_text(result.config.to_yaml())
    (directory / "summary.json").write_text(json.dumps(_as_json(result, reports_wins), indent=2) + "\n")
    plot_learning_curve(result, reports_wins).savefig(directory / "learning_curve.png", dpi=120)
    policy.save(result, directory)


def load(directory: str | Path) -> RunResult:
    """Reads back what `write` wrote, but for the networks, which `policy.load_policy` loads.

    Raises:
        ValueError: if there are no results, or they are damaged.
    """
    directory = Path(directory)
    try:
        with np.load(directory / "metrics.npz") as arrays:
            metrics = {name.replace(".", "/"): arrays[name] for name in arrays.files}
        provenance = json.loads((directory / "summary.json").read_text())["provenance"]
        config = Config.from_yaml(directory / "config.yaml")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"there are no results of a finished run in {directory}: {' '.join(str(error).split())}") from None
    tasks = make_game(config)[1]
    return RunResult(config, metrics, tasks.names, tasks.order, {}, {}, provenance)


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A directory that appears under its name only when everything in it was written; on any error nothing is left.

    Raises:
        FileExistsError: if something of that name exists.
    """
    final = Path(directory)
    if final.exists():
        raise FileExistsError(f"{directory} exists already; results are never overwritten, choose another directory")
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        os.rename(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _as_json(result: RunResult, reports_wins: bool) -> dict[str, Any]:
    summary = summarise(result, reports_wins)
    performance = curves_of(result, "eval/won" if reports_wins else "eval/return")
    everywhere = result.metrics["all_tasks/won" if reports_wins else "all_tasks/return"]
    measures = continual.sequence_measures(performance, everywhere, result.task_order)
    content = {
        "tasks": [
            {"position": row.position + 1, "name": row.name} | {field: plain(getattr(row, field)) for field in TaskSummary._fields[2:]}
            for row in summary.tasks
        ],
        "sequence": {name: plain(mean_estimate(values)) for name, values in measures._asdict().items()},
        "plasticity_loss": summary.plasticity_loss,
        "provenance": result.provenance,
    }
    return content


def plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    """An estimate for JSON, which knows no NaN."""
    if estimate is None or np.isnan(estimate.value):
        return None
    return {name: None if np.isnan(number) else number for name, number in estimate._asdict().items()}

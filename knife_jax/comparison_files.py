"""What a comparison leaves behind: its numbers as JSON, its picture, and the files of every run.

Shapes: P tasks in the order met, T thresholds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from knife_jax import results
from knife_jax.compare import Comparison, compare
from knife_jax.results import curves_of
from knife_jax.run_result import RunResult
from knife_jax.statistics import Estimate, mean_estimate


def write(runs: Mapping[str, RunResult], directory: Path, reports_wins: bool = True) -> None:
    """Writes `comparison.json`, `comparison.png` and a directory per method into a directory that exists."""
    for index, (method, run) in enumerate(runs.items()):
        own = directory / f"{index}-{''.join(letter if letter.isalnum() or letter in '_+' else '-' for letter in method)[:40]}"
        own.mkdir()
        results.write(run, own, reports_wins)
    write_comparison(runs, directory, reports_wins)


def write_comparison(runs: Mapping[str, RunResult], directory: Path, reports_wins: bool = True) -> None:
    """Writes `comparison.json` and `comparison.png` into a directory that exists."""
    comparison = compare(runs, reports_wins)
    (directory / "comparison.json").write_text(json.dumps(_as_json(comparison), indent=2) + "\n")
    plot(runs, comparison).savefig(directory / "comparison.png", dpi=120)


def _as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "measure": comparison.measure,
        "seeds": comparison.seeds,
        "final": {method: [results.plain(estimate) for estimate in estimates] for method, estimates in comparison.final.items()},
        "against_first": {method: results.plain(difference) for method, difference in comparison.against.items()},
        "probability_of_improvement": {method: results.plain(chance) for method, chance in comparison.improvement.items()},
        "sentences": list(comparison.sentences),
    }


def plot(runs: Mapping[str, RunResult], comparison: Comparison) -> Figure:
    """Learning curves of all methods; below them the final performance on every task, and performance profiles over the later tasks."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplot_mosaic([["curves", "curves"], ["tasks", "profile"]], width_ratios=(3, 2))
    first = next(iter(runs.values()))
    colors = {method: matplotlib.colormaps["tab10"](index % 10) for index, method in enumerate(runs)}
    _draw_curves(panels["curves"], runs, colors, comparison)
    _draw_tasks(panels["tasks"], comparison, colors, [first.task_names[task] for task in first.task_order])
    _draw_profiles(panels["profile"], comparison, colors)
    for axes in panels.values():
        axes.grid(alpha=0.3)
    return figure


def _draw_curves(axes: Axes, runs: Mapping[str, RunResult], colors: Mapping[str, Any], comparison: Comparison) -> None:
    """Mean over seeds with its interval, against environment steps."""
    name = "eval/won" if comparison.measure == "success" else "eval/return"
    for method, run in runs.items():
        steps = run.metrics["env_steps"].reshape(len(run.task_order), -1)
        curves = curves_of(run, name)
        for position in range(len(run.task_order)):
            estimates = np.array([mean_estimate(column) for column in curves[:, position].T])
            axes.plot(steps[position], estimates[:, 0], color=colors[method], label=method if position == 0 else None)
            axes.fill_between(steps[position], estimates[:, 1], estimates[:, 2], color=colors[method], alpha=0.15, linewidth=0)
    first = next(iter(runs.values()))
    results.mark_tasks(axes, first)
    axes.set(xlabel="environment steps (slots, resets included)", ylabel=f"greedy {comparison.measure}")
    if comparison.measure == "success":
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(f"{first.config.learner.mixer}, {comparison.seeds} seeds: mean and 95 % interval", pad=20, fontsize=10)
    axes.legend(loc="lower left", fontsize=9)


def _draw_tasks(axes: Axes, comparison: Comparison, colors: Mapping[str, Any], task_names: list[str]) -> None:
    """A group of bars for every task in the order met."""
    width = 0.8 / len(comparison.final)
    for index, (method, estimates) in enumerate(comparison.final.items()):
        places = np.arange(len(task_names)) + (index - (len(comparison.final) - 1) / 2) * width
        axes.bar(places, [estimate.value for estimate in estimates], 0.9 * width, color=colors[method], label=method)
        axes.errorbar(places, [estimate.value for estimate in estimates], _half_widths(estimates), fmt="none", ecolor="0.25", capsize=2)
    axes.set_xticks(
        range(len(task_names)), task_names, rotation=30 if len(task_names) > 3 else 0, ha="right" if len(task_names) > 3 else "center"
    )
    axes.set_ylabel(f"final greedy {comparison.measure}")
    axes.set_title("at the end of every task: mean and 95 % interval", fontsize=10)
    axes.axhline(0, color="0.25", linewidth=0.8)


def _half_widths(estimates: tuple[Estimate, ...]) -> np.ndarray:
    """From each value down and up to the ends of its interval, `[2, P]`; nothing where there is none."""
    values, low, high = np.array(estimates).T
    return np.nan_to_num(np.maximum([values - low, high - values], 0.0))


def _draw_profiles(axes: Axes, comparison: Comparison, colors: Mapping[str, Any]) -> None:
    for method, profile in comparison.profiles.items():
        axes.step(comparison.thresholds, profile.share, where="post", color=colors[method], label=method)
        axes.fill_between(comparison.thresholds, profile.low, profile.high, step="post", color=colors[method], alpha=0.15, linewidth=0)
    axes.set(xlabel=f"mean {comparison.measure} over the later tasks", ylabel="share of seeds above it", ylim=(-0.03, 1.03))
    axes.set_title("performance profile, 95 % bootstrap band", fontsize=10)

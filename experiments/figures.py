"""Figures of an experiment, from its result files.

Shapes: S seeds, P positions in the order of tasks, N evaluations within a task.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.measures import Measure, curves
from experiments.tables import Row
from knife_jax.results import mark_tasks
from knife_jax.run_result import RunResult
from knife_jax.statistics import normal_estimates

SHOWN = ("none", "fresh", "reset", "redo", "reborn", "plasticity_injection", "knife", "knife_mixing")
"""Methods in figures that cannot show them all."""
NAMES: Mapping[Measure, str] = {"won": "greedy success", "return": "greedy return", "optimum_share": "share of the best return"}


def learning_curves(runs: Mapping[str, RunResult], measure: Measure, title: str) -> Figure:
    """Performance over training: means over seeds with 95 % intervals."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = [method for method in SHOWN if method in runs] or list(runs)[:10]
    for index, method in enumerate(shown):
        _band(axes, runs[method], f"eval/{measure}", method, matplotlib.colormaps["tab10"](index))
    mark_tasks(axes, runs[shown[0]])
    axes.set(xlabel="environment steps (slots, resets included)", ylabel=NAMES[measure])
    axes.set_title(title, pad=20, fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(alpha=0.3)
    return figure


def bars(rows: Mapping[str, Row], measure: Measure, title: str) -> Figure:
    """Final performance on the tasks after the first, best on top, and the difference to no cure."""
    order = sorted(rows, key=lambda method: rows[method].later.value)
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(order)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for height, method in enumerate(order):
        color = {"knife": "tab:red", "none": "0.3", "fresh": "tab:green"}.get(method, "tab:blue")
        for axes, estimate in ((left, rows[method].later), (right, rows[method].against)):
            if estimate is not None:
                axes.plot([estimate.low, estimate.high], [height, height], color=color, linewidth=2)
                axes.plot(estimate.value, height, "o", color=color)
    left.set_yticks(range(len(order)), [method + (" *" if rows[method].boundaries else "") for method in order], fontsize=8)
    right.axvline(0, color="0.4", linewidth=1)
    left.set_xlabel(f"{NAMES[measure]}, tasks after the first")
    right.set_xlabel("paired difference to none")
    left.set_title(title, fontsize=10)
    right.set_title("mean and 95 % interval; * its schedule knows the boundaries", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    return figure


def shares(runs: Mapping[str, RunResult], title: str, methods: Sequence[str] = ("none", "knife", "fresh")) -> Figure:
    """Shares of stagnant, dormant and inactive (GraMa) units of each network over training."""
    present = [method for method in methods if method in runs] or list(runs)[:1]
    wanted = [(network, share) for network in ("agent", "mixer") for share in ("stagnant", "dormant", "inactive")]
    wanted = [pair for pair in wanted if all("plasticity/" + "/".join(pair) in runs[method].metrics for method in present)]
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, squeeze=False)
    for axes, (network, share) in zip(panels.ravel(), wanted, strict=False):
        for index, method in enumerate(present):
            _band(axes, runs[method], f"plasticity/{network}/{share}", method, matplotlib.colormaps["tab10"](index))
        axes.set_title(f"{network}: {share}", fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    for axes in panels.ravel()[len(wanted) :]:
        axes.set_axis_off()
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _band(axes: Axes, run: RunResult, name: str, label: str, color: object) -> None:
    """A curve with its interval, broken where tasks change."""
    positions = len(run.task_order)
    steps = run.metrics["env_steps"].reshape(positions, -1)
    heights: Float[np.ndarray, "S P N"] = curves(run.metrics, positions, name)
    for position in range(positions):
        value, low, high = np.array(normal_estimates(heights[:, position].T)).T
        axes.plot(steps[position], value, color=color, linewidth=1.3, label=label if position == 0 else None)
        axes.fill_between(steps[position], low, high, color=color, alpha=0.15, linewidth=0)

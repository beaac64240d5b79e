"""Shares of stuck units on a task that never changes: over training by setting, and against the replay ratio.

Shapes: S seeds, N evaluations.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from knife_jax.plan import make_game, make_plan
from knife_jax.run_result import RunResult
from knife_jax.statistics import continuous_estimate, normal_estimates

Groups = Mapping[tuple[str, str], Mapping[str, RunResult]]
"""Runs by setting and learner, then by method."""
NETWORKS = ("agent", "mixer")
KINDS = {"stagnant": "stagnant (KNIFE)", "dormant": "dormant (ReDo)", "inactive": "inactive (GraMa)"}
RATIO_ENV_STEPS = 256
"""The replay ratio is in gradient steps for so many environment steps."""


def sections(groups: Groups, pictures: Path) -> list[str]:
    """Figures over all settings, written to `pictures`, and the lines of a report that show them."""
    drawn = {}
    for method in dict.fromkeys(method for runs in groups.values() for method in runs):
        own = {place: runs[method] for place, runs in groups.items() if method in runs}
        drawn[f"over_training-{method}"] = over_training(own, f"{method}: shares of units over training")
        if len({replay_ratio(run) for run in own.values()}) > 1:
            drawn[f"replay_ratio-{method}"] = against_ratio(
                own, f"{method}: shares of units at the end of training, against the replay ratio"
            )
    for name, figure in drawn.items():
        figure.savefig(pictures / f"{name}.png", dpi=90)
    table = _table(groups)
    return ["## Over all settings", "", *table, "", *(f"![{name}](figures/{name}.png)" for name in drawn), ""]


def replay_ratio(run: RunResult) -> float:
    """Gradient steps for every 256 environment steps."""
    plan = make_plan(run.config, make_game(run.config)[0])
    return run.config.train.updates_per_round * RATIO_ENV_STEPS / plan.round_env_steps


def over_training(runs: Mapping[tuple[str, str], RunResult], title: str) -> Figure:
    """Every share of every network over environment steps, a line for each setting and learner: means with 95 % intervals."""
    figure, panels = _panels(title)
    colors = {setting: matplotlib.colormaps["tab10"](index) for index, setting in enumerate(dict.fromkeys(setting for setting, _ in runs))}
    for (network, kind), axes in panels.items():
        for (setting, mixer), run in runs.items():
            name = f"plasticity/{network}/{kind}"
            if name not in run.metrics:
                continue
            value, low, high = np.array(normal_estimates(run.metrics[name].T)).T
            style = "-" if mixer == "qmix" else "--"
            axes.plot(run.metrics["env_steps"], value, style, color=colors[setting], linewidth=1.3, label=f"{setting}, {mixer}")
            axes.fill_between(run.metrics["env_steps"], low, high, color=colors[setting], alpha=0.1, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda steps, _: f"{steps:,.0f}")
    _finish(figure, panels, "environment steps")
    return figure


def against_ratio(runs: Mapping[tuple[str, str], RunResult], title: str) -> Figure:
    """Every share of every network at the end, against the replay ratio, a line for each game and learner: means with 95 % intervals."""
    figure, panels = _panels(title)
    lines: dict[str, list[RunResult]] = {}
    for (_, mixer), run in runs.items():
        lines.setdefault(f"{run.config.env.name}/{run.config.env.scenario}, {mixer}", []).append(run)
    lines = {label: sorted(own, key=replay_ratio) for label, own in lines.items() if len({replay_ratio(run) for run in own}) > 1}
    for (network, kind), axes in panels.items():
        for index, (label, own) in enumerate(lines.items()):
            name = f"plasticity/{network}/{kind}"
            present = [run for run in own if name in run.metrics]
            ends = np.array([continuous_estimate(run.metrics[name][:, -1]) for run in present])
            if not present:
                continue
            ratios = np.array([replay_ratio(run) for run in present]) * 1.03**index
            errors = np.abs(ends[:, 1:].T - ends[:, 0])
            axes.errorbar(ratios, ends[:, 0], np.nan_to_num(errors), marker="o", markersize=4, capsize=2, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({replay_ratio(run) for own in lines.values() for run in own}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _finish(figure, panels, f"gradient steps for {RATIO_ENV_STEPS} environment steps")
    return figure


def _panels(title: str) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(len(NETWORKS), len(KINDS), sharex=True)
    figure.suptitle(title, fontsize=11)
    return figure, {(network, kind): panels[row, column] for row, network in enumerate(NETWORKS) for column, kind in enumerate(KINDS)}


def _finish(figure: Figure, panels: Mapping[tuple[str, str], Axes], label: str) -> None:
    for (network, kind), axes in panels.items():
        axes.set_title(f"{network}: {KINDS[kind]}", fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        if network == NETWORKS[-1]:
            axes.set_xlabel(label, fontsize=9)
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)


def _table(groups: Groups) -> list[str]:
    """Shares at the end of training."""
    head = ["setting", "learner", "method", "seeds", "ratio", *(f"{network}, {kind}" for network in NETWORKS for kind in KINDS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (setting, mixer), runs in groups.items():
        for method, run in runs.items():
            names = [f"plasticity/{network}/{kind}" for network in NETWORKS for kind in KINDS]
            ends = [str(continuous_estimate(run.metrics[name][:, -1])) if name in run.metrics else "" for name in names]
            row = [setting, mixer, method, str(run.provenance["seeds"]), f"{replay_ratio(run):g}", *ends]
            lines.append("| " + " | ".join(row) + " |")
    return [
        *lines,
        "",
        "Shares of units at the end of training, means over seeds with 95 % intervals. Ratio: gradient steps for 256 environment steps.",
    ]

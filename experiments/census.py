"""Stuck units by layer at the end of each task, from result files: table and heat maps.

Shapes: S seeds, P positions in the order of tasks, L layers.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from knife_jax.program import make_program
from knife_jax.run_result import RunResult
from knife_jax.statistics import continuous_estimate

KINDS = {"stagnant": "stagnant (KNIFE)", "dormant": "dormant (ReDo)", "inactive": "inactive (GraMa)"}


class Place(NamedTuple):
    """Where a run comes from."""

    experiment: str
    setting: str
    mixer: str

    def __str__(self) -> str:
        return f"{self.experiment.removesuffix('_drift')}, {self.setting}, {self.mixer}"


def units(run: RunResult) -> dict[str, int]:
    """How many units each hidden layer has, those of stacks together, in the order of the network."""
    return {layer.name: layer.size * math.prod(layer.stack) for layer in make_program(run.config).networks.graph.layers}


def share_by_layer(run: RunResult, kind: str) -> dict[str, Float[np.ndarray, "S P"]]:
    """The share of every layer's units at the end of each task, of layers that the files know."""
    names = {layer: f"at_end/plasticity/{layer}/{kind}" for layer in units(run)}
    return {layer: run.metrics[name].astype(np.float64) for layer, name in names.items() if name in run.metrics}


def write_report(question: str, runs: Mapping[Place, RunResult], out: Path) -> Path:
    """Writes `report.md` and `figures/`.

    Raises:
        ValueError: if no run holds what is counted.
    """
    counted = {place: run for place, run in runs.items() if share_by_layer(run, "stagnant")}
    if not counted:
        raise ValueError("there is nothing to count: no results with diagnoses of single layers")
    pictures = out / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    text = ["# neuron_census", "", question.strip(), ""]
    for kind in KINDS:
        heat_maps(counted, kind).savefig(pictures / f"{kind}.png", dpi=90)
        text += [f"![{KINDS[kind]} units by layer and task](figures/{kind}.png)"]
    text += ["", *(line for place, run in counted.items() for line in _section(place, run))]
    path = out / "report.md"
    path.write_text("\n".join(text).rstrip() + "\n")
    return path


def heat_maps(runs: Mapping[Place, RunResult], kind: str) -> Figure:
    """Mean shares over seeds, layers against tasks, a panel for each game and learner."""
    mixers = list(dict.fromkeys(place.mixer for place in runs))
    games = list(dict.fromkeys((place.experiment, place.setting) for place in runs))
    heights = [max(len(units(run)) for place, run in runs.items() if place.mixer == mixer) for mixer in mixers]
    size = (2.2 + 4.2 * len(games), 1.4 + sum(0.32 * height + 0.9 for height in heights))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(mixers), len(games), squeeze=False, height_ratios=heights)
    image = None
    for row, mixer in enumerate(mixers):
        for column, game in enumerate(games):
            run = runs.get(Place(*game, mixer))
            if run is None:
                panels[row, column].set_axis_off()
                continue
            image = _heat_map(panels[row, column], run, kind)
            panels[row, column].set_title(str(Place(*game, mixer)), fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6, aspect=30, label="mean share over seeds")
    figure.suptitle(f"{KINDS[kind]} units at the end of each task", fontsize=11)
    return figure


def _heat_map(axes: Axes, run: RunResult, kind: str) -> AxesImage:
    shares = {layer: values.mean(axis=0) for layer, values in share_by_layer(run, kind).items()}
    sizes, table = units(run), np.array(list(shares.values()))
    image = axes.imshow(table, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
    axes.set_yticks(range(len(shares)), [f"{layer} ({sizes[layer]})" for layer in shares], fontsize=7)
    axes.set_xticks(range(len(run.task_order)), [run.task_names[task] for task in run.task_order], fontsize=7, rotation=30, ha="right")
    for (layer, position), value in np.ndenumerate(table):
        axes.text(position, layer, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white" if value > 0.45 else "black")
    return image


def _section(place: Place, run: RunResult) -> list[str]:
    """A table of one game and learner: first task, last task, and what changed."""
    head = (
        "layer",
        "units",
        "stagnant, first task",
        "stagnant, end",
        "change",
        "dormant, end",
        "inactive, end",
        "share of all stagnant units",
    )
    lines = [f"## {place}", "", f"{run.provenance['seeds']} seeds.", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    by_kind, sizes = {kind: share_by_layer(run, kind) for kind in KINDS}, units(run)
    stuck = {layer: sizes[layer] * values[:, -1] for layer, values in by_kind["stagnant"].items()}
    everywhere = np.maximum(sum(stuck.values(), np.zeros(len(next(iter(stuck.values()))))), 1e-9)
    for layer, values in by_kind["stagnant"].items():
        estimates = (
            continuous_estimate(values[:, 0]),
            continuous_estimate(values[:, -1]),
            continuous_estimate(values[:, -1] - values[:, 0]),
            *(continuous_estimate(by_kind[kind][layer][:, -1]) for kind in ("dormant", "inactive")),
            continuous_estimate(stuck[layer] / everywhere),
        )
        lines.append("| " + " | ".join([layer, str(sizes[layer]), *map(str, estimates)]) + " |")
    return [*lines, "", "Means over seeds with 95 % intervals; changes are paired by seed.", ""]

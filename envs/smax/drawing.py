"""What one moment of a SMAX battle looks like, drawn with matplotlib's objects (no pyplot, no global state).

Shapes: T environment steps, A allies, M enemies, N = A + M units (the allies first). Positions and lengths are in map units.
"""

import textwrap
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from envs.smax.types import NOBODY, UNIT_TYPES

LETTERS = "mMsZzh"
"""JaxMARL's shorthands, in the order of `UNIT_TYPES`."""

ALLY, ENEMY = "#0072B2", "#D55E00"
HEALTH, FALLEN, INK, GRID, OUTSIDE, FLOOR = "#009E73", "#7F7F7F", "#222222", "#EEEEEE", "#C8C8C8", "#FFFFFF"
COLORS = (ALLY, ENEMY, HEALTH, FALLEN, INK, GRID, OUTSIDE, FLOOR)
"""All colours of a drawing; those of the teams are Okabe and Ito's, which the colour-blind tell apart."""

MARGIN, RIM, LEAST_SPAN, SLIMMEST = 2.0, 0.75, 12.0, 0.5
"""Of the view: around the units, beyond the border, its least side, and its least ratio of sides."""

HEADER, FOOTER, GAP = 0.5, 0.3, 0.2
"""Heights above a panel and below all of them, and the space between panels, in inches."""
LEGEND_LINE, LEGEND_LETTER = 0.15, 0.06
"""Height of a further line of the legend and width of a letter, in inches."""

LETTER_SIZE, SMALL_LETTER, LARGE_LETTER = 1.35, 0.55, 0.74
"""The font's size over the unit's radius, and the heights of its letters over that size."""

POINTS_PER_INCH = 72


class View(NamedTuple):
    """The part of the map that is shown, in map units."""

    west: float
    south: float
    width: float
    height: float


class Battle(NamedTuple):
    """All that is drawn of an episode.

    Attributes:
        x: positions.
        y: positions.
        health: what is left.
        targets: the unit that each unit hit during each step, or `NOBODY`.
        rewards: the team's.
        full_health: at the start; 0 for units that take no part, which are not drawn.
        radius: of each unit.
        attack_range: of each unit.
        unit_types: indices into `UNIT_TYPES`.
        num_allies: A.
        map_size: width and height of the map.
        walls_kill: whether the border is deadly.
        ending: how the episode ended, in a word or two.
        view: the part of the map that is shown.
    """

    x: Float[np.ndarray, "T+1 N"]
    y: Float[np.ndarray, "T+1 N"]
    health: Float[np.ndarray, "T+1 N"]
    targets: Int[np.ndarray, "T N"]
    rewards: Float[np.ndarray, "T"]
    full_health: Float[np.ndarray, "N"]
    radius: Float[np.ndarray, "N"]
    attack_range: Float[np.ndarray, "N"]
    unit_types: Int[np.ndarray, "N"]
    num_allies: int
    map_size: tuple[float, float]
    walls_kill: bool
    ending: str
    view: View


class Moment(NamedTuple):
    """A battle at one time, which may lie between two environment steps.

    Attributes:
        x: positions.
        y: positions.
        health: what is left.
        alive: units on their feet.
        fallen: units that were.
        shots: pairs (shooter, target) of the step that is under way or has just ended.
    """

    x: Float[np.ndarray, "N"]
    y: Float[np.ndarray, "N"]
    health: Float[np.ndarray, "N"]
    alive: Bool[np.ndarray, "N"]
    fallen: Bool[np.ndarray, "N"]
    shots: list[tuple[int, int]]


def moment_of(battle: Battle, step: int, share: float = 1.0) -> Moment:
    """The battle when a share of an environment step, in (0, 1], has passed.

    Args:
        battle: all of it.
        step: the step, from 1; 0 is the start, before any.
        share: positions and health go linearly from the step's start to its end; who dies in it falls at its end.
    """
    before = max(step - 1, 0)
    x, y, health = ((1 - share) * values[before] + share * values[step] for values in (battle.x, battle.y, battle.health))
    alive = battle.health[step if share == 1.0 else before] > 0
    targets = battle.targets[before] if step else np.full(x.shape, NOBODY)
    shots = [(int(shooter), int(targets[shooter])) for shooter in np.flatnonzero(targets != NOBODY)]
    return Moment(x, y, health, alive, ~alive & (battle.full_health > 0), shots)


def view_of(
    x: Float[np.ndarray, "*T N"], y: Float[np.ndarray, "*T N"], alive: Bool[np.ndarray, "*T N"], map_size: tuple[float, float]
) -> View:
    """The part of the map that holds the living at all times, with a margin and not too slim; beyond the border only a rim."""
    lows = [float(values[alive].min()) - MARGIN for values in (x, y)]
    highs = [float(values[alive].max()) + MARGIN for values in (x, y)]
    spans = [high - low for low, high in zip(lows, highs, strict=True)]
    least = max(LEAST_SPAN, SLIMMEST * max(spans))
    starts, sizes = [], []
    for low, high, span, size in zip(lows, highs, spans, map_size, strict=True):
        span = min(max(span, least), size + 2 * RIM)
        starts.append(float(np.clip((low + high - span) / 2, -RIM, size + RIM - span)))
        sizes.append(span)
    return View(*starts, *sizes)


def panels(battle: Battle, count: int, columns: int, width: float) -> tuple[Figure, list[Axes]]:
    """A figure with room for so many moments, and a legend below.

    Args:
        battle: what will be drawn.
        count: of panels.
        columns: panels side by side.
        width: of a panel, in inches; its height follows from the view.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    height = width * battle.view.height / battle.view.width
    total_width = columns * (width + GAP) + GAP
    legend = _legend(battle, total_width)
    footer = FOOTER + LEGEND_LINE * legend.count("\n")
    total_height = rows * (height + HEADER) + footer
    figure = Figure(figsize=(total_width, total_height), facecolor=FLOOR)
    axes = []
    for index in range(count):
        row, column = divmod(index, columns)
        left, bottom = GAP + column * (width + GAP), footer + (rows - row - 1) * (height + HEADER)
        place = (left / total_width, bottom / total_height, width / total_width, height / total_height)
        axes.append(figure.add_axes(place))
    figure.text(0.5, 0.1 / total_height, legend, ha="center", va="bottom", fontsize=7.5, color=INK)
    return figure, axes


def draw(axes: Axes, battle: Battle, step: int, share: float = 1.0) -> None:
    """Draws a moment (see `moment_of`) in place of whatever the axes show."""
    moment = moment_of(battle, step, share)
    axes.clear()
    _draw_map(axes, battle)
    _draw_ranges(axes, battle, moment)
    axes.scatter(moment.x[moment.fallen], moment.y[moment.fallen], s=16, c=FALLEN, marker="x", linewidths=1.2)
    _draw_units(axes, battle, moment)
    _draw_shots(axes, battle, moment)
    _draw_health(axes, battle, moment)
    _write_titles(axes, battle, moment, step)


def _legend(battle: Battle, width: float) -> str:
    present = np.unique(battle.unit_types[battle.full_health > 0])
    types = ", ".join(f"{LETTERS[index]} {UNIT_TYPES[index]}" for index in present)
    marks = "bar: health · thin circle: attack range · line: a shot that hit · cross: fallen"
    return textwrap.fill(f"{types}  ·  {marks}" if width > 5 else types, int(width / LEGEND_LETTER))


def _draw_map(axes: Axes, battle: Battle) -> None:
    view, (width, height) = battle.view, battle.map_size
    axes.set(xlim=(view.west, view.west + view.width), ylim=(view.south, view.south + view.height), xticks=[], yticks=[])
    axes.set_facecolor(OUTSIDE)
    axes.spines[:].set_color(OUTSIDE)
    axes.add_patch(Rectangle((0, 0), width, height, facecolor=FLOOR, edgecolor="none", zorder=0))
    lines = [[(x, 0), (x, height)] for x in np.arange(4, width, 4)] + [[(0, y), (width, y)] for y in np.arange(4, height, 4)]
    axes.add_collection(LineCollection(lines, colors=GRID, linewidths=0.6, zorder=0.1), autolim=False)
    thickness, line = (2.5, "-") if battle.walls_kill else (1.0, "--")
    axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=INK, zorder=0.2, linewidth=thickness, linestyle=line))


def _teams(battle: Battle) -> list[str]:
    """Everyone's colour."""
    return [ALLY if unit < battle.num_allies else ENEMY for unit in range(len(battle.radius))]


def _circles(axes: Axes, moment: Moment, radius: Float[np.ndarray, "N"], **style) -> None:
    """Circles around the living."""
    alive = moment.alive
    size = 2 * radius[alive]
    middles = np.stack([moment.x[alive], moment.y[alive]], axis=1)
    circles = EllipseCollection(size, size, np.zeros_like(size), units="xy", offsets=middles, offset_transform=axes.transData, **style)
    axes.add_collection(circles, autolim=False)


def _draw_ranges(axes: Axes, battle: Battle, moment: Moment) -> None:
    colors = [color for color, alive in zip(_teams(battle), moment.alive, strict=True) if alive]
    strength = float(np.clip(3.0 / (battle.full_health > 0).sum(), 0.2, 0.45))
    _circles(axes, moment, battle.attack_range, facecolors="none", edgecolors=colors, alpha=strength, linewidths=0.7, zorder=0.5)


def _draw_units(axes: Axes, battle: Battle, moment: Moment) -> None:
    colors = _teams(battle)
    living = [color for color, alive in zip(colors, moment.alive, strict=True) if alive]
    _circles(axes, moment, battle.radius, facecolors=living, edgecolors=FLOOR, linewidths=0.5, zorder=2)
    for unit in np.flatnonzero(moment.alive):
        letter, size = LETTERS[battle.unit_types[unit]], LETTER_SIZE * battle.radius[unit]
        baseline = moment.y[unit] - 0.5 * size * (SMALL_LETTER if letter in "msz" else LARGE_LETTER)
        style = {"ha": "center", "va": "baseline", "weight": "bold", "color": FLOOR, "zorder": 7, "clip_on": True}
        axes.text(moment.x[unit], baseline, letter, fontsize=size * _points_per_map_unit(axes), **style)


def _points_per_map_unit(axes: Axes) -> float:
    pixels = axes.get_window_extent().width
    low, high = axes.get_xlim()
    return pixels / axes.figure.dpi * POINTS_PER_INCH / (high - low)


def _draw_shots(axes: Axes, battle: Battle, moment: Moment) -> None:
    """Lines from circle to circle, a little to the right of the middle, so that two units that hit each other have two."""
    colors, lines, tips = _teams(battle), [], []
    for shooter, target in moment.shots:
        start, end = (np.array([moment.x[unit], moment.y[unit]]) for unit in (shooter, target))
        distance = float(np.hypot(*(end - start))) + 1e-6
        ahead = (end - start) / distance
        aside = 0.4 * min(battle.radius[shooter], battle.radius[target]) * np.array([ahead[1], -ahead[0]])
        lines.append([start + battle.radius[shooter] * ahead + aside, end - 0.8 * battle.radius[target] * ahead + aside])
        tips.append(lines[-1][1])
    if lines:
        hues = [colors[shooter] for shooter, _ in moment.shots]
        axes.add_collection(LineCollection(lines, colors=hues, linewidths=1.4, zorder=3), autolim=False)
        axes.scatter(*np.array(tips).T, s=11, c=hues, edgecolors=FLOOR, linewidths=0.5, zorder=4)


def _draw_health(axes: Axes, battle: Battle, moment: Moment) -> None:
    """A bar above each of the living, as wide as the unit; what is dark of it is lost."""
    alive = moment.alive
    half, share = battle.radius[alive], moment.health[alive] / battle.full_health[alive]
    west, height = moment.x[alive] - half, moment.y[alive] + half + 0.17
    full = np.stack([np.stack([west, height], 1), np.stack([west + 2 * half, height], 1)], axis=1)
    left = np.stack([np.stack([west, height], 1), np.stack([west + 2 * half * share, height], 1)], axis=1)
    thickness = 0.2 * _points_per_map_unit(axes)
    for lines, color, width in ((full, FLOOR, thickness + 1.2), (full, INK, thickness + 0.6), (left, HEALTH, thickness)):
        axes.add_collection(LineCollection(list(lines), colors=color, linewidths=width, capstyle="butt", zorder=6), autolim=False)


def _write_titles(axes: Axes, battle: Battle, moment: Moment, step: int) -> None:
    ending = f" · {battle.ending}" if step == len(battle.rewards) else ""
    reward = float(battle.rewards[:step].sum())
    axes.set_title(f"step {step} · {reward:.2f} reward so far{ending}", fontsize=9.5, color=INK, pad=17)
    teams = (("allies", slice(None, battle.num_allies), ALLY, 0.0), ("enemies", slice(battle.num_allies, None), ENEMY, 1.0))
    for name, team, color, side in teams:
        present = battle.full_health[team] > 0
        share = moment.health[team].sum() / battle.full_health[team].sum()
        text = f"{name}: {moment.alive[team].sum()} of {present.sum()}, {share:.0%} health"
        where = {"xycoords": "axes fraction", "xytext": (0, 4), "textcoords": "offset points", "ha": "right" if side else "left"}
        axes.annotate(text, (side, 1.0), fontsize=8, color=color, weight="bold", **where)

"""Episodes of predator-prey to look at: an animation, or a strip of stills that needs no player.

Agents are numbered circles, stags squares and hares triangles; a frozen agent is grey, and so are walls.

Shapes: T environment steps, A agents, P prey.
"""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.animation import FFMpegWriter, FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from envs.files import checked_path, complete_or_not
from envs.predator_prey import PredatorPrey
from envs.predator_prey_types import PredatorPreyParams, PredatorPreyState

ANIMATIONS, FILMSTRIPS = (".gif", ".mp4"), (".png",)
AGENT, STAG, HARE, FROZEN, WALL, GRID = "#0072B2", "#D55E00", "#E69F00", "#7F7F7F", "#C8C8C8", "#EEEEEE"


def save_episode(
    env: PredatorPrey,
    params: PredatorPreyParams,
    states: PredatorPreyState,
    rewards: Float[np.ndarray, "T"],
    path: str | Path,
    *,
    steps_per_second: float = 4.0,
    frames: int = 9,
) -> None:
    """Writes an episode as a `.gif` or `.mp4`, or as evenly spaced moments side by side in a `.png`; complete or not at all.

    Args:
        env: in which it was played.
        params: the task.
        states: at all T + 1 times; every leaf has them as its first axis.
        rewards: the team's.
        path: to the file.
        steps_per_second: of an animation.
        frames: moments in a strip, its first and last among them.

    Raises:
        ValueError: if the suffix is not known, or `ffmpeg` is missing for an `.mp4`.
        FileNotFoundError: if the directory does not exist.
    """
    path = checked_path(path, ANIMATIONS + FILMSTRIPS)
    if path.suffix.lower() == ".mp4" and not FFMpegWriter.isAvailable():
        raise ValueError(f"{path.name} needs the program ffmpeg, which was not found; install it, or write {path.stem}.gif instead")
    with complete_or_not(path) as unfinished:
        if path.suffix.lower() in FILMSTRIPS:
            _save_strip(env, params, states, rewards, unfinished, frames)
        else:
            _save_animation(env, params, states, rewards, unfinished, steps_per_second)


def _save_strip(
    env: PredatorPrey, params: PredatorPreyParams, states: PredatorPreyState, rewards: np.ndarray, path: Path, frames: int
) -> None:
    steps = np.unique(np.linspace(0, len(rewards), frames).round().astype(int))
    columns = min(3, len(steps))
    rows = -(-len(steps) // columns)
    figure = Figure(figsize=(3 * columns, 3.3 * rows * env.height / env.width), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(steps) :]:
        panel.set_axis_off()
    for panel, step in zip(panels, steps, strict=False):
        draw(panel, env, params, states, rewards, int(step))
    figure.savefig(path, dpi=100)


def _save_animation(
    env: PredatorPrey, params: PredatorPreyParams, states: PredatorPreyState, rewards: np.ndarray, path: Path, steps_per_second: float
) -> None:
    figure = Figure(figsize=(4.5, 4.8 * env.height / env.width), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    order = [*range(len(rewards) + 1), *[len(rewards)] * round(1.5 * steps_per_second)]  # the end is held for a while
    animation = FuncAnimation(figure, lambda step: draw(axes, env, params, states, rewards, step), frames=order, repeat=False)
    rate = max(1, round(steps_per_second))
    animation.save(path, writer=PillowWriter(fps=rate) if path.suffix.lower() == ".gif" else FFMpegWriter(fps=rate), dpi=80)


def draw(
    axes: Axes, env: PredatorPrey, params: PredatorPreyParams, states: PredatorPreyState, rewards: Float[np.ndarray, "T"], step: int
) -> list[Axes]:
    """Draws one moment of an episode, with the return so far."""
    now: PredatorPreyState = jax.tree.map(lambda leaf: np.asarray(leaf)[step], states)
    axes.clear()
    axes.set(xlim=(-0.5, env.width - 0.5), ylim=(env.height - 0.5, -0.5), aspect="equal")
    axes.set_xticks(np.arange(env.width) - 0.5, [])
    axes.set_yticks(np.arange(env.height) - 0.5, [])
    axes.grid(color=GRID)
    axes.tick_params(length=0)
    rows, columns = int(params.active_height), int(params.active_width)
    axes.add_patch(Rectangle((columns - 0.5, -0.5), env.width - columns, env.height, color=WALL))
    axes.add_patch(Rectangle((-0.5, rows - 0.5), env.width, env.height - rows, color=WALL))
    for index, (row, column) in enumerate(now.prey):
        if now.alive[index]:
            is_stag = index < env.num_stags
            axes.plot(column, row, marker="s" if is_stag else "^", color=STAG if is_stag else HARE, markersize=11)
    for index, (row, column) in enumerate(now.agents[: int(params.active_agents)]):
        if not (now.frozen[index] and bool(params.remove_frozen)):
            axes.plot(column, row, marker="o", color=FROZEN if now.frozen[index] else AGENT, markersize=11, alpha=0.85)
            axes.annotate(str(index + 1), (column, row), ha="center", va="center", color="white", fontsize=7)
    axes.set_title(f"step {step}, return {float(rewards[:step].sum()):g}, {int(now.alive.sum())} prey left", fontsize=9)
    return [axes]

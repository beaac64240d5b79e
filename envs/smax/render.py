"""Episodes of SMAX to look at: an animation, or a strip of stills that needs no player.

Shapes: T environment steps, A allies, M enemies, N = A + M units (the allies first).

To see how chance fares in a scenario::

    env, params = envs.smax.make("2s3z")
    episode = play(env, params, None, jax.random.key(0))
    save_filmstrip(env, params, episode, "battle.png")
    save_animation(env, params, episode, "battle.gif")
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, PRNGKeyArray
from matplotlib.animation import FFMpegWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from envs.base import Observation
from envs.files import checked_path, complete_or_not
from envs.smax import drawing, engine
from envs.smax.drawing import Battle
from envs.smax.game import Smax
from envs.smax.types import NOBODY, SmaxParams, SmaxState

Policy = Callable[[PRNGKeyArray, Observation], Int[Array, "A"]]
"""`(key, what the allies observe) -> their actions`, which must be available ones."""

ANIMATIONS = (".gif", ".mp4")
FILMSTRIPS = (".png",)
LAST_FRAME_SECONDS = 1.5


class Episode(NamedTuple):
    """One complete episode, in numpy.

    Attributes:
        states: at all T + 1 times; every leaf has them as its first axis.
        actions: what all units did, `[T, N]`. Enemies count opponents backwards: their action `5 + j` attacks ally `A - 1 - j`.
        rewards: the team's.
        won: only the enemies are dead at the end.
        lost: only the allies are.
        truncated: the episode ended by its time limit.
    """

    states: SmaxState
    actions: Int8[np.ndarray, "T N"]
    rewards: Float[np.ndarray, "T"]
    won: bool
    lost: bool
    truncated: bool


def random_policy(key: PRNGKeyArray, observation: Observation) -> Int[Array, "A"]:
    """Draws every action from the available ones, each with the same chance."""
    return jax.random.categorical(key, jnp.where(observation.action_mask, 0.0, -jnp.inf))


def play(env: Smax, params: SmaxParams, policy: Policy | None, key: PRNGKeyArray) -> Episode:
    """Plays one complete episode in one compiled program.

    Args:
        env: the game; against its own enemy.
        params: the task.
        policy: of the allies; any hashable function of JAX, compiled once for each function given. `random_policy` if None.
        key: of start, moves and policy.
    """
    first, (states, outcomes) = jax.device_get(_rollout(env, policy or random_policy, params, key))
    length = int(np.argmax(outcomes.terminated | outcomes.truncated)) + 1
    states = jax.tree.map(lambda start, later: np.concatenate([start[None], later[:length]]), first, states)
    won, lost, truncated = (bool(flags[length - 1]) for flags in (outcomes.info["won"], outcomes.info["lost"], outcomes.truncated))
    return Episode(states, states.last_actions[1:], outcomes.reward[:length], won, lost, truncated)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rollout(env: Smax, policy: Policy, params: SmaxParams, key: PRNGKeyArray) -> Any:
    """The first state, and states and outcomes of all steps up to the time limit, of which those after the end mean nothing."""
    key_start, key_steps = jax.random.split(key)
    first = env.reset(key_start, params)

    def step(state: SmaxState, key: PRNGKeyArray) -> tuple[SmaxState, Any]:
        key_policy, key_step = jax.random.split(key)
        actions = policy(key_policy, env.observe(env.record(state), params))
        state, outcome = env.step(key_step, state, actions, params)
        return state, (state, outcome)

    return first, jax.lax.scan(step, first, jax.random.split(key_steps, env.max_steps + int(env.legacy)))[1]


def hits(episode: Episode, num_allies: int) -> Int[np.ndarray, "T N"]:
    """Whom each unit hit during each step, as an index into all units; `NOBODY` if nobody.

    Every cooldown passes with the time, below 0 too, and is set back by a shot only, which always hits: a unit has hit its target during a
    step if less of its cooldown has passed than the step lasts.
    """
    actions = jnp.asarray(episode.actions.T, jnp.int32)
    targets = np.asarray(engine.orders_of(actions, jnp.zeros(actions.shape), num_allies).target).T
    is_ally = np.arange(targets.shape[1]) < num_allies
    passed = episode.states.cooldown[:-1] - episode.states.cooldown[1:]
    shot = passed < engine.TICKS * engine.TICK_SECONDS - 0.01
    return np.where(shot & (targets != NOBODY), targets + num_allies * is_ally, NOBODY)


def save_animation(
    env: Smax,
    params: SmaxParams,
    episode: Episode,
    path: str | Path,
    *,
    frames_per_step: int = 2,
    steps_per_second: float = 5.0,
    width: float = 6.4,
    dpi: int = 100,
    whole_map: bool = False,
) -> None:
    """Writes an episode as an animation: units, health, ranges of attack, and the shots that hit.

    The file appears when it is complete, or not at all.

    Args:
        env: in which the episode was played.
        params: the task.
        episode: see `play`.
        path: to a `.gif` or, with the program `ffmpeg` installed, an `.mp4`.
        frames_per_step: frames for each environment step; units move linearly in between.
        steps_per_second: environment steps shown in a second (two are the game's own pace).
        width: of the map, in inches.
        dpi: pixels per inch.
        whole_map: whether to show all of the map, instead of the part where units go.

    Raises:
        ValueError: if the suffix is not known, a number is out of range, or `ffmpeg` is missing.
        FileNotFoundError: if the directory does not exist.
    """
    path = checked_path(path, ANIMATIONS)
    _check_least(1, frames_per_step=frames_per_step, dpi=dpi)
    _check_positive(steps_per_second=steps_per_second, width=width)
    if path.suffix.lower() == ".mp4" and not FFMpegWriter.isAvailable():
        raise ValueError(f"{path.name} needs the program ffmpeg, which was not found; install it, or write {path.stem}.gif instead")
    figure, frames = _frames(_battle(env, params, episode, whole_map), frames_per_step, width, dpi)
    save = _save_gif if path.suffix.lower() == ".gif" else _save_mp4
    with complete_or_not(path) as unfinished:
        save(figure, frames, unfinished, frames_per_step * steps_per_second)


def save_filmstrip(
    env: Smax,
    params: SmaxParams,
    episode: Episode,
    path: str | Path,
    *,
    columns: int = 3,
    frames: int = 9,
    width: float = 4.5,
    dpi: int = 100,
    whole_map: bool = False,
) -> None:
    """Writes a grid of evenly spaced moments of an episode, its first and last among them; shots are those of the step that led there.

    The file appears when it is complete, or not at all.

    Args:
        env: in which the episode was played.
        params: the task.
        episode: see `play`.
        path: to a `.png`.
        columns: moments side by side.
        frames: how many moments, at least 2; all there are, if the episode is shorter.
        width: of one moment, in inches.
        dpi: pixels per inch.
        whole_map: whether to show all of the map, instead of the part where units go.

    Raises:
        ValueError: if the suffix is not known or a number out of range.
        FileNotFoundError: if the directory does not exist.
    """
    path = checked_path(path, FILMSTRIPS)
    _check_least(1, columns=columns, dpi=dpi)
    _check_least(2, frames=frames)
    _check_positive(width=width)
    battle = _battle(env, params, episode, whole_map)
    steps = np.unique(np.linspace(0, len(episode.rewards), frames).round().astype(int))
    figure, axes = drawing.panels(battle, len(steps), columns, width)
    for panel, step in zip(axes, steps, strict=True):
        drawing.draw(panel, battle, int(step))
    with complete_or_not(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi)


def _check_least(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value!r}")


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, not {value!r}")


def _battle(env: Smax, params: SmaxParams, episode: Episode, whole_map: bool) -> Battle:
    states = episode.states
    x, y, health = (np.asarray(leaf) for leaf in (states.x, states.y, states.health))
    unit_types = np.asarray(states.unit_types[0], int)
    tables = jax.tree.map(lambda table: jnp.asarray(table)[..., None], params.statistics)
    statistics = engine.statistics_of(tables, jnp.asarray(unit_types)[:, None], env.num_agents)
    everywhere = drawing.View(-drawing.RIM, -drawing.RIM, env.map_width + 2 * drawing.RIM, env.map_height + 2 * drawing.RIM)
    ending = "won" if episode.won else "lost" if episode.lost else "time is up" if episode.truncated else "nobody is left"
    return Battle(
        x,
        y,
        health,
        hits(episode, env.num_agents),
        episode.rewards,
        full_health=health[0],
        radius=np.asarray(statistics.radius)[:, 0],
        attack_range=np.asarray(statistics.attack_range)[:, 0],
        unit_types=unit_types,
        num_allies=env.num_agents,
        map_size=env.map_size,
        walls_kill=bool(params.walls_cause_death),
        ending=ending,
        view=everywhere if whole_map else drawing.view_of(x, y, health > 0, env.map_size),
    )


def _frames(battle: Battle, frames_per_step: int, width: float, dpi: int) -> tuple[Figure, Iterator[None]]:
    """A figure, and what draws one frame after the other into it."""
    figure, (axes,) = drawing.panels(battle, 1, 1, width)
    figure.set_dpi(dpi)

    def frames() -> Iterator[None]:
        yield drawing.draw(axes, battle, 0)
        for step in range(1, len(battle.rewards) + 1):
            for frame in range(1, frames_per_step + 1):
                yield drawing.draw(axes, battle, step, frame / frames_per_step)

    return figure, frames()


def _save_gif(figure: Figure, frames: Iterator[None], path: Path, frames_per_second: float) -> None:
    """One palette for all frames keeps the file small and free of flicker."""
    palette, canvas = _palette(), FigureCanvasAgg(figure)
    images = []
    for _ in frames:
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(palette=palette, dither=Image.Dither.NONE))
    durations = [round(1000 / frames_per_second)] * (len(images) - 1) + [round(1000 * LAST_FRAME_SECONDS)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=1)


def _palette() -> Image.Image:
    """A palette of all colours of a drawing and their blends with white.

    Pillow tells colours apart by their upper six bits only, and would mistake white itself for a blend close to it.
    """
    shares = np.linspace(0.0, 1.0, 32)[:, None, None]
    blends = (1 - shares) + shares * np.array([to_rgb(color) for color in drawing.COLORS])
    colors = np.unique((255 * blends).round().astype(np.uint8).reshape(-1, 3), axis=0)
    distance_to_white = 255 - colors.min(axis=1)
    image = Image.new("P", (1, 1))
    image.putpalette(colors[(distance_to_white == 0) | (distance_to_white > 8)].tobytes())
    return image


def _save_mp4(figure: Figure, frames: Iterator[None], path: Path, frames_per_second: float) -> None:
    writer = FFMpegWriter(fps=frames_per_second)  # pyright: ignore[reportArgumentType] (ffmpeg takes any number)
    with writer.saving(figure, str(path), figure.dpi):
        for _ in frames:
            writer.grab_frame()
        for _ in range(round(LAST_FRAME_SECONDS * frames_per_second)):
            writer.grab_frame()

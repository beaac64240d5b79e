"""One line that says how far a run has come; nothing where there is no terminal."""

from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from knife_jax.config import Config
from knife_jax.loop import Status
from knife_jax.plan import make_game, make_plan
from knife_jax.statistics import iqm


class ProgressLine:
    """Shows task, environment steps, gradient steps, greedy performance over seeds, speed and the time left.

    Environment steps are slots per seed; the speed counts those of all seeds that are trained side by side.

    Args:
        console: where to.
        config: the run's configuration.
        seeds: how many seeds in all.
        seeds_per_batch: how many of them side by side.
    """

    def __init__(self, console: Console, config: Config, seeds: int, seeds_per_batch: int) -> None:
        env, tasks = make_game(config)
        plan = make_plan(config, env)
        self._measure = "won" if env.reports_wins else "return"
        self._num_tasks, self._width, self._round_steps = len(tasks.order), seeds_per_batch, plan.round_env_steps
        self._rounds_per_task = plan.rounds_per_evaluation * plan.evaluations_per_task
        self._batches = -(-seeds // seeds_per_batch)
        self._total = self._batches * self._num_tasks * self._rounds_per_task
        self._seen: int | None = None
        self._performance, self._speed = "", 0.0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[news]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._line = Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self._job = self._line.add_task("compiling", total=self._total, news="")

    def __enter__(self) -> "ProgressLine":
        self._line.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._line.stop()

    def __call__(self, status: Status) -> None:
        """Moves on; see `runner.run`."""
        batch, position, rounds = status.point
        done = (batch * self._num_tasks + position) * self._rounds_per_task + rounds
        if self._seen is None:
            self._line.reset(self._job, completed=done)  # a resumed run has not done in a moment what was done before
        elif done > self._seen:
            speed = (done - self._seen) * self._round_steps * self._width / max(status.seconds, 1e-6)
            self._speed = speed if self._speed == 0 else 0.7 * self._speed + 0.3 * speed
        self._seen = done
        if status.rows:
            self._performance = f"{self._measure} {float(iqm(status.rows[-1][f'eval/{self._measure}'])):.2f}"
        self._line.update(self._job, completed=done, description=self._where(batch, position), news=self._news(position, rounds, status))

    def _where(self, batch: int, position: int) -> str:
        task = f"task {position + 1}/{self._num_tasks}"
        return task if self._batches == 1 else f"seeds {batch + 1}/{self._batches}, {task}"

    def _news(self, position: int, rounds: int, status: Status) -> str:
        steps = (position * self._rounds_per_task + rounds) * self._round_steps
        parts = [f"{short(steps)} env steps", f"{short(status.updates)} updates", self._performance]
        if self._speed:
            parts.append(f"{short(self._speed)} steps/s")
        return ", ".join(part for part in parts if part)


def short(number: float | int) -> str:
    """A number in at most four digits and a letter."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            scaled = number / (1e3 if letter == "k" else size)
            return f"{scaled:.{max(0, 2 - int(np.log10(abs(scaled))))}f}{letter}"
    return f"{number:.0f}"

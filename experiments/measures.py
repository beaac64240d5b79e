"""What is measured on a finished sequence of tasks, one number per seed.

Shapes: S seeds, P positions in the order of tasks, K distinct tasks, N evaluations within a task.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from knife_jax import continual
from knife_jax.config import Config
from knife_jax.plan import make_game
from knife_jax.run_result import RunResult

Measure = Literal["won", "return", "optimum_share"]


class Sequence(NamedTuple):
    """Performance over a sequence of tasks.

    Attributes:
        final: at each task's end `[S, P]`.
        area: mean height of each task's learning curve `[S, P]`.
        later: mean of `final` over the tasks after the first `[S]`.
        later_area: mean of `area` over them `[S]`.
        average: performance on all distinct tasks at the sequence's end `[S]`.
        forgetting: how much of each task's final performance is gone by then `[S]`.
        plasticity: final performance on the task that comes back over that of its first time `[S]`, NaN where that was 0 or less.
    """

    final: Float[np.ndarray, "S P"]
    area: Float[np.ndarray, "S P"]
    later: Float[np.ndarray, "S"]
    later_area: Float[np.ndarray, "S"]
    average: Float[np.ndarray, "S"]
    forgetting: Float[np.ndarray, "S"]
    plasticity: Float[np.ndarray, "S"]


def curves(metrics: Mapping[str, np.ndarray], positions: int, name: str) -> Float[np.ndarray, "S P N"]:
    """A metric by seed, position and evaluation."""
    values = metrics[name]
    return values.reshape(len(values), positions, -1).astype(np.float64)


def later_performance(metrics: Mapping[str, np.ndarray], config: Config, measure: Measure) -> Float[np.ndarray, "S"]:
    """The mean height of the learning curves of all tasks after the first, which sees both how much is learned and how fast."""
    area = continual.area_under_curve(curves(metrics, len(make_game(config)[1].order), f"eval/{measure}"))
    return area[:, min(1, area.shape[1] - 1) :].mean(axis=1)


def sequence(run: RunResult, measure: Measure) -> Sequence:
    """All measures of a run."""
    heights = curves(run.metrics, len(run.task_order), f"eval/{measure}")
    everywhere = run.metrics[f"all_tasks/{measure}"].astype(np.float64)
    final, area = continual.final_performance(heights), continual.area_under_curve(heights)
    first = min(1, final.shape[1] - 1)
    over = continual.sequence_measures(heights, everywhere, run.task_order)
    return Sequence(
        final, area, final[:, first:].mean(axis=1), area[:, first:].mean(axis=1), over.average, over.forgetting, over.plasticity
    )


def forward_transfer(area: Float[np.ndarray, "S P"], fresh: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S"]:
    """How much higher the curves of tasks after the first are than those of a fresh network on the same tasks, relative to them.

    Args:
        area: mean heights.
        fresh: those of networks drawn anew for every task, of the same seeds.

    Returns:
        `mean (area - fresh) / fresh`, with at least 0.01 below the line; negative where what came before hinders.

    References:
        The form of MEAL's continual protocol, with fresh networks on the same sequence in the place of tasks trained alone.
    """
    return ((area - fresh) / np.maximum(fresh, 0.01))[:, 1:].mean(axis=1)


def area_under_roc(score: Float[np.ndarray, "C"], failed: Bool[np.ndarray, "C"]) -> float:
    """The chance that a case that failed had a higher score than one that did not, ties counting half; NaN if all or none failed."""
    if failed.all() or not failed.any():
        return float("nan")
    ranks = stats.rankdata(score)
    bad, good = int(failed.sum()), int((~failed).sum())
    return float((ranks[failed].sum() - bad * (bad + 1) / 2) / (bad * good))

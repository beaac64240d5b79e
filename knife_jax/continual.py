"""Measures of learning over a sequence of tasks.

Shapes: S seeds, P tasks in the order met, K distinct tasks, N evaluations within a task, the one before its first step included.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Curves = Float[np.ndarray, "S P N"]
TaskMatrix = Float[np.ndarray, "S P K"]


class SequenceMeasures(NamedTuple):
    """One number per seed for a whole sequence, `[S]`; NaN where it is not defined.

    Attributes:
        average: performance on all distinct tasks at the end of the sequence.
        forgetting: how much worse the end of the sequence is than the end of each task's own last training, over the tasks that were
            followed by another.
        plasticity: the final performance on a task met again over the one it had the first time, 1 where nothing was lost. NaN if no task
            comes back, or if the first time already ended at or below zero.
    """

    average: Float[np.ndarray, "S"]
    forgetting: Float[np.ndarray, "S"]
    plasticity: Float[np.ndarray, "S"]


def final_performance(curves: Curves) -> Float[np.ndarray, "S P"]:
    """The last evaluation within each task."""
    return curves[..., -1]


def area_under_curve(curves: Curves) -> Float[np.ndarray, "S P"]:
    """The mean height of each task's curve, by the trapezoidal rule over evenly spaced evaluations."""
    return np.trapezoid(curves, axis=-1) / (curves.shape[-1] - 1)


def returns_to(order: tuple[int, ...]) -> tuple[int, int] | None:
    """The first and the last position of the first task of the order that comes back; None if none does."""
    for position, task in enumerate(order):
        last = len(order) - 1 - order[::-1].index(task)
        if last > position:
            return position, last
    return None


def sequence_measures(curves: Curves, everywhere: TaskMatrix, order: tuple[int, ...]) -> SequenceMeasures:
    """Average performance, forgetting and plasticity of each seed.

    Args:
        curves: performance on the current task.
        everywhere: performance on every distinct task at every task's end.
        order: the distinct task met at each position.
    """
    final, end = final_performance(curves), everywhere[:, -1]
    last_met = {task: position for position, task in enumerate(order)}
    left_behind = [(task, position) for task, position in last_met.items() if position < len(order) - 1]
    drops = [final[:, position] - end[:, task] for task, position in left_behind]
    nothing = np.full(len(final), np.nan)
    forgetting = np.mean(drops, axis=0) if drops else nothing
    again = returns_to(order)
    plasticity = nothing
    if again is not None:
        first, last = final[:, again[0]], final[:, again[1]]
        plasticity = np.divide(last, first, out=np.full(len(final), np.nan), where=first > 0)
    return SequenceMeasures(end.mean(axis=-1), forgetting, plasticity)

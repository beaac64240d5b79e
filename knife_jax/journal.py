"""The metrics of a run as the host gathers them, evaluation by evaluation.

Shapes: S seeds, P positions in the order of tasks, N evaluations, K distinct tasks.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Arrays = dict[str, np.ndarray]

EVERYWHERE = "all_tasks/"


class Journal:
    """What was measured so far on a batch of seeds.

    Args:
        kept: the first so many seeds count.
        metrics: those of an earlier journal that this one continues.

    Attributes:
        rows: `{name: [S]}` of every evaluation.
        everywhere: `{name: [S, K]}` of every task's end, named `all_tasks/*`.
    """

    def __init__(self, kept: int, metrics: Mapping[str, np.ndarray] | None = None) -> None:
        metrics = metrics or {}
        self._kept = kept
        self.rows = _unstacked({name: values for name, values in metrics.items() if not name.startswith(EVERYWHERE)})
        self.everywhere = _unstacked({name: values for name, values in metrics.items() if name.startswith(EVERYWHERE)})

    def write(self, rows: Mapping[str, np.ndarray], count: int) -> Sequence[Arrays]:
        """Takes the first `count` of the evaluations `{name: [S, R]}`; returns them one by one."""
        new = _unstacked({name: values[: self._kept, :count] for name, values in rows.items()})
        self.rows += new
        return new

    def write_end(self, row: Mapping[str, np.ndarray], everywhere: Mapping[str, np.ndarray]) -> Sequence[Arrays]:
        """Takes the evaluations of a task's end; returns the one on the task itself."""
        self.everywhere.append({name.replace("eval/", EVERYWHERE): values[: self._kept] for name, values in everywhere.items()})
        return self.write({name: values[:, None] for name, values in row.items()}, 1)

    @property
    def metrics(self) -> Arrays:
        """Everything so far, `[S, N]`, and `[S, P, K]` for `all_tasks/*`, as `make_train` returns it."""
        return _stacked(self.rows) | _stacked(self.everywhere)


def _stacked(rows: Sequence[Arrays]) -> Arrays:
    return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]} if rows else {}


def _unstacked(metrics: Mapping[str, np.ndarray]) -> list[Arrays]:
    count = next(iter(metrics.values())).shape[1] if metrics else 0
    return [{name: values[:, index] for name, values in metrics.items()} for index in range(count)]

"""The log of a run: one JSON line and one array record per evaluation, appended as they are made.

`log.jsonl` is for people and quick plots: means over seeds with intervals. `log.npy` keeps every seed: one record after the other, each
an array `[S]` with a field per metric. Both are cut back to what they held at the checkpoint when a run is resumed, so that no line is
lost or doubled.

Shapes: S seeds.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knife_jax.journal import Arrays
from knife_jax.statistics import Estimate, normal_estimates

LINES, ARRAYS = "log.jsonl", "log.npy"
COUNTERS = ("position", "task", "rounds", "updates")
"""What is the same for every seed of a row."""


class Evaluation(NamedTuple):
    """One evaluation of seeds that have everything else in common.

    Attributes:
        batch: the batch of seeds.
        group: what sets them apart from other seeds of the run, such as a swept number; empty if nothing does.
        env_steps: slots collected before it, per seed.
        task_name: the task it was made on.
        seconds: since the run began.
        row: `{name: [S]}`.
    """

    batch: int
    group: str
    env_steps: int
    task_name: str
    seconds: float
    row: Arrays

    @property
    def counters(self) -> dict[str, int]:
        """Position, task, rounds and updates."""
        return {name: int(self.row[name][0]) for name in COUNTERS}

    @property
    def estimates(self) -> dict[str, Estimate]:
        """The mean over seeds of every other metric, with its interval."""
        names = [name for name in self.row if name not in COUNTERS]
        return dict(zip(names, normal_estimates(np.stack([self.row[name] for name in names])), strict=True))


class LogFiles:
    """Appends to both files of a run.

    Args:
        directory: of the run.

    Raises:
        OSError: if they cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = (directory / LINES, directory / ARRAYS)
        self._files = tuple(path.open("ab") for path in self._paths)

    @property
    def sizes(self) -> list[int]:
        """Bytes in each file."""
        return [file.tell() for file in self._files]

    def cut(self, sizes: Sequence[int]) -> None:
        """Forgets what was written after the files had these sizes.

        Raises:
            ValueError: if a file is shorter than that.
        """
        for file, path, size in zip(self._files, self._paths, sizes, strict=True):
            found = file.seek(0, os.SEEK_END)
            if found < size:
                raise ValueError(f"{path} is damaged: it has {found} bytes, and had {size} when the checkpoint was written")
            file.truncate(size)
            file.seek(size)

    def write(self, evaluations: Sequence[Evaluation]) -> None:
        """Appends evaluations, and hands them to the operating system."""
        lines, arrays = self._files
        for evaluation in evaluations:
            lines.write((json.dumps(_line(evaluation)) + "\n").encode())
            np.save(arrays, _record(evaluation), allow_pickle=False)
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Closes both files; what could not be written, of which `write` has told, is given up."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()


def read_lines(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl`; a last one that is still being written is left out."""
    text = (Path(directory) / LINES).read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_arrays(directory: str | Path) -> Iterator[np.ndarray]:
    """The records of `log.npy`, each `[S]` with a field per metric; a last one that is still being written is left out."""
    with (Path(directory) / ARRAYS).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            try:
                yield np.load(file, allow_pickle=False)
            except (ValueError, EOFError):
                return


def as_numbers(estimate: Estimate) -> list[float | None]:
    """An estimate for JSON, which knows no NaN."""
    return [None if np.isnan(number) else float(number) for number in estimate]


def _line(evaluation: Evaluation) -> Mapping[str, Any]:
    return {
        "batch": evaluation.batch,
        "group": evaluation.group,
        **evaluation.counters,
        "task_name": evaluation.task_name,
        "env_steps": evaluation.env_steps,
        "seconds": round(evaluation.seconds, 3),
        "metrics": {name: as_numbers(estimate) for name, estimate in evaluation.estimates.items()},
    }


def _record(evaluation: Evaluation) -> np.ndarray:
    columns = {"batch": np.full(len(evaluation.row["rounds"]), evaluation.batch, np.int32), **evaluation.row}
    record = np.empty(len(columns["batch"]), [(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        record[name] = values
    return record

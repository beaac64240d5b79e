"""The smallest piece of an experiment that is kept: one method under one setting, for one batch of seeds, in one file.

A file is written whole or not at all, carries all that it takes to know what it is, and is never trained twice: an experiment that was
stopped goes on with the first one that is missing.

Shapes: S seeds, N evaluations, P positions in the order of tasks, K distinct tasks.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knife_jax.config import Config
from knife_jax.plan import make_game
from knife_jax.run_result import RunResult
from knife_jax.runner import run

KEPT = (
    *(f"{kind}/{measure}" for kind in ("eval", "all_tasks") for measure in ("won", "return", "optimum_share")),
    *("train/loss", "train/q_tot", "env_steps", "updates"),
)
"""Metrics that are kept whole, beside the diagnoses of whole networks; the networks themselves are not kept."""
_NETWORKS = ("agent", "mixer")
_PRECISE_BITS = 10
"""Of the mantissa of diagnoses, which makes files a third of the size; relative error at most 0.001."""


class Cell(NamedTuple):
    """What is trained in one piece.

    Attributes:
        setting: which variant of the experiment, for instance a scale of rewards.
        mixer: the learner.
        method: the label of the cure.
        config: all of it.
        first_seed: the first seed.
        seeds: S.
    """

    setting: str
    mixer: str
    method: str
    config: Config
    first_seed: int
    seeds: int

    @property
    def file(self) -> Path:
        """Where it is kept, below the directory of the experiment."""
        last = self.first_seed + self.seeds - 1
        return Path(self.setting) / self.mixer / self.method / f"seeds-{self.first_seed:04d}-{last:04d}.npz"


class DamagedError(ValueError):
    """A file that is not what its name says."""


Work = Callable[[Cell, Path], None]
"""What makes a cell's file."""


def train(cell: Cell, root: Path, work: Work | None = None) -> bool:
    """Trains a cell and writes its file; does nothing where the file is there already.

    Args:
        cell: the cell.
        root: the experiment's directory.
        work: what there is to do, if not a run; it writes the file that it is given.

    Returns:
        Whether there was something to do.

    Raises:
        DamagedError: if the file is damaged, or that of another configuration.
    """
    path = root / cell.file
    if path.exists():
        _check_same(cell, path)
        return False
    (work or _run)(cell, path)
    return True


def _run(cell: Cell, path: Path) -> None:
    save(cell, run(cell.config, seeds=cell.seeds, first_seed=cell.first_seed), path)


def save(cell: Cell, result: RunResult, path: Path) -> None:
    """Writes the kept metrics, the cure's report, the configuration and where it came from; all or nothing."""
    arrays = {f"metrics/{name}": values for name, values in _kept(result).items()}
    arrays |= {f"report/{name}": np.asarray(values) for name, values in result.report.items()}
    write(cell, arrays, result.provenance, path)


def write(cell: Cell, arrays: Mapping[str, np.ndarray], provenance: Mapping[str, Any], path: Path) -> None:
    """Writes a cell's arrays, with what it takes to know what they are; all or nothing."""
    about = {
        "setting": cell.setting,
        "mixer": cell.mixer,
        "method": cell.method,
        "config": cell.config.to_dict(),
        "provenance": provenance,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".npz", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)  # pyright: ignore[reportArgumentType]
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(paths: Sequence[Path]) -> RunResult:
    """The seeds of several files of the same method as one run, in the order of the files.

    Raises:
        DamagedError: if one is missing or damaged, or they are of different configurations.
    """
    parts = [read(path) for path in paths]
    first = parts[0][0]
    for path, (about, _) in zip(paths, parts, strict=True):
        if about["config"] != first["config"]:
            raise DamagedError(f"{path}: has another configuration than {paths[0]}")
    config = Config.from_dict(first["config"])
    tasks = make_game(config)[1]
    joined: dict[str, dict[str, np.ndarray]] = {"metrics": {}, "report": {}}
    for name in parts[0][1]:
        kind, _, rest = name.partition("/")
        values = [arrays[name] for _, arrays in parts]
        joined[kind][rest] = values[0] if rest == "env_steps" else np.concatenate(values)
    provenance = {**first["provenance"], "seeds": sum(about["provenance"]["seeds"] for about, _ in parts)}
    return RunResult(config, joined["metrics"], tasks.names, tasks.order, {}, joined["report"], provenance)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file says it is, and its arrays.

    Raises:
        DamagedError: if it is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file) as found:
            arrays = {name: found[name] for name in found.files if name != "about"}
            return json.loads(str(found["about"])), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedError(f"{path}: not a whole result ({' '.join(str(error).split())}); delete it to train it again") from None


def _check_same(cell: Cell, path: Path) -> None:
    about, _ = read(path)
    known = Config.from_dict(about["config"]).to_dict()
    if known != cell.config.to_dict():
        fields = _differing(known, cell.config.to_dict())
        raise DamagedError(f"{path}: was trained with another configuration ({fields}); choose another --out, or delete it")


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{section}.{field}: {there[section].get(field)!r} there, {value!r} now"
        for section, fields in here.items()
        for field, value in fields.items()
        if there[section].get(field) != value
    )


def _kept(result: RunResult) -> dict[str, np.ndarray]:
    """The kept metrics; diagnoses of single layers are kept at the tasks' ends, `[S, P]`, under `at_end/...`."""
    positions, found = len(result.task_order), {}
    for name, values in result.metrics.items():
        if name in KEPT:
            found[name] = values
        elif name.startswith("plasticity/") and name.split("/")[1] in _NETWORKS and name.count("/") == 2:
            found[name] = _shortened(values)
        elif name.startswith("plasticity/"):
            found[f"at_end/{name}"] = _shortened(values.reshape(len(values), positions, -1)[..., -1])
    return found


def _shortened(values: np.ndarray) -> np.ndarray:
    """With fewer bits of the mantissa."""
    mantissa, exponent = np.frexp(values.astype(np.float32))
    return np.ldexp(np.round(mantissa * 2**_PRECISE_BITS) / 2**_PRECISE_BITS, exponent).astype(np.float32)

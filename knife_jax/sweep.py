"""Numbers swept beside the seeds inside one compiled program.

Shapes: L lanes, one for every combination and seed: seed `s` of combination `c` is lane `c * seeds + s`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from envs.base import unknown_name
from knife_jax.config import Config

Sweep = Mapping[str, Sequence[float | int]]
"""`{"section.field": values}`; with several fields, every combination is run."""


class Combination(NamedTuple):
    """One choice of values.

    Attributes:
        label: its name in files, such as `optimizer.learning_rate=0.0005`; empty without a sweep.
        config: the configuration with these values.
        values: `{section: {field: value}}`.
    """

    label: str
    config: Config
    values: dict[str, dict[str, float]]


def combinations(config: Config, sweep: Sweep) -> list[Combination]:
    """Every combination of the values of a sweep; the configuration itself if nothing is swept.

    Raises:
        ValueError: for a field that does not exist or cannot be swept, no values, the same value twice, or one that the field refuses.
    """
    for name, values in sweep.items():
        _check(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"sweep: {name} needs values that differ from each other, got {list(values)}")
    chosen = []
    for values in itertools.product(*sweep.values()):
        nested: dict[str, dict[str, float]] = {}
        for name, value in zip(sweep, values, strict=True):
            section, field = name.split(".", 1)
            nested.setdefault(section, {})[field] = float(value)
        label = ",".join(f"{name}={float(value):g}" for name, value in zip(sweep, values, strict=True))
        chosen.append(Combination(label, Config.from_dict(nested, config), nested))
    return chosen


def parse_sweep(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Reads `section.field=value,value` as flags have it.

    Raises:
        ValueError: for anything else, or a field given twice.
    """
    sweep: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            numbers = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise ValueError(
                f"--sweep: expected section.field=value,value, as in optimizer.learning_rate=1e-4,5e-4; got {text!r}"
            ) from None
        if name in sweep:
            raise ValueError(f"--sweep: {name} is given twice")
        sweep[name] = numbers
    return sweep


def lanes(chosen: Sequence[Combination], seeds: int, which: np.ndarray) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """The seed `[L]` of some lanes, and their swept values, each `[L]`."""
    swept: dict[str, dict[str, Any]] = {}
    for section, fields in chosen[0].values.items():
        swept[section] = {
            field: np.array([combination.values[section][field] for combination in chosen], np.float32)[which // seeds] for field in fields
        }
    return which % seeds, swept


def groups(chosen: Sequence[Combination], seeds: int, first: int, count: int) -> list[tuple[str, slice]]:
    """The combinations met in the lanes from `first` on, with the slice of these lanes that each has."""
    found = []
    for index, combination in enumerate(chosen):
        start, stop = max(index * seeds, first) - first, min((index + 1) * seeds, first + count) - first
        if start < stop:
            found.append((combination.label, slice(start, stop)))
    return found


def _check(config: Config, name: str) -> None:
    known = [f"{section}.{field}" for section, fields in config.hyper.items() for field in fields]
    if name in known:
        return
    section, _, field = name.partition(".")
    if field in config.to_dict().get(section, {}):
        raise ValueError(
            f"sweep: {name} cannot be swept inside one program: its shapes, its schedules or its branches depend on it, and they are the "
            f"same for all seeds side by side; run it once for every value. What can be swept: {', '.join(known)}"
        )
    raise unknown_name("sweepable field", name, known)

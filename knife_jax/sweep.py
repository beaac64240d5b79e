"""What a run is repeated for: numbers beside the seeds inside one compiled program, and settings that take a program for each value.

Shapes: L lanes, one for every combination and seed: seed `s` of combination `c` is lane `c * seeds + s`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from envs.base import unknown_name
from knife_jax.config import Config

Value = float | int | str | bool
Sweep = Mapping[str, Sequence[Value]]
"""`{"section.field": values}`; with several fields, every combination is run."""


class Part(NamedTuple):
    """The share of a sweep that one program can run.

    Attributes:
        label: its name in files, such as `agent.hidden_size=32`; empty if the whole sweep is one program's.
        config: the configuration with these settings.
        sweep: the numbers swept inside the program.
    """

    label: str
    config: Config
    sweep: Sweep

    def labelled(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """What is named by `Combination.label`, named by both labels."""
        return {",".join(label for label in (self.label, inner) if label): result for inner, result in results.items()}


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


def parts(config: Config, sweep: Sweep) -> list[Part]:
    """Splits a sweep into programs: one for every combination of what shapes, schedules or branches depend on.

    Raises:
        ValueError: for a field that does not exist, no values, the same value twice, or one that the field refuses.
    """
    _check_values(sweep)
    inside = {name: values for name, values in sweep.items() if name in _sweepable(config)}
    apart = {name: values for name, values in sweep.items() if name not in inside}
    found = []
    for values in itertools.product(*apart.values()):
        nested: dict[str, dict[str, Value]] = {}
        for name, value in zip(apart, values, strict=True):
            section, _, field = name.partition(".")
            nested.setdefault(section, {})[field] = value
        label = ",".join(f"{name}={value}".replace("/", "-") for name, value in zip(apart, values, strict=True))
        part = Part(label, Config.from_dict(nested, config), inside)
        combinations(part.config, inside)
        found.append(part)
    return found


def combinations(config: Config, sweep: Sweep) -> list[Combination]:
    """Every combination of the values of a sweep inside one program; the configuration itself if nothing is swept.

    Raises:
        ValueError: for a field that does not exist or cannot be swept, no values, the same value twice, or one that the field refuses.
    """
    _check_values(sweep)
    for name, values in sweep.items():
        _check(config, name)
        if not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"sweep: {name} takes numbers, got {list(values)}")
    chosen = []
    for values in itertools.product(*sweep.values()):
        nested: dict[str, dict[str, float]] = {}
        for name, value in zip(sweep, values, strict=True):
            section, field = name.split(".", 1)
            nested.setdefault(section, {})[field] = float(value)
        label = ",".join(f"{name}={float(value):g}" for name, value in zip(sweep, values, strict=True))
        chosen.append(Combination(label, Config.from_dict(nested, config), nested))
    return chosen


def _check_values(sweep: Sweep) -> None:
    for name, values in sweep.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"sweep: {name} needs values that differ from each other, got {list(values)}")


def parse_sweep(texts: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """Reads `section.field=value,value` as flags have it: numbers, `true`, `false` or names.

    Raises:
        ValueError: for anything else, or a field given twice.
    """
    sweep: dict[str, tuple[Value, ...]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        values = listed.split(",")
        if not all((name, *values)):
            raise ValueError(f"--sweep: expected section.field=value,value, as in optimizer.learning_rate=1e-4,5e-4; got {text!r}")
        if name in sweep:
            raise ValueError(f"--sweep: {name} is given twice")
        sweep[name] = tuple(map(_parse_value, values))
    return sweep


def _parse_value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)


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


def _sweepable(config: Config) -> list[str]:
    return [f"{section}.{field}" for section, fields in config.hyper.items() for field in fields]


def _check(config: Config, name: str) -> None:
    known = _sweepable(config)
    if name in known:
        return
    section, _, field = name.partition(".")
    if field in config.to_dict().get(section, {}):
        raise ValueError(
            f"sweep: {name} cannot be swept inside one program: its shapes, its schedules or its branches depend on it, and they are the "
            f"same for all seeds side by side; it takes a program for every value. What can be swept: {', '.join(known)}"
        )
    raise unknown_name("sweepable field", name, known)

"""Choosing the options of every method with the same small budget, on seeds that no result is shown of.

Shapes: S seeds.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.measures import later_performance
from experiments.protocol import Protocol, configuration
from knife_jax.config import Config
from knife_jax.plasticity.registry import options_of
from knife_jax.runner import run, run_sweep

FILE = "tuning.json"


def tune(protocol: Protocol, scale: str, root: Path, say: Callable[[str], None] = print) -> dict[str, dict[str, Any]]:
    """Tries every candidate of every method that the scale trains, and remembers what it found in `tuning.json`.

    What is chosen is the candidate with the highest mean performance on the tasks after the first (`measures.later_performance`), the
    earlier one of equals; methods with one candidate are not tried. A method that the file has, with the same candidates, is not tried
    again.

    Returns:
        The section `plasticity` chosen for each method.
    """
    path, methods = root / FILE, _methods(protocol, scale)
    known = _read(path)
    setting, mixer = next(iter(protocol.settings)), next(iter(protocol.mixers))
    for method in methods:
        candidates = protocol.methods[method]
        if len(candidates) == 1 or known.get(method, {}).get("candidates") == candidates:
            continue
        configs = [configuration(protocol, protocol.tuning, setting, mixer, candidate) for candidate in candidates]
        scores = [float(np.mean(later_performance(metrics, config, protocol.measure))) for metrics, config in _tried(protocol, configs)]
        known[method] = {"candidates": candidates, "scores": scores, "chosen": int(np.argmax(scores))}
        about = {"setting": setting, "mixer": mixer, "seeds": protocol.tuning.seeds, "first_seed": protocol.tuning.first_seed}
        _write(path, {**about, "measure": protocol.measure, "methods": known})
        say(f"tuned {method}: {_described(candidates, scores)}")
    return chosen(protocol, scale, root)


def chosen(protocol: Protocol, scale: str, root: Path) -> dict[str, dict[str, Any]]:
    """The section `plasticity` of each method as far as they are chosen; of the others, the first candidate."""
    known, found = _read(root / FILE), {}
    for method in _methods(protocol, scale):
        candidates = protocol.methods[method]
        entry = known.get(method, {})
        found[method] = candidates[entry["chosen"] if entry.get("candidates") == candidates else 0]
    return found


def _methods(protocol: Protocol, scale: str) -> list[str]:
    return protocol.scales[scale].methods or list(protocol.methods)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["methods"] if path.exists() else {}


def _tried(protocol: Protocol, configs: Sequence[Config]) -> list[tuple[Mapping[str, np.ndarray], Config]]:
    """The metrics of every candidate; those that differ in one number that is data are trained side by side in one program."""
    seeds = {"seeds": protocol.tuning.seeds, "first_seed": protocol.tuning.first_seed}
    field = _swept_field(configs)
    if field is None:
        return [(run(config, **seeds).metrics, config) for config in configs]
    values = [config.hyper["plasticity"][field] for config in configs]
    found = run_sweep(configs[0], {f"plasticity.{field}": values}, **seeds)
    return [(result.metrics, config) for result, config in zip(found.values(), configs, strict=True)]


def _swept_field(configs: Sequence[Config]) -> str | None:
    """The one number in which some configurations differ, if that is all and it may be traced."""
    numbers = [config.hyper.get("plasticity", {}) for config in configs]
    differing = [name for name in numbers[0] if len({values.get(name) for values in numbers}) > 1]
    if len(differing) != 1 or None in {values.get(differing[0]) for values in numbers}:
        return None
    name = configs[0].plasticity.name
    (option,) = differing
    if any(config.plasticity.name != name for config in configs) or "+" in name or not options_of(name)[option].swept:
        return None
    without = [{key: value for key, value in config.plasticity.options.items() if key != option} for config in configs]
    same = all(rest == without[0] and config.plasticity.when == configs[0].plasticity.when for rest, config in zip(without, configs, strict=True))
    same &= len({config.plasticity.interval_updates for config in configs}) == 1
    return option if same else None


def _described(candidates: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> str:
    return ", ".join(f"{candidate} {score:.3f}" for candidate, score in zip(candidates, scores, strict=True))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)

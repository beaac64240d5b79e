"""Choosing the options of every method with the same small budget, on seeds that no result is shown of.

Shapes: S seeds.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.measures import later_performance
from experiments.protocol import Protocol, configuration
from knife_jax.config import Config
from knife_jax.runner import run, run_sweep

FILE = "tuning.json"
Group = list[tuple[Config, dict[str, Any]]]
"""Candidates, each with its configuration."""


def tune(protocol: Protocol, scale: str, root: Path, methods: Iterable[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Tries every candidate of some methods, and remembers the scores in `tuning.json`.

    A score is the mean performance on the tasks after the first (`measures.later_performance`). Methods with one candidate are not tried,
    and nothing is tried twice. Several processes may work in one directory, each on methods of its own.

    Args:
        protocol: the experiment.
        scale: whose methods, if `methods` is None.
        root: the directory of the results.
        methods: which.
        say: told every score.
    """
    path = root / FILE
    setting, mixer = next(iter(protocol.settings)), next(iter(protocol.mixers))
    about = {"setting": setting, "mixer": mixer, "seeds": protocol.tuning.seeds, "first_seed": protocol.tuning.first_seed}
    for method in _methods(protocol, scale) if methods is None else methods:
        candidates, known = protocol.methods[method], _read(path)
        missing = [candidate for candidate in candidates if _score(known, method, candidate) is None]
        if len(candidates) == 1 or not missing:
            continue
        for group in _side_by_side([(configuration(protocol, protocol.tuning, setting, mixer, one), one) for one in missing]):
            found = []
            for candidate, metrics, config in _tried(protocol, group):
                found.append({"options": candidate, "score": float(np.mean(later_performance(metrics, config, protocol.measure)))})
                say(f"tuning {method}: {candidate} {found[-1]['score']:.3f}")
            known = _read(path)
            known[method] = known.get(method, []) + found
            _write(path, {**about, "measure": protocol.measure, "tried": known})


def chosen(protocol: Protocol, scale: str, root: Path) -> dict[str, dict[str, Any]]:
    """The section `plasticity` of each method.

    That is the candidate with the highest score, the earlier one of equals, or the first where none was tried.
    """
    known = _read(root / FILE)
    found = {}
    for method in _methods(protocol, scale):
        scores = [_score(known, method, candidate) for candidate in protocol.methods[method]]
        found[method] = protocol.methods[method][int(np.argmax([-np.inf if score is None else score for score in scores]))]
    return found


def _methods(protocol: Protocol, scale: str) -> list[str]:
    return protocol.scales[scale].methods or list(protocol.methods)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["tried"] if path.exists() else {}


def _score(known: Mapping[str, Any], method: str, candidate: Mapping[str, Any]) -> float | None:
    return next((entry["score"] for entry in known.get(method, ()) if entry["options"] == candidate), None)


def _tried(protocol: Protocol, group: Group) -> list[tuple[dict[str, Any], Mapping[str, np.ndarray], Config]]:
    """The metrics of candidates that differ in one number, trained side by side in one program."""
    count, first = protocol.tuning.seeds, protocol.tuning.first_seed
    if len(group) == 1:
        ((config, candidate),) = group
        return [(candidate, run(config, seeds=count, first_seed=first).metrics, config)]
    field = _differing([config for config, _ in group])
    swept = {f"plasticity.{field}": [_numbers(config)[str(field)] for config, _ in group]}
    found = run_sweep(group[0][0], swept, seeds=count, first_seed=first)
    return [(candidate, result.metrics, config) for result, (config, candidate) in zip(found.values(), group, strict=True)]


def _side_by_side(tried: Group) -> list[Group]:
    """Parts of candidates that one program can train: alike but for one number that may be traced."""
    groups: list[Group] = []
    for pair in tried:
        for group in groups:
            if _differing([config for config, _ in [*group, pair]]) is not None:
                group.append(pair)
                break
        else:
            groups.append([pair])
    return groups


def _numbers(config: Config) -> dict[str, Any]:
    return config.hyper.get("plasticity", {})


def _differing(configs: Sequence[Config]) -> str | None:
    """The one number in which all of these differ; None if they do not, or differ in anything else."""
    names = [name for name in _numbers(configs[0]) if len({_numbers(config).get(name) for config in configs}) == len(configs)]
    rest = [
        replace(config.plasticity, options={key: value for key, value in config.plasticity.options.items() if key not in names})
        for config in configs
    ]
    alike = all(section == rest[0] for section in rest)
    return names[0] if len(names) == 1 and alike and all(names[0] in _numbers(config) for config in configs) else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)

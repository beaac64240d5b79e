"""Several cures side by side on the same seeds, tasks and budgets.

Shapes: M methods, S seeds, P tasks in the order met, T thresholds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from knife_jax import continual, results
from knife_jax.config import Config, parse_yaml
from knife_jax.results import FEWEST_SEEDS, curves_of
from knife_jax.run_result import RunResult
from knife_jax.statistics import (
    Estimate,
    Profile,
    continuous_estimate,
    mean_estimate,
    performance_profile,
    probability_of_improvement,
)

_THRESHOLDS = 201
"""Points of a performance profile."""


class Comparison(NamedTuple):
    """Final performance of several methods.

    Attributes:
        measure: `success` or `return`.
        final: `{method: one estimate per position}`.
        against: `{method: estimate of the paired difference to the first method, averaged over the tasks after the first}`.
        improvement: `{method: the chance that a seed of it does better there than one of the first method}`.
        thresholds: scores `[T]`, from 0 to 1 of success, or over the range of returns.
        profiles: `{method: the share of seeds whose mean over the later tasks is above each threshold}`.
        sentences: the differences in words.
        seeds: S.
    """

    measure: str
    final: dict[str, tuple[Estimate, ...]]
    against: dict[str, Estimate]
    improvement: dict[str, Estimate]
    thresholds: np.ndarray
    profiles: dict[str, Profile]
    sentences: tuple[str, ...]
    seeds: int


def method_configs(base: Config, methods: Sequence[str]) -> dict[str, Config]:
    """One configuration per method, by label.

    Args:
        base: what they share.
        methods: names, or YAML mappings with a name and options, such as `{name: reset, which: all}`.

    Raises:
        ValueError: for an unknown method or option, or the same label twice.
    """
    configs: dict[str, Config] = {}
    for text in methods:
        section = parse_yaml(text)
        if not isinstance(section, Mapping):
            section = {"name": text}
        label = str(section.get("name"))
        if label in configs:
            label = text
        if label in configs:
            raise ValueError(f"--methods: {text} is given twice")
        configs[label] = Config.from_dict({"plasticity": section}, base)
    return configs


def load_runs(paths: Sequence[Path]) -> dict[str, RunResult]:
    """Finished runs by the names of their directories, which are compared with the first.

    Raises:
        ValueError: for less than two, one without results, or one that has other tasks, evaluations or seeds than the first.
    """
    if len(set(paths)) < max(2, len(paths)):
        raise ValueError(f"comparing takes two runs or more, each once; got {', '.join(map(str, paths))}")
    names = [path.resolve().name for path in paths]
    runs = {name if names.count(name) == 1 else str(path): results.load(path) for name, path in zip(names, paths, strict=True)}
    (first, reference), *others = runs.items()
    for name, run in others:
        for what in ("tasks", "evaluations", "seeds"):
            there, here = _common(reference)[what], _common(run)[what]
            if there != here:
                raise ValueError(f"{name} has other {what} than {first}: {here} there, {there} in the first")
    return runs


def _common(run: RunResult) -> dict[str, Any]:
    """What runs must share to be compared seed by seed."""
    first, count = run.provenance["first_seed"], len(run.metrics["eval/return"])
    tasks = [run.task_names[task] for task in run.task_order]
    return {"tasks": tasks, "evaluations": run.metrics["eval/return"].shape[1], "seeds": f"{first} to {first + count - 1}"}


def compare(runs: Mapping[str, RunResult], reports_wins: bool = True) -> Comparison:
    """Compares runs that share seeds and tasks.

    Args:
        runs: by method; the first is what the others are compared with.
        reports_wins: whether the game's `won` means anything; returns are compared if not.
    """
    name = "eval/won" if reports_wins else "eval/return"
    final = {method: continual.final_performance(curves_of(run, name)) for method, run in runs.items()}
    reference, *others = final
    later = {method: values[:, min(1, values.shape[1] - 1) :].mean(axis=1) for method, values in final.items()}
    against = {method: continuous_estimate(later[method] - later[reference]) for method in others}
    seeds = len(final[reference])
    improvement = {method: probability_of_improvement(later[method], later[reference]) for method in others}
    sentences = tuple(_sentence(method, reference, difference, seeds) for method, difference in against.items())
    estimates = {method: tuple(mean_estimate(column) for column in values.T) for method, values in final.items()}
    thresholds = _thresholds(np.concatenate(list(later.values())), reports_wins)
    profiles = {method: performance_profile(values, thresholds) for method, values in later.items()}
    measure = "success" if reports_wins else "return"
    return Comparison(measure, estimates, against, improvement, thresholds, profiles, sentences, seeds)


def _thresholds(scores: np.ndarray, reports_wins: bool) -> np.ndarray:
    finite = scores[np.isfinite(scores)]
    low, high = (0.0, 1.0) if reports_wins or not finite.size else (finite.min(), finite.max())
    return np.linspace(low, high, _THRESHOLDS)


def _sentence(method: str, reference: str, difference: Estimate, seeds: int) -> str:
    if seeds < FEWEST_SEEDS:
        judgement = f"undecided: fewer than {FEWEST_SEEDS} seeds"
    elif difference.low > 0:
        judgement = "better"
    elif difference.high < 0:
        judgement = "worse"
    else:
        judgement = "undecided: the interval holds 0"
    return f"{method} against {reference}, mean over the later tasks, paired by seed: {_signed(difference)}; {judgement}"


def _signed(difference: Estimate) -> str:
    if np.isnan(difference.low):
        return f"{difference.value:+.2f}"
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def as_table(comparison: Comparison, task_names: Sequence[str]) -> Table:
    """The comparison for a terminal.

    Args:
        comparison: what to show.
        task_names: the name of the task at every position.
    """
    title = f"Final greedy {comparison.measure}: mean over {comparison.seeds} seeds, 95 % intervals"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("task")
    for method in comparison.final:
        table.add_column(method, justify="right")
    for position, task in enumerate(task_names):
        table.add_row(str(position + 1), task, *(str(estimates[position]) for estimates in comparison.final.values()))
    return table

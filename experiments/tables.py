"""What the result files of an experiment say, in numbers: methods against each other, claims of the paper, what foretells failure.

Shapes: S seeds, P positions in the order of tasks, N evaluations within a task, C cases (a seed at a task after the first).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import cells, measures
from experiments.measures import Measure, Sequence
from experiments.protocol import Protocol, shared_part
from knife_jax.results import FEWEST_SEEDS
from knife_jax.run_result import RunResult
from knife_jax.statistics import Estimate, continuous_estimate, mean_estimate, probability_of_improvement

CEILING = "fresh"
"""The method that draws all networks anew at every task: what there was to reach."""
RESETS = ("reset", CEILING)
"""Methods that give up what was learned; the paper's claims are about the others."""
VARIANTS = {"knife_mixing": "KNIFE on the mixing layer", "knife_both": "KNIFE on both", "knife_release": "KNIFE with slow release"}
"""Named variants of KNIFE, as claims speak of them."""
MIXING_CONTROL = "random_mixing"
"""`knife_mixing` on random units."""
CONTROLS = (
    "random_neurons",
    MIXING_CONTROL,
    "knife_without_knowledge",
    "knife_without_active",
    "knife_without_compensation",
    "freeze_and_zero",
    "wide_none",
)
"""Null controls: parts of KNIFE, or its size alone."""
UNSCHEDULED = (
    *("none", "wide_none", "layer_norm", "l2_init", "weight_decay", "spectral"),
    *("continual_backprop", "self_normalized_resets"),
)
"""Cures that act through the network, the loss or every gradient step, and so at no particular moment."""
Verdict = Literal["supported", "contradicted", "undecided"]


class Row(NamedTuple):
    """A method's performance, each with its 95 % interval over seeds.

    Attributes:
        boundaries: whether its schedule knows when tasks change: at every switch, or at intervals that are the length of a task.
        seeds: how many.
        later: final performance, mean over the tasks after the first.
        area: mean height of their learning curves.
        average: performance on all tasks at the end of the sequence.
        forgetting: what is gone of each task's final performance by then.
        transfer: how much higher its curves are than a fresh network's, relative to those, see `measures.forward_transfer`.
        against: paired difference of `later` to `none`.
        improvement: the chance that a seed of it has a higher `later` than one of `none`.

    The last three are None where there is nothing to compare with, or other seeds were trained.
    """

    boundaries: bool
    seeds: int
    later: Estimate
    area: Estimate
    average: Estimate
    forgetting: Estimate
    transfer: Estimate | None
    against: Estimate | None
    improvement: Estimate | None


class Claim(NamedTuple):
    """A sentence, what the files say of it, and by which numbers."""

    sentence: str
    verdict: Verdict
    evidence: tuple[str, ...]


def load_group(root: Path, setting: str, mixer: str, methods: list[str]) -> dict[str, RunResult]:
    """The runs of one setting and learner that are there, by method.

    Raises:
        DamagedError: for a damaged file, or one whose configuration differs from the others' in more than the cure.
    """
    runs: dict[str, RunResult] = {}
    for method in methods:
        files = sorted((root / setting / mixer / method).glob("seeds-*.npz"))
        if files:
            runs[method] = cells.load(files)
    first = next(iter(runs), None)
    for method, run in runs.items():
        if first is not None and shared_part(run.config) != shared_part(runs[first].config):
            raise cells.DamagedError(f"{root / setting / mixer}: {method} was not trained as {first} was, apart from the cure")
    return runs


def knows_boundaries(run: RunResult) -> bool:
    """Whether the cure acts at the moments when tasks change because its schedule says so."""
    cure, updates = run.config.plasticity, run.metrics["updates"]
    if cure.name in UNSCHEDULED:
        return False
    plan = updates.reshape(len(updates), len(run.task_order), -1)
    a_task = int(plan[0, -1, -1] - plan[0, -1, 0])
    every = cure.interval_updates or a_task
    return cure.when == "task_switch" or (cure.when == "interval" and every % a_task == 0)


def rows(runs: Mapping[str, RunResult], measure: Measure) -> dict[str, Row]:
    """One row per method."""
    found = {method: measures.sequence(run, measure) for method, run in runs.items()}
    return {method: _row(runs[method], found, method) for method in runs}


def _row(run: RunResult, found: Mapping[str, Sequence], method: str) -> Row:
    own, none, fresh = found[method], found.get("none"), found.get(CEILING)
    paired = none is not None and method != "none" and len(none.later) == len(own.later)
    transfer = None
    if fresh is not None and len(fresh.later) == len(own.later):
        transfer = continuous_estimate(measures.forward_transfer(own.area, fresh.area))
    return Row(
        boundaries=knows_boundaries(run),
        seeds=len(own.later),
        later=mean_estimate(own.later),
        area=mean_estimate(own.later_area),
        average=mean_estimate(own.average),
        forgetting=continuous_estimate(own.forgetting),
        transfer=transfer,
        against=continuous_estimate(own.later - none.later) if none is not None and paired else None,
        improvement=probability_of_improvement(own.later, none.later) if none is not None and paired else None,
    )


def claims(runs: Mapping[str, RunResult], measure: Measure) -> list[Claim]:
    """What the files of one setting and learner say of the paper's claims; those whose methods are missing are left out."""
    found = {method: measures.sequence(run, measure) for method, run in runs.items()}
    later = {method: sequence.later for method, sequence in found.items()}
    areas = {method: sequence.later_area for method, sequence in found.items()}
    rivals = [method for method in later if method not in (*RESETS, *CONTROLS, "none") and not method.startswith("knife")]
    controls = {"knife": [method for method in CONTROLS if method != MIXING_CONTROL], "knife_mixing": [MIXING_CONTROL]}
    about = [_above("Learning on one network is worse than on fresh ones (plasticity is lost)", later, CEILING, ["none"])]
    for method, label in {"knife": "KNIFE", **VARIANTS}.items():
        others = rivals if method == "knife" else [*rivals, "knife"]
        about += [
            _above(f"{label} is better than no cure", later, method, ["none"]),
            _above(f"{label} is better than every rival that keeps what was learned", later, method, others),
            _above(f"{label} has higher learning curves than every such rival", areas, method, others),
            _above(
                f"{label} needs its parts and its choice of units (better than every null control)", later, method, controls.get(method, [])
            ),
            _above(f"{label} reaches what fresh networks do", later, method, [CEILING], margin=0.05),
        ]
    return [claim for claim in about if claim is not None]


def _above(sentence: str, later: Mapping[str, np.ndarray], better: str, others: list[str], margin: float = 0.0) -> Claim | None:
    """Whether one method is better than all others, by paired intervals: above `-margin`.

    Contradicted if it is worse than one of them beyond the margin.
    """
    present = [other for other in others if other in later and len(later[other]) == len(later.get(better, ()))]
    if better not in later or not present:
        return None
    if len(later[better]) < FEWEST_SEEDS:
        return Claim(sentence, "undecided", (f"fewer than {FEWEST_SEEDS} seeds",))
    differences = {other: continuous_estimate(later[better] - later[other]) for other in present}
    if all(difference.low > -margin for difference in differences.values()):
        verdict: Verdict = "supported"
    elif any(difference.high < -margin for difference in differences.values()):
        verdict = "contradicted"
    else:
        verdict = "undecided"
    return Claim(sentence, verdict, tuple(f"{better} - {other} = {difference}" for other, difference in differences.items()))


def foretelling(run: RunResult, measure: Measure, below: float = 0.5) -> dict[str, Estimate]:
    """How well a number at the end of a task foretells failure on the next one: the area under the ROC curve.

    Args:
        run: without a cure.
        measure: performance; a final one below `below` is a failure.
        below: see there.

    Returns:
        `{score: area}` over the shares of the diagnoses, and `low_activity` (minus the gradient's norm over the weights', of each network),
        `low_activity_for_its_history` (the same as a share of its own highest so far), and for QMIX the mixing layer's saturation and
        openness. The interval is a bootstrap's over seeds; empty if
        all cases failed, or none did.
    """
    positions = len(run.task_order)
    failed = measures.curves(run.metrics, positions, f"eval/{measure}")[:, 1:, -1] < below
    if failed.all() or not failed.any():
        return {}
    return {name: _area(values[:, :-1], failed) for name, values in _scores(run).items()}


def _scores(run: RunResult) -> dict[str, Float[np.ndarray, "S P"]]:
    positions = len(run.task_order)
    heights = {name: measures.curves(run.metrics, positions, name) for name in run.metrics if name.startswith("plasticity/")}
    found: dict[str, np.ndarray] = {}
    for network in ("agent", "mixer"):
        for share in ("stagnant", "dormant", "inactive"):
            if (name := f"plasticity/{network}/{share}") in heights:
                found[f"{network}: {share}"] = heights[name][..., -1]
        norms = [f"plasticity/{network}/{norm}_norm" for norm in ("grad", "weight")]
        if all(name in heights for name in norms):
            activity = heights[norms[0]] / np.maximum(heights[norms[1]], 1e-8)
            so_far = np.fmax.accumulate(activity.reshape(len(activity), -1), axis=1).reshape(activity.shape)
            found[f"{network}: low activity"] = -activity[..., -1]
            found[f"{network}: low activity for its history"] = -(activity / np.maximum(so_far, 1e-12))[..., -1]
    for measure in ("openness", "saturation"):
        if (name := f"at_end/plasticity/mixer/mixing/{measure}") in run.metrics:
            sign = -1.0 if measure == "openness" else 1.0
            found[f"mixing layer: {'low ' if sign < 0 else ''}{measure}"] = sign * run.metrics[name].astype(np.float64)
    return {name: np.nan_to_num(values) for name, values in found.items()}


def _area(score: Float[np.ndarray, "S P-1"], failed: np.ndarray) -> Estimate:
    rng = np.random.default_rng(0)
    point = measures.area_under_roc(score.ravel(), failed.ravel())
    drawn = [rng.integers(len(score), size=len(score)) for _ in range(500)]
    areas = np.array([measures.area_under_roc(score[seeds].ravel(), failed[seeds].ravel()) for seeds in drawn])
    low, high = np.nanquantile(areas, (0.025, 0.975))
    return Estimate(point, float(low), float(high))


def groups(described: Protocol, root: Path) -> dict[tuple[str, str], dict[str, RunResult]]:
    """All runs that are there, by setting and learner."""
    found = {
        (setting, mixer): load_group(root, setting, mixer, list(described.methods))
        for setting in described.settings
        for mixer in described.mixers
    }
    return {place: runs for place, runs in found.items() if runs}

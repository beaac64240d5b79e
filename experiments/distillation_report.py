"""What the files of the distillation say: one table and one figure for each setting and learner.

Shapes: S seeds, N records.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from experiments import cells
from experiments.distilling import TEACHERS
from experiments.protocol import Protocol, shared_part
from knife_jax.config import Config
from knife_jax.statistics import Estimate, continuous_estimate, normal_estimates

FRESH = "fresh"
"""The start that others are compared with."""
_LEAST = 1e-6
"""Below it errors count as this, so that logarithms do not weigh rounding."""


class Pupil(NamedTuple):
    """Learning from one start.

    Attributes:
        config: with the cure.
        steps: gradient steps `[N]`.
        errors: decimal logarithm of the unexplained share of the targets' variance `[S, 2, N]`, for each teacher.
        shares: of stuck units at the end of the sequence, before the cure, `{"<network>/<share>": [S]}`.
        provenance: where the first file came from.
    """

    config: Config
    steps: Int[np.ndarray, "N"]
    errors: Float[np.ndarray, "S 2 N"]
    shares: dict[str, Float[np.ndarray, "S"]]
    provenance: dict[str, Any]


def load(directory: Path) -> Pupil | None:
    """All seeds of one start, in the order of the files; None if there are none.

    Raises:
        DamagedError: for a damaged file, or files of different configurations.
    """
    paths = sorted(directory.glob("seeds-*.npz"))
    if not paths:
        return None
    parts = [cells.read(path) for path in paths]
    about, arrays = parts[0]
    for path, (other, _) in zip(paths, parts, strict=True):
        if other["config"] != about["config"]:
            raise cells.DamagedError(f"{path}: has another configuration than {paths[0]}")
    errors = np.log10(np.maximum(np.concatenate([found["unexplained"] for _, found in parts]), _LEAST))
    names = [name for name in arrays if name.startswith("shares/")]
    shares = {name.removeprefix("shares/"): np.concatenate([found[name][:, -1] for _, found in parts]) for name in names}
    return Pupil(Config.from_dict(about["config"]), arrays["steps"], errors.astype(np.float64), shares, about["provenance"])


def load_group(described: Protocol, root: Path, setting: str, mixer: str) -> dict[str, Pupil]:
    """The starts of one setting and learner that are there.

    Raises:
        DamagedError: for a damaged file, or one that differs from the others in more than the cure.
    """
    found = {method: load(root / setting / mixer / method) for method in described.methods}
    pupils = {method: pupil for method, pupil in found.items() if pupil is not None}
    first = next(iter(pupils.values()), None)
    for method, pupil in pupils.items():
        if first is not None and shared_part(pupil.config) != shared_part(first.config):
            raise cells.DamagedError(f"{root / setting / mixer}: {method} was not made as the others were, apart from the cure")
    return pupils


def write_report(described: Protocol, scale: str, root: Path) -> Path:
    """Writes `report.md` and `figures/` from what is there.

    Raises:
        ValueError: if nothing is.
    """
    groups = {(setting, mixer): load_group(described, root, setting, mixer) for setting in described.settings for mixer in described.mixers}
    groups = {place: pupils for place, pupils in groups.items() if pupils}
    if not groups:
        raise ValueError(f"there are no results in {root}")
    pictures = root / "figures"
    pictures.mkdir(exist_ok=True)
    text = [f"# {described.name}, scale {scale}", "", described.question.strip(), ""]
    for (setting, mixer), pupils in groups.items():
        title, stem = f"{mixer}, {setting}", f"{setting}-{mixer}-distillation.png"
        curves(pupils, title).savefig(pictures / stem, dpi=90)
        text += [f"## {title}", "", *_before(pupils), "", *_table(pupils), "", f"![{title}](figures/{stem})", ""]
    path = root / "report.md"
    path.write_text("\n".join(text).rstrip() + "\n")
    return path


def curves(pupils: Mapping[str, Pupil], title: str) -> Figure:
    """The unexplained share of the targets over gradient steps, for both teachers: geometric means over seeds with 95 % intervals."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for teacher, axes in enumerate(panels):
        for index, (method, pupil) in enumerate(pupils.items()):
            value, low, high = 10 ** np.array(normal_estimates(pupil.errors[:, teacher].T)).T
            color = matplotlib.colormaps["tab10"](index)
            axes.plot(pupil.steps, value, color=color, linewidth=1.4, label=method)
            axes.fill_between(pupil.steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(yscale="log", xlabel="gradient steps", title=f"{title}: taught by {_of(teacher)}")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("unexplained share of the targets' variance")
    panels[1].legend(fontsize=8, ncols=2)
    return figure


def _of(teacher: int) -> str:
    return ("the network after its first task", "a random network")[teacher]


def _before(pupils: Mapping[str, Pupil]) -> list[str]:
    """The share of stuck units that the sequence left."""
    shares = next(iter(pupils.values())).shares
    said = ", ".join(f"{name.replace('/', ' ')} {continuous_estimate(values)}" for name, values in shares.items())
    return [f"Units at the end of the sequence, before any cure: {said}."]


def _table(pupils: Mapping[str, Pupil]) -> list[str]:
    head = ["start", "seeds"]
    for teacher in TEACHERS:
        head += [f"end, {teacher}", f"mean, {teacher}", f"mean against {FRESH}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, pupil in sorted(pupils.items(), key=lambda item: item[1].errors.mean()):
        estimates: list[Estimate | None] = []
        for teacher in range(len(TEACHERS)):
            errors = pupil.errors[:, teacher]
            estimates += [
                continuous_estimate(errors[:, -1]),
                continuous_estimate(errors.mean(axis=1)),
                _against_fresh(pupils, method, teacher),
            ]
        row = [method, str(len(pupil.errors)), *("" if one is None else str(one) for one in estimates)]
        lines.append("| " + " | ".join(row) + " |")
    note = (
        "Decimal logarithms of the unexplained share of the targets' variance (0: as good as their mean; -2: 1 % is left), at the end "
        "and as a mean over all records; lower is better. Means over seeds, 95 % intervals; differences are paired by seed, positive "
        "where a fresh network learns faster."
    )
    return [*lines, "", note]


def _against_fresh(pupils: Mapping[str, Pupil], method: str, teacher: int) -> Estimate | None:
    own, fresh = pupils[method], pupils.get(FRESH)
    if fresh is None or method == FRESH or len(fresh.errors) != len(own.errors):
        return None
    return continuous_estimate((own.errors[:, teacher] - fresh.errors[:, teacher]).mean(axis=1))

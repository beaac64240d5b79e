"""Result files turned into one Markdown report with figures.

python -m experiments.report experiments/results/matrix_drift/standard
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from experiments import distillation_report, figures, protocol, shares, tables
from experiments.protocol import Protocol
from experiments.tables import Claim, Row
from knife_jax.run_result import RunResult
from knife_jax.statistics import Estimate

OWN: Mapping[str, Callable[[Protocol, str, Path], Path]] = {"distillation": distillation_report.write_report}
"""Experiments whose files hold no runs."""
ACROSS: Mapping[str, Callable[[shares.Groups, Path], list[str]]] = {"stationary": shares.sections}
"""What is said and drawn over all settings of an experiment."""
STAR = r" \*"
"""Marks methods that act when tasks change."""


def write_report(described: Protocol, scale: str, root: Path) -> Path:
    """Writes `report.md` and `figures/` from what is there.

    Raises:
        ValueError: if nothing is.
    """
    if described.name in OWN:
        return OWN[described.name](described, scale, root)
    found = tables.groups(described, root)
    if not found:
        raise ValueError(f"there are no results in {root}")
    pictures = root / "figures"
    pictures.mkdir(exist_ok=True)
    text = [f"# {described.name}, scale {scale}", "", described.question.strip(), "", *_facts(found), ""]
    for (setting, mixer), runs in found.items():
        text += _section(described, setting, mixer, runs, pictures)
    if described.name in ACROSS:
        text += ACROSS[described.name](found, pictures)
    text += _tuning(root)
    path = root / "report.md"
    path.write_text("\n".join(text).rstrip() + "\n")
    return path


def _section(described: Protocol, setting: str, mixer: str, runs: Mapping[str, RunResult], pictures: Path) -> list[str]:
    rows = tables.rows(runs, described.measure)
    title, stem = f"{mixer}, {setting}", f"{setting}-{mixer}"
    drawn = {
        "curves": figures.learning_curves(runs, described.measure, title),
        "methods": figures.bars(rows, described.measure, title),
    }
    if any("plasticity/agent/stagnant" in run.metrics for run in runs.values()):
        drawn["shares"] = figures.shares(runs, title)
    for name, figure in drawn.items():
        figure.savefig(pictures / f"{stem}-{name}.png", dpi=90)
    text = [f"## {title}", "", *_table(rows), ""]
    text += [f"![{name}](figures/{stem}-{name}.png)" for name in drawn]
    text += ["", *_claims(tables.claims(runs, described.measure))]
    if "none" in runs:
        text += _foretelling(tables.foretelling(runs["none"], described.measure))
    return [*text, ""]


def _table(rows: Mapping[str, Row]) -> list[str]:
    head = (
        "method",
        "seeds",
        "final, later tasks",
        "area, later tasks",
        "all tasks at the end",
        "forgetting",
        "transfer",
        "against none",
        "P(better than none)",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, row in sorted(rows.items(), key=lambda item: -item[1].later.value):
        estimates: Iterable[Estimate | None] = (
            row.later,
            row.area,
            row.average,
            row.forgetting,
            row.transfer,
            row.against,
            row.improvement,
        )
        cells = [method + STAR * row.boundaries, str(row.seeds), *("" if value is None else str(value) for value in estimates)]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        STAR.strip()
        + " acts when tasks change, because its schedule says so. Means over seeds, 95 % intervals; differences are paired by seed.",
    ]


def _claims(found: Sequence[Claim]) -> list[str]:
    lines = []
    for claim in found:
        lines += [f"* **{claim.verdict}**: {claim.sentence}. " + "; ".join(claim.evidence) + "."]
    return ["### Claims", "", *lines, ""] if lines else []


def _foretelling(found: Mapping[str, Estimate]) -> list[str]:
    if not found:
        return []
    ordered = sorted(found.items(), key=lambda item: -abs(item[1].value - 0.5))
    lines = [f"| {name} | {area} |" for name, area in ordered]
    head = [
        "### What foretells failure on the next task, without a cure",
        "",
        "Area under the ROC curve of a number at a task's end; 0.5 is chance.",
        "",
    ]
    return [*head, "| score | area |", "|---|---|", *lines, ""]


def _facts(found: Mapping[tuple[str, str], Mapping[str, RunResult]]) -> list[str]:
    provenances = [run.provenance for runs in found.values() for run in runs.values()]
    machines = sorted({str(provenance.get("device", "unknown")) for provenance in provenances})
    commits = sorted({str(provenance.get("commit", provenance.get("revision", "unknown")))[:12] for provenance in provenances})
    seconds = sum(float(provenance.get("run_seconds", 0)) + float(provenance.get("compile_seconds", 0)) for provenance in provenances)
    runs = sum(int(provenance["seeds"]) for provenance in provenances)
    return [f"{runs} runs in {seconds / 3600:.1f} h on {', '.join(machines)}; code at {', '.join(commits)}."]


def _tuning(root: Path) -> list[str]:
    path = root / "tuning.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    lines = ["## Options", ""]
    where = f"{content['mixer']}, {content['setting']}, seeds from {content['first_seed']} on ({content['seeds']} each)"
    lines += [f"Chosen on {where}, by the mean height of the curves after the first task.", ""]
    for method, tried in content["tried"].items():
        best = max(tried, key=lambda entry: entry["score"])
        said = (f"{'**' * (entry is best)}{json.dumps(entry['options'])} {entry['score']:.3f}{'**' * (entry is best)}" for entry in tried)
        lines.append(f"* {method}: {'; '.join(said)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the reports of some directories `.../NAME/SCALE` anew."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path, metavar="NAME/SCALE")
    given = parser.parse_args(arguments)
    try:
        for root in given.directories:
            name, scale = root.resolve().parts[-2:]
            print(write_report(protocol.read(name), scale, root))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

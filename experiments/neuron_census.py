"""Figure 3 of the paper: where stagnant units sit, by network and layer, at the end of each task, over games.

It trains nothing of its own: the runs without a cure of the experiments on drifts hold what it asks for. Those of them that are missing
are trained as their own experiment would, into its directory, where it finds them.

    python -m experiments.neuron_census --scale standard --results experiments/results

Shapes: S seeds, P positions in the order of tasks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from experiments import cells, census, protocol, tables
from experiments.census import Place
from knife_jax.cache import keep_compiled_programs
from knife_jax.run_result import RunResult


class Census(BaseModel):
    """What is counted.

    Attributes:
        name: its file's.
        question: what it is to answer.
        experiments: whose runs.
        method: of which method.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    question: str
    experiments: list[str]
    method: str


def collect(experiment: str, method: str, scale: str, root: Path, train: bool, console: Console) -> dict[Place, RunResult]:
    """The runs of one experiment at one scale, by experiment, setting and learner; none if it has no such scale.

    Args:
        experiment: its name.
        method: of which method.
        scale: of which scale.
        root: the experiment's directory.
        train: whether to train what is missing.
        console: told what is trained.

    Raises:
        ValueError: for an unknown experiment, or damaged files.
    """
    described = protocol.read(experiment)
    if scale not in described.scales:
        console.print(f"{experiment}: has no scale {scale}")
        return {}
    if train:
        for cell in protocol.cells(described, scale):
            if cell.method == method and cells.train(cell, root):
                console.print(f"trained {experiment}/{cell.file}", soft_wrap=True)
    found = {}
    for setting in described.settings:
        for mixer in described.mixers:
            for run in tables.load_group(root, setting, mixer, [method]).values():
                found[Place(experiment, setting, mixer)] = run
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts as its flags say; 0 if all went well, 1 if something it was given does not fit."""
    described = protocol.read_as(Census, "neuron_census")
    parser = argparse.ArgumentParser(prog="python -m experiments.neuron_census", description=described.question)
    parser.add_argument("--scale", choices=("full", "quick", "standard"), default="quick", help="which results of the others (quick)")
    parser.add_argument("--results", type=Path, help="where the others' are, as NAME/SCALE (runs/experiments)")
    parser.add_argument("--experiments", nargs="+", default=described.experiments, metavar="NAME", help="some of the games")
    parser.add_argument("--no-train", action="store_true", help="count what is there, and train nothing that is missing")
    parser.add_argument("--out", type=Path, help="where the report is written (RESULTS/neuron_census/SCALE)")
    given = parser.parse_args(arguments)
    results = given.results or Path("runs") / "experiments"
    console = Console(highlight=False)
    keep_compiled_programs()
    try:
        runs: dict[Place, RunResult] = {}
        for name in given.experiments:
            runs |= collect(name, described.method, given.scale, results / name / given.scale, not given.no_train, console)
        out = given.out or results / described.name / given.scale
        console.print(f"report in {census.write_report(described.question, runs, out)}", soft_wrap=True)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

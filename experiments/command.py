"""The command of every experiment: tune, train what is missing, draw.

    python -m experiments.matrix_drift --scale standard

Shapes: S seeds.
"""

import argparse
import fnmatch
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments import cells, protocol, tuning
from experiments.cells import Cell, Work
from experiments.report import write_report
from knife_jax.cache import keep_compiled_programs
from knife_jax.cores import spread_over_cores


def main(name: str, arguments: Sequence[str] | None = None, work: Work | None = None) -> int:
    """Runs an experiment as its flags say; 0 if all went well, 1 if something it was given does not fit.

    Args:
        name: the experiment.
        arguments: the command line's, if not the process's own.
        work: what is done for a cell, if not a run.
    """
    described = protocol.read(name)
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=described.question)
    parser.add_argument("--scale", choices=sorted(described.scales), default="quick", help="how much of it (quick)")
    parser.add_argument("--seeds", type=int, help="how many seeds, if not as many as the scale says")
    parser.add_argument("--out", type=Path, help="where results are, and go on from (runs/experiments/NAME/SCALE)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of what is trained, such as '*/qmix/knife'")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="every N-th of what is to be trained, from the I-th on; for N machines"
    )
    parser.add_argument("--list", action="store_true", help="say what there is and what is missing, and train nothing")
    given = parser.parse_args(arguments)
    root = given.out or Path("runs") / "experiments" / name / given.scale
    console = Console(highlight=False)
    keep_compiled_programs()
    spread_over_cores()
    try:
        if given.seeds is not None and given.seeds < 1:
            raise ValueError(f"--seeds: at least 1, got {given.seeds}")
        part = _part_of(given.part)
        wanted = _wanted(described, given, root)
        if described.scales[given.scale].tuned and not given.list:
            tuning.tune(described, given.scale, root, dict.fromkeys(cell.method for cell in wanted), console.print)
            wanted = _wanted(described, given, root)
        wanted = wanted[part]
        if given.list:
            for cell in wanted:
                console.print(f"{'done   ' if (root / cell.file).exists() else 'missing'} {cell.file}", soft_wrap=True)
            return 0
        _train(wanted, root, console, work)
        console.print(f"report in {write_report(described, given.scale, root)}", soft_wrap=True)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _wanted(described: protocol.Protocol, given: argparse.Namespace, root: Path) -> list[Cell]:
    """What the flags ask for, with the options that were chosen so far."""
    chosen = tuning.chosen(described, given.scale, root) if described.scales[given.scale].tuned else None
    asked = [cell for cell in protocol.cells(described, given.scale, seeds=given.seeds, chosen=chosen) if _matches(cell, given.only)]
    if not asked:
        raise ValueError(f"--only: nothing is called SETTING/MIXER/METHOD as in {' '.join(given.only)}; --list says what there is")
    return asked


def _train(wanted: Sequence[Cell], root: Path, console: Console, work: Work | None) -> None:
    for number, cell in enumerate(wanted, 1):
        began = time.perf_counter()
        trained = cells.train(cell, root, work)
        took = f"{time.perf_counter() - began:.0f} s" if trained else "was there"
        console.print(f"[{number}/{len(wanted)}] {cell.file}: {took}", soft_wrap=True)


def _matches(cell: Cell, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch("/".join(cell.file.parts[:3]), pattern) for pattern in patterns)


def _part_of(part: str) -> slice:
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part: expected I/N with I from 1 to N, got {part!r}")
    return slice(int(index) - 1, None, int(count))

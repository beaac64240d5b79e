"""What the benchmarks share: a JSON line per row, a result file that says where it comes from, and a plot."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def add_output(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    """Adds `--out` and `--plot`."""
    parser.add_argument("--out", type=Path, help="write the rows and facts about the machine to this new JSON file")
    if plot:
        parser.add_argument("--plot", type=Path, help="draw the rows to this new file (png, pdf, svg)")


def refuse_existing(*paths: Path | None) -> None:
    """Ends the program if one of its outputs is there already."""
    for path in paths:
        if path and path.exists():
            sys.exit(f"{path} exists; nothing is overwritten")


def use_processor(count: int | None) -> None:
    """Restricts this process, and those that it starts, to so many cores; must come before JAX starts in it."""
    if count:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))


def say(row: Row) -> None:
    """Prints one row."""
    print(json.dumps(row), flush=True)


def write(rows: list[Row], out: Path | None, **settings: Any) -> None:
    """Writes the rows with facts about machine, versions and revision; the file appears only once it is complete."""
    if out is None:
        return
    from knife_jax.runner import environment_facts

    partial = out.with_suffix(".part")
    facts = {**environment_facts(), "processors": os.cpu_count()}
    partial.write_text(json.dumps({"rows": rows, "settings": settings, "facts": facts}, indent=1) + "\n")
    partial.replace(out)


def draw(rows: list[Row], path: Path | None, paint: Callable[[Any, list[Row]], None]) -> None:
    """Draws the rows with `paint(figure, rows)`."""
    if path is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=150)
    paint(figure, rows)
    figure.savefig(path)

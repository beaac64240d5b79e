"""The directory of a sweep that takes several programs: one below it for each, which is the directory of a run like any other.

`run.json` says what is swept and whether all of it is done.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from knife_jax import hosts, policy, results
from knife_jax.run_directory import RUN_FILE, check_resumable, read_run_file, write_run_file
from knife_jax.run_result import RunResult
from knife_jax.sweep import Part, combinations


class Place(NamedTuple):
    """Where a program of a sweep is run.

    Attributes:
        part: its share of the sweep.
        out: its directory; None writes nothing.
        resume: whether it was begun before.
        done: whether it was finished before; `read_finished` reads what it left.
    """

    part: Part
    out: Path | None
    resume: bool
    done: bool


def places(parts: Sequence[Part], out: Path | None, resume: bool, identity: Mapping[str, Any]) -> Iterator[Place]:
    """Begins the directory of a sweep, or finds it, and goes through its programs; after the last one the sweep counts as done.

    Args:
        parts: the programs; a single one without a label is a run by itself.
        out: the directory.
        resume: whether to go on with the sweep that is there.
        identity: what sweep this is.

    Raises:
        OSError: if the directory exists (unless resuming) or cannot be written.
        CheckpointError: if there is no such sweep to resume, it is done, or another one.
    """
    if out is None or not parts[0].label:
        yield from (Place(part, out, resume, False) for part in parts)
        return
    identity = json.loads(json.dumps(identity))
    if resume:
        check_resumable(out, identity)
    else:
        hosts.first_does(lambda: _begin(out, identity))
    for part in parts:
        own = out / part.label
        was_begun = (own / RUN_FILE).exists()
        begun, done = hosts.most(was_begun, was_begun and read_run_file(own)["done"])  # all have looked before any goes on
        yield Place(part, own, bool(begun), bool(done))
    hosts.first_does(lambda: write_run_file(out, identity, done=True))


def _begin(out: Path, identity: Mapping[str, Any]) -> None:
    with results.new_directory(out) as unfinished:
        write_run_file(unfinished, identity, done=False)


def read_finished(place: Place) -> dict[str, RunResult]:
    """The results of a program that was done before, by `Combination.label`, from its files; they do not hold the cure's report."""
    assert place.out is not None
    found = {}
    for combination in combinations(place.part.config, place.part.sweep):
        own = place.out / combination.label
        found[combination.label] = results.load(own)._replace(variables=policy.load_variables(own))
    return found

"""The directory of a run: what it is, checkpoints while it goes on, results when it is done.

`run.json` says what run it is and whether it is done, `config.yaml` its configuration; `log.jsonl` and `log.npy` grow evaluation by
evaluation; `checkpoints/` is there until it is done.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knife_jax import checkpoint, hosts, results
from knife_jax.checkpoint import CheckpointError
from knife_jax.chunks import Carry, Pieces
from knife_jax.interrupts import Interruptions, RunStoppedError
from knife_jax.journal import Arrays
from knife_jax.loop import Snapshot, Status
from knife_jax.provenance import environment_facts
from knife_jax.rows import Evaluation, LogFiles
from knife_jax.run_result import RunResult
from knife_jax.wandb_log import WandbLog, WandbSettings

RUN_FILE = "run.json"
Groups = Sequence[Sequence[tuple[str, slice]]]


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written."""

    every_minutes: float = 10.0
    """Minutes between two checkpoints."""
    every_updates: int | None = None
    """Gradient steps between two checkpoints, as well."""
    keep: int = 2
    """How many checkpoints stay, the newest."""

    def __post_init__(self) -> None:
        for name, least in (("every_minutes", 0), ("every_updates", 1), ("keep", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"saving.{name}: at least {least}, got {value}")


class RunDirectory:
    """Writes a run down, and finds what was written of one that is to be resumed.

    Args:
        path: the directory; it must be new, or that of the run to resume.
        pieces: the program.
        setting: what beside the configuration makes the run what it is: seeds and how they are batched.
        saving: when checkpoints are written.
        wandb: what goes to Weights & Biases.
        groups: the parts of every batch that are logged apart, each with a name.
        resume: whether to go on with a run.

    Attributes:
        interruptions: signals that ask the run to stop.

    Raises:
        OSError: if the directory exists (unless resuming) or cannot be written.
        CheckpointError: if there is nothing to resume, or another run, with the fields that differ.
    """

    def __init__(
        self, path: Path, pieces: Pieces, setting: Mapping[str, Any], saving: Saving, wandb: WandbSettings, groups: Groups, resume: bool
    ) -> None:
        self.path = path
        self.interruptions = Interruptions()
        self._pieces, self._saving, self._groups = pieces, saving, groups
        config = pieces.program.config
        self._identity = json.loads(json.dumps({"config": config.to_dict(), **setting}))
        self._began = self._saved_at = time.perf_counter()
        self._updates_saved = self._evaluations = 0
        self._logs: LogFiles | None = None
        self._wandb: WandbLog | None = None
        wandb.check()
        if resume:
            check_resumable(path, self._identity)
        else:
            hosts.first_does(self._create)
        if wandb.mode != "disabled" and hosts.is_first():
            facts = {**self._identity, "provenance": environment_facts(pieces.program.plan.samples_per_update)}
            self._wandb = WandbLog(wandb, path, facts)

    def _create(self) -> None:
        with results.new_directory(self.path) as unfinished:
            (unfinished / "config.yaml").write_text(self._pieces.program.config.to_yaml())
            write_run_file(unfinished, self._identity, done=False)

    @property
    def seconds(self) -> float:
        """For how long the run went on, before it was resumed too."""
        return time.perf_counter() - self._began

    def start(self, carry: Carry) -> Snapshot | None:
        """Where to go on; None at the beginning.

        Args:
            carry: shapes and shardings of the state.
        """
        loaded = checkpoint.load(self.path / "checkpoints", carry, self._identity)
        self._began = self._saved_at = time.perf_counter()
        extra = loaded.extra if loaded else {"seconds": 0.0, "evaluations": 0, "log_bytes": [0, 0]}
        self._began -= extra["seconds"]
        self._evaluations = extra["evaluations"]
        hosts.first_does(lambda: self._open_logs(extra["log_bytes"]))
        if loaded is None:
            return None
        self._updates_saved = int(loaded.snapshot.carry.state.counters.updates)
        return loaded.snapshot

    def _open_logs(self, sizes: Sequence[int]) -> None:
        self._logs = LogFiles(self.path)
        self._logs.cut(sizes)
        if self._wandb is not None:
            self._wandb.open()

    def on_status(self, status: Status) -> None:
        """Logs what is new.

        Raises:
            OSError: if it cannot be written.
        """
        hosts.first_does(lambda: self._log(status))

    def _log(self, status: Status) -> None:
        assert self._logs is not None
        groups = self._groups[status.point.batch]
        evaluations = [self._evaluation(status.point.batch, *group, row) for row in status.rows for group in groups]
        try:
            self._logs.write(evaluations)
        except OSError as error:
            raise OSError(f"could not write the log of {self.path}: {error}; the run can be resumed from its last checkpoint") from error
        if self._wandb is not None:
            self._wandb.log(self._evaluations, evaluations)
        self._evaluations += len(evaluations)

    def _evaluation(self, batch: int, group: str, part: slice, row: Arrays) -> Evaluation:
        program = self._pieces.program
        task, env_steps = program.networks.tasks.names[int(row["task"][0])], int(row["rounds"][0]) * program.plan.round_env_steps
        return Evaluation(batch, group, env_steps, task, self.seconds, {name: values[part] for name, values in row.items()})

    def after_chunk(self, status: Status, take: Callable[[], Snapshot]) -> None:
        """Writes a checkpoint if one is due, or if the run was asked to stop.

        Raises:
            RunStoppedError: if it was asked to stop.
            OSError: if the checkpoint cannot be written.
        """
        number, due = hosts.most(self.interruptions.signal or 0, self._is_due(status.updates))
        asked = int(number)  # whichever process was asked, all stop
        if not (asked or due):
            return
        point, order = status.point, self._pieces.program.networks.tasks.order
        step = (point.batch * len(order) + point.position) * self._pieces.rounds_per_task + point.rounds
        extra = {"seconds": self.seconds, "evaluations": self._evaluations, "log_bytes": self._logs.sizes if self._logs else []}
        path = checkpoint.save(self.path / "checkpoints", step, take(), self._identity, extra, self._saving.keep)
        self._saved_at, self._updates_saved = time.perf_counter(), status.updates
        if asked:
            raise RunStoppedError(f"stopped, and saved to {path}; go on with: knife-jax train --resume --out {self.path}", asked)

    def _is_due(self, updates: int) -> bool:
        since, every = updates - self._updates_saved, self._saving.every_updates
        by_updates = every is not None and not 0 <= since < every  # the next batch of seeds counts from zero again
        return by_updates or time.perf_counter() - self._saved_at >= 60 * self._saving.every_minutes

    def finish(self, finished: Mapping[str, RunResult]) -> None:
        """Writes the results; only when all of them are there the run counts as done and the checkpoints go.

        Args:
            finished: by the name of a directory in that of the run; the empty name is the run's own.
        """
        hosts.first_does(lambda: self._finish(finished))

    def _finish(self, finished: Mapping[str, RunResult]) -> None:
        unfinished = Path(tempfile.mkdtemp(prefix=".results-", dir=self.path))
        try:
            for name, result in finished.items():
                (unfinished / name).mkdir(exist_ok=True)
                results.write(result, unfinished / name, self._pieces.program.networks.env.reports_wins)
            unfinished.chmod(0o755)
            for item in unfinished.iterdir():
                if item.is_dir():
                    shutil.rmtree(self.path / item.name, ignore_errors=True)
                os.replace(item, self.path / item.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if self._wandb is not None:
            self._wandb.finish(finished)
        write_run_file(self.path, self._identity, done=True)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def close(self) -> None:
        """Closes what is open; the run may be resumed unless it is done."""
        if self._logs is not None:
            self._logs.close()
        if self._wandb is not None:
            self._wandb.close(1)


def write_run_file(directory: Path, identity: Mapping[str, Any], done: bool) -> None:
    """Says in the directory of a run what run it is, and whether it is done."""
    partial = directory / f".{RUN_FILE}"
    partial.write_text(json.dumps({**identity, "done": done}, indent=2) + "\n")
    os.replace(partial, directory / RUN_FILE)


def check_resumable(path: Path, identity: Mapping[str, Any]) -> None:
    """Compares a run with that in a directory.

    Raises:
        CheckpointError: if there is none, it is done, or it is another one, with the fields that differ.
    """
    saved = read_run_file(path)
    if saved.pop("done"):
        raise CheckpointError(f"the run in {path} is done; there is nothing to resume")
    if lines := checkpoint.differences(saved, identity):
        raise CheckpointError(f"the run in {path} is another one, which differs in\n  " + "\n  ".join(lines))


def read_run_file(path: Path) -> dict[str, Any]:
    """What the directory of a run says of it: `config`, `seeds`, `first_seed`, `seeds_per_batch` and whether it is `done`.

    Raises:
        CheckpointError: if it is not the directory of a run.
    """
    try:
        return json.loads((path / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"there is no run to resume in {path}: {' '.join(str(error).split())}") from None

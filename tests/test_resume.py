"""Stopping, killing and resuming: the same bits, clear refusals, nothing half written."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from knife_jax import checkpoint, cli, runner
from knife_jax.checkpoint import CheckpointError
from knife_jax.config import Config, resolve
from knife_jax.interrupts import RunStoppedError
from knife_jax.run_directory import Saving
from tests.test_runner import SMALL, tolerance

pytestmark = pytest.mark.usefixtures("compile_once")

OPTIONS: dict[str, Any] = {"seeds": 3, "seeds_per_batch": 2, "chunk_rounds": 7}
OFTEN = Saving(every_minutes=0.0)


@pytest.fixture(scope="module")
def whole(compile_once):
    """The run that nothing stopped."""
    return runner.run(SMALL, **OPTIONS)


@pytest.fixture(scope="module")
def broken(tmp_path_factory, compile_once):
    """The directory of a run that died in its second batch of seeds, with checkpoints after every chunk."""
    out = tmp_path_factory.mktemp("runs") / "broken"
    _run_until(14, out)
    return out


def _run_until(evaluations, out, action=None):
    """Runs until so many evaluations are made, then dies, or acts."""
    seen = []

    def progress(status):
        seen.extend(status.rows)
        if seen and len(seen) - len(status.rows) < evaluations <= len(seen):
            if action is None:
                raise RuntimeError("died")
            action()

    expected: type[Exception] = RuntimeError if action is None else RunStoppedError
    with pytest.raises(expected) as caught:
        runner.run(SMALL, out=out, saving=OFTEN, progress=progress, **OPTIONS)
    return caught


def _same(result, whole):
    assert set(result.metrics) == set(whole.metrics)
    for name, values in whole.metrics.items():
        np.testing.assert_array_equal(result.metrics[name], values, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, (result.variables, result.report), (whole.variables, whole.report))


def _copy(broken, tmp_path):
    return shutil.copytree(broken, tmp_path / "copy")


def test_a_run_that_died_resumes_to_the_same_bits(broken, whole, tmp_path):
    """In its second batch, from the newest checkpoint; then its results are there and its checkpoints gone."""
    out = _copy(broken, tmp_path)
    assert len(list((out / "checkpoints").iterdir())) == OFTEN.keep
    _same(runner.run(SMALL, out=out, resume=True, **OPTIONS), whole)
    names = {"run.json", "config.yaml", "metrics.npz", "summary.json", "learning_curve.png"}
    assert {path.name for path in out.iterdir()} >= names
    assert not (out / "checkpoints").exists()
    with pytest.raises(CheckpointError, match="is done"):
        runner.run(SMALL, out=out, resume=True, **OPTIONS)


def test_a_damaged_checkpoint_is_passed_over(broken, whole, tmp_path):
    """The newest with a flipped bit, beside a foreign directory and half a checkpoint: the older one serves."""
    out = _copy(broken, tmp_path)
    older, newest = sorted((out / "checkpoints").iterdir())
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (out / "checkpoints" / "999999999999").mkdir()
    (out / "checkpoints" / ".unfinished-999999999998").mkdir()
    _same(runner.run(SMALL, out=out, resume=True, **OPTIONS), whole)
    shutil.rmtree(out)
    out = _copy(broken, tmp_path)
    for path in (out / "checkpoints").iterdir():
        (path / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"no checkpoint is whole:\n.*{newest.name}.*damaged.*meta.json\n.*{older.name}"):
        runner.run(SMALL, out=out, resume=True, **OPTIONS)


def test_a_checkpoint_of_other_code_is_refused(broken, tmp_path, monkeypatch):
    """The state's leaves are listed in it."""
    out = _copy(broken, tmp_path)
    leaves = checkpoint._leaves
    monkeypatch.setattr(checkpoint, "_leaves", lambda carry: [[".state.novel", [3], "float32"], *leaves(carry)[1:]])
    with pytest.raises(CheckpointError, match=r"another version of this code[\s\S]*\.state\.novel: None there, \[\[3\], 'float32'\] here"):
        runner.run(SMALL, out=out, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"learner": {"mixer": "vdn", "gamma": 0.5}}, {}, r"config\.learner\.gamma: 0\.99 there, 0\.5 here"),
        ({}, {"seeds": 4}, "seeds: 3 there, 4 here"),
        ({}, {"out": "elsewhere"}, "no run to resume in elsewhere"),
        ({}, {"out": None}, "resume: needs the directory"),
    ],
    ids=str,
)
def test_another_run_is_refused_before_anything_compiles(broken, monkeypatch, change, options, message):
    """With the fields that differ."""
    monkeypatch.setattr(runner, "compile_pieces", lambda *_: pytest.fail("compiled"))
    config = Config.from_dict(change, resolve(SMALL))
    with pytest.raises(ValueError, match=message):
        runner.run(config, **{"out": broken, "resume": True, **OPTIONS, **options})


def test_results_are_not_overwritten_without_resume(broken):
    """A directory that exists is refused, whatever is in it."""
    with pytest.raises(FileExistsError, match="exists already"):
        runner.run(SMALL, out=broken, **OPTIONS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(whole, tmp_path, number, capfd):
    """The chunk is finished, a checkpoint written, and the way to go on told; handlers are as before."""
    before = signal.getsignal(number)
    stopped = _run_until(3, tmp_path / "out", lambda: os.kill(os.getpid(), number)).value
    assert isinstance(stopped, RunStoppedError) and stopped.signal == number
    assert f"knife-jax train --resume --out {tmp_path / 'out'}" in str(stopped)
    assert "once more to leave at once" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    _same(runner.run(SMALL, out=tmp_path / "out", resume=True, **OPTIONS), whole)


WRITING = """
import sys, time
from pathlib import Path
from knife_jax import checkpoint, runner
from knife_jax.config import resolve
from knife_jax.run_directory import Saving

write, calls = checkpoint._write_state, []


def slow(path, carry):
    write(path, carry)
    calls.append(path)
    if len(calls) == 3:
        print("writing", flush=True)
        time.sleep(300)


checkpoint._write_state = slow
runner.run(resolve(eval(sys.argv[1])), out=Path(sys.argv[2]), saving=Saving(every_minutes=0.0), **eval(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(whole, tmp_path, compile_once):
    """In the middle of a checkpoint: the process is gone with the signal's status, and the run goes on from the one before."""
    out = tmp_path / "out"
    quick = {"JAX_COMPILATION_CACHE_DIR": str(compile_once), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", WRITING, repr(SMALL), str(out), repr(OPTIONS)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **quick}, **pipes) as process:
        assert process.stdout.readline() == "writing\n"  # pyright: ignore[reportOptionalMemberAccess]
        process.send_signal(signal.SIGINT)
        while "once more to leave at once" not in (line := process.stderr.readline()):  # pyright: ignore[reportOptionalMemberAccess]
            assert line and process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert [path.name for path in sorted((out / "checkpoints").glob("0*"))] == ["000000000007", "000000000014"]
    _same(runner.run(SMALL, out=out, resume=True, **OPTIONS), whole)


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(whole, tmp_path, monkeypatch):
    """A full disk in the middle of one: a clear error, nothing half written, and the run goes on from the one before."""
    out, write, calls = tmp_path / "out", checkpoint._write_state, []

    def full(path, carry):
        calls.append(path)
        write(path, carry)
        if len(calls) == 3:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpoint, "_write_state", full)
    with pytest.raises(OSError, match=r"could not write the checkpoint .*No space left on device; the last one is .*000000000014"):
        runner.run(SMALL, out=out, saving=OFTEN, **OPTIONS)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["000000000007", "000000000014"]
    monkeypatch.undo()
    _same(runner.run(SMALL, out=out, resume=True, **OPTIONS), whole)


def test_saving_refuses_what_makes_no_sense():
    """With the field's path."""
    bad: dict[str, Any] = {"every_minutes": -1.0, "every_updates": 0, "keep": 0}
    for field, value in bad.items():
        with pytest.raises(ValueError, match=f"saving.{field}: at least"):
            Saving(**{field: value})


class Killed:
    """`knife-jax train` in processes of its own, killed again and again, then resumed to the end."""

    def __init__(self, tmp_path, cache):
        self.out, self.config = tmp_path / "out", tmp_path / "small.yaml"
        self.config.write_text(resolve(SMALL).to_yaml())
        quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        self.environment = {**os.environ, "KNIFE_JAX_CACHE": str(cache), "MPLBACKEND": "agg", **quick}

    def start(self):
        """Starts or resumes the run."""
        how = ["--resume"] if (self.out / "run.json").exists() else ["--config", str(self.config), "--seeds", "3"]
        how += ["--seeds_per_batch", "2", "--devices", "1", "--out", str(self.out), "--saving.every_minutes", "0", "--chunk_rounds", "2"]
        command = [sys.executable, "-m", "knife_jax.cli", "train", *how]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill_when(self, moment):
        """Starts the run and kills it when `moment` comes; False if it was done before that."""
        with self.start() as process:
            began = time.monotonic()
            while process.poll() is None and not moment(time.monotonic() - began):
                time.sleep(0.001)
            was_running = process.poll() is None
            process.kill()
            process.wait()
        return was_running

    def finish(self):
        """Lets the run come to its end."""
        with self.start() as process:
            said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return np.load(self.out / "metrics.npz")

    def checkpoints(self, pattern):
        """How many files of checkpoints there are."""
        return len(list((self.out / "checkpoints").glob(pattern)))


def _same_files(metrics, whole):
    assert len(metrics.files) == len(whole.metrics)
    for name, values in whole.metrics.items():
        np.testing.assert_allclose(metrics[name.replace("/", ".")], values, rtol=tolerance(name), atol=0, err_msg=name)


@pytest.mark.slow
def test_killed_three_times_a_run_ends_with_the_same_bits(whole, tmp_path, compile_once):
    """While it compiles, in the middle of writing a checkpoint, and while it trains."""
    run = Killed(tmp_path, compile_once)
    assert run.kill_when(lambda _: (run.out / "run.json").exists())
    assert run.kill_when(lambda _: run.checkpoints(".unfinished*/state*"))
    assert run.kill_when(lambda _: run.checkpoints("0*") == 2)
    _same_files(run.finish(), whole)


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_with_the_same_bits(whole, tmp_path, compile_once):
    """At random moments of its life."""
    run, chance = Killed(tmp_path, compile_once), random.Random(0)
    run.kill_when(lambda _: (run.out / "run.json").exists())
    killed = 1
    while killed < 20:
        seconds = chance.uniform(1.0, 15.0)
        if not run.kill_when(lambda passed, seconds=seconds: passed > seconds):
            _same_files(np.load(run.out / "metrics.npz"), whole)
            shutil.rmtree(run.out)
        killed += 1
    _same_files(run.finish(), whole)


def test_the_command_resumes_with_the_runs_own_settings(tmp_path, compile_once, capsys):
    """Neither configuration nor seeds need to be said again; what is said must agree."""
    out = tmp_path / "out"
    _run_until(3, out)
    assert cli.main(["train", "--resume", "--out", str(out), "--learner.gamma", "0.5"]) == 2
    assert "config.learner.gamma: 0.99 there, 0.5 here" in capsys.readouterr().err
    assert cli.main(["train", "--resume"]) == 2
    assert "--resume: needs --out" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert np.load(out / "metrics.npz")["eval.return"].shape == (3, 9)

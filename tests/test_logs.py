"""What a run logs: JSON lines, arrays with the seeds' axis, the progress line, and Weights & Biases' own files."""

import io
import json
import resource
import struct

import numpy as np
import pytest
from rich.console import Console

from knife_jax import cli, progress, rows, runner, statistics
from knife_jax.config import resolve
from knife_jax.loop import Point, Status
from knife_jax.run_directory import Saving
from knife_jax.wandb_log import WandbSettings
from tests.test_resume import OFTEN, OPTIONS
from tests.test_runner import SMALL

pytestmark = pytest.mark.usefixtures("compile_once")


class DiedError(Exception):
    """What ends a run in these tests."""


def _die_after(evaluations):
    seen = []

    def progress(status):
        seen.extend(status.rows)
        if len(seen) >= evaluations:
            raise DiedError

    return progress


def _run(out, **options):
    return runner.run(SMALL, out=out, **{**OPTIONS, "saving": OFTEN, **options})


@pytest.fixture(scope="module")
def logged(tmp_path_factory, compile_once):
    """A run that died and was resumed, with its result; everything was logged, and to W&B offline."""
    out = tmp_path_factory.mktemp("runs") / "logged"
    wandb = WandbSettings(mode="offline", project="tests", per_seed=True)
    with pytest.raises(DiedError):
        _run(out, wandb=wandb, saving=Saving(every_updates=1, keep=3), progress=_die_after(14))
    return out, _run(out, wandb=wandb, resume=True)


def test_log_files_hold_every_evaluation_once(logged):
    """In order, with means over seeds in the lines and every seed in the arrays, though the run died on the way."""
    out, result = logged
    lines, arrays = rows.read_lines(out), list(rows.read_arrays(out))
    assert [(line["batch"], line["rounds"]) for line in lines] == [(batch, r) for batch in (0, 1) for r in result.metrics["rounds"][0]]
    assert [line["env_steps"] for line in lines[:9]] == result.metrics["env_steps"].tolist()
    assert {line["task_name"] for line in lines} == {"permuted_1", "permuted_2"}
    for name in ("eval/return", "train/loss", "plasticity/agent/gru/dormant"):
        curves = np.concatenate([np.stack([record[name] for record in arrays[first : first + 9]], axis=1) for first in (0, 9)])
        np.testing.assert_array_equal(curves, result.metrics[name])
    mean, low, high = lines[2]["metrics"]["eval/return"]
    assert low <= mean <= high
    np.testing.assert_allclose(mean, result.metrics["eval/return"][:2, 2].mean(), rtol=1e-6)
    assert lines[0]["metrics"]["train/loss"] == [None, None, None]


def test_half_a_line_at_the_end_is_left_out(logged, tmp_path):
    """As readers see a log that is being written."""
    out, _ = logged
    for name in (rows.LINES, rows.ARRAYS):
        content = (out / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) - 20])
    assert len(rows.read_lines(tmp_path)) == len(list(rows.read_arrays(tmp_path))) == 17


def test_a_log_shorter_than_at_the_checkpoint_is_refused(tmp_path):
    """Rather than going on with a hole in it."""
    out = tmp_path / "out"
    with pytest.raises(DiedError):
        _run(out, progress=_die_after(5))
    (out / rows.LINES).write_text("")
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged: it has 0 bytes"):
        _run(out, resume=True)


def test_a_log_that_cannot_be_written_leaves_the_checkpoint(tmp_path):
    """Files may grow no further in the middle of a run: a clear error; given room again, the run goes on."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(status):
        if status.rows and status.point.rounds >= 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((out / rows.LINES).stat().st_size, limits[1]))

    try:
        with pytest.raises(OSError, match=r"could not write the log of .*can be resumed"):
            _run(out, progress=fill, saving=Saving(every_minutes=60.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _run(out, resume=True)
    assert len(rows.read_lines(out)) == 18


def test_a_place_that_cannot_be_written_is_found_before_anything_compiles(tmp_path, monkeypatch):
    """Here a file where a directory should be."""
    monkeypatch.setattr(runner, "compile_pieces", lambda *_: pytest.fail("compiled"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        _run(tmp_path / "file" / "out")


def _wandb_records(directory):
    """The records of a `.wandb` file: a header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("*.wandb")
    content, position, record = path.read_bytes(), 7, b""
    while position < len(content):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
            record = b""


def _read_wandb(out):
    """Every W&B run in the directory as `(id, group, job type, config, rows)`."""
    runs = []
    for directory in sorted((out / "wandb").glob("offline-run-*")):
        records = list(_wandb_records(directory))
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        history = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        runs.append((run.run_id, run.run_group, run.job_type, config, history))
    return runs


def test_wandb_gets_what_is_promised(logged):
    """Read back from what the client wrote: one run that went on after the death, intervals, boundaries, and one run per seed."""
    out, result = logged
    runs = _read_wandb(out)
    together = [run for run in runs if run[2] == "seeds"]
    assert len(together) == 2 and len({run[0] for run in together}) == 1
    history = [row for run in together for row in run[4]]
    assert [row["_step"] for row in history] == list(range(18))
    assert [row["env_steps"] for row in history[:9]] == result.metrics["env_steps"].tolist()
    assert [row["task/begins"] for row in history] == [1, 0, 0] * 6
    assert [row["task/name"] for row in history[:4]] == ["permuted_1"] * 3 + ["permuted_2"]
    for row, batch, index in ((history[1], "batch_1", 1), (history[11], "batch_2", 2)):
        values = result.metrics["eval/return"][:2, index] if batch == "batch_1" else result.metrics["eval/return"][2:, index]
        np.testing.assert_allclose(row[f"{batch}/eval/return"], values.mean(), rtol=1e-6)
    assert history[1]["batch_1/train/loss/low"] <= history[1]["batch_1/train/loss"] <= history[1]["batch_1/train/loss/high"]
    assert any("plasticity/agent/gru/" in name for name in history[1])
    assert together[0][3]["config"]["learner"]["mixer"] == "vdn" and together[0][3]["provenance"]["versions"]["jax"]
    alone = [run for run in runs if run[2] == "seed"]
    assert sorted(run[3]["seed"] for run in alone) == [0, 1, 2] and {run[1] for run in alone} == {"logged"}
    for _, _, _, config, curve in alone:
        np.testing.assert_allclose([row["eval/return"] for row in curve], result.metrics["eval/return"][config["seed"]], rtol=1e-6)


def test_wandb_without_a_key_or_a_directory_is_refused_before_anything_compiles(tmp_path, monkeypatch):
    """With what to do about it."""
    monkeypatch.setattr(runner, "compile_pieces", lambda *_: pytest.fail("compiled"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"wandb\.mode: there is no API key; run `wandb login`.*offline"):
        runner.run(SMALL, out=tmp_path / "out", wandb=WandbSettings(mode="online"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="wandb: needs a directory"):
        runner.run(SMALL, wandb=WandbSettings(mode="offline"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"knife-jax\[wandb\]"):
        WandbSettings(mode="offline").check()


def test_the_progress_line_tells_where_a_run_is():
    """On a terminal; nothing is written where there is none."""
    for is_terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=is_terminal, width=160)
        with progress.ProgressLine(console, resolve(SMALL), 3, 2) as line:
            line(Status(Point(0, 1, 10), 25, [], 0.5))
            line(Status(Point(1, 0, 10), 7, [{"eval/won": np.array([0.0, 1.0])}], 0.5))
        said = text.getvalue()
        if is_terminal:
            for part in ("seeds 2/2, task 1/3", "40 env steps", "7 updates", "won 0.50", "steps/s", "left"):
                assert part in said
        else:
            assert said.strip() == ""


def test_short_numbers():
    """At most four digits and a letter."""
    expected = {0: "0", 9999: "9999", 12345: "12.3k", 123456: "123k", 1234567: "1.23M", 5.5e9: "5.50G"}
    assert {number: progress.short(number) for number in expected} == expected


def test_normal_estimates_are_means_with_intervals():
    """Against numpy; NaNs are left out, one number has no interval, none has no mean."""
    values = np.array([[1.0, 2.0, 3.0, 6.0], [np.nan, 2.0, np.nan, 4.0], [5.0, np.nan, np.nan, np.nan], [np.nan] * 4])
    full, two, one, none = statistics.normal_estimates(values)
    np.testing.assert_allclose(full, 3 + 1.959964 * np.array([0, -1, 1]) * np.std(values[0], ddof=1) / 2, rtol=1e-6)
    np.testing.assert_allclose(two, (3.0, 3 - 1.959964, 3 + 1.959964), rtol=1e-6)
    np.testing.assert_array_equal(one, (5.0, np.nan, np.nan))
    assert np.isnan(none).all()


def test_the_command_takes_wandbs_fields(tmp_path):
    """As flags."""
    parsed = cli.parse(cli.TrainArguments, ["--wandb.mode", "offline", "--wandb.per_seed", "--saving.keep", "4"])
    assert parsed.wandb == WandbSettings(mode="offline", per_seed=True) and parsed.saving.keep == 4

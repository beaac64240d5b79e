"""Several processes that make one run: the numbers of one process, stopping together, resuming, and refusals."""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from knife_jax import cli, hosts, runner
from knife_jax.config import resolve
from knife_jax.hosts import Hosts
from tests.test_runner import SMALL

SHORT = {**SMALL, "train": {"env_steps_per_task": 40}, "evaluation": {"episodes": 1, "per_task": 1}, "plasticity": {"diagnostics": False}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "here:1", "processes": 2}, "hosts: coordinator, processes and process_id are given together"),
        ({"coordinator": "here", "processes": 2, "process_id": 0}, "hosts.coordinator: expected HOST:PORT, got 'here'"),
        ({"coordinator": "here:1", "processes": 2, "process_id": 2}, "hosts.process_id: from 0 to below the 2 processes, got 2"),
        ({"detect": True, "processes": 2}, "hosts.detect: finds .* by itself"),
    ],
    ids=str,
)
def test_hosts_that_make_no_sense_are_refused(given, message):
    """With the field's name."""
    with pytest.raises(ValueError, match=message):
        Hosts(**given)


def test_joining_others_comes_before_anything_is_computed(capsys, tmp_path):
    """JAX has computed in this process, so it cannot join others any more; nothing is written."""
    jax.block_until_ready(jax.numpy.zeros(1))
    out = tmp_path / "out"
    flags = ["--hosts.coordinator", "localhost:1", "--hosts.processes", "2", "--hosts.process_id", "0"]
    assert cli.main(["train", "--out", str(out), *flags]) == 2
    assert "hosts: cannot join the other processes: " in capsys.readouterr().err
    assert not out.exists()


def test_processes_share_devices_evenly(monkeypatch):
    """Three processes with four devices each: as many of each, and no fewer seeds than processes."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "device_count", lambda: 12)
    assert [runner.choose_devices(*asked) for asked in ((20, None, None), (8, None, None), (20, 4, None), (20, None, 9))] == [12, 6, 3, 9]
    with pytest.raises(ValueError, match="devices: 3 processes cannot share 4 evenly"):
        runner.choose_devices(8, None, 4)
    with pytest.raises(ValueError, match="seeds: 2 side by side are fewer than the 3 processes"):
        runner.choose_devices(8, 2, None)


def test_what_the_first_process_fails_at_the_others_hear_of(monkeypatch):
    """Its own error there, an OSError elsewhere, which does nothing itself."""

    def fail() -> None:
        raise KeyError("no")

    monkeypatch.setattr(hosts, "most", lambda *_: (1.0,))
    with pytest.raises(KeyError, match="no"):
        hosts.first_does(fail)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    with pytest.raises(OSError, match="the first process has failed"):
        hosts.first_does(lambda: pytest.fail("did it"))


class Processes:
    """`knife-jax train` of four seeds in several processes, or in one with as many devices."""

    def __init__(self, tmp_path):
        self.config, self.cache = tmp_path / "small.yaml", tmp_path / "cache"
        self.config.write_text(resolve(SHORT).to_yaml())

    def start(self, out, count, cluster=False) -> list[Any]:
        """Starts or resumes a run in so many processes, which are given a coordinator or SLURM's variables."""
        how = ["--resume"] if (out / "run.json").exists() else ["--config", str(self.config), "--seeds", "4"]
        how += ["--out", str(out), "--saving.every_minutes", "0", "--chunk_rounds", "5"]
        environment = {**os.environ, "KNIFE_JAX_CACHE": str(self.cache), "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={2 // count}"
        port = _free_port()
        started = []
        for index in range(count):
            told: list[str] = []
            if cluster:
                told = ["--hosts.detect"]
                names = {"JOB_ID": port, "STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": index, "LOCALID": index}
                environment |= {f"SLURM_{name}": str(value) for name, value in names.items()}
            elif count > 1:
                told = ["--hosts.coordinator", f"localhost:{port}", "--hosts.processes", str(count), "--hosts.process_id", str(index)]
            command = [sys.executable, "-m", "knife_jax.cli", "train", *how, *told]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, env=dict(environment), **pipes))
        return started


def _free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def _finished(processes):
    """What each of them said, and how it ended."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    return said, [process.returncode for process in processes]


@pytest.mark.slow
def test_two_processes_do_one_run_together_and_resume_it(tmp_path):
    """The bits of one process with two devices, after a SIGTERM to the second, which both obey; only the first one writes.

    They find each other by a coordinator, and when resumed as in a job of SLURM.
    """
    run, out, alone = Processes(tmp_path), tmp_path / "out", tmp_path / "alone"
    both = run.start(out, 2)
    while len(list((out / "checkpoints").glob("0*"))) < 1 and all(process.poll() is None for process in both):
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    said, codes = _finished(both)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert all("go on with: knife-jax train --resume" in text for text in said)
    said, codes = _finished(run.start(out, 2, cluster=True))
    assert codes == [0, 0], "\n".join(said)
    assert "results in" in said[0] and "results in" not in said[1]
    said, codes = _finished(run.start(alone, 1))
    assert codes == [0], said
    together, single = np.load(out / "metrics.npz"), np.load(alone / "metrics.npz")
    assert set(together.files) == set(single.files) and len(together["eval.return"]) == 4
    for name in single.files:
        np.testing.assert_array_equal(together[name], single[name], err_msg=name)
    assert len((out / "log.jsonl").read_text().splitlines()) == len((alone / "log.jsonl").read_text().splitlines()) == 6
    assert '"process_count": 2' in (out / "summary.json").read_text()

"""Sweeps, inside one program and over several: the runs that would be made one by one, and refusals with the reason."""

import os
import signal

import jax
import numpy as np
import pytest

from knife_jax import cli, rows, runner
from knife_jax.config import Config, resolve
from knife_jax.interrupts import RunStoppedError
from knife_jax.run_directory import Saving
from knife_jax.sweep import combinations, groups, lanes, parse_sweep, parts
from knife_jax.wandb_log import WandbSettings
from tests.test_logs import _read_wandb
from tests.test_runner import SMALL

pytestmark = pytest.mark.usefixtures("compile_once")

SHORT = {**SMALL, "train": {"env_steps_per_task": 64}, "evaluation": {"episodes": 1, "per_task": 1}, "plasticity": {"diagnostics": False}}
SWEEP = {"optimizer.learning_rate": (1e-2, 1e-4)}


@pytest.mark.slow
def test_a_sweep_holds_the_runs_that_would_be_made_one_by_one(tmp_path):
    """Two rates x two seeds, three lanes at a time, stopped and resumed through the command; results and logs apart for each rate."""
    out = tmp_path / "out"

    def die(status):
        if status.point.batch == 1:
            raise RuntimeError

    options = {"seeds": 2, "seeds_per_batch": 3, "saving": Saving(every_minutes=0.0), "wandb": WandbSettings(mode="offline")}
    with pytest.raises(RuntimeError):
        runner.run_sweep(SHORT, SWEEP, out=out, progress=die, **options)
    assert cli.main(["train", "--resume", "--out", str(out), "--wandb.mode", "offline"]) == 0
    labels = ["optimizer.learning_rate=0.01", "optimizer.learning_rate=0.0001"]
    for label, rate in zip(labels, SWEEP["optimizer.learning_rate"], strict=True):
        config = Config.from_yaml(out / label / "config.yaml")
        assert config.optimizer.learning_rate == rate
        found, alone = np.load(out / label / "metrics.npz"), runner.run(config, seeds=2).metrics
        for name in ("eval/return", "train/q_tot", "train/loss", "updates"):
            np.testing.assert_allclose(found[name.replace("/", ".")][:, :2], alone[name][:, :2], rtol=1e-4)
    one, other = (np.load(out / label / "metrics.npz")["train.q_tot"] for label in labels)
    assert not np.allclose(one[:, 1:2], other[:, 1:2], rtol=1e-4)
    assert [line["group"] for line in rows.read_lines(out)] == [labels[0]] * 6 + [labels[1]] * 6
    (first, *_) = _read_wandb(out)
    assert any(name.startswith(labels[0] + "/eval/return") for row in first[4] for name in row)


def test_lanes_are_combinations_times_seeds():
    """In that order; a group is what one batch holds of a combination."""
    chosen = combinations(resolve(SMALL), {"learner.gamma": (0.5, 0.9), "optimizer.learning_rate": (1e-3,)})
    assert [combination.label for combination in chosen] == [f"learner.gamma={g},optimizer.learning_rate=0.001" for g in (0.5, 0.9)]
    assert [combination.config.learner.gamma for combination in chosen] == [0.5, 0.9]
    seeds, swept = lanes(chosen, 3, np.arange(6))
    np.testing.assert_array_equal(seeds, [0, 1, 2, 0, 1, 2])
    np.testing.assert_allclose(swept["learner"]["gamma"], [0.5] * 3 + [0.9] * 3)
    assert [(label[:17], part) for label, part in groups(chosen, 3, 2, 3)] == [
        ("learner.gamma=0.5", slice(0, 1)),
        ("learner.gamma=0.9", slice(1, 3)),
    ]
    assert combinations(resolve(SMALL), {})[0].label == ""


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"optimizer.learning_rat": (1.0, 2.0)}, "optimizer.learning_rat: no such field; did you mean optimizer.learning_rate"),
        ({"optimiser.learning_rate": (1.0, 2.0)}, "optimiser: no such field; did you mean optimizer"),
        ({"agent.hidden_size": (4, 0)}, "agent.hidden_size: .*greater than 0, got 0"),
        ({"agent.hidden_size": (4, 4)}, "differ from each other"),
        ({"plasticity.interval_updates": (5, 5000)}, "plasticity.interval_updates: 5000 never comes"),
        ({"learner.mixer": ("vdn", "qmx")}, "learner.mixer: .*did you mean 'qmix'"),
        ({"learner.gamma": ("half", 0.9)}, "learner.gamma takes numbers"),
        ({"learner.gamma": (0.5, 1.5)}, "learner.gamma: .*less than or equal to 1, got 1.5"),
        ({"learner.gamma": ()}, "learner.gamma needs values"),
        ({"learner.gamma": (0.5, 0.5)}, "differ from each other"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_refused(sweep, message, tmp_path):
    """Before anything compiles or is written, though only a later program would fail."""
    with pytest.raises(ValueError, match=message):
        runner.run_sweep(SMALL, sweep, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["learner.target_interval_updates", "plasticity.interval_updates", "agent.hidden_size"])
def test_intervals_and_shapes_are_refused_inside_one_program(name):
    """With the reason."""
    with pytest.raises(ValueError, match=f"{name} cannot be swept inside one program: .*; it takes a program for every value"):
        combinations(resolve(SMALL), {name: (5, 6)})


def test_a_sweep_is_split_into_programs():
    """One for every combination of what is no data; the rest is swept inside each; labels are joined."""
    sweep = {"agent.hidden_size": (4, 8), "learner.gamma": (0.5, 0.9), "learner.mixer": ("vdn", "qmix")}
    found = parts(resolve(SMALL), sweep)
    assert [part.label for part in found] == [
        f"agent.hidden_size={size},learner.mixer={mixer}" for size in (4, 8) for mixer in ("vdn", "qmix")
    ]
    assert [(part.config.agent.hidden_size, part.config.learner.mixer) for part in found] == [
        (4, "vdn"),
        (4, "qmix"),
        (8, "vdn"),
        (8, "qmix"),
    ]
    assert all(part.sweep == {"learner.gamma": (0.5, 0.9)} for part in found)
    assert found[0].labelled({"learner.gamma=0.5": 1, "": 2}) == {found[0].label + ",learner.gamma=0.5": 1, found[0].label: 2}
    (whole,) = parts(resolve(SMALL), SWEEP)
    assert (whole.label, whole.sweep) == ("", SWEEP)


@pytest.mark.slow
def test_a_sweep_over_several_programs_is_stopped_and_resumed(tmp_path):
    """Two sizes, the second stopped by a signal: each is the run of its own, to the bits, and what was done is not done again."""
    out, sizes = tmp_path / "out", {"agent.hidden_size": (4, 3)}
    labels = [f"agent.hidden_size={size}" for size in (4, 3)]

    def stop(status):
        if (out / labels[1]).exists() and status.point.position == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStoppedError, match=f"with the whole sweep: knife-jax train --resume --out {out}$"):
        runner.run_sweep(SHORT, sizes, seeds=2, out=out, progress=stop, chunk_rounds=4)
    before = (out / labels[0] / "metrics.npz").stat().st_mtime_ns
    assert not (out / labels[1] / "metrics.npz").exists()
    with pytest.raises(ValueError, match=r"sweep\.agent\.hidden_size: .* there, .* here"):
        runner.run_sweep(SHORT, {"agent.hidden_size": (4, 3, 2)}, seeds=2, out=out, resume=True)
    finished = runner.run_sweep(SHORT, sizes, seeds=2, out=out, resume=True)
    assert list(finished) == labels and (out / labels[0] / "metrics.npz").stat().st_mtime_ns == before
    for label, result in finished.items():
        config = Config.from_yaml(out / label / "config.yaml")
        alone = runner.run(config, seeds=2)
        for name, values in alone.metrics.items():
            np.testing.assert_array_equal(result.metrics[name], values, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, result.variables, alone.variables)
    assert cli.main(["train", "--resume", "--out", str(out)]) == 2


def test_flags_of_a_sweep():
    """Every flag a field with its values."""
    assert parse_sweep(["a.b=1e-4,5e-4", "c.d=1"]) == {"a.b": (1e-4, 5e-4), "c.d": (1,)}
    assert parse_sweep(["a.b=vdn,qmix", "c.d=true,false"]) == {"a.b": ("vdn", "qmix"), "c.d": (True, False)}
    for texts, message in ((["a.b"], "expected section.field=value"), (["a.b=1,"], "got 'a.b=1,'"), (["a.b=1", "a.b=2"], "given twice")):
        with pytest.raises(ValueError, match=message):
            parse_sweep(texts)

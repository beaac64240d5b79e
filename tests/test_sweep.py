"""Numbers swept beside the seeds: the runs that would be made one by one, and refusals with the reason."""

import numpy as np
import pytest

from knife_jax import cli, rows, runner
from knife_jax.config import Config, resolve
from knife_jax.run_directory import Saving
from knife_jax.sweep import combinations, groups, lanes, parse_sweep
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
        ({"learner.target_interval_updates": (1, 2)}, "cannot be swept inside one program: .*; run it once for every value"),
        ({"plasticity.interval_updates": (1, 2)}, "plasticity.interval_updates cannot be swept"),
        ({"optimizer.learning_rat": (1.0, 2.0)}, "unknown sweepable field .*did you mean 'optimizer.learning_rate'"),
        ({"learner.gamma": (0.5, 1.5)}, "learner.gamma: .*less than or equal to 1, got 1.5"),
        ({"learner.gamma": ()}, "learner.gamma needs values"),
        ({"learner.gamma": (0.5, 0.5)}, "differ from each other"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_refused(sweep, message):
    """Before anything compiles."""
    with pytest.raises(ValueError, match=message):
        runner.run_sweep(SMALL, sweep)


def test_flags_of_a_sweep():
    """Every flag a field with its values."""
    assert parse_sweep(["a.b=1e-4,5e-4", "c.d=1"]) == {"a.b": (1e-4, 5e-4), "c.d": (1.0,)}
    for texts, message in ((["a.b"], "expected section.field=value"), (["a.b=x"], "got 'a.b=x'"), (["a.b=1", "a.b=2"], "given twice")):
        with pytest.raises(ValueError, match=message):
            parse_sweep(texts)

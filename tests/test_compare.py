"""Comparisons of cures: pairing by seed, verdicts, and the files of `knife-jax compare`."""

import io
import json

import numpy as np
import pytest

from knife_jax import Config, cli, compare, comparison_files, results
from knife_jax.run_result import RunResult
from knife_jax.statistics import probability_of_improvement

SMALL = ["--preset", "matrix_drift", "--env.scenario", "custom", "--env.options", "{payoff: [[1, 0], [0, 2]]}", "--agent.hidden_size", "8"]
SHORT = [
    "--learner.mixer",
    "vdn",
    "--train.env_steps_per_task",
    "480",
    "--evaluation.per_task",
    "2",
    "--plasticity.interval_updates",
    "20",
    "--replay.batch_size",
    "8",
]


def _run(final, order=(0, 1, 0)):
    """A finished run whose last evaluation of every task is given, `[S, P]`."""
    final = np.asarray(final, float)
    curves = np.stack([np.zeros_like(final), final], axis=-1).reshape(len(final), -1)
    metrics = {"eval/won": curves, "eval/return": 10 * curves, "env_steps": np.arange(curves.shape[1])}
    return RunResult(Config(), metrics, ("a", "b"), order, {}, {}, {"seeds": len(final)})


def test_differences_are_paired_by_seed():
    """The mean over the later tasks of the difference within each seed: +1 on every seed, whatever the seeds' own levels."""
    none = [[1, 0.1 * seed, 0.2 * seed] for seed in range(6)]
    better = [[0, 0.1 * seed + 1, 0.2 * seed + 1] for seed in range(6)]
    compared = compare.compare({"none": _run(none), "cure": _run(better)})
    assert list(compared.against) == ["cure"]
    np.testing.assert_allclose(compared.against["cure"], (1.0, 1.0, 1.0), rtol=1e-6)
    assert compared.sentences[0].endswith("better")
    np.testing.assert_allclose(compared.final["none"][2].value, 0.5)


@pytest.mark.parametrize(
    ("shift", "seeds", "judgement"),
    [(-0.5, 8, "worse"), (0.0, 8, "undecided: the interval holds 0"), (0.5, 4, "undecided: fewer than 5 seeds")],
)
def test_verdicts(shift, seeds, judgement):
    """Worse, undecided, and too few seeds to say."""
    levels = np.random.default_rng(0).normal(size=(seeds, 3))
    noise = np.random.default_rng(1).normal(size=(seeds, 3)) * 0.1
    noise -= noise[:, 1:].mean()
    compared = compare.compare({"none": _run(levels), "cure": _run(levels + noise + shift)})
    assert compared.sentences[0].endswith(judgement)


def test_methods_are_names_or_mappings():
    """Options stand beside the name; the label is the name, or the whole text where that is taken."""
    configs = compare.method_configs(Config(), ["none", "redo", "{name: redo, tau: 0.5}"])
    assert list(configs) == ["none", "redo", "{name: redo, tau: 0.5}"]
    assert [config.plasticity.options for config in configs.values()] == [{}, {}, {"tau": 0.5}]
    with pytest.raises(ValueError, match="given twice"):
        compare.method_configs(Config(), ["none", "none", "none"])
    with pytest.raises(ValueError, match="did you mean 'redo'"):
        compare.method_configs(Config(), ["none", "reddo"])


def test_the_command_writes_everything(tmp_path, capsys):
    """Table, sentence, comparison and the files of every method."""
    out = tmp_path / "compared"
    assert cli.main(["compare", *SMALL, *SHORT, "--seeds", "2", "--methods", "none", "redo", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "redo against none" in text and "undecided: fewer than 5 seeds" in text
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.png", "0-none", "1-redo"}
    content = json.loads((out / "comparison.json").read_text())
    assert list(content["final"]) == ["none", "redo"] and content["seeds"] == 2
    cured = np.load(out / "1-redo" / "metrics.npz")
    assert cured["cure.agent.hidden_1.treated"].shape == (2, 3)
    again = tmp_path / "again"
    assert cli.main(["compare", str(out / "0-none"), str(out / "1-redo"), "--out", str(again)]) == 0
    assert "1-redo against 0-none" in capsys.readouterr().out
    compared = json.loads((again / "comparison.json").read_text())
    assert list(compared["final"].values()) == list(content["final"].values())
    assert cli.main(["compare", str(out / "0-none"), str(tmp_path)]) == 2
    assert "no results of a finished run" in capsys.readouterr().err
    assert cli.main(["compare", str(out / "0-none"), str(out / "0-none")]) == 2
    assert "two runs or more, each once" in capsys.readouterr().err


def test_mistakes_are_told_before_the_first_run(tmp_path, capsys):
    """A bad second method stops the command before the first is trained."""
    bad = "{name: knife, reserve: -1}"
    assert cli.main(["compare", *SMALL, *SHORT, "--methods", "none", bad, "--out", str(tmp_path / "out")]) == 2
    assert "plasticity.options: reserve" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_into_memory_is_told_before_the_first_run(tmp_path, capsys, monkeypatch):
    """Also where only the second method needs too much."""
    monkeypatch.setattr(cli, "available_memory", lambda: 40_000_000)
    wide = "{name: knife, reserve: 40000.0, when_full: skip}"
    assert cli.main(["compare", *SMALL, *SHORT, "--methods", "none", wide, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "not even one seed fits" in said.err and said.out.count("memory:") == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_compared_are_refused(tmp_path, monkeypatch):
    """Other seeds, evaluations or tasks than the first run's."""
    runs = {"one": _run([[1, 1, 1]] * 3), "seeds": _run([[1, 1, 1]] * 2), "tasks": _run([[1, 1, 1]] * 3, (0, 1, 1))}
    for run in runs.values():
        run.provenance["first_seed"] = 0
    monkeypatch.setattr(results, "load", lambda path: runs[path.name])
    for name, message in (("seeds", "seeds has other seeds than one: 0 to 1 there, 0 to 2"), ("tasks", "tasks has other tasks than one")):
        with pytest.raises(ValueError, match=message):
            compare.load_runs([tmp_path / "one", tmp_path / name])


def test_probability_of_improvement():
    """Against counting all pairs; ties count half; one seed has no interval."""
    better, worse = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0])
    estimate = probability_of_improvement(better, worse)
    np.testing.assert_allclose(estimate.value, (1 + 0 + 1 + 0.5 + 1 + 1) / 6)
    assert estimate.low < estimate.value < estimate.high <= 1.0
    assert np.isnan(probability_of_improvement(better[:1], worse).low)


def test_the_picture_shows_curves_bars_and_profiles():
    """A bar per method and task as high as its mean, its interval beside it; a profile per method that falls from 1 to 0."""
    levels = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 0, 0]])
    runs = {"none": _run(levels), "cure": _run(np.ones((5, 3)))}
    compared = compare.compare(runs)
    _, tasks, profile = figure_axes = comparison_files.plot(runs, compared).axes
    assert len(figure_axes) == 3
    heights = [bar.get_height() for bar in tasks.patches]  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(heights, [1.0, 0.4, 0.4, 1.0, 1.0, 1.0])
    segments = tasks.collections[0].get_segments()  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(segments[1][:, 1], compared.final["none"][1][1:])
    none, cure = (np.asarray(line.get_ydata()) for line in profile.lines)
    np.testing.assert_allclose([none[0], none[-1], cure[0], cure[-1]], [0.6, 0.0, 1.0, 0.0])
    assert np.all(np.diff(none) <= 0)


@pytest.mark.parametrize("reports_wins", [True, False])
def test_one_seed_has_a_picture_without_intervals(reports_wins):
    """Neither bars nor profile fail where there is no interval to draw; profiles of returns span the returns."""
    runs = {"none": _run([[1, 0, 1]]), "cure": _run([[1, 1, 1]])}
    compared = compare.compare(runs, reports_wins)
    comparison_files.plot(runs, compared).savefig(io.BytesIO())
    np.testing.assert_allclose(compared.thresholds[[0, -1]], [0, 1] if reports_wins else [5, 10])
    assert np.isnan(compared.profiles["cure"].low).all()

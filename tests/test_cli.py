"""The command line, its files, and what is left after a failure."""

import json

import numpy as np
import pytest
import yaml

from knife_jax import cli, results, runner
from knife_jax.config import Config
from knife_jax.policy import load_policy

SMALL = [
    *("--env.options", "{num_tasks: 2}", "--agent.hidden_size", "8", "--qmix.embed_size", "8", "--qmix.hypernet_size", "8"),
    *("--collect.num_envs", "4", "--replay.capacity_env_steps", "64", "--replay.batch_size", "8"),
    *("--train.env_steps_per_task", "40", "--evaluation.per_task", "2"),
    "--plasticity.no_diagnostics",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run through the command line, in a directory of its own."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert cli.main(["train", *SMALL, "--seeds", "3", "--out", str(out)]) == 0
    return out


def test_train_writes_all_its_files(finished):
    """Metrics with the seed axis, the resolved configuration, the summary and the plot."""
    metrics = np.load(finished / "metrics.npz")
    assert metrics["eval.return"].shape == (3, 9)
    np.testing.assert_array_equal(metrics["env_steps"], [0, 20, 40, 40, 60, 80, 80, 100, 120])
    config = Config.from_yaml(finished / "config.yaml")
    assert (config.agent.hidden_size, config.env.options) == (8, {"num_tasks": 2})
    summary = json.loads((finished / "summary.json").read_text())
    assert [task["name"] for task in summary["tasks"]] == ["permuted_1", "permuted_2", "permuted_1"]
    assert summary["provenance"]["seeds"] == 3
    assert summary["provenance"]["versions"]["jax"]
    assert load_policy(finished, 2).networks.tasks.names == ("permuted_1", "permuted_2")
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in finished.parent.iterdir()] == ["small"]


def test_the_same_seed_alone_is_the_same_run(finished):
    """Seed 2 of three is seed 2 of one, at the start of training to float tolerance."""
    config = Config.from_yaml(finished / "config.yaml")
    alone = runner.run(config, seeds=1, first_seed=2)
    np.testing.assert_allclose(alone.metrics["train/q_tot"][0, 1], np.load(finished / "metrics.npz")["train.q_tot"][2, 1], rtol=1e-4)


def test_results_are_never_overwritten(finished, capsys):
    """A second run into the same directory is refused before it starts."""
    assert cli.main(["train", *SMALL, "--out", str(finished)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    """An error in the middle of writing removes what was written, and the directory never appears."""
    result = runner.run(
        {
            "preset": "matrix_drift",
            **yaml.safe_load("{train: {env_steps_per_task: 640}, evaluation: {per_task: 1}, plasticity: {diagnostics: false}}"),
        }
    )
    monkeypatch.setattr(results, "plot_learning_curve", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        results.save(result, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "matrix_drft"], "did you mean 'matrix_drift'"),
        (["train", "--seeds", "0"], "--seeds: at least 1"),
        (["train", "--env.name", "smx"], "env.name: unknown game 'smx'; did you mean 'smax'"),
        (["train", "--replay.batch_size", "1000000"], "replay.batch_size"),
        (["train", "--config", "no_such_file.yaml"], "no_such_file.yaml"),
        (["trian"], "unknown command 'trian'"),
        ([], "usage"),
    ],
)
def test_mistakes_are_told_and_exit_with_2(arguments, message, capsys, tmp_path, monkeypatch):
    """Nothing is written, nothing compiles."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learner.mixer", "qmx"], "qmx"),
        (["--learner.mixr", "qmix"], "--learner.mixer"),
        (["--agent.hidden_size", "-3"], "greater than 0"),
        (["--agent.hidden_size", "many"], "many"),
    ],
)
def test_bad_flags_are_told_and_exit_with_2(arguments, message, capsys):
    """The parser's own refusals."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_explains_every_field(capsys):
    """Every field of the configuration is a flag with a sentence."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section, values in Config().to_dict().items():
        for field in values:
            assert f"--{section}.{field}" in text
    assert "Gradient steps between hard copies" in text


def test_flags_lie_over_the_file_over_the_preset(tmp_path):
    """The last word is the flag's."""
    path = tmp_path / "mine.yaml"
    path.write_text("learner: {mixer: vdn, gamma: 0.5}\n")
    parsed = cli.parse(cli.TrainArguments, ["--preset", "pymarl_qmix", "--config", str(path), "--learner.gamma", "0.25"])
    assert (parsed.fields.learner.mixer, parsed.fields.learner.gamma, parsed.fields.collect.mode) == ("vdn", 0.25, "episode")


def test_list_names_games_mixers_and_presets(capsys):
    """What can be asked for is listed."""
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("matrix", "predator_prey", "smax", "qplex", "pymarl2_qmix", "continual_backprop"):
        assert name in text

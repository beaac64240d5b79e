"""Configurations: what is accepted, what is refused, and how the user is told."""

import jax
import pytest
import yaml

from knife_jax import PRESETS, Config, make_train
from knife_jax.config import merge_hyper, resolve
from knife_jax.presets import preset_config

REFUSED = {
    "unknown section": ({"lerner": {}}, r"lerner: no such field; did you mean learner\?"),
    "unknown field": ({"learner": {"mixr": "vdn"}}, r"learner\.mixr: no such field; did you mean learner\.mixer\?"),
    "unknown mixer": ({"learner": {"mixer": "qmx"}}, r"learner\.mixer: .*'qmx'; did you mean 'qmix'\?"),
    "text for a number": ({"agent": {"hidden_size": "64"}}, r"agent\.hidden_size: .*integer.*'64'"),
    "number for a flag": ({"agent": {"recurrent": 1}}, r"agent\.recurrent: .*boolean.*1"),
    "fraction for a count": ({"replay": {"batch_size": 2.5}}, r"replay\.batch_size: .*2\.5"),
    "number for a section": ({"learner": 3}, r"learner: expected a section.*3"),
    "negative size": ({"agent": {"hidden_size": -1}}, r"agent\.hidden_size: .*greater than 0.*-1"),
    "zero environments": ({"collect": {"num_envs": 0}}, r"collect\.num_envs: .*greater than 0"),
    "discount above one": ({"learner": {"gamma": 1.5}}, r"learner\.gamma: .*1\.5"),
    "not a number": ({"optimizer": {"learning_rate": float("nan")}}, r"optimizer\.learning_rate: .*finite"),
    "no such depth": ({"qmix": {"hypernet_layers": 3}}, r"qmix\.hypernet_layers: .*1 or 2.*3"),
    "unknown preset": ({"preset": "pymarl_qmx"}, r"unknown preset 'pymarl_qmx'; did you mean 'pymarl_qmix'\?"),
    "unknown game": ({"env": {"name": "matrx"}}, r"env\.name: unknown game 'matrx'; did you mean 'matrix'\?"),
    "unknown scenario": ({"env": {"scenario": "qtrn"}}, r"env\.scenario: .*'qtrn'; did you mean 'qtran'\?"),
    "unknown map": ({"env": {"name": "smax", "scenario": "3mm"}}, r"env\.scenario: .*'3mm'; did you mean '3m'\?"),
    "unknown option": ({"env": {"scenario": "qtran", "options": {"payof": [[1]]}}}, r"env\.options: .*payof"),
    "a field among the options": ({"env": {"options": {"scenario": "qtran"}}}, r"env\.options: 'scenario' is a field of env itself"),
    "payoff of one dimension": ({"env": {"scenario": "qtran", "options": {"payoff": [1, 2]}}}, r"env\.options: .*2-D.*\(2,\)"),
    "payoff of three": ({"env": {"scenario": "qtran", "options": {"payoff": [[[1.0]]]}}}, r"env\.options: .*2-D.*\(1, 1, 1\)"),
    "payoff without end": ({"env": {"scenario": "qtran", "options": {"payoff": [[1, float("inf")]]}}}, r"env\.options: .*finite"),
    "different actions": (
        {"env": {"scenario": "qtran", "tasks": [{}, {"payoff": [[1, 2], [3, 4]]}]}},
        r"env\.tasks: tasks\[1\]: 2 actions, but tasks\[0\] has 3",
    ),
    "batch above the buffer": (
        {"env": {"scenario": "qtran"}, "replay": {"capacity_env_steps": 256, "batch_size": 512}},
        r"replay\.batch_size: 512 sequences .* do not fit",
    ),
    "buffer below a round": (
        {"env": {"scenario": "qtran"}, "replay": {"capacity_env_steps": 100}},
        r"replay\.capacity_env_steps: .*less than",
    ),
    "episodes in another mode": (
        {"env": {"scenario": "qtran"}, "replay": {"capacity_episodes": 10}},
        r"replay\.capacity_episodes: .*'episode'",
    ),
    "a start never reached": (
        {"env": {"scenario": "qtran"}, "train": {"learning_starts_env_steps": 10**7}},
        r"train\.learning_starts_env_steps: .*never fit",
    ),
    "an end before the start": (
        {"env": {"scenario": "qtran"}, "train": {"env_steps_per_task": 300}, "evaluation": {"per_task": 1}},
        r"train\.env_steps_per_task: 300 slots end before the first gradient step",
    ),
    "a name that is none": ({"learner": {3: 1}}, r"learner\.3: no such field"),
    "a preset that is none": ({"preset": ["a"]}, r"unknown preset"),
    "quoted number": ({"optimizer": {"learning_rate": "5e-4"}}, r"learning_rate: .*5\.0e-4"),
    "endless reward": ({"env": {"name": "predator_prey", "options": {"miscapture_punishment": float("inf")}}}, r"env\.options: .*finite"),
    "no steps": ({"env": {"name": "smax", "options": {"max_steps": 0}}}, r"env\.options: max_steps"),
    "nothing but burn-in": (
        {"env": {"scenario": "two_step"}, "replay": {"burn_in": 16}},
        r"replay\.burn_in: 16 leaves nothing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_configurations_are_refused_with_the_field_path(case):
    """Before anything compiles: `make_train` itself raises."""
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_train(config)


def test_every_mistake_is_reported_at_once():
    """One line each."""
    with pytest.raises(ValueError) as caught:
        Config.from_dict({"agent": {"hidden_size": 0}, "learner": {"gamma": -1.0, "mixer": "x"}})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["agent.hidden_size", "learner.mixer", "learner.gamma"]


def test_direct_construction_is_validated_and_frozen():
    """The dataclasses themselves refuse bad values and changes."""
    from dataclasses import FrozenInstanceError, replace

    config = Config()
    with pytest.raises(ValueError, match="greater than 0"):
        replace(config.agent, hidden_size=-2)
    with pytest.raises(FrozenInstanceError):
        config.agent.hidden_size = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_survive_yaml(name, tmp_path):
    """Every preset is valid; text and file give the same configuration again."""
    config = preset_config(name)
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "config.yaml") == config
    assert resolve(name) == config


def test_presets_are_what_they_claim():
    """The settings by which the published ones are known."""
    pymarl, pymarl2, jaxmarl, qplex = map(preset_config, ("pymarl_qmix", "pymarl2_qmix", "jaxmarl_qmix_smax", "qplex_paper"))
    assert (pymarl.optimizer.name, pymarl.collect.mode, pymarl.collect.num_envs, pymarl.replay.capacity_episodes) == (
        "rmsprop",
        "episode",
        1,
        5000,
    )
    assert (pymarl2.optimizer.name, pymarl2.learner.td_lambda, pymarl2.collect.num_envs, pymarl2.replay.batch_size) == ("adam", 0.6, 8, 128)
    assert (jaxmarl.optimizer.name, jaxmarl.learner.reward_scale, jaxmarl.learner.loss_mean) == ("radam", 10.0, "all")
    assert (jaxmarl.learner.mixer_initializer, jaxmarl.learner.mixer_init_scale, jaxmarl.agent.hidden_size) == ("orthogonal", 0.001, 512)
    assert (qplex.learner.mixer, qplex.qplex.num_kernels, qplex.qplex.adv_layers) == ("qplex", 4, 1)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("smax_qmix", "jaxmarl_qmix_smax")])
def test_presets_trace_on_a_small_game(name):
    """Each published setting makes a program; traced, not run."""
    shapes = jax.eval_shape(make_train({"preset": name, "env": {"name": "matrix", "scenario": "two_step"}}), jax.random.key(0))
    assert "eval/return" in shapes["metrics"]


def test_a_preset_in_a_dict_is_a_base():
    """Fields beside `preset` override it."""
    config = resolve({"preset": "pymarl_qmix", "learner": {"mixer": "vdn"}})
    assert config.learner.mixer == "vdn"
    assert config.collect.mode == "episode"
    with pytest.raises(TypeError):
        resolve(3)  # pyright: ignore[reportArgumentType]


def test_another_game_leaves_the_scenario_of_the_preset_behind(tmp_path):
    """A preset's scenario, options and tasks belong to its own game."""
    assert resolve({"preset": "matrix_drift", "env": {"name": "smax"}}).env.scenario is None
    assert resolve({"preset": "matrix_drift", "env": {"options": {"num_tasks": 2}}}).env.scenario == "permuted"
    (tmp_path / "bad.yaml").write_text("{a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        Config.from_yaml(tmp_path / "bad.yaml")


def test_hyper_holds_the_swept_floats_and_merges():
    """Sections and fields are those of the configuration; others are refused."""
    config = Config()
    assert config.hyper["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    assert set(config.hyper) == {"learner", "optimizer", "exploration"}
    merged = merge_hyper(config, {"learner": {"gamma": 0.5}})
    assert merged["learner"]["gamma"] == 0.5
    assert config.hyper["learner"]["gamma"] == 0.99
    with pytest.raises(ValueError, match="expected a section"):
        merge_hyper(config, {"learner": 0.5})
    with pytest.raises(ValueError, match=r"learner\.gama.*did you mean 'learner\.gamma'"):
        merge_hyper(config, {"learner": {"gama": 0.5}})

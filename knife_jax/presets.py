"""Named configurations: published settings, and this library's own experiments.

A preset of an algorithm leaves the game alone; give it with `env`. What each is after is in its comment; where the source counts in
episodes or rounds, the field's unit here is the gradient step or the environment step, converted. Lengths of training count slots: in
the mode `episode` a slot that idles after an early end counts too, so a budget equal to the source's holds fewer episodes than there.
"""

from collections.abc import Mapping
from typing import Any

from envs.base import unknown_name
from knife_jax.config import Config

_PYMARL: dict[str, Any] = {
    "collect": {"mode": "episode", "num_envs": 1},
    "replay": {"capacity_episodes": 5000, "batch_size": 32},
    "train": {"updates_per_round": 1, "env_steps_per_task": 2_050_000},
    "learner": {"target_interval_updates": 200},
    "exploration": {"anneal_env_steps": 50_000},
    "evaluation": {"episodes": 32, "per_task": 200},
}
"""oxwhirl/pymarl `default.yaml`: one episode and one gradient step at a time, RMSProp, target copied every 200 episodes (= updates)."""

_PYMARL2: dict[str, Any] = {
    "collect": {"mode": "episode", "num_envs": 8},
    "replay": {"capacity_episodes": 5000, "batch_size": 128},
    "train": {"updates_per_round": 1, "env_steps_per_task": 10_050_000},
    "learner": {"target_interval_updates": 25, "td_lambda": 0.6, "loss_scale": 0.5},
    "optimizer": {"name": "adam", "learning_rate": 1e-3, "eps": 1e-8},
    "exploration": {"anneal_env_steps": 100_000},
    "evaluation": {"episodes": 32, "per_task": 1000},
}
"""hijkzzz/pymarl2: 8 environments, Adam, TD(0.6), half the squared error; 200 episodes between target copies are 25 updates."""

_MATRIX_DRIFT: dict[str, Any] = {
    "env": {"name": "matrix", "scenario": "permuted"},
    "agent": {"recurrent": False, "last_action": False},
    "collect": {"num_envs": 8, "rollout_length": 1},
    "replay": {"capacity_env_steps": 16_384, "batch_size": 32, "sequence_length": 1},
    "train": {"env_steps_per_task": 16_000, "updates_per_round": 1},
    "exploration": {"anneal_env_steps": 8_000, "epsilon_finish": 0.05},
    "evaluation": {"episodes": 1, "per_task": 20},
}
"""The main job: five permutations of the paper's payoff and the first again, 2,000 updates each."""

_MATRIX_CALIBRATION: dict[str, Any] = {
    "collect": {"num_envs": 1, "rollout_length": 1},
    "replay": {"capacity_env_steps": 5_000, "batch_size": 32, "sequence_length": 1},
    "train": {"env_steps_per_task": 20_000, "updates_per_round": 1},
    "exploration": {"epsilon_start": 1.0, "epsilon_finish": 1.0},
    "evaluation": {"episodes": 1, "per_task": 10},
}
"""How the QPLEX paper runs matrix games: recurrent agents, uniform data, one gradient step per episode, a buffer of 5,000."""

_SMAX_QMIX: dict[str, Any] = {
    "env": {"name": "smax", "scenario": "3m"},
    "collect": {"num_envs": 16, "rollout_length": 16},
    "replay": {"capacity_env_steps": 204_800, "batch_size": 32, "sequence_length": 32},
    "learner": {"td_lambda": 0.6, "reward_scale": 10.0},
    "optimizer": {"name": "adam", "learning_rate": 5e-4},
    "train": {"env_steps_per_task": 1_000_000, "updates_per_round": 4},
    "exploration": {"anneal_env_steps": 60_000},
    "evaluation": {"episodes": 64, "per_task": 20},
}
"""QMIX on SMAX 3m in minutes on a processor: 4 gradient steps for every 256 environment steps, TD(0.6), Adam."""

PRESETS: dict[str, Mapping[str, Any]] = {
    "matrix_drift": _MATRIX_DRIFT,
    "smax_qmix": _SMAX_QMIX,
    "matrix_calibration": _MATRIX_CALIBRATION,
    "pymarl_vdn": {**_PYMARL, "learner": {**_PYMARL["learner"], "mixer": "vdn"}},
    "pymarl_qmix": {**_PYMARL, "learner": {**_PYMARL["learner"], "mixer": "qmix"}},
    "pymarl2_vdn": {**_PYMARL2, "learner": {**_PYMARL2["learner"], "mixer": "vdn"}},
    "pymarl2_qmix": {**_PYMARL2, "learner": {**_PYMARL2["learner"], "mixer": "qmix"}},
    "pymarl2_qplex": {
        **_PYMARL2,
        "learner": {**_PYMARL2["learner"], "mixer": "qplex"},
        "qplex": {"num_kernels": 4, "adv_layers": 2},
    },
    # wjh720/QPLEX `qplex_sc2.yaml` (mixer "dmaq"): PyMARL's settings with K = 4 kernels of one layer. Learning starts at 32 stored
    # episodes, the source's at 100; the paper's own online SMAC runs use the Qatten transformation, which is not here.
    "qplex_paper": {
        **_PYMARL,
        "learner": {**_PYMARL["learner"], "mixer": "qplex"},
        "qplex": {"num_kernels": 4, "adv_layers": 1},
    },
    # wjh720/QPLEX `qplex.yaml`: K = 10 kernels of three layers on matrix games, under uniform exploration.
    "qplex_matrix": {
        **_MATRIX_CALIBRATION,
        "learner": {"mixer": "qplex"},
        "qplex": {"num_kernels": 10, "adv_layers": 3},
    },
    # JaxMARL `qmix_rnn` with `ql_rnn_smax`: RAdam, rewards x 10, orthogonal mixers of scale 0.001, the loss divided by all slots. Its
    # target network is copied every 10 rounds of 8 gradient steps, its epsilon falls over the first tenth of 1e7 environment steps.
    "jaxmarl_qmix_smax": {
        "env": {"name": "smax", "scenario": "2s3z"},
        "agent": {"hidden_size": 512, "last_action": False, "initializer": "orthogonal"},
        "learner": {
            "mixer": "qmix",
            "reward_scale": 10.0,
            "loss_mean": "all",
            "target_interval_updates": 80,
            "mixer_initializer": "orthogonal",
            "mixer_init_scale": 0.001,
        },
        "qmix": {"embed_size": 64, "hypernet_size": 256},
        "optimizer": {"name": "radam", "learning_rate": 5e-5, "eps": 1e-8},
        "exploration": {"anneal_env_steps": 1_000_000},
        "collect": {"mode": "rollout", "num_envs": 16, "rollout_length": 128},
        "replay": {"capacity_env_steps": 639_488, "batch_size": 32},
        "train": {"env_steps_per_task": 10_000_000, "updates_per_round": 8, "learning_starts_env_steps": 10_000},
        "evaluation": {"episodes": 512, "per_task": 20},
    },
}
"""Presets by name, each a nested dict over the defaults."""


def preset_config(name: object) -> Config:
    """The configuration of a preset.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return Config.from_dict(PRESETS[name])

"""JaxMARL's own QMIX script, `baselines/QLearning/qmix_rnn.py` in a checkout of its repository, at a configuration of ours."""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import yaml

from envs.jaxmarl_quiet import import_jaxmarl, in_jaxmarl
from knife_jax import Config
from knife_jax.cores import compile_wide

SCRIPT = Path("baselines/QLearning/qmix_rnn.py")
SETTINGS = Path("baselines/QLearning/config/alg/ql_rnn_smax.yaml")
NEVER = 2**31 - 1


class Peer(NamedTuple):
    """Its compiled training.

    Attributes:
        run: with the environment steps after which it may learn, 0 or `NEVER`, gives the gradient steps made, of all seeds.
        rounds: rounds of a run.
        compile_wall: seconds of wall time that compiling took.
        compile_cpu: those of processor time.
    """

    run: Callable[[int], int]
    rounds: int
    compile_wall: float
    compile_cpu: float


def load_script(checkout: Path) -> ModuleType:
    """The script, imported.

    Raises:
        SystemExit: if it is not there, or needs what is not installed.
    """
    for needed in (SCRIPT, SETTINGS):
        if not (checkout / needed).is_file():
            sys.exit(f"--peer: {checkout} is no checkout of JaxMARL's repository, {needed} is not there; see github.com/FLAIROx/JaxMARL")
    import_jaxmarl()
    spec = importlib.util.spec_from_file_location("jaxmarl_qmix_rnn", checkout / SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    try:
        with in_jaxmarl():
            spec.loader.exec_module(script)
    except ImportError as error:
        sys.exit(f"--peer: {SCRIPT} needs what is not installed ({error}); pip install 'jaxmarl[algs]'")
    return script


def their_settings(checkout: Path, config: Config, rounds: int) -> dict[str, Any]:
    """The script's settings for SMAX, with the sizes and numbers of ours, no tests and no logging."""
    collect, hyper = config.collect, config.hyper
    ours = {
        "TOTAL_TIMESTEPS": rounds * collect.num_envs * collect.rollout_length,
        "NUM_ENVS": collect.num_envs,
        "NUM_STEPS": collect.rollout_length,
        "BUFFER_SIZE": config.replay.capacity_env_steps // collect.rollout_length,
        "BUFFER_BATCH_SIZE": config.replay.batch_size,
        "HIDDEN_SIZE": config.agent.hidden_size,
        "MIXER_EMBEDDING_DIM": config.qmix.embed_size,
        "MIXER_HYPERNET_HIDDEN_DIM": config.qmix.hypernet_size,
        "NUM_EPOCHS": config.train.updates_per_round,
        "TARGET_UPDATE_INTERVAL": config.learner.target_interval_updates // config.train.updates_per_round,
        "LR": hyper["optimizer"]["learning_rate"],
        "GAMMA": hyper["learner"]["gamma"],
        "REW_SCALE": hyper["learner"]["reward_scale"],
        "MAX_GRAD_NORM": hyper["optimizer"]["max_grad_norm"],
        "MAP_NAME": config.env.scenario,
        "TEST_DURING_TRAINING": False,
        "WANDB_MODE": "disabled",
    }
    return yaml.safe_load((checkout / SETTINGS).read_text()) | ours


def compile_peer(checkout: Path, config: Config, rounds: int, seeds: int) -> Peer:
    """Compiles its whole training of so many rounds, which learns or never does as its argument says."""
    script = load_script(checkout)
    settings = their_settings(checkout, config, rounds)
    with in_jaxmarl():
        env, _ = script.env_from_config({**settings, "ENV_KWARGS": dict(settings["ENV_KWARGS"])})

    def train(starts: Any, keys: Any) -> Any:
        trained = jax.vmap(script.make_train({**settings, "LEARNING_STARTS": starts}, env))(keys)["runner_state"][0]
        return trained.grad_steps, trained.params

    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    wall, cpu = time.perf_counter(), time.process_time()
    with in_jaxmarl():
        compiled = compile_wide(jax.jit(train).lower(jax.numpy.int32(0), keys))
    took = time.perf_counter() - wall, time.process_time() - cpu
    return Peer(lambda starts: int(jax.block_until_ready(compiled(jax.numpy.int32(starts), keys))[0].sum()), rounds, *took)

"""Cooperative multi-agent Q-learning that keeps its ability to learn, as one compiled JAX program."""

from knife_jax import envs
from knife_jax.config import Config
from knife_jax.presets import PRESETS
from knife_jax.program import Program, RunnerState, make_program
from knife_jax.train import make_train

__all__ = ["PRESETS", "Config", "Program", "RunnerState", "envs", "make_program", "make_train"]

"""What is asked of JAX on processors: cores as devices, over which seeds are spread, and wide vectors."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.stages import Compiled, Lowered

FLAG = "xla_force_host_platform_device_count"
WIDTH = "xla_cpu_prefer_vector_width"
LEVEL, EMITTERS = "xla_backend_optimization_level", "xla_cpu_use_fusion_emitters"

MANY_SAMPLES = 1024
"""From how many samples a gradient step's products outweigh what the optimizer does to every weight."""


def compile_wide(lowered: Lowered) -> Compiled:
    """Compiles with `compiler_options()`; a program with an arctangent without them.

    XLA's arctangent is wrong in vectors of 512 bits (jax 0.10.2): of 16 numbers it gives eight zeros and eight of other numbers' values.

    Args:
        lowered: what `jax.jit(function).lower(...)` gives.
    """
    return _compile(lowered, {})


def _compile(lowered: Lowered, more: dict[str, Any]) -> Compiled:
    wide = compiler_options()
    options = more if not wide or "atan" in lowered.as_text() else wide | more
    return lowered.compile(options or None)


def compile_training(lowered: Lowered, samples: int = 0) -> Compiled:
    """Compiles rounds of training, as `compile_wide` does but in half to four fifths of the time.

    On processors with less of LLVM's optimizing, and from `MANY_SAMPLES` on with XLA's earlier emitters of kernels: they do not vectorise
    what is computed in its own place, such as a weight's next value, and are for gradient steps to which that matters little. Whole rounds
    lose nothing by either; games alone take up to a third longer. What `XLA_FLAGS` say of it stays.

    Args:
        lowered: what `jax.jit(function).lower(...)` gives.
        samples: of each gradient step, `Plan.samples_per_update`.
    """
    return _compile(lowered, training_options(samples))


def compile_quickly(lowered: Lowered) -> Compiled:
    """Compiles what evaluates once for every task, as `compile_training` does but in two thirds of the time.

    On processors with XLA's earlier emitters of kernels whatever the samples: evaluating takes no longer with them. What `XLA_FLAGS` say
    of it stays.

    Args:
        lowered: what `jax.jit(function).lower(...)` gives.
    """
    return _compile(lowered, training_options(MANY_SAMPLES))


def compile_start(lowered: Lowered) -> Compiled:
    """Compiles what draws networks and starts games, as `compile_quickly` does but in half of the time.

    On processors with none of LLVM's optimizing: such a program mostly fills memory and calls LAPACK. Weights differ from those that a
    program compiled otherwise draws in the last bits. What `XLA_FLAGS` say of it stays.

    Args:
        lowered: what `jax.jit(function).lower(...)` gives.
    """
    return _compile(lowered, _unless_told({LEVEL: 0, EMITTERS: False}))


@contextmanager
def without_collecting() -> Iterator[None]:
    """Leaves Python's garbage where it is until the end: what tracing makes stays, and would be looked at again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def training_options(samples: int) -> dict[str, Any]:
    """What XLA is told of rounds of training with so many samples in a gradient step, beside `compiler_options()`."""
    return _unless_told({LEVEL: 1} | ({EMITTERS: False} if samples >= MANY_SAMPLES else {}))


def _unless_told(options: dict[str, Any]) -> dict[str, Any]:
    """The options that `XLA_FLAGS` say nothing of; none on accelerators."""
    told = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in told and jax.default_backend() == "cpu"}


def compiler_options() -> dict[str, str | bool]:
    """Has XLA use vectors of 512 bits on processors that have them (AVX-512); by itself it keeps to 256.

    Nothing on accelerators, or where `XLA_FLAGS` say how wide vectors shall be.
    """
    wide = jax.default_backend() == "cpu" and WIDTH not in os.environ.get("XLA_FLAGS", "") and "avx512f" in _features()
    return {WIDTH: "512"} if wide else {}


@cache
def _features() -> set[str]:
    """What the processor says it has; nothing where the system does not tell."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {feature for line in told.splitlines() if line.startswith("flags") for feature in line.split()}


def spread_over_cores(devices: int | None = None) -> None:
    """Makes JAX see every core of the processor as a device of its own; to be called before anything is computed.

    A program over all seeds shares the cores poorly, since each of its operations is small; a program for each core and its share of the
    seeds does not wait for the others. Accelerators are as they were, and so is what the user settled with `JAX_NUM_CPU_DEVICES` or in
    `XLA_FLAGS`, or by computing something before.

    Args:
        devices: how many there shall be; as many as the cores this process may use, if not given.
    """
    settled = jax.config.values["jax_num_cpu_devices"] not in (None, -1) or FLAG in os.environ.get("XLA_FLAGS", "")
    if settled:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices or cores())
    except RuntimeError:
        return  # JAX computes already


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

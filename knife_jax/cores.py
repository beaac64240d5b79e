"""What the command line asks of JAX on processors: cores as devices, over which seeds are spread, and wide vectors."""

import os
from pathlib import Path

import jax

FLAG = "xla_force_host_platform_device_count"
WIDTH = "xla_cpu_prefer_vector_width"


def use_wide_vectors() -> None:
    """Has XLA use vectors of 512 bits on processors that have them (AVX-512); by itself it keeps to 256.

    To be called before anything is computed. What the user settled in `XLA_FLAGS` stays. Processes that this one starts inherit it.
    """
    told = os.environ.get("XLA_FLAGS", "")
    if WIDTH not in told and "avx512f" in _features():
        os.environ["XLA_FLAGS"] = f"{told} --{WIDTH}=512".strip()


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

"""Processor cores as devices, over which seeds are spread."""

import os

import jax

FLAG = "xla_force_host_platform_device_count"


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

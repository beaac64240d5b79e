"""Settings shared by every test."""

import gc
import os
from pathlib import Path

import jax
import pytest

# Most of a test's time is compilation, which need not produce fast code here; slow tests, which compute for minutes, ask for fast code.
if os.environ.get("KNIFE_JAX_FAST_CODE") != "1":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

jax.config.update("jax_numpy_rank_promotion", "raise")


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000


def pytest_runtest_teardown():
    """Forgets what is compiled long before a process has as many memory mappings as Linux allows (65,530), at which XLA aborts.

    A compiled program takes a dozen.
    """
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    """A fixed key; no test may depend on what is drawn from it, only on laws that hold for every key."""
    return jax.random.key(0)

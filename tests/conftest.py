"""Settings shared by every test."""

import os

import jax
import pytest

# Most of a test's time is compilation, which need not produce fast code here; slow tests, which compute for minutes, ask for fast code.
if os.environ.get("KNIFE_JAX_FAST_CODE") != "1":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    """A fixed key; no test may depend on what is drawn from it, only on laws that hold for every key."""
    return jax.random.key(0)

"""Settings shared by every test."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    """A fixed key; no test may depend on what is drawn from it, only on laws that hold for every key."""
    return jax.random.key(0)

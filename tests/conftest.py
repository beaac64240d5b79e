"""Settings shared by every test."""

import gc
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Most of a test's time is compilation, which need not produce fast code here; tests marked `computes` compute for minutes and want it fast.
if os.environ.get("KNIFE_JAX_FAST_CODE") != "1":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

os.environ["KNIFE_JAX_CACHE"] = "off"  # no test may depend on what an earlier run left behind
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # so that no command called from a test changes how many there are
gc.set_threshold(200_000, 10, 10)  # tracing makes millions of objects and few cycles; looking for these took a tenth of the suite


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


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """What a module compiles again and again is compiled once: runs in this process share it, other processes find it on disk."""
    from knife_jax import runner  # not earlier, or its types would not be checked

    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    done, compile_pieces = {}, runner.compile_pieces

    def shared(pieces, keys, swept, mesh):
        asked = (pieces.program.config.to_yaml(), keys.shape, str(jax.tree.map(np.shape, swept)), mesh)
        if asked not in done:
            done[asked] = compile_pieces(pieces, keys, swept, mesh)
        return done[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "compile_pieces", shared)
        yield Path(names["jax_compilation_cache_dir"])
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()

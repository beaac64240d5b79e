"""Processor cores as devices: how many JAX sees, in a process that has computed nothing yet."""

import os
import subprocess
import sys

import pytest

from knife_jax import cores as module
from knife_jax.cores import FLAG, cores, use_wide_vectors

CASES = {
    "asked for": ("spread_over_cores(3)", {}, 3),
    "one for each core": ("spread_over_cores()", {}, cores()),
    "the first word stands": ("spread_over_cores(3); spread_over_cores(4)", {}, 3),
    "XLA was told": ("spread_over_cores(3)", {"XLA_FLAGS": f"--{FLAG}=2"}, 2),
    "JAX was told": ("spread_over_cores(3)", {"JAX_NUM_CPU_DEVICES": "2"}, 2),
    "something was computed": ("jax.devices(); spread_over_cores(3)", {}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_jax_sees_as_many_devices(case):
    """Unless the user settled it."""
    statements, told, expected = CASES[case]
    alone = f"import runpy\nspread_over_cores = runpy.run_path({module.__file__!r})['spread_over_cores']"  # the package takes seconds
    program = f"import jax\n{alone}\n{statements}\nprint(jax.device_count())"
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment |= {"JAX_PLATFORMS": "cpu", **told}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == expected


@pytest.mark.parametrize(
    ("features", "told", "expected"),
    [
        ("fma avx512f avx512vl", "", "--xla_cpu_prefer_vector_width=512"),
        ("fma avx512f", "--xla_cpu_prefer_vector_width=256", "--xla_cpu_prefer_vector_width=256"),
        ("fma avx512f", "--other=1", "--other=1 --xla_cpu_prefer_vector_width=512"),
        ("fma avx2", "", ""),
    ],
)
def test_vectors_are_as_wide_as_the_processor_has_them(monkeypatch, features, told, expected):
    """Unless the user settled it."""
    monkeypatch.setattr(module, "_features", lambda: set(features.split()))
    monkeypatch.setenv("XLA_FLAGS", told)
    use_wide_vectors()
    assert os.environ["XLA_FLAGS"] == expected

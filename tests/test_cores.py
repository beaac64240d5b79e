"""Processor cores as devices: how many JAX sees, in a process that has computed nothing yet."""

import gc
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax import cores as module
from knife_jax.cores import (
    EMITTERS,
    FLAG,
    LEVEL,
    MANY_SAMPLES,
    WIDTH,
    compile_quickly,
    compile_start,
    compile_training,
    compile_wide,
    compiler_options,
    cores,
)

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
        ("fma avx512f avx512vl", "", {WIDTH: "512"}),
        ("fma avx512f", f"--{WIDTH}=256", {}),
        ("fma avx512f", "--other=1", {WIDTH: "512"}),
        ("fma avx2", "", {}),
    ],
)
def test_vectors_are_as_wide_as_the_processor_has_them(monkeypatch, features, told, expected):
    """Unless the user settled it."""
    monkeypatch.setattr(module, "_features", lambda: set(features.split()))
    monkeypatch.setattr(module.jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_FLAGS", told)
    assert compiler_options() == expected


ELEMENTARY = """
acos asin asinh atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p logistic pow rem rsqrt sin sinh sqrt tan tanh
"""


@pytest.mark.skipif(not compiler_options(), reason="this processor has no wide vectors, or XLA was told how wide they are")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_vectors_change_no_function(dtype):
    """Every elementary function but the arctangent, of 250 numbers in (0, 1) together and one by one."""

    def values(x):
        given = {"pow": (x, 1.5 - x), "rem": (x, 0.3 + x * x)}
        return {name: getattr(jax.lax, name)(*given.get(name, (x,))) for name in ELEMENTARY.split()}

    with jax.enable_x64(True):
        numbers = jnp.linspace(0.02, 0.98, 250, dtype=dtype)
        fast = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}  # or nothing is put into vectors
        wide = jax.jit(values).lower(numbers).compile({**compiler_options(), **fast})(numbers)
        singly = jax.jit(lambda numbers: jax.lax.map(values, numbers))(numbers)
        for name in ELEMENTARY.split():
            np.testing.assert_allclose(wide[name], singly[name], rtol=1e-4 if dtype == "float32" else 1e-9, atol=1e-6, err_msg=name)


@pytest.fixture
def asked(monkeypatch):
    """The options that XLA is given, program by program, on a processor with wide vectors."""
    given, compile_it = [], jax.stages.Lowered.compile

    def compile_and_tell(lowered, options):
        given.append(options)
        return compile_it(lowered)

    monkeypatch.setattr(module, "compiler_options", lambda: {WIDTH: "512"})
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_and_tell)
    return given


def test_an_arctangent_is_compiled_without_wide_vectors(asked):
    """XLA's is wrong in them; other programs are compiled with them."""
    for function in (jnp.arctan, lambda x: jnp.arctan2(x, 1.0), jnp.tanh):
        compile_wide(jax.jit(function).lower(jnp.ones(8)))
    assert asked == [None, None, {WIDTH: "512"}]


def test_training_and_what_runs_once_are_compiled_quickly(asked, monkeypatch):
    """With less optimizing, and for the rest like everything else; what the user said of it stays."""
    arctan, tanh = (jax.jit(function).lower(jnp.ones(8)) for function in (jnp.arctan, jnp.tanh))
    monkeypatch.setattr(module.jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    for lowered in (arctan, tanh):
        compile_start(lowered)
        compile_quickly(lowered)
        compile_training(lowered)
        compile_training(lowered, MANY_SAMPLES)
    monkeypatch.setenv("XLA_FLAGS", f"--{LEVEL}=0")
    compile_start(tanh)
    compile_quickly(tanh)
    compile_training(tanh)
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    compile_start(arctan)
    compile_quickly(arctan)
    compile_training(arctan)
    wide, less, quick = {WIDTH: "512"}, {LEVEL: 1}, {EMITTERS: False}
    without = [{LEVEL: 0} | quick, less | quick, less, less | quick]
    assert asked == [*without, *(wide | options for options in without), wide | quick, wide | quick, wide, None, None, None]


@pytest.mark.parametrize("collects", [True, False])
def test_collecting_goes_on_as_it_was(collects):
    """Also after an error."""
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ValueError, match="within"), module.without_collecting():
            assert not gc.isenabled()
            raise ValueError("within")
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()

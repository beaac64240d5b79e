"""Runs in compiled chunks: the numbers of the single program, whatever the chunks and the batches."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax import cache, make_program, make_train, runner
from knife_jax.chunks import Pieces, seed_axes
from knife_jax.config import resolve
from knife_jax.cores import compile_training
from knife_jax.pace import TARGET_SECONDS, Pace

SMALL = {
    "env": {"name": "matrix", "scenario": "permuted", "options": {"num_tasks": 2}},
    "agent": {"recurrent": True, "hidden_size": 4},
    "learner": {"mixer": "vdn", "target_interval_updates": 7},
    "collect": {"num_envs": 2, "rollout_length": 2},
    "replay": {"capacity_env_steps": 64, "batch_size": 4, "sequence_length": 2},
    "train": {"env_steps_per_task": 80},
    "evaluation": {"episodes": 1, "per_task": 2},
    "plasticity": {"name": "redo", "interval_updates": 5, "diagnostic_batches": 1},
}
"""Twenty rounds a task in two periods, learning from the fourth round on."""


pytestmark = pytest.mark.usefixtures("compile_once")


def tolerance(name):
    """How far a metric may differ in another process: not at all, but for ranks, whose singular values LAPACK rounds as memory falls."""
    return 1e-4 if name.endswith("_rank") else 0.0


@pytest.fixture(scope="module")
def single(compile_once):
    """The single program, for two seeds."""
    keys = runner.seed_keys(2)
    samples = make_program(resolve(SMALL)).plan.samples_per_update
    return compile_training(jax.jit(jax.vmap(make_train(SMALL))).lower(keys), samples)(keys)


@pytest.mark.parametrize("options", [{"chunk_rounds": 1}, {"chunk_rounds": 7}, {}], ids=str)
def test_chunks_have_the_bits_of_the_single_program(single, options):
    """All metrics, parameters and reports, whether chunks divide the periods or not."""
    result = runner.run(SMALL, seeds=2, **options)
    assert set(result.metrics) == {*single["metrics"], "env_steps"}
    for name, values in single["metrics"].items():
        np.testing.assert_array_equal(result.metrics[name], values, err_msg=name)
    learner = single["runner_state"].learner
    jax.tree.map(np.testing.assert_array_equal, (result.variables, result.report), (learner.variables, learner.report))


def test_batches_have_the_bits_of_runs_of_their_width(single):
    """Three seeds, two at a time: the first two are the run of two, the last is filled up with one that is thrown away."""
    seen = []
    result = runner.run(
        SMALL, seeds=3, seeds_per_batch=2, progress=lambda status: seen.extend(row["eval/return"].shape for row in status.rows)
    )
    assert result.provenance["seeds_per_batch"] == 2
    assert seen == [(2,)] * 9 + [(1,)] * 9
    for name, values in single["metrics"].items():
        assert len(result.metrics[name]) == 3
        np.testing.assert_array_equal(result.metrics[name][:2], values, err_msg=name)


def test_what_does_not_depend_on_the_seed_is_reported_for_every_seed():
    """`reset` treats the same count of numbers whatever the key."""
    plasticity = {"name": "reset", "interval_updates": 5, "diagnostics": False}
    result = runner.run({**SMALL, "plasticity": plasticity}, seeds=2)
    assert result.report["all/treated"].shape == (2,)
    assert result.report["all/treated"].min() > 0
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(result.variables))


def test_cond_survives_in_a_chunk():
    """Counters enter a chunk without a seeds' axis, so that no branch turns into a select of both."""
    pieces = Pieces(make_program(resolve(SMALL)))
    place = (jnp.int32(0), jnp.int32(0))
    key = jax.random.key(0)
    axes = seed_axes(pieces, key, {})
    begin = jax.vmap(lambda key, place: pieces.begin(pieces.init(key, {}), {}, place), in_axes=(0, None), out_axes=axes)
    carry = jax.eval_shape(begin, runner.seed_keys(3), place)
    assert carry.state.counters.updates.shape == carry.state.replay.head.shape == carry.period.updates.shape == ()
    assert carry.state.replay.slots.reward.shape[0] == 3
    alone = jax.eval_shape(lambda key: pieces.begin(pieces.init(key, {}), {}, place), key)
    single = str(jax.make_jaxpr(pieces.advance)(alone, {}, place, jnp.int32(5)))
    mapped = str(jax.make_jaxpr(jax.vmap(pieces.advance, in_axes=(axes, None, None, None)))(carry, {}, place, jnp.int32(5)))
    conds = len(re.findall(r"\bcond\[", single))
    assert conds >= 5
    assert len(re.findall(r"\bcond\[", mapped)) == conds


def test_batches_are_even():
    """At most as many as asked for, and as few as possible left over."""
    widths = {(10, None, 1): 10, (10, 8, 1): 5, (10, 4, 1): 4, (3, 2, 1): 2, (3, 5, 1): 3, (1, 1, 1): 1}
    widths |= {(10, None, 4): 12, (16, None, 8): 16, (16, 9, 4): 8, (9, 5, 4): 4, (17, 8, 8): 8, (3, 4, 2): 4}
    assert {asked: runner.batch_width(*asked) for asked in widths} == widths


def test_devices_that_are_not_there_are_refused(monkeypatch):
    """As are more than seeds side by side; unless told, as many are taken as there are, and no more than seeds."""
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert [runner.choose_devices(*asked) for asked in ((8, None, None), (3, None, None), (8, 2, None), (8, None, 3))] == [4, 3, 2, 3]
    with pytest.raises(ValueError, match="devices: there are 4, not 5"):
        runner.run(SMALL, seeds=8, devices=5)
    with pytest.raises(ValueError, match="devices: 3 are more than the 2 seeds that are trained side by side"):
        runner.run(SMALL, seeds=8, seeds_per_batch=2, devices=3)


ON_DEVICES = """
import sys
import jax
import numpy as np
from knife_jax import runner
from knife_jax.chunks import Pieces
from knife_jax.compiled import compile_pieces, seeds_mesh
from knife_jax.config import resolve
from knife_jax.program import make_program
from knife_jax.run_directory import Saving

config, out = resolve(eval(sys.argv[1])), sys.argv[2]
pieces, keys = Pieces(make_program(config)), runner.seed_keys(8)
compiled = compile_pieces(pieces, keys, {}, seeds_mesh(8))
text = compiled.advance.as_text()
assert not [word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter") if word in text]
compile_once, compile_pieces = {8: compiled}, runner.compile_pieces
runner.compile_pieces = lambda pieces, keys, swept, mesh: compile_once.get(mesh.size) or compile_pieces(pieces, keys, swept, mesh)


def die(status):
    if status.point.position == 1:
        raise RuntimeError


try:
    runner.run(config, seeds=8, devices=8, out=out, saving=Saving(every_minutes=0.0), chunk_rounds=7, progress=die)
except RuntimeError:
    pass
result = runner.run(config, seeds=8, devices=8, out=out, resume=True, chunk_rounds=7)
assert result.provenance["devices"] == 8
on_two = runner.run(config, seeds=8, devices=2, seeds_per_batch=2)
for name, values in on_two.metrics.items():
    np.testing.assert_array_equal(values, result.metrics[name], err_msg=name)
jax.tree.map(np.testing.assert_array_equal, on_two.variables, result.variables)
np.savez(out + "/all.npz", **{name.replace("/", "."): values for name, values in result.metrics.items()})
"""


@pytest.mark.slow
def test_seeds_on_eight_devices_have_the_numbers_of_one(single, tmp_path):
    """A seed on each of eight, without a word between them, killed and resumed: the numbers of one to 1e-6 over the first 20 updates.

    Also the bits of two devices with a seed on each, four times over. Not those of one: XLA compiles the same function for one device with
    other roundings than for several (measured, a seed at a time, at either level of optimization: 3e-7; ranks 1e-5).
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", ON_DEVICES, repr(SMALL), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    metrics = np.load(tmp_path / "out" / "all.npz")
    early = single["metrics"]["updates"][0] <= 20
    assert early.sum() >= 4 and single["metrics"]["updates"][0][early].max() >= 17
    for name, values in single["metrics"].items():
        found = metrics[name.replace("/", ".")]
        assert len(found) == 8
        within = early if values.shape[1] == len(early) else slice(0, 1)  # all tasks at the end of the first
        accuracy = max(1e-6, tolerance(name))
        np.testing.assert_allclose(found[:2, within], values[:, within], rtol=accuracy, atol=accuracy, err_msg=name)


def test_pace_finds_the_rounds_that_last_as_long_as_wanted():
    """It grows step by step, falls at once, never beyond what is allowed, and never below one round."""
    pace = Pace()
    for _ in range(20):
        rounds = pace.rounds(10**9)
        pace.took(rounds, rounds * 1e-4)
    assert pace.rounds(10**9) == pytest.approx(TARGET_SECONDS / 1e-4, rel=0.01)
    assert pace.rounds(50) == 50
    pace.took(100, 1000.0)
    assert pace.rounds(10**9) == 1
    fixed = Pace(7)
    fixed.took(7, 1000.0)
    assert fixed.rounds(100) == 7


@pytest.mark.parametrize("field", ["seeds", "seeds_per_batch", "devices", "chunk_rounds"])
def test_counts_below_one_are_refused(field):
    """Before anything compiles."""
    with pytest.raises(ValueError, match=f"^{field}: at least 1, got 0"):
        runner.run(SMALL, **{field: 0})  # pyright: ignore[reportArgumentType]


def test_compiled_programs_are_kept_unless_told_otherwise(monkeypatch, tmp_path):
    """In the user's cache directory or one of their choice; never over what JAX was given."""
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert cache.keep_compiled_programs() is None and jax.config.values["jax_compilation_cache_dir"] is None
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
        assert cache.keep_compiled_programs() == jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "other"))
        assert cache.keep_compiled_programs() is None and jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.delenv(cache.VARIABLE)
        assert "knife-jax" in (cache.keep_compiled_programs() or "")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

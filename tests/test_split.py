"""One seed's work split over devices: the draws, and to float tolerance the numbers, of a seed on one device."""

import os
import subprocess
import sys

import jax
import pytest

from knife_jax import make_train, runner
from knife_jax.config import resolve
from knife_jax.program import make_program
from knife_jax.split import Split

SMALL = {
    "env": {"name": "predator_prey/gradps_small"},
    "agent": {"hidden_size": 8},
    "collect": {"num_envs": 4, "rollout_length": 8},
    "replay": {"capacity_env_steps": 512, "batch_size": 4, "sequence_length": 8},
    "train": {"env_steps_per_task": 256, "learning_starts_env_steps": 128},
    "evaluation": {"per_task": 2, "episodes": 2},
    "exploration": {"anneal_env_steps": 100.0},
    "plasticity": {"diagnostics": False},
}

BEGINNING = """
import sys
import jax
import numpy as np
from knife_jax import make_train, runner

config = eval(sys.argv[1])


def assert_same(one, other):
    assert sorted(one) == sorted(other)
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=2e-4, atol=1e-5, err_msg=name)
"""

IN_ONE_CALL = """
keys, events = jax.random.split(jax.random.key(0), 3), {1: [], 2: []}
trained = {}
for devices in events:
    train = make_train(config, devices=devices, callback=events[devices].append)
    compiled = jax.jit(jax.vmap(train)).lower(keys).compile()
    trained[devices] = jax.device_get(compiled(keys)["metrics"])
    jax.effects_barrier()
assert_same(trained[1], trained[2])
assert trained[1]["updates"].max() >= 4
assert len(events[1]) == len(events[2]) == 3
for one, other in zip(events[1], events[2], strict=True):
    assert other["eval/return"].shape == (3,)
    assert_same(one, other)
text = compiled.as_text()
assert 0 < text.count(" all-reduce(") <= 8, text.count(" all-reduce(")
assert 0 < text.count(" all-gather(") <= 8, text.count(" all-gather(")
"""

SPREAD = """
for plasticity in ({"name": "redo"}, {"name": "l2_init"}, {"name": "knife"}):
    cured = {**config, "plasticity": {"diagnostic_batches": 2, "interval_updates": 3, **plasticity}}
    alone = runner.run(cured, seeds=2, devices=1)
    shared = runner.run(cured, seeds=2, devices=4)
    assert shared.provenance["devices"] == 4
    assert alone.metrics["updates"].max() >= 4
    measures = [name for name in alone.metrics if name.startswith("plasticity/") and "grad_norm" in name]
    assert np.isfinite(alone.metrics[measures[0]][:, -1]).all()
    assert_same(alone.metrics, shared.metrics)
"""


def _run_on_four_devices(config, script):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", BEGINNING + script, repr(config)]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("uneven", [False, True])
def test_a_split_seed_has_the_numbers_of_one_that_is_not(uneven):
    """Under vmap, and told of once; what is exchanged is packed. Where environments or episodes are uneven every device plays them all."""
    config = {**SMALL, "collect": {"num_envs": 3, "rollout_length": 8}, "evaluation": {"per_task": 2, "episodes": 3}} if uneven else SMALL
    script = IN_ONE_CALL if not uneven else IN_ONE_CALL.replace('0 < text.count(" all-gather(")', '0 == text.count(" all-gather(")')
    _run_on_four_devices(config, script)


@pytest.mark.slow
def test_two_seeds_on_four_devices_have_the_numbers_of_one_device():
    """With cures that count samples, add to the loss, and rewrite neurons; and with diagnoses."""
    _run_on_four_devices({name: value for name, value in SMALL.items() if name != "plasticity"}, SPREAD)


def test_devices_beyond_the_seeds_share_them(monkeypatch):
    """If they can be shared evenly; of several processes, each has its own seeds."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert [runner.choose_devices(*asked) for asked in ((2, None, 8), (6, 2, 4), (2, None, None))] == [8, 4, 2]
    assert [runner.parts_of_a_seed(*asked) for asked in ((2, None, 8), (6, 2, 4), (6, None, 4), (1, None, 8))] == [4, 2, 1, 8]
    with pytest.raises(ValueError, match="devices: 8 are more than the 3 seeds that are trained side by side, and no multiple of them"):
        runner.choose_devices(3, None, 8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="devices: 2 processes cannot share 3 seeds, each split over devices, evenly"):
        runner.choose_devices(3, None, 6)


def test_what_cannot_be_split_is_refused():
    """Before anything compiles: batches that are uneven, and devices that are not there."""
    with pytest.raises(ValueError, match=r"^devices: 3 for one seed cannot share its replay.batch_size of 4 evenly"):
        make_program(resolve(SMALL), 3)
    for devices in (0, 2):
        with pytest.raises(ValueError, match=f"^devices: from 1 to 1, as many as there are; got {devices}"):
            make_train(SMALL, devices=devices)
    assert Split(2).of(6) == Split(2) and Split(2).of(5) == Split(1)

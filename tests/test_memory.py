"""The memory of a run before it starts: what is estimated, what fits, and what is said when nothing does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax import Config, make_program, memory
from knife_jax.liveness import peak_bytes, tree_bytes
from knife_jax.memory import PROCESS_BYTES, SeedMemory

KILO = 1024 * 4
"""Bytes of 1,024 float32."""


def _peak(function, *shapes):
    return peak_bytes(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


# --- what is alive at once ---


def test_a_chain_of_products_holds_two_at_a_time():
    """Each product is alive with the one made from it, however many there are."""
    square = jnp.zeros((32, 32))
    assert _peak(lambda x: x @ square @ square @ square @ square, (32, 32)) == 2 * KILO
    assert _peak(lambda x: x @ square, (32, 32)) == KILO


def test_what_is_needed_later_stays_alive():
    """The backward pass reads what the forward pass made: activations of every layer are held at the turn."""
    weights = jnp.zeros((32, 32))

    def layers(x, count):
        for _ in range(count):
            x = jnp.tanh(x @ weights)
        return x.sum()

    held = [_peak(jax.grad(lambda x, count=count: layers(x, count)), (32, 32)) for count in (2, 4, 8)]
    assert held[1] - held[0] == 2 * (held[2] - held[1]) / 4 >= 2 * KILO


def test_arithmetic_that_only_the_next_operation_reads_takes_nothing():
    """And neither does a view."""
    assert _peak(lambda x: jnp.sum(jnp.exp(x * 2 + 1).reshape(-1)), (1024,)) == 4
    assert _peak(lambda x, y: (x * 2) @ y, (32, 32), (32, 32)) == 2 * KILO


def test_a_loop_holds_its_outputs_and_one_turn():
    """Stacked outputs for all turns, the body's two products for one, and the carry that went in."""

    def turn(carry, _):
        inner = carry @ carry
        return inner @ inner, inner[0]

    assert _peak(lambda x: jax.lax.scan(turn, x @ x, length=100)[1], (32, 32)) == 3 * KILO + 100 * 32 * 4


def test_an_update_in_place_and_the_larger_branch():
    """A ring that is written takes nothing; of two branches the larger counts."""
    ring = jax.make_jaxpr(lambda ring, new: jax.lax.dynamic_update_slice(ring, new, (0,)))(jnp.zeros(10**6), jnp.zeros(8))
    assert peak_bytes(ring.jaxpr) == 0
    big, small = jnp.zeros((32, 1024)), jnp.zeros((32, 8))
    assert _peak(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: (x @ big).sum(), lambda: (x @ small).sum()), (1, 32)) in range(KILO, KILO + 64)


def test_of_branches_by_platform_that_of_this_process_counts(monkeypatch):
    """The smaller here, the larger on an accelerator."""
    big, small = jnp.zeros((32, 1024)), jnp.zeros((32, 8))

    def peak():
        by_platform = {"cpu": lambda x: (x @ small).sum(), "cuda": lambda x: (x @ big).sum()}
        return _peak(lambda x: jax.lax.platform_dependent(x, **by_platform), (1, 32))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert peak() in range(32, 128)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert peak() in range(KILO, KILO + 64)


# --- the estimate ---

RECURRENT = {
    "collect": {"num_envs": 8, "rollout_length": 16},
    "replay": {"capacity_env_steps": 20_480, "batch_size": 8, "sequence_length": 16},
    "plasticity": {"diagnostics": False},
}
PREY = {"env": {"name": "predator_prey", "scenario": "wqmix"}, **RECURRENT}
MARINES = {"env": {"name": "smax", "scenario": "3m"}, **RECURRENT}
MATRIX = {"preset": "matrix_drift"}


@pytest.mark.parametrize("config", [PREY, pytest.param(MARINES, marks=pytest.mark.slow)], ids=["predator_prey", "smax"])
def test_the_estimate_is_near_what_the_compiled_program_asks_for(config):
    """Within 15 % of the arguments and temporaries of four seeds' round, whose state is donated."""
    program = make_program(Config.from_dict(config))
    hyper, seeds = program.config.hyper, 4
    state = jax.eval_shape(jax.vmap(lambda key: program.init(key, hyper)), jax.random.split(jax.random.key(0), seeds))
    chunk = jax.jit(jax.vmap(lambda state: program.train_rounds(state, jnp.int32(0), hyper)), donate_argnums=0)
    analysis = chunk.lower(state).compile().memory_analysis()
    assert analysis is not None
    asked = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    estimate = memory.seed_memory(program)
    assert seeds * (estimate.replay + estimate.state) == tree_bytes(state)
    assert abs(seeds * estimate.total / asked - 1) < 0.15


def test_the_replay_is_counted_to_the_byte():
    """Slots of one byte of record, two actions, a float, a continuation and a task; and two counters."""
    assert memory.seed_memory(MATRIX).replay == 16_384 * (1 + 2 + 4 + 1 + 2) + 8


def test_more_to_learn_from_needs_more_room():
    """Room to work in grows with the batch, the replay with its capacity, and nothing else does."""
    base = memory.seed_memory(MATRIX)
    batch = memory.seed_memory({**MATRIX, "replay": {"batch_size": 128}})
    ring = memory.seed_memory({**MATRIX, "replay": {"capacity_env_steps": 32_768}})
    assert batch.work > 1.5 * base.work and batch[:2] == base[:2]
    assert ring.replay > 1.9 * base.replay and ring[1:] == base[1:]


# --- what fits ---

CONFIG = Config.from_dict(MATRIX)
MEGABYTE = SeedMemory(replay=700_000, state=100_000, work=200_000)


def _available(seeds):
    """Just enough for so many seeds of a megabyte, with the usual margin."""
    return int(np.ceil((seeds * 1_000_000 + PROCESS_BYTES) / memory.USABLE_SHARE)) + 1


@pytest.mark.parametrize(
    ("seeds", "room", "width"), [(8, 8, 8), (8, 100, 8), (8, 7, 4), (9, 4, 3), (10, 4, 4), (4096, 513, 512), (5, 1, 1)]
)
def test_batches_are_as_few_and_as_even_as_possible(seeds, room, width):
    """Never more side by side than fit."""
    assert memory.fit_seeds(MEGABYTE, CONFIG, seeds, _available(room)) == width


def test_a_width_of_the_users_own_is_checked():
    """It may use all of the memory; what does not fit is refused with the width that does."""
    memory.check_seeds(MEGABYTE, CONFIG, 100, MEGABYTE.of(100))
    with pytest.raises(ValueError, match=r"seeds_per_batch: .*1,000 seeds x .*take at most 10 seeds per batch"):
        memory.check_seeds(MEGABYTE, CONFIG, 1000, _available(10))


def test_where_not_one_seed_fits_the_error_says_what_to_change():
    """A smaller replay where that is enough; otherwise smaller batches. The replay that is proposed does fit."""
    huge = Config.from_dict({**MATRIX, "replay": {"capacity_env_steps": 100_000_000}})
    with pytest.raises(ValueError, match=r"^replay.capacity_env_steps: .*not even one seed fits; take at most (\d+)") as refusal:
        memory.choose_seeds_per_batch(huge, 4, 200_000_000)
    proposed = int(str(refusal.value).split("take at most ")[1].split()[0])
    assert proposed > 1_000_000
    smaller = Config.from_dict({**MATRIX, "replay": {"capacity_env_steps": proposed}})
    assert memory.choose_seeds_per_batch(smaller, 4, 200_000_000) == 1
    with pytest.raises(ValueError, match=r"replay.batch_size, replay.sequence_length"):
        memory.choose_seeds_per_batch(CONFIG, 4, 1_000_000)
    episodes = Config.from_dict({"preset": "pymarl_qmix", "env": {"name": "predator_prey"}})
    with pytest.raises(ValueError, match=r"^replay.capacity_episodes: .*take at most \d+ \(now 5000\)"):
        memory.fit_seeds(SeedMemory(10**10, 10**5, 10**5), episodes, 1, 10**9)


def test_one_line_for_people():
    """Bytes in units that people use."""
    said = SeedMemory(3_100_000, 1_250_000, 999_600).describe(512, 12_500_000_000)
    assert said == (
        "memory: 512 seeds x (3.1 MB replay + 1.25 MB networks and environments + 1 MB to work in) = 2.77 GB of 12.5 GB available"
    )


def test_groups_work_in_the_room_of_one():
    """All seeds are carried, one group's state twice, and one group works."""
    assert MEGABYTE.of(10, 2) == 10 * 800_000 + 2 * 800_000 + 2 * 200_000 + PROCESS_BYTES
    assert MEGABYTE.of(10, 10) == MEGABYTE.of(10, 20) == MEGABYTE.of(10) == 10 * 1_000_000 + PROCESS_BYTES
    assert "10 seeds x (700 kB replay + 100 kB networks and environments) in groups of 2 x 200 kB to work in" in MEGABYTE.describe(
        10, group=2
    )


# --- what is available ---


def test_some_memory_is_available():
    """On the machine that runs this."""
    assert 10**6 < memory.available_memory() < 10**14


@pytest.mark.parametrize("unified", [True, False], ids=["v2", "v1"])
def test_the_tightest_container_counts(tmp_path, unified):
    """Limits of the group and of those around it, less what is used, but for caches of files."""
    root = tmp_path / "groups"
    limit, used, cache = (
        ("memory.max", "memory.current", "inactive_file")
        if unified
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    memory_root = root if unified else root / "memory"
    for folder, sizes in {"": (900, 100, 0), "outer": (500, 300, 50), "outer/inner": (400, 10, 0)}.items():
        place = memory_root / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, value in zip((limit, used, "memory.stat"), (sizes[0], sizes[1], f"{cache} {sizes[2]}\nother 7"), strict=True):
            (place / name).write_text(f"{value}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n" if unified else "7:cpu,cpuacct:/\n4:memory:/outer/inner\n0::/\n")
    assert memory._free_in_containers(root, membership) == [390, 250, 800]
    (memory_root / "outer" / limit).write_text("max\n")
    assert memory._free_in_containers(root, membership) == [390, 800]
    assert memory._free_in_containers(root, tmp_path / "absent") == []

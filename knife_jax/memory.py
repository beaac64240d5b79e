"""How much memory a run takes, estimated before it starts, and how many seeds fit side by side.

Every seed carries a replay and a state, which are counted exactly, and needs room to work in: what one round of collecting and learning,
or an evaluation, holds at once. That is read off the traced program (see `liveness`), times what XLA's compiler adds to it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from knife_jax.config import Config, resolve
from knife_jax.liveness import peak_bytes, tree_bytes
from knife_jax.program import Program, make_program

WORK_PER_LIVE_BYTE = {"recurrent": 3.6, "feed-forward": 1.5}
"""Memory that a compiled program works in, per byte that is alive at once in the traced one, by the agents' kind: XLA orders operations for
concurrency rather than for memory, and copies operands of batched products and of loops. Fitted to
what 128 to 4,096 seeds took on the CPU."""

PROCESS_BYTES = 30_000_000
"""What a running program takes whatever the number of seeds: its code, and buffers of the threads that multiply matrices."""

USABLE_SHARE = 0.85
"""The share of the free memory that a run is given; the rest is for what the estimate misses."""

_CGROUP = Path("/sys/fs/cgroup")


class SeedMemory(NamedTuple):
    """Bytes of one seed.

    Attributes:
        replay: its ring of records.
        state: the rest of what it carries: networks, optimizer, environments.
        work: the most that it needs beside them at once.
    """

    replay: int
    state: int
    work: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.replay + self.state + self.work

    def of(self, seeds: int, group: int | None = None) -> int:
        """Bytes of a program over so many seeds: all side by side, or in groups (see `groups`), each of which is copied to be worked on."""
        carried = self.replay + self.state
        at_work = min(seeds, group or seeds)
        copied = at_work * carried if at_work < seeds else 0
        return seeds * carried + copied + at_work * self.work + PROCESS_BYTES

    def describe(self, seeds: int, available_bytes: int | None = None, group: int | None = None) -> str:
        """One line for people about so many seeds."""
        at_work = min(seeds, group or seeds)
        carried, work = f"({_said(self.replay)} replay + {_said(self.state)} networks and environments", f"{_said(self.work)} to work in"
        parts = f"{carried}) in groups of {at_work:,} x {work}" if at_work < seeds else f"{carried} + {work})"
        text = f"memory: {seeds:,} seeds x {parts} = {_said(self.of(seeds, group))}"
        return text if available_bytes is None else f"{text} of {_said(available_bytes)} available"


def seed_memory(config: Config | Mapping[str, Any] | str | Program) -> SeedMemory:
    """Estimates the memory of one seed by tracing its program, which takes seconds; nothing compiles.

    Args:
        config: a `Config`, a nested dict, a preset's name, or the program made from one.

    Raises:
        ValueError: for a configuration that cannot be run, with the field's path.
    """
    program = config if isinstance(config, Program) else make_program(resolve(config))
    hyper = program.config.hyper
    state = jax.eval_shape(lambda key: program.init(key, hyper), jax.random.key(0))
    training = jax.make_jaxpr(lambda state, task: program.train_rounds(state, task, hyper))(state, jnp.int32(0))
    playing = jax.make_jaxpr(program.evaluate_all)(state)
    replay = tree_bytes(state.replay)
    carried = tree_bytes(state) - replay
    live = max(peak_bytes(training.jaxpr), peak_bytes(playing.jaxpr))
    kind = "recurrent" if program.config.agent.recurrent else "feed-forward"
    return SeedMemory(replay, carried, round(WORK_PER_LIVE_BYTE[kind] * live))


def choose_seeds_per_batch(config: Config | Mapping[str, Any] | str, seeds: int, available_bytes: int) -> int:
    """How many of so many seeds to train side by side; see `fit_seeds`.

    Args:
        config: as for `seed_memory`.
        seeds: of the whole run.
        available_bytes: memory of the device, see `available_memory`.

    Raises:
        ValueError: if not even one seed fits, with what to change.
    """
    resolved = resolve(config)
    return fit_seeds(seed_memory(resolved), resolved, seeds, available_bytes)


def fit_seeds(memory: SeedMemory, config: Config, seeds: int, available_bytes: int) -> int:
    """The width of the fewest batches that fit, all as even as possible.

    Raises:
        ValueError: if not even one seed fits, with what to change.
    """
    fitting = _fitting(memory, available_bytes)
    if fitting < 1:
        raise ValueError(_too_big(memory, config, 1, available_bytes))
    return -(-seeds // -(-seeds // fitting))


def check_seeds(memory: SeedMemory, config: Config, seeds_per_batch: int, available_bytes: int) -> None:
    """Refuses a width that does not fit, before anything compiles; here all of the available memory may be used.

    Raises:
        ValueError: with what to change.
    """
    if memory.of(seeds_per_batch) > available_bytes:
        raise ValueError(_too_big(memory, config, seeds_per_batch, available_bytes))


def available_memory() -> int:
    """Bytes that a run may take on one device: free memory of the accelerator, or of this machine within its container's limit."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return min(_free_on_host(), *_free_in_containers())


def _fitting(memory: SeedMemory, available_bytes: int) -> int:
    """How many seeds fit."""
    return int(USABLE_SHARE * available_bytes - PROCESS_BYTES) // memory.total


def _too_big(memory: SeedMemory, config: Config, seeds: int, available_bytes: int) -> str:
    """The error for so many seeds, with the nearest thing that would fit."""
    fitting = _fitting(memory, available_bytes)
    text = f"{memory.describe(seeds, available_bytes)}; "
    if fitting > 0:
        return f"seeds_per_batch: {text}take at most {fitting} seeds per batch"
    field = "capacity_env_steps" if config.replay.capacity_episodes is None else "capacity_episodes"
    room = USABLE_SHARE * available_bytes - PROCESS_BYTES - memory.state - memory.work
    smaller = int(getattr(config.replay, field) * max(room, 0) / memory.replay)
    if smaller >= _least_capacity(config, field):
        return f"replay.{field}: {text}not even one seed fits; take at most {_rounded(smaller)} (now {getattr(config.replay, field)})"
    fields = "replay.batch_size, replay.sequence_length, collect.num_envs or evaluation.episodes"
    return f"replay.batch_size: {text}not even one seed fits, whatever the replay's capacity; make {fields} smaller"


def _least_capacity(config: Config, field: str) -> int:
    """What the replay must hold for one batch and one round, in the field's unit."""
    if field == "capacity_episodes":
        return max(config.replay.batch_size, config.collect.num_envs)
    sequence = config.replay.sequence_length + 1 if config.collect.mode == "continuous" else config.collect.rollout_length
    return max(config.replay.batch_size * sequence, config.collect.num_envs * config.collect.rollout_length)


def _rounded(count: int) -> int:
    """Down to two digits."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return count // unit * unit


def _free_on_host() -> int:
    """Memory that programs may take without swapping; half of what there is where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_in_containers(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group around this process leaves of its limit, where there is one; file caches count as free."""
    if not membership.exists():
        return []
    groups = dict(line.split(":", 2)[1:] for line in membership.read_text().splitlines())
    if "memory" in groups:
        return _free_in(root / "memory", groups["memory"], ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file")
    return _free_in(root, groups.get("", "/"), ("memory.max", "memory.current"), "inactive_file")


def _free_in(root: Path, group: str, files: tuple[str, str], cache: str) -> list[int]:
    free = []
    inner = root / group.lstrip("/")
    for folder in (inner, *inner.parents):
        limit, used, stat = folder / files[0], folder / files[1], folder / "memory.stat"
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
            cached = dict(line.split() for line in stat.read_text().splitlines()).get(cache, 0) if stat.exists() else 0
            free.append(int(text) - int(used.read_text()) + int(cached))
        if folder == root:
            break
    return free


def _said(size: int | float) -> str:
    """Bytes as people say them, to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"

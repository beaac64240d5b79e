"""Several processes that make one run together, on one machine or on many.

JAX's own runtime joins them: each has some devices, all run the same program, and the seeds are spread over the devices of all. Inside the
compiled program nothing is exchanged. Between two chunks the processes agree on a few numbers, and metrics are gathered. The first process
alone writes, but for the state in checkpoints, of which each writes what it holds; so they must share the directory of the run.

With a single process every function here is the plain thing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

LONGEST_WAIT_SECONDS = 3600
"""How long a process waits for the others, should they compile for so long."""


@dataclass(frozen=True)
class Hosts:
    """How the processes of one run find each other; the same command is started once for each."""

    detect: bool = False
    """This is one of several processes of a cluster's job (SLURM, Open MPI, Kubernetes), from whose variables JAX finds the others."""
    coordinator: str | None = None
    """HOST:PORT on which the first process listens, where no cluster is to be asked."""
    processes: int | None = None
    """How many processes there are, with a coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with a coordinator."""

    @property
    def given(self) -> bool:
        """Whether there are others to find."""
        return self.detect or self.coordinator is not None

    def __post_init__(self) -> None:
        explicit = (self.coordinator, self.processes, self.process_id)
        if self.detect and any(value is not None for value in explicit):
            raise ValueError("hosts.detect: finds coordinator, processes and process_id by itself; leave them out")
        if not any(value is not None for value in explicit):
            return
        if self.coordinator is None or self.processes is None or self.process_id is None:
            raise ValueError("hosts: coordinator, processes and process_id are given together")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"hosts.coordinator: expected HOST:PORT, got {self.coordinator!r}")
        if not 0 <= self.process_id < self.processes:
            raise ValueError(f"hosts.process_id: from 0 to below the {self.processes} processes, got {self.process_id}")


def connect(hosts: Hosts) -> None:
    """Joins the other processes, and waits for them; to be called before anything is computed.

    Raises:
        ValueError: if JAX finds no cluster, has computed something already, or the others do not come.
    """
    if not hosts.given:
        return
    try:
        jax.distributed.initialize(hosts.coordinator, hosts.processes, hosts.process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"hosts: cannot join the other processes: {' '.join(str(error).split())}") from error


def _await_all() -> None:
    """Waits for the slowest: the first collective gives up after half a minute, and one process may compile for longer than another."""
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key="knife_jax", timeout_ms=1000 * LONGEST_WAIT_SECONDS)


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def most(*numbers: int | float) -> tuple[int | float, ...]:
    """Every number at its largest over the processes, to the bit."""
    if jax.process_count() == 1:
        return numbers
    _await_all()
    bits = np.asarray(numbers, np.float64).view(np.uint32)
    everywhere = np.asarray(multihost_utils.process_allgather(bits))
    return tuple(map(float, everywhere.view(np.float64).max(axis=0)))


def first_does(action: Callable[[], Any]) -> None:
    """Lets the first process do something, and the others wait for it.

    Raises:
        OSError: if the first process fails, in the others; in the first one, its own error.
    """
    error = None
    if is_first():
        try:
            action()
        except Exception as caught:
            error = caught
    (failed,) = most(error is not None)
    if error is not None:
        raise error
    if failed:
        raise OSError("the first process has failed, and says why")


def gathered(tree: Any) -> Any:
    """Arrays that are spread over the devices of all processes, in numpy and whole."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    _await_all()
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    return jax.device_get(jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree))


def _same(tree: Any) -> Any:
    return tree


def placed(values: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, spread over the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(values, sharding)
    if jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(placed(jax.random.key_data(values), sharding))
    whole = np.asarray(values)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def devices_of_all(count: int) -> list[Any]:
    """So many devices, of every process as many; the first ones of each."""
    processes = range(jax.process_count())
    own = {process: [device for device in jax.devices() if device.process_index == process] for process in processes}
    return [device for process in processes for device in own[process][: count // len(processes)]]

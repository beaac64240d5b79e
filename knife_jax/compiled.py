"""The pieces of a run compiled for many seeds, spread over devices.

Every device works on its own share of the seeds with a program of its own; nothing is exchanged between them while they train. Where there
are more devices than seeds, several of them share each seed; see `split`.

Shapes: S seeds, R evaluations that a chunk has room for, K distinct tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from knife_jax import hosts
from knife_jax.chunks import Carry, Pieces, Rows, Swept, seed_axes
from knife_jax.cores import compile_quickly, compile_start, compile_training, without_collecting
from knife_jax.learner import Metrics
from knife_jax.program import Row, RunnerState
from knife_jax.split import PARTS

SEEDS = "seeds"
"""The name of the seeds' axis in the mesh of devices."""


class Compiled(NamedTuple):
    """The functions of `Pieces` over S seeds; what they are given of the run's state they consume.

    Attributes:
        pieces: what was compiled.
        carry: shapes and shardings of what a chunk passes on.
        placed: puts keys or swept numbers on the devices.
        init: `(keys, swept)` to the state before the first task.
        begin: `(state, swept, place)` to a task's `Carry`.
        advance: `(carry, swept, place, rounds)` to `(carry, rows)`, metrics `[S, R]`.
        finish: `(state, since_last, place)` to `(state, row, everywhere)`, metrics `[S]` and `[S, K]`.
    """

    pieces: Pieces
    carry: Carry
    placed: Callable[[Any], Any]
    init: Callable[..., RunnerState]
    begin: Callable[..., Carry]
    advance: Callable[..., tuple[Carry, Rows]]
    finish: Callable[..., tuple[RunnerState, Row, Metrics]]


def seeds_mesh(count: int, parts: int = 1) -> Mesh:
    """So many devices, of every process as many: the seeds' axis is split over groups of them, and every seed over the parts of a group."""
    return Mesh(np.asarray(hosts.devices_of_all(count)).reshape(-1, parts), (SEEDS, PARTS))


@without_collecting()
def compile_pieces(pieces: Pieces, keys: Key[Array, "S"], swept: Swept, mesh: Mesh) -> Compiled:
    """Compiles a run for as many seeds as there are keys.

    Args:
        pieces: the run for one seed.
        keys: `[S]`, of which only the shape matters; S is a multiple of the number of groups of devices.
        swept: leaves of `config.hyper` `[S]`, of which only the shapes matter.
        mesh: the devices, `seeds_mesh`; in a group of it there are as many as the program is split over.
    """
    axes = seed_axes(pieces, keys[0], jax.tree.map(lambda leaf: leaf[0], swept))

    def lower(
        function: Callable[..., Any], ins: tuple[Any, ...], outs: Any, arguments: tuple[Any, ...], donated: tuple[int, ...] = ()
    ) -> Any:
        mapped = jax.vmap(function, in_axes=ins, out_axes=outs)
        spread = jax.shard_map(mapped, mesh=mesh, in_specs=specs(ins), out_specs=specs(outs), check_vma=False)
        return jax.jit(spread, donate_argnums=donated).lower(*arguments)

    def shapes(lowered: Any, outs: Any) -> Any:
        return _placed(lowered.out_info, outs, mesh)

    keys, swept = _placed(keys, 0, mesh), _placed(swept, 0, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    place = (number, number)
    init = lower(pieces.init, (0, 0), axes.state, (keys, swept))
    state = shapes(init, axes.state)
    begin = lower(pieces.begin, (axes.state, 0, None), axes, (state, swept, place), (0,))
    carry = shapes(begin, axes)
    rows = (axes, Rows(0, None))  # pyright: ignore[reportArgumentType]
    advance = lower(pieces.advance, (axes, 0, None, None), rows, (carry, swept, place, number), (0,))
    finish = lower(pieces.finish, (axes.state, 0, None), (axes.state, 0, 0), (carry.state, carry.since_last, place), (0,))

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: hosts.placed(leaf, NamedSharding(mesh, PartitionSpec(SEEDS))), tree)

    rounds = compile_training(advance, pieces.program.plan.samples_per_update)
    return Compiled(pieces, carry, placed, compile_start(init), compile_start(begin), rounds, compile_quickly(finish))


def specs(axes: Any) -> Any:
    """How `vmap`'s axes are split over devices: the seeds' axis is, and what has none is the same everywhere."""
    return jax.tree.map(lambda axis: PartitionSpec() if axis is None else PartitionSpec(SEEDS), axes, is_leaf=lambda axis: axis is None)


def _placed(shapes: Any, axes: Any, mesh: Mesh) -> Any:
    """The shapes of arrays with their places on the devices."""
    placements = jax.tree.broadcast(specs(axes), shapes, is_leaf=lambda spec: isinstance(spec, PartitionSpec))

    def place(shape: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes, placements)

"""`make_train`: collect, store, learn and evaluate over a sequence of tasks, as one pure function of a key.

Shapes: P tasks in the order met, K distinct tasks, N evaluations of a whole run.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from envs.context import in_one_context
from knife_jax.bundle import Bundle
from knife_jax.config import Config, merge_hyper, resolve
from knife_jax.learner import Metrics
from knife_jax.model import Hyper
from knife_jax.program import Place, Program, Row, RunnerState, make_program, make_row
from knife_jax.split import PARTS

Callback = Callable[[dict[str, np.ndarray]], None]
Emit = Callable[[dict[str, Array]], Any]


def make_train(
    config: Config | Mapping[str, Any] | str, *, callback: Callback | None = None, return_replay: bool = False, devices: int = 1
) -> Callable[..., dict[str, Any]]:
    """Makes the whole of a run one pure function.

    Args:
        config: a `Config`, a nested dict (whose key `preset` may name a base) or a preset's name.
        callback: called on the host once per evaluation, for all vmapped seeds together, with `{name: numpy array}`: the metrics below
            with the vmapped axes in front. It has no effect on results.
        return_replay: also return the replay in `runner_state`.
        devices: over how many of `jax.devices()` every seed is split: each learns from its part of every batch, and plays its part of the
            environments and of an evaluation's episodes where these can be split evenly. The draws are those of one device; the numbers
            agree to float tolerance. (To spread seeds over devices, see `run`.)

    Returns:
        `train(key, hyper=None)`, which may be jitted, and vmapped over keys and over leaves of `hyper` (`{section: {field: value}}`, over
        `config.hyper`). It returns `{"runner_state": RunnerState, "metrics": {...}}`, where N = P (per_task + 1) evaluations are one before
        each task's first step and `evaluation.per_task` evenly after it:

        * `eval/{return,won,length,optimum_share}` `[N]`: greedy play of the current task;
        * `train/*` `[N]`: means since the last evaluation, NaN before a task's first step and where there was nothing to average;
        * `plasticity/<layer>/<measure>` `[N]`: the state of the hidden units, see `plasticity.diagnostics.measure`;
        * `cure/<layer>/<measure>` `[N]`: what the cure did since the start of the run (`treated`, ...);
        * `position`, `task`, `rounds`, `updates` `[N]`: index into the task order, into the distinct tasks, rounds and gradient steps
          so far;
        * `all_tasks/*` `[P, K]`: greedy play of every distinct task at every task's end.

    Raises:
        ValueError: for a configuration that cannot be run, with the field's path; for more devices than there are, or than can share
            `replay.batch_size` evenly.

    Examples:
        >>> small = {"train": {"env_steps_per_task": 64}, "evaluation": {"per_task": 2, "episodes": 1}}
        >>> train = make_train({"preset": "matrix_drift", "env": {"name": "matrix", "scenario": "qtran"}, **small})
        >>> jax.jit(train)(jax.random.key(0))["metrics"]["eval/return"].shape
        (3,)
    """
    config = resolve(config)
    _check_devices(devices)
    program = make_program(config, devices)
    emit = _of_first_part(make_logger(callback), devices) if callback is not None else None
    order = jnp.asarray(program.networks.tasks.order, jnp.int32)

    @in_one_context
    def train(key: PRNGKeyArray, hyper: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        swept = merge_hyper(config, hyper)

        def one_task(state: RunnerState, place: Place) -> tuple[RunnerState, tuple[Row, Metrics]]:
            return _train_on_task(program, state, place, swept, emit)

        state, (rows, everywhere) = jax.lax.scan(one_task, program.init(key, swept), (jnp.arange(len(order)), order))
        metrics = {name: values.reshape(-1) for name, values in rows.unpacked().items()}
        metrics |= {name.replace("eval/", "all_tasks/"): values for name, values in everywhere.items()}
        kept = state if return_replay else state._replace(replay=None)  # pyright: ignore[reportArgumentType]
        return {"runner_state": kept, "metrics": metrics}

    if devices == 1:
        return train
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (PARTS,))
    split = jax.shard_map(train, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return lambda key, hyper=None: split(key, jax.tree.map(jnp.asarray, dict(hyper or {})))


def _train_on_task(
    program: Program, state: RunnerState, place: Place, hyper: Hyper, emit: Emit | None
) -> tuple[RunnerState, tuple[Row, Metrics]]:
    """One task from its first step to its end: rows `[per_task + 1]` on it, and greedy play of every task `[K]`.

    Evaluations come before the rounds that follow them, and the last one is part of that of all tasks, so that the program holds each of
    the two kinds of evaluation once.
    """
    task = place[1]

    def one_period(carry: tuple[RunnerState, Bundle], _: None) -> tuple[tuple[RunnerState, Bundle], Row]:
        state, since_last = carry
        state, evaluated = program.evaluate(state, task)
        row = _emitted(make_row(state, place, evaluated, since_last), emit)
        return program.train_rounds(state, task, hyper), row

    begun = program.begin_task(state, task, hyper)
    nothing_yet = program.no_metrics(begun)
    (state, since_last), rows = jax.lax.scan(one_period, (begun, nothing_yet), length=program.plan.evaluations_per_task)
    state, everywhere = program.evaluate_all(state)
    here = jax.tree.map(lambda values: values[task], everywhere)
    last = _emitted(make_row(state, place, here, since_last), emit)
    return state, (jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), rows, last), everywhere)


def make_logger(write: Callback) -> Emit:
    """Wraps a host function so that it is called once per event with the whole vmapped batch.

    The batching rule of `jax.debug.callback` would unroll over the batch; this one hands the batched arrays to another call of itself, so
    that nested vmaps add one leading axis each.
    """

    def on_host(event: dict[str, Any]) -> None:
        write({name: np.asarray(value) for name, value in event.items()})

    @custom_vmap
    def log(event: dict[str, Array]) -> tuple[()]:
        jax.debug.callback(on_host, event)
        return ()

    @log.def_vmap
    def batched(axis_size: int, in_batched: list[Any], event: dict[str, Array]) -> tuple[tuple[()], tuple[()]]:
        def full(value: Array, is_batched: bool) -> Array:
            return value if is_batched else jnp.broadcast_to(value, (axis_size, *jnp.shape(value)))

        log(jax.tree.map(full, event, in_batched[0]))
        return (), ()

    return log


def _check_devices(devices: int) -> None:
    if not 1 <= devices <= jax.device_count():
        raise ValueError(f"devices: from 1 to {jax.device_count()}, as many as there are; got {devices}")


def _of_first_part(emit: Emit, parts: int) -> Emit:
    """Of the devices that share a seed, only the first one speaks."""
    if parts == 1:
        return emit
    return lambda event: jax.lax.cond(jax.lax.axis_index(PARTS) == 0, lambda: emit(event), lambda: ())


def _emitted(row: Row, emit: Emit | None) -> Row:
    """A row as it is, once it is handed to the callback."""
    if emit is not None:
        emit(row.unpacked())
    return row

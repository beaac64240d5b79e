"""Checkpoints: all that it takes to go on to the same bits, on disk, all or nothing.

A checkpoint is a directory named after the rounds done so far, with the device's state (orbax), the host's arrays, what run it belongs
to, and a manifest with the digest of every file, by which damage is found before anything is believed. It is written under another name
and renamed once it is complete, so that a kill at any moment leaves the older ones as they were.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from knife_jax import hosts
from knife_jax.chunks import Carry
from knife_jax.loop import Learned, Point, Snapshot
from knife_jax.trees import flat, nested

FORMAT = 1
_STATE, _HOST, _META, _MANIFEST = "state", "host.npz", "meta.json", "manifest.json"
_UNFINISHED = ".unfinished-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class Loaded(NamedTuple):
    """A checkpoint read back.

    Attributes:
        snapshot: where to go on.
        extra: what `save` was given beside it.
        path: where it came from.
        damaged: what is wrong with newer ones, which were passed over.
    """

    snapshot: Snapshot
    extra: dict[str, Any]
    path: Path
    damaged: tuple[str, ...]


def save(directory: Path, step: int, snapshot: Snapshot, identity: Mapping[str, Any], extra: Mapping[str, Any], keep: int) -> Path:
    """Writes a checkpoint, and removes all but the newest `keep`; processes that make a run together all call it.

    Args:
        directory: of all checkpoints of a run.
        step: rounds done in the whole run; the checkpoint's name.
        snapshot: what to write.
        identity: what run this is; the same must be said to `load`.
        extra: anything for JSON that is to come back from `load`.
        keep: how many checkpoints stay.

    Raises:
        OSError: if it cannot be written; older checkpoints are untouched.
    """
    final = directory / f"{step:012d}"
    unfinished = directory / f"{_UNFINISHED}{step:012d}"
    meta = {"format": FORMAT, "point": snapshot.point._asdict(), "identity": identity, "extra": extra, "leaves": _leaves(snapshot.carry)}

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        unfinished.mkdir()

    def complete() -> None:
        np.savez(unfinished / _HOST, **flat(_host_part(snapshot)))  # pyright: ignore[reportArgumentType]
        (unfinished / _META).write_text(json.dumps(meta))
        (unfinished / _MANIFEST).write_text(json.dumps(_digests(unfinished)))
        _remove(final)
        os.rename(unfinished, final)

    def forget_older() -> None:
        for old in _steps(directory)[:-keep]:
            _remove(old)

    try:
        hosts.first_does(begin)
        _write_state(unfinished / _STATE, snapshot.carry)
        hosts.first_does(complete)
    except Exception as error:  # tensorstore reports a full disk as ValueError
        shutil.rmtree(unfinished, ignore_errors=True)
        older = _steps(directory)
        left = f"the last one is {older[-1]}" if older else "there is none yet"
        raise OSError(f"could not write the checkpoint {final}: {_one_line(error)}; {left}") from error
    hosts.first_does(forget_older)
    return final


def load(directory: Path, carry: Carry, identity: Mapping[str, Any]) -> Loaded | None:
    """Reads the newest checkpoint that is whole.

    Args:
        directory: of all checkpoints of a run.
        carry: shapes and shardings of the state.
        identity: what run this is.

    Returns:
        The checkpoint; None if there is none at all.

    Raises:
        CheckpointError: if none is whole, or the newest whole one is of another run or other code, with what differs.
    """
    damaged: list[str] = []
    for path in reversed(_steps(directory)):
        try:
            meta = _read_meta(path)
        except (OSError, ValueError, KeyError) as error:
            damaged.append(f"{path}: {_one_line(error)}")
            continue
        _check(path, meta, carry, identity)
        host = nested(dict(np.load(path / _HOST)))
        learned = tuple(Learned(**host["learned"][str(index)]) for index in range(len(host["learned"])))
        snapshot = Snapshot(Point(**meta["point"]), _read_state(path / _STATE, carry), host["metrics"], learned)
        return Loaded(snapshot, meta["extra"], path, tuple(damaged))
    if damaged:
        raise CheckpointError("no checkpoint is whole:\n" + "\n".join(damaged))
    return None


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], path: str = "") -> list[str]:
    """The fields in which two nested dicts differ, as `path: one value there, another here`."""
    lines = []
    for name in [*saved, *(name for name in given if name not in saved)]:
        one, other = saved.get(name), given.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += differences(one, other, f"{path}{name}.")
        elif one != other:
            lines.append(f"{path}{name}: {one!r} there, {other!r} here")
    return lines


def _check(path: Path, meta: Mapping[str, Any], carry: Carry, identity: Mapping[str, Any]) -> None:
    lines = differences(meta["identity"], identity)
    if lines:
        raise CheckpointError(f"{path} is of another run, which differs in\n  " + "\n  ".join(lines))
    saved, ours = {name: rest for name, *rest in meta["leaves"]}, {name: rest for name, *rest in _leaves(carry)}
    lines = differences(saved, json.loads(json.dumps(ours)))
    if lines:
        raise CheckpointError(f"{path} was written by another version of this code, whose state differs in\n  " + "\n  ".join(lines[:10]))


def _read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, once every file is found to be what was written."""
    if not (path / _MANIFEST).is_file():
        raise ValueError("not a checkpoint of knife-jax, it has no manifest.json")
    wanted, found = json.loads((path / _MANIFEST).read_text()), _digests(path)
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"damaged, {len(wrong)} of {len(wanted)} files are not what was written: {', '.join(wrong[:3])}")
    meta = json.loads((path / _META).read_text())
    if meta["format"] != FORMAT:
        raise ValueError(f"has format {meta['format']}, this version reads {FORMAT}")
    return meta


def _digests(directory: Path) -> dict[str, str]:
    """The digest of every file but the manifest, which is written to the disk proper on the way."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                digests[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
    return digests


def _leaves(carry: Carry) -> list[list[Any]]:
    """Name, shape and type of every leaf of the state."""
    return [[jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(carry)]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _write_state(path: Path, carry: Carry) -> None:
    """Orbax takes neither keys nor arrays without elements; keys become numbers, and what is empty is left out."""
    import orbax.checkpoint as ocp

    plain = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(carry)]
    tree = {f"{index:05d}": leaf for index, leaf in enumerate(plain) if leaf.size}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path.resolve(), args=ocp.args.StandardSave(tree))  # pyright: ignore[reportCallIssue]


def _read_state(path: Path, carry: Carry) -> Carry:
    import orbax.checkpoint as ocp

    leaves, structure = jax.tree.flatten(carry)
    target = {f"{index:05d}": _plain_shape(leaf) for index, leaf in enumerate(leaves) if leaf.size}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(path.resolve(), args=ocp.args.StandardRestore(target))  # pyright: ignore[reportCallIssue]

    def restored(index: int, leaf: jax.ShapeDtypeStruct) -> Any:
        if not leaf.size:
            assert isinstance(leaf.sharding, NamedSharding)
            return hosts.placed(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        values = found[f"{index:05d}"]
        return jax.random.wrap_key_data(values) if _is_key(leaf) else values

    return structure.unflatten(restored(index, leaf) for index, leaf in enumerate(leaves))


def _plain_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of a leaf as it is stored."""
    if not _is_key(leaf):
        return leaf
    data, sharding = jax.eval_shape(jax.random.key_data, leaf), leaf.sharding
    assert isinstance(sharding, NamedSharding)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=NamedSharding(sharding.mesh, sharding.spec))


def _host_part(snapshot: Snapshot) -> dict[str, Any]:
    return {"metrics": snapshot.metrics, "learned": {str(index): learned._asdict() for index, learned in enumerate(snapshot.learned)}}


def _steps(directory: Path) -> list[Path]:
    """All checkpoints that were completed, oldest first."""
    return sorted(path for path in directory.glob("[0-9]*") if path.is_dir()) if directory.is_dir() else []


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

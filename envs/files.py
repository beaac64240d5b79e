"""Files that are complete or absent."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def checked_path(path: str | Path, suffixes: tuple[str, ...]) -> Path:
    """A path with one of these suffixes, in a directory that exists.

    Raises:
        ValueError: if the suffix is another.
        FileNotFoundError: if the directory does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"path must end in {' or '.join(suffixes)}, not {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the directory {path.parent} of {path.name} does not exist")
    return path


@contextlib.contextmanager
def complete_or_not(path: Path) -> Iterator[Path]:
    """A path to write to, next to the wanted one; it is renamed if all goes well, and removed if not."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as directory:
        unfinished = Path(directory) / path.name
        yield unfinished
        os.replace(unfinished, path)

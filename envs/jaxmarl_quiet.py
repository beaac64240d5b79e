"""Keeps three habits of JaxMARL to its own calls: it needs NumPy's rank promotion, it warns, and it prints when imported."""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax


def import_jaxmarl() -> Any:
    """Imports JaxMARL without the lines that it prints and the warnings of its dependencies.

    On its way in, JaxMARL 0.2 points `sys.stdout` and `sys.stderr` at the interpreter's own streams, and only then prints.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__")}
    sys.stdout = sink = io.StringIO()
    setattr(sys, "__stdout__", sink)  # noqa: B010 (a read-only name to the type checker)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import jaxmarl
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)
    return jaxmarl


@contextlib.contextmanager
def in_jaxmarl() -> Iterator[None]:
    """Lets JaxMARL's own code mix ranks and warn; goes around the calls into JaxMARL, and holds while they are traced."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

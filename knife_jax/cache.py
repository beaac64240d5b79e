"""Compiled programs kept on disk, so that the second run of a configuration starts at once."""

import os

import jax
import platformdirs

VARIABLE = "KNIFE_JAX_CACHE"
"""The environment variable that names another directory, or turns the cache off with `off`."""


def keep_compiled_programs() -> str | None:
    """Turns JAX's persistent compilation cache on, in the user's cache directory.

    What `KNIFE_JAX_CACHE` says comes first; a cache that JAX was already given (`JAX_COMPILATION_CACHE_DIR`) is left as it is.

    Returns:
        The directory, or None where the cache is off or not ours.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() == "off" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    directory = chosen or os.path.join(platformdirs.user_cache_dir("knife-jax", appauthor=False), "compiled")
    jax.config.update("jax_compilation_cache_dir", directory)
    return directory

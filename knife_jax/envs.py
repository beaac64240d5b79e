"""The public names of the package `envs` under this library's own name, for code in which `envs` already means something else.

This library itself imports the package `envs`, so a top-level `envs` of your own must not come before it on `sys.path`.

Examples:
    >>> from knife_jax.envs import make
    >>> make("matrix", "two_step").env.max_steps
    2
"""

from envs import *  # noqa: F403 (its `__all__` is the one list of public names)
from envs import __all__ as __all__

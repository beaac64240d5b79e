"""The context in which JAX traces, the same from the beginning."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def in_one_context(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, traced in a third less of the time.

    JAX looks up what it traced before by the mesh of devices, for which "none" and "an empty one" are two answers: a program begins under
    the first, and every equation that is evaluated again, under `vmap` or `grad`, is so under the second. Whatever both meet, such as a
    game's step, would be traced twice. Here the second holds from the beginning; a mesh that there is stays.
    """

    @functools.wraps(function)
    def settled(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return function(*args, **kwargs)

    return settled

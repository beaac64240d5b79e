"""How the numbers of an observation are stored where they cannot be recomputed: exactly, in half the bytes, or in a quarter."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from envs.base import unknown_name

KINDS = ("float32", "float16", "int8")
_LARGEST_FLOAT16 = 65504.0
_STEPS = 127


@dataclass(frozen=True)
class Storage:
    """A way to store numbers.

    Attributes:
        kind: `float32`, as they are; `float16`, to a relative 2^-11 (whole numbers up to 2,048 exactly), 65,504 at most; or `int8`, 127
            equal steps on each side of an exact 0, so that numbers are within `bound / 254`, and larger ones become `bound`.
        bound: the largest absolute number that `int8` can store; with 127, whole numbers are exact.
    """

    kind: str = "float32"
    bound: float = 1.0

    def encode(self, values: Num[Array, "..."]) -> Num[Array, "..."]:
        """What is stored of them."""
        values = jnp.asarray(values, jnp.float32)
        if self.kind == "float16":
            return jnp.clip(values, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(jnp.float16)
        if self.kind == "int8":
            return jnp.round(jnp.clip(values * (_STEPS / self.bound), -_STEPS, _STEPS)).astype(jnp.int8)
        return values

    def decode(self, stored: Num[Array, "..."]) -> Float[Array, "..."]:
        """The numbers again, in float32."""
        values = stored.astype(jnp.float32)
        return values * (self.bound / _STEPS) if self.kind == "int8" else values


EXACT = Storage()


def make_storage(kind: str, bound: int | float | None, usual_bound: float | None) -> Storage:
    """Checks the options `storage` and `storage_bound` of a game.

    Args:
        kind: see `Storage`.
        bound: the user's; None for the game's usual one.
        usual_bound: what no number of the game exceeds by much; None where that is not known.

    Raises:
        ValueError: for an unknown kind, a bound that is not positive or is not used, or one that is needed and not given.
    """
    if kind not in KINDS:
        raise unknown_name("storage", kind, KINDS)
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < float("inf")):
        raise ValueError(f"storage_bound must be a positive number, got {bound!r}")
    if kind != "int8":
        if bound is not None:
            raise ValueError(f"storage_bound is for the storage 'int8', but storage is {kind!r}")
        return Storage(kind)
    if bound is None and usual_bound is None:
        raise ValueError("storage 'int8' needs storage_bound here, the largest absolute number that the game shows")
    return Storage(kind, float(usual_bound if bound is None else bound))  # pyright: ignore[reportArgumentType]

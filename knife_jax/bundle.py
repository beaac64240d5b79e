"""Many numbers as one array with names, so that loops and branches carry one array and the compiler has one kernel to make for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names"])
@dataclass(frozen=True)
class Bundle:
    """Named floating-point numbers.

    Attributes:
        names: M of them.
        values: `[..., M]`, NumPy's on the host.
    """

    names: tuple[str, ...]
    values: Any

    def __or__(self, other: "Bundle") -> "Bundle":
        """Both, whose names differ."""
        return Bundle(self.names + other.names, jnp.concatenate([self.values, other.values], axis=-1))

    def unpacked(self) -> dict[str, Any]:
        """`{name: [...]}`."""
        return {name: self.values[..., index] for index, name in enumerate(self.names)}


def blank(names: Iterable[str], value: float = 0.0) -> Bundle:
    """One number under every name, in the order of `bundled`."""
    names = tuple(sorted(names))
    return Bundle(names, jnp.full(len(names), value, jnp.float32))


def bundled(numbers: Mapping[str, Float[Array, ""]]) -> Bundle:
    """Scalars as a `Bundle`, sorted by name as jax sorts dicts."""
    names = tuple(sorted(numbers))
    return Bundle(names, jnp.stack([numbers[name] for name in names]) if names else jnp.zeros(0))

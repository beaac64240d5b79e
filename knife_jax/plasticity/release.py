"""Slow release: what frozen units give fades with a half-life, gradient step by gradient step, until their slots are free again.

A composite gives K + (A - C). Its K and C fade together, `A + f (K - C)` with `f = 2^(-age / half-life)`: f is 1 at the intervention,
where nothing changes; whatever the live weights do not take over meanwhile is lost; and at the end the unit is A alone, a unit like any
other. (With K alone fading, A would stay without its initial self for good, and the slot could never be freed.) The target network does not
fade by itself: it follows the online one through its own updates, as it does after every other step.

Recurrent units fade in what live units and later layers read of them. What K and C read of each other does not fade, so that their memory
stays what it was; a K whose slot comes free is lost to a younger K that read it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from knife_jax.plasticity import reserve as frozen
from knife_jax.plasticity.checks import check_number
from knife_jax.plasticity.graph import Graph

NEGLIGIBLE = 2.0**-10
"""A slot is free again once its K and C give no more than this share of what they did: after ten half-lives."""


def check(half_life: float | None, composite: str = "separate") -> None:
    """Refuses a release that cannot be.

    Raises:
        ValueError: for a half-life that is not positive, or shared outgoing weights.
    """
    if half_life is None:
        return
    check_number("release_updates", half_life, above=0)
    if composite == "shared":
        raise ValueError("release_updates: with composite='shared' K and C have no outgoing weights of their own that could fade")


def decay(half_life: float) -> float:
    """The share that is left after one gradient step."""
    return 0.5 ** (1.0 / half_life)


def expired(age: Float[Array, "*K R"], half_life: float) -> Bool[Array, "*K R"]:
    """Slots that give no more than `NEGLIGIBLE`.

    Args:
        age: gradient steps since the slot was filled.
        half_life: in gradient steps.
    """
    return jnp.exp2(-age / half_life) <= NEGLIGIBLE


def fade(graph: Graph, half_life: float, reserve: frozen.Reserve) -> frozen.Reserve:
    """A reserve one gradient step later: all that reads K and C reads a little less of them, but for recurrent K and C themselves."""
    share, faded = decay(half_life), dict(reserve)
    for module in frozen.modules(graph).values():
        block = reserve.get(module.name, {})
        if "rows" not in block:
            continue
        faded[module.name] = block | {"rows": share * block["rows"]}
        if "columns" in block and module.source is not module.target:
            axis, columns = len(module.stack), block["columns"]
            is_live = jnp.arange(columns.shape[axis]) < columns.shape[axis] - block["rows"].shape[axis]
            shares = jnp.where(is_live, 1.0, share).astype(columns.dtype)
            faded[module.name] |= {"columns": columns * shares.reshape((1,) * axis + (-1,) + (1,) * (columns.ndim - axis - 1))}
    prepared = frozen.prepare(graph, faded)
    return {name: block if block is reserve[name] else prepared[name] for name, block in faded.items()}

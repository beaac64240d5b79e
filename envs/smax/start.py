"""Start states of SMAX for a whole batch of battles, batch axis last: unit types and positions.

Laws of JaxMARL's `distributions.py`, and of SMACv2's `distributions.py` where noted. Shapes: A allies, M enemies, N = A + M units, K types,
B battles. Every draw of a law is made, whichever law applies; the draws are shared between the laws, as only one applies.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from envs.apart import apart
from envs.smax.engine import FAR, high_half, low_half, push_apart, statistics_of, stop_all, whole
from envs.smax.types import NOBODY, SmaxParams, SmaxState

CORNERS = 4
EDGE = 0.05
"""How close to the border a unit may start, in map units."""


def num_draws(num_units: int) -> int:
    """How many 32-bit draws a start takes: two positions and one for type and group per unit, one per group, two for the laws."""
    return 3 * num_units + CORNERS + 2


def start(bits: UInt32[Array, "D B"], params: SmaxParams, num_allies: int, map_size: tuple[float, float], legacy: bool) -> SmaxState:
    """The first states of a batch of episodes.

    Args:
        bits: `num_draws(N)` draws.
        params: the tasks.
        num_allies: A.
        map_size: width and height.
        legacy: as JaxMARL: extra enemies of random types are all marines, and units may start off the map (where they die at once).
    """
    num_units = params.unit_types.shape[0]
    at_x, at_y, own, groups, law = jnp.split(bits, [num_units, 2 * num_units, 3 * num_units, 3 * num_units + CORNERS])
    unit_types = _unit_types(high_half(own), params, num_allies, legacy)
    statistics = statistics_of(params.statistics, unit_types, num_allies)
    x, y = _positions(whole(at_x), whole(at_y), low_half(own), groups, law, params, num_allies, map_size)
    present = _present(num_allies, params.active_allies), _present(num_units - num_allies, params.active_enemies)
    present = jnp.concatenate(present)
    if not legacy:
        x, y = _reflected(x, map_size[0]), _reflected(y, map_size[1])
    radius = jnp.where(present, statistics.radius, -FAR)
    x, y = apart(push_apart)(x, y, radius)
    if not legacy:
        x, y = jnp.clip(x, EDGE, map_size[0] - EDGE), jnp.clip(y, EDGE, map_size[1] - EDGE)
    size = bits.shape[-1]
    return SmaxState(
        x=x,
        y=y,
        health=jnp.where(present, statistics.health, 0.0),
        cooldown=jnp.zeros_like(x),
        unit_types=unit_types.astype(jnp.int8),
        last_actions=stop_all(num_units, size),
        goal_x=map_size[0] - x[num_allies:],
        goal_y=map_size[1] - y[num_allies:],
        last_target=jnp.full((num_units - num_allies, size), NOBODY, jnp.int8),
        steps=jnp.zeros(size, jnp.int32),
    )


def _present(size: int, active: Int[Array, "b"]) -> Bool[Array, "U b"]:
    """The units of a team that take part."""
    return jnp.arange(size)[:, None] < active[None]


def _drawn(luck: Float[Array, "... B"], weights: Float[Array, "L b"]) -> Int[Array, "... B"]:
    """Indices drawn from the weights, which sum to 1."""
    index, total = jnp.zeros(luck.shape, jnp.int32), jnp.zeros((1,) * luck.ndim)
    for weight in weights[:-1]:
        total = total + weight.reshape((1,) * (luck.ndim - 1) + weight.shape)
        index = index + (luck >= total)
    return index


def _unit_types(luck: Float[Array, "N B"], params: SmaxParams, num_allies: int, legacy: bool) -> Int[Array, "N B"]:
    drawn = _drawn(luck, params.type_weights)
    num_enemies = drawn.shape[0] - num_allies
    allies, extra = drawn[:num_allies], drawn[2 * num_allies :]
    if legacy:
        extra = jnp.zeros_like(extra)
    drawn = jnp.concatenate([allies, allies[:num_enemies], extra])
    return jnp.where(params.random_types[None], drawn, params.unit_types.astype(jnp.int32))


def _positions(
    across: Float[Array, "N B"],
    along: Float[Array, "N B"],
    group: Float[Array, "N B"],
    groups: UInt32[Array, "4 B"],
    law: UInt32[Array, "2 B"],
    params: SmaxParams,
    num_allies: int,
    map_size: tuple[float, float],
) -> tuple[Float[Array, "N B"], Float[Array, "N B"]]:
    """Draws positions from all three laws, and keeps those of one."""
    width, height = map_size
    is_ally = jnp.arange(across.shape[0])[:, None] < num_allies
    off_x, off_y = params.spread[None] * (2 * across - 1), params.spread[None] * (2 * along - 1)
    facing = jnp.where(is_ally, 0.25 * width, 0.75 * width) + off_x, 0.5 * height + off_y
    mirrored = _mirrored(across * 0.5 * width, along * height, num_allies, width)
    inside = is_ally == (high_half(law[1]) < params.allies_inside)[None]
    middle_x, middle_y = _group_middles(group, groups, _drawn(low_half(law[1]), params.group_weights) + 1, map_size)
    around = jnp.where(inside, 0.5 * width, middle_x) + off_x, jnp.where(inside, 0.5 * height, middle_y) + off_y
    which = _drawn(whole(law[:1]), params.start_weights)
    x, y = (
        jnp.where(which == 0, first, jnp.where(which == 1, second, third))
        for first, second, third in zip(facing, mirrored, around, strict=True)
    )
    return x, y


def _mirrored(x: Float[Array, "N B"], y: Float[Array, "N B"], num_allies: int, width: float) -> tuple[Array, Array]:
    """Allies anywhere in the western half, each enemy where an ally is seen in the mirror; those left over anywhere in the eastern half."""
    pairs = min(num_allies, x.shape[0] - num_allies)
    extra = x[num_allies + pairs :]
    mirrored = jnp.concatenate([x[:num_allies], width - x[:pairs], width - extra])
    return mirrored, jnp.concatenate([y[:num_allies], y[:pairs], y[num_allies + pairs :]])


def _group_middles(
    luck: Float[Array, "N B"], groups: UInt32[Array, "4 B"], number: Int[Array, "B"], map_size: tuple[float, float]
) -> tuple[Float[Array, "N B"], Float[Array, "N B"]]:
    """The middle of each unit's group: so many groups lie on different diagonals, each anywhere between the centre and the corner."""
    share, priority = high_half(groups), low_half(groups)
    mine = (luck * number[None]).astype(jnp.int32)
    x, y = jnp.zeros_like(luck), jnp.zeros_like(luck)
    for corner in range(CORNERS):
        rank = jnp.stack([_precedes(priority, other, corner) for other in range(CORNERS) if other != corner]).sum(axis=0)
        in_group = mine == rank[None]
        corner_x, corner_y = (map_size[0] * (corner // 2), map_size[1] * (corner % 2))
        x = jnp.where(in_group, (share[corner] * 0.5 * map_size[0] + (1 - share[corner]) * corner_x)[None], x)
        y = jnp.where(in_group, (share[corner] * 0.5 * map_size[1] + (1 - share[corner]) * corner_y)[None], y)
    return x, y


def _precedes(priority: Float[Array, "4 B"], first: int, second: int) -> Bool[Array, "B"]:
    return priority[first] <= priority[second] if first < second else priority[first] < priority[second]


def _reflected(position: Float[Array, "N B"], size: float) -> Float[Array, "N B"]:
    """Positions beyond the border, reflected by it."""
    position = jnp.abs(position)
    return jnp.where(position > size, 2 * size - position, position)

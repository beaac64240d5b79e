"""What a task, a state and a record of SMAX hold; the rules are in `envs.smax.engine` and `envs.smax.start`.

Shapes: A allies, M enemies, N = A + M units (the allies first), K unit types. Positions are in map units, x to the east, y to the north.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Float16, Int, Int8

UNIT_TYPES = ("marine", "marauder", "stalker", "zealot", "zergling", "hydralisk")
"""The K types, in the order of JaxMARL's `smax_env.py`."""

MOVES = ("north", "east", "south", "west")
STOP = len(MOVES)
FIRST_ATTACK = STOP + 1
"""Actions: the four moves, stop, then one attack per opponent."""

NOBODY = -1


class UnitStatistics(NamedTuple):
    """What units are capable of, for each team (allies, enemies) and type.

    Attributes:
        speed: in map units per second.
        attack: health taken by one shot.
        attack_range: in map units.
        sight_range: in map units.
        radius: in map units; units push each other apart.
        health: at the start.
        cooldown: mean seconds between two shots, less 1/32.
    """

    speed: Float[Array, "2 K"]
    attack: Float[Array, "2 K"]
    attack_range: Float[Array, "2 K"]
    sight_range: Float[Array, "2 K"]
    radius: Float[Array, "2 K"]
    health: Float[Array, "2 K"]
    cooldown: Float[Array, "2 K"]


class SmaxParams(NamedTuple):
    """A task: everything that may differ between tasks of one size, as arrays.

    Attributes:
        statistics: what the units are capable of. Health and attack must be multiples of 1/8 below 256, which a record keeps exactly.
        unit_types: the type of each unit, where teams are not random.
        random_types: whether the allies' types are drawn at every reset; enemies are of the same types, one by one, and those that are
            more than the allies are drawn by themselves.
        type_weights: the law of those types; sums to 1.
        start_weights: the chances of the three start laws: teams facing each other in two clusters, teams mirrored over the middle of
            the map, one team surrounded by groups of the other. Sums to 1.
        allies_inside: the chance that, if one team is surrounded, it is the allies.
        group_weights: the law of the number of groups around the surrounded team, from 1 to 4; sums to 1.
        spread: how far units start from the middle of their cluster or group, at most, along each axis.
        active_allies: allies in the game, the first ones; the others are dead from the start.
        active_enemies: enemies in the game, the first ones.
        enemy_shoots: whether the heuristic enemy attacks.
        enemy_attacks_randomly: whether it attacks a random unit in range, instead of the closest.
        enemy_idleness: the chance that one of its units does nothing, for each unit and step.
        damage_reward: for taking all the health of all enemies, spread over the damage.
        win_reward: for a battle that is won.
        loss_reward: for one that is lost (usually not positive).
        see_enemy_actions: whether agents see what enemies last did.
        walls_cause_death: whether a unit that touches the border dies.
        enemy: whatever the enemy's learned policy takes, see `Smax.enemy_policy`; nothing for the heuristic one.
    """

    statistics: UnitStatistics
    unit_types: Int8[Array, "N"]
    random_types: Bool[Array, ""]
    type_weights: Float[Array, "K"]
    start_weights: Float[Array, "3"]
    allies_inside: Float[Array, ""]
    group_weights: Float[Array, "4"]
    spread: Float[Array, ""]
    active_allies: Int[Array, ""]
    active_enemies: Int[Array, ""]
    enemy_shoots: Bool[Array, ""]
    enemy_attacks_randomly: Bool[Array, ""]
    enemy_idleness: Float[Array, ""]
    damage_reward: Float[Array, ""]
    win_reward: Float[Array, ""]
    loss_reward: Float[Array, ""]
    see_enemy_actions: Bool[Array, ""]
    walls_cause_death: Bool[Array, ""]
    enemy: Any = ()


class SmaxState(NamedTuple):
    """The full state. A unit is alive as long as it has health.

    Attributes:
        x: positions.
        y: positions.
        health: what is left.
        cooldown: seconds until the unit may shoot; at or below 0 it may.
        unit_types: indices into `UNIT_TYPES`.
        last_actions: what each unit did on the step before; `STOP` at first.
        goal_x: where a heuristic enemy that sees nobody goes: its own start, rotated by 180 degrees about the middle of the map.
        goal_y: the same.
        last_target: the ally that each heuristic enemy attacked last, or `NOBODY`.
        steps: environment steps since the reset.
    """

    x: Float[Array, "N"]
    y: Float[Array, "N"]
    health: Float[Array, "N"]
    cooldown: Float[Array, "N"]
    unit_types: Int8[Array, "N"]
    last_actions: Int8[Array, "N"]
    goal_x: Float[Array, "M"]
    goal_y: Float[Array, "M"]
    last_target: Int8[Array, "M"]
    steps: Int[Array, ""]


class SmaxRecord(NamedTuple):
    """The 16 bytes per unit of a state that can be observed: all but the time and the enemy's intentions."""

    x: Float[Array, "N"]
    y: Float[Array, "N"]
    cooldown: Float[Array, "N"]
    health: Float16[Array, "N"]
    unit_types: Int8[Array, "N"]
    last_actions: Int8[Array, "N"]

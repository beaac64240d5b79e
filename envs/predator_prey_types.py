"""What a task, a state and a record of grid predator-prey hold; the rules are in `envs.predator_prey`.

Shapes: A agents, P prey (the stags, then the hares). Positions are (row, column), rows counted downwards.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt8


class PredatorPreyParams(NamedTuple):
    """A task: everything that may differ between tasks of one size, as arrays.

    Attributes:
        capture_condition: how many agents must catch a prey at once, for [stag, hare].
        capture_reward: what a captured prey pays the team, for [stag, hare].
        miscapture_punishment: added (so usually negative) once for every prey that some agents, but too few, try to catch.
        time_reward: added on every step.
        collision_reward: added for every agent that acts and does not move. As in the source that includes those that chose to stay or
            to catch, whose own marker is in their way; keep it 0 to avoid this.
        rest_probability: the chance that a prey that could move does not, for [stag, hare].
        capture_freezes: whether the catchers of a captured prey are out for the rest of the episode.
        remove_frozen: whether a frozen agent leaves the grid (then it blocks nobody, is not seen and sees nothing) or stands where it is.
        prevent_cannibalism: whether a capture needs an agent next to the prey; matters only for a condition of 0.
        active_agents: agents in the game, the first ones; the others are never placed.
        active_stags: stags in the game, the first ones.
        active_hares: hares in the game, the first ones.
        active_height: rows in the game, the upper ones; the others are wall. Walls look like empty cells but show in the action mask.
        active_width: columns in the game, the left ones; the others are wall.
        num_hunters: agents that are hunters, the first ones. GradPS draws a fresh random subset whenever an environment is constructed, and
            does not say whether training and evaluation environments agree; agents are alike but for their index, so the first ones lose
            no generality. Nobody observes who is a hunter.
        hunter_multiplier: factor on the reward of a hare that has a hunter among its catchers.
    """

    capture_condition: Int[Array, "2"]
    capture_reward: Float[Array, "2"]
    miscapture_punishment: Float[Array, ""]
    time_reward: Float[Array, ""]
    collision_reward: Float[Array, ""]
    rest_probability: Float[Array, "2"]
    capture_freezes: Bool[Array, ""]
    remove_frozen: Bool[Array, ""]
    prevent_cannibalism: Bool[Array, ""]
    active_agents: Int[Array, ""]
    active_stags: Int[Array, ""]
    active_hares: Int[Array, ""]
    active_height: Int[Array, ""]
    active_width: Int[Array, ""]
    num_hunters: Int[Array, ""]
    hunter_multiplier: Float[Array, ""]


class PredatorPreyState(NamedTuple):
    """The full state. A position means nothing where the agent is not in the task or the prey is not alive.

    Attributes:
        agents: positions.
        prey: positions, stags first.
        frozen: agents that are out after a capture.
        alive: prey that are neither captured nor absent from the task.
        steps: environment steps since the reset.
    """

    agents: Int[Array, "A 2"]
    prey: Int[Array, "P 2"]
    frozen: Bool[Array, "A"]
    alive: Bool[Array, "P"]
    steps: Int[Array, ""]


class PredatorPreyRecord(NamedTuple):
    """The 3N bytes of a state that can be observed: all but the time."""

    agents: UInt8[Array, "A 2"]
    prey: UInt8[Array, "P 2"]
    frozen: Bool[Array, "A"]
    alive: Bool[Array, "P"]

"""Grid predator-prey ("stag hunt"): agents must catch together what none of them can catch alone.

Shapes: A agents, S stags, P prey (the S stags, then the hares), N = A + P entities, U = 6 actions, H x W cells, r the radius of view.
Positions are (row, column), rows counted downwards. All sizes are those of the static grid; what a task does not use is masked out.

The rules are those of `stag_hunt.py` in the public repositories wendelinboehmer/dcg, hijkzzz/pymarl2, oxwhirl/wqmix and
xmu-rl-3dv/GradPS (the origin of the hunters), with one deviation, at `PredatorPrey.step`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from envs.apart import apart_under_vmap
from envs.base import Actions, Environment, Observation, Outcome, Scalar
from envs.predator_prey_types import PredatorPreyParams, PredatorPreyRecord, PredatorPreyState

ACTIONS = ("right", "down", "left", "up", "stay", "catch")
STAY, CATCH = ACTIONS.index("stay"), ACTIONS.index("catch")
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))
STAG, HARE = 0, 1
NOWHERE, WALL = -1, -2
LARGEST_SIDE = 256


class _PreyTurn(NamedTuple):
    """What is known of a prey before any prey has taken its turn; a neighbouring cell that is wall is `WALL`."""

    itself: Bool[Array, "P"]
    alive: Bool[Array, ""]
    condition: Int[Array, ""]
    rests: Bool[Array, ""]
    luck: Float[Array, ""]
    agent_beside: Bool[Array, "4 A"]
    neighbours: Int[Array, "4"]


class _Hunt(NamedTuple):
    """What the turns of the prey change; the cell of a prey that is not alive is `NOWHERE`."""

    frozen: Bool[Array, "A"]
    cells: Int[Array, "P"]


class _Events(NamedTuple):
    """What happened in one turn of a prey."""

    captured: Bool[Array, ""]
    missed: Bool[Array, ""]
    with_hunter: Bool[Array, ""]


@dataclass(frozen=True)
class PredatorPrey(Environment):
    """The grid predator-prey game; the sizes by default are those of pymarl2.

    Attributes:
        height: H, rows of the grid.
        width: W, columns of the grid.
        num_agents: A.
        num_stags: S.
        num_hares: P - S.
        radius: r; an agent sees the (2r+1) x (2r+1) cells around itself.
        max_steps: the time limit in environment steps.

    Raises:
        ValueError: if a size is out of range, or there are more entities than cells.
    """

    height: int = 10
    width: int = 10
    num_agents: int = 8
    num_stags: int = 8
    num_hares: int = 0
    radius: int = 2
    max_steps: int = 200

    def __post_init__(self):
        least = {"height": 1, "width": 1, "num_agents": 1, "num_stags": 0, "num_hares": 0, "radius": 0, "max_steps": 1}
        for name, smallest in least.items():
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= smallest):
                raise ValueError(f"{name} must be a whole number of at least {smallest}, not {getattr(self, name)!r}")
        for name in ("height", "width"):
            if getattr(self, name) > LARGEST_SIDE:
                raise ValueError(f"{name} must be at most {LARGEST_SIDE} (a record keeps positions in bytes), not {getattr(self, name)}")
        if self.num_prey == 0:
            raise ValueError("num_stags + num_hares must be at least 1: without prey every episode is over before it starts")
        check_room(self.num_agents + self.num_prey, self.height, self.width, "num_agents + num_stags + num_hares", "height x width")

    @property
    def num_prey(self) -> int:
        """P."""
        return self.num_stags + self.num_hares

    @property
    def num_actions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """U, see `ACTIONS`."""
        return len(ACTIONS)

    @property
    def observation_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """D = 3 (2r+1)^2."""
        return 3 * (2 * self.radius + 1) ** 2

    @property
    def state_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """G = 3 H W."""
        return 3 * self.height * self.width

    @property
    def default_params(self) -> PredatorPreyParams:
        """The rules of pymarl2's `stag_hunt.yaml`, everyone active. For other rules see `envs.predator_prey_scenarios.make`."""
        return PredatorPreyParams(**{name: jnp.asarray(value) for name, value in default_rules(self).items()})

    def reset(self, key: PRNGKeyArray, params: PredatorPreyParams) -> PredatorPreyState:
        """Places the active entities on distinct cells, uniformly at random."""
        present = jnp.concatenate([self._active_agents(params), self._active_prey(params)])
        cells = _distinct_cells(key, present, params.active_height * params.active_width)
        positions = jnp.stack(jnp.divmod(cells, params.active_width), axis=1)
        return PredatorPreyState(
            agents=positions[: self.num_agents],
            prey=positions[self.num_agents :],
            frozen=jnp.zeros(self.num_agents, bool),
            alive=present[self.num_agents :],
            steps=jnp.zeros((), jnp.int32),
        )

    def step(
        self, key: PRNGKeyArray, state: PredatorPreyState, actions: Actions, params: PredatorPreyParams
    ) -> tuple[PredatorPreyState, Outcome]:
        """Agents move one after the other in random order, then prey are captured or move one after the other in random order.

        An agent moves unless its target cell is taken. A prey meets the agents where they now are: those beside it that chose to catch and
        are not frozen are its catchers, and one agent may be a catcher of several prey. Enough catchers capture it and (if captures freeze)
        are frozen before the next prey's turn; too few are punished, once per prey; and a prey that is not captured moves to a
        random free neighbouring cell, if there is one and it does not rest.

        The episode terminates when no prey is alive or no agent is left unfrozen, and only then is won: agents left over, too few for any
        prey, play on to the time limit. Deviation from the source: where both ends coincide the source reports the limit, so that its
        learner bootstraps; here the episode is terminated and not truncated.

        Returns:
            The next state, and an outcome whose `info` counts the `captures` and `miscaptures` (punished prey) of this step.
        """
        draws = jax.random.uniform(key, (self.num_agents + 3 * self.num_prey,))
        agent_priority, prey_draws = draws[: self.num_agents], draws[self.num_agents :].reshape(3, self.num_prey)
        moved = self._agents_that_move(agent_priority, state, actions, params)
        stuck = self._acting(state.frozen, params) & ~moved
        agents = jnp.where(moved[:, None], state.agents + _step_of(actions), state.agents)
        hunt, events, order = self._hunt(prey_draws, state._replace(agents=agents), actions, params)
        alive = hunt.cells != NOWHERE
        prey = jnp.where(alive[:, None], jnp.stack(jnp.divmod(hunt.cells, self.width), axis=1), state.prey)
        next_state = PredatorPreyState(agents, prey, hunt.frozen, alive, state.steps + 1)
        reward = params.time_reward + params.collision_reward * stuck.sum() + self._hunt_reward(events, order, params)
        terminated = ~alive.any() | ~self._acting(hunt.frozen, params).any()
        truncated = (next_state.steps >= self.max_steps) & ~terminated
        info = {"won": terminated, "captures": events.captured.sum(), "miscaptures": events.missed.sum()}
        return next_state, Outcome(reward, terminated, truncated, info)

    def record(self, state: PredatorPreyState) -> PredatorPreyRecord:
        """Drops the time, which nobody observes, and keeps positions in bytes."""
        return PredatorPreyRecord(state.agents.astype(jnp.uint8), state.prey.astype(jnp.uint8), state.frozen, state.alive)

    def observe(self, record: PredatorPreyRecord, params: PredatorPreyParams) -> Observation:
        """Renders the windows, the grid and the action masks.

        An agent's view is its window [2r+1, 2r+1, 3] around itself, flattened in this order, with channels (agents, stags, hares) of zeros
        and ones and itself in the middle; cells off the grid are 0 (the sources' `observe_walls: False`). Frozen agents that are removed
        appear to nobody and see zeros; so do agents that are not in the task. The state is the grid [H, W, 3], flattened.

        A frozen or absent agent may only stay. Others may always stay, may move where there is no wall (even if the cell is taken), and may
        catch if a living prey is beside them.
        """
        windows, grid, action_mask = apart_under_vmap(self._marks)(record, params)
        windows, grid = apart_under_vmap(self._marked)(windows, grid)
        return Observation(windows.reshape(self.num_agents, -1), grid.reshape(-1), action_mask, self._active_agents(params))

    def _marks(
        self, record: PredatorPreyRecord, params: PredatorPreyParams
    ) -> tuple[Int[Array, "A E"], Int[Array, "E"], Bool[Array, "A U"]]:
        """Which number everyone turns to one in every window and in the grid (-1: none), and the action masks."""
        agents, prey = record.agents.astype(jnp.int32), record.prey.astype(jnp.int32)
        visible = self._visible(record.frozen, params)
        entities, shown = jnp.concatenate([agents, prey]), jnp.concatenate([visible, record.alive])
        channel = jnp.concatenate([jnp.zeros(self.num_agents, jnp.int32), 1 + self._kinds()])
        side = 2 * self.radius + 1
        offsets = entities[None] - agents[:, None] + self.radius
        in_view = _inside(offsets, side, side) & shown[None] & visible[:, None]
        windows = jnp.where(in_view, 3 * _cells(offsets, side) + channel[None], -1)
        grid = jnp.where(shown, 3 * _cells(entities, self.width) + channel, -1)
        return windows, grid, self._action_mask(agents, prey, record.frozen, record.alive, params)

    def _marked(self, windows: Int[Array, "A E"], grid: Int[Array, "E"]) -> tuple[Float[Array, "A V"], Float[Array, "G"]]:
        """The windows and the grid. Their marks are made apart, or XLA would make them anew for every number on processors."""
        return _ones_at(windows, 3 * (2 * self.radius + 1) ** 2), _ones_at(grid, 3 * self.height * self.width)

    def optimal_return(self, params: PredatorPreyParams) -> Scalar:
        """The best undiscounted return, given enough time and room to carry out every capture.

        Without freezing every prey that enough agents can surround is captured, hares with a hunter. With freezing each capture of a stag
        costs `capture_condition` agents, so that `floor(agents / condition)` of them are possible.

        Returns:
            The return; NaN with freezing and hares (which prey to give up is a packing problem), with time or collision rewards (the
            shortest episode is not known), with conditions below 1, capture rewards that are not positive, or rewarded miscaptures.
        """
        neighbours = jnp.minimum(2, params.active_height - 1) + jnp.minimum(2, params.active_width - 1)
        condition = jnp.maximum(params.capture_condition, 1)
        number = jnp.stack([params.active_stags, params.active_hares])
        captures = jnp.where(condition <= jnp.minimum(neighbours, params.active_agents), number, 0)
        captures = jnp.where(params.capture_freezes, jnp.minimum(captures, params.active_agents // condition), captures)
        multiplier = jnp.where(params.num_hunters > 0, jnp.maximum(params.hunter_multiplier, 1.0), 1.0)
        best = (captures * params.capture_reward * jnp.stack([jnp.ones(()), multiplier])).sum()
        ordinary = ((number == 0) | ((params.capture_condition >= 1) & (params.capture_reward > 0))).all()
        known = ordinary & (~params.capture_freezes | (params.active_hares == 0)) & (params.miscapture_punishment <= 0)
        return jnp.where(known & (params.time_reward == 0) & (params.collision_reward == 0), best, jnp.nan)

    def _active_agents(self, params: PredatorPreyParams) -> Bool[Array, "A"]:
        return jnp.arange(self.num_agents) < params.active_agents

    def _active_prey(self, params: PredatorPreyParams) -> Bool[Array, "P"]:
        return jnp.concatenate([jnp.arange(self.num_stags) < params.active_stags, jnp.arange(self.num_hares) < params.active_hares])

    def _acting(self, frozen: Bool[Array, "A"], params: PredatorPreyParams) -> Bool[Array, "A"]:
        return self._active_agents(params) & ~frozen

    def _visible(self, frozen: Bool[Array, "A"], params: PredatorPreyParams) -> Bool[Array, "A"]:
        """The agents that are on the grid."""
        return self._active_agents(params) & ~(frozen & params.remove_frozen)

    def _agents_that_move(
        self, priority: Float[Array, "A"], state: PredatorPreyState, actions: Actions, params: PredatorPreyParams
    ) -> Bool[Array, "A"]:
        """Lets the agents move in ascending order of `priority`; a target is met where its owner stands at that moment."""
        targets = state.agents + _step_of(actions)
        start, target, prey = _cells(state.agents, self.width), _cells(targets, self.width), _cells(state.prey, self.width)
        wants = (actions < STAY) & self._acting(state.frozen, params) & _inside(targets, params.active_height, params.active_width)
        can = wants & ~((target[:, None] == prey[None]) & state.alive[None]).any(axis=1)
        meets_start = (target[:, None] == start[None]) & self._visible(state.frozen, params)[None]
        meets_target = target[:, None] == target[None]

        def turn(moved, agent):
            itself, can, meets_target, meets_start = agent
            blocked = jnp.where(moved, meets_target, meets_start).any()
            return moved | (itself & can & ~blocked), None

        order = _turn_order(priority)
        in_turn = (jnp.eye(self.num_agents, dtype=bool)[order], can[order], meets_target[order], meets_start[order])
        return jax.lax.scan(turn, jnp.zeros(self.num_agents, bool), in_turn)[0]

    def _hunt(
        self, draws: Float[Array, "3 P"], state: PredatorPreyState, actions: Actions, params: PredatorPreyParams
    ) -> tuple[_Hunt, _Events, Int[Array, "P"]]:
        """Lets the prey take their turns; returns what they changed, what happened in each turn, and whose turn it was."""
        priority, rest, luck = draws
        order, kind = _turn_order(priority), self._kinds()
        neighbours = state.prey[:, None] + jnp.array(DIRECTIONS)[None]
        inside = _inside(neighbours, params.active_height, params.active_width)
        neighbours = jnp.where(inside, _cells(neighbours, self.width), WALL)
        agents = jnp.where(self._active_agents(params), _cells(state.agents, self.width), NOWHERE)
        turns = _PreyTurn(
            itself=jnp.eye(self.num_prey, dtype=bool),
            alive=state.alive,
            condition=params.capture_condition[kind],
            rests=rest < params.rest_probability[kind],
            luck=luck,
            agent_beside=neighbours[:, :, None] == agents[None, None],
            neighbours=neighbours,
        )
        turns = jax.tree.map(lambda leaf: leaf[order], turns)
        hunt = _Hunt(state.frozen, jnp.where(state.alive, _cells(state.prey, self.width), NOWHERE))
        hunt, events = jax.lax.scan(lambda hunt, prey: self._prey_turn(hunt, prey, actions == CATCH, params), hunt, turns)
        return hunt, events, order

    def _prey_turn(self, hunt: _Hunt, prey: _PreyTurn, catching: Bool[Array, "A"], params: PredatorPreyParams) -> tuple[_Hunt, _Events]:
        """The turn of one prey: it is captured, or else it moves or rests."""
        agent_beside = prey.agent_beside & self._visible(hunt.frozen, params)[None]
        catchers = prey.agent_beside.any(axis=0) & catching & ~hunt.frozen
        enough = catchers.sum() >= prey.condition
        captured = prey.alive & enough & (agent_beside.any() | ~params.prevent_cannibalism)
        taken = agent_beside.any(axis=1) | (prey.neighbours[:, None] == hunt.cells[None]).any(axis=1)
        free = (prey.neighbours != WALL) & ~taken
        nth_free = jnp.floor(prey.luck * free.sum()).astype(jnp.int32) + 1
        destination = jnp.where(free & (jnp.cumsum(free) == nth_free), prey.neighbours, 0).sum()
        moves = prey.alive & ~captured & ~prey.rests & free.any()
        hunt = _Hunt(
            frozen=hunt.frozen | (catchers & captured & params.capture_freezes),
            cells=jnp.where(prey.itself & (captured | moves), jnp.where(captured, NOWHERE, destination), hunt.cells),
        )
        is_hunter = jnp.arange(self.num_agents) < params.num_hunters
        return hunt, _Events(captured, prey.alive & catchers.any() & ~enough, (catchers & is_hunter).any())

    def _hunt_reward(self, events: _Events, order: Int[Array, "P"], params: PredatorPreyParams) -> Scalar:
        kind = self._kinds()[order]
        factor = jnp.where((kind == HARE) & events.with_hunter, params.hunter_multiplier, 1.0)
        captured = (events.captured * params.capture_reward[kind] * factor).sum()
        return captured + params.miscapture_punishment * events.missed.sum()

    def _kinds(self) -> Int[Array, "P"]:
        return jnp.where(jnp.arange(self.num_prey) < self.num_stags, STAG, HARE)

    def _action_mask(
        self,
        agents: Int[Array, "A 2"],
        prey: Int[Array, "P 2"],
        frozen: Bool[Array, "A"],
        alive: Bool[Array, "P"],
        params: PredatorPreyParams,
    ) -> Bool[Array, "A U"]:
        moves = _inside(agents[:, None] + jnp.array(DIRECTIONS)[None], params.active_height, params.active_width)
        distance = jnp.abs(agents[:, None] - prey[None]).sum(axis=-1)
        catch = ((distance == 1) & alive[None]).any(axis=1, keepdims=True)
        acting = self._acting(frozen, params)[:, None]
        return jnp.concatenate([moves & acting, jnp.ones_like(acting), catch & acting], axis=1)


def _step_of(actions: Actions) -> Int[Array, "A 2"]:
    """How far each action goes, were nothing in the way."""
    return jnp.array((*DIRECTIONS, (0, 0), (0, 0)))[actions]


def _ones_at(marks: Int[Array, "*B N"], size: int) -> Float[Array, "*B size"]:
    """So many zeros, but ones where a mark says."""
    numbers = jnp.arange(size).reshape((1,) * marks.ndim + (size,))
    return (marks[..., None] == numbers).any(axis=-2).astype(jnp.float32)


def _cells(positions: Int[Array, "*B 2"], width: int) -> Int[Array, "*B"]:
    """Positions as indices into the flattened grid; only those inside the grid are distinct."""
    return positions[..., 0] * width + positions[..., 1]


def _inside(positions: Int[Array, "*B 2"], height: Int[Array, ""] | int, width: Int[Array, ""] | int) -> Bool[Array, "*B"]:
    row, column = positions[..., 0], positions[..., 1]
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


def _precedes(priority: Float[Array, "N"]) -> Bool[Array, "N N"]:
    """Whether the one of the row comes before the one of the column; ties go by index."""
    index = jnp.arange(priority.size)
    return (priority[:, None] < priority[None]) | ((priority[:, None] == priority[None]) & (index[:, None] < index[None]))


def _turn_order(priority: Float[Array, "N"]) -> Int[Array, "N"]:
    """Like `argsort`, by comparing all pairs: for a handful of entities that is many times faster than XLA's sort."""
    rank = _precedes(priority).sum(axis=0)
    return jnp.argmax(rank[None] == jnp.arange(priority.size)[:, None], axis=1)


def _distinct_cells(key: PRNGKeyArray, present: Bool[Array, "N"], num_cells: Int[Array, ""]) -> Int[Array, "N"]:
    """A uniformly random assignment of distinct cells to those that are present; 0 for the others.

    Floyd's method draws the set of cells (Bentley and Floyd, "A sample of brilliance", 1987) at a cost that does not depend on the size of
    the grid, as automatic reset pays for it on every step; a random permutation then deals them out.
    """
    luck, priority = jax.random.uniform(key, (2, present.size))
    slots = jnp.arange(present.size)
    last = num_cells - present.sum() + slots
    drawn = jnp.floor(luck * (last + 1)).astype(jnp.int32)

    def draw(cells, slot):
        index, last, drawn = slot
        cell = jnp.where((cells == drawn).any(), last, drawn)
        return jnp.where((slots == index) & (index < present.sum()), cell, cells), None

    cells = jax.lax.scan(draw, jnp.full(present.size, -1), (slots, last, drawn))[0]
    rank = (_precedes(priority) & present[:, None]).sum(axis=0)
    return jnp.where(present, cells[rank], 0)


def default_rules(env: PredatorPrey) -> dict[str, np.ndarray]:
    """The fields of `PredatorPrey.default_params` as NumPy arrays, which can be read while JAX is tracing."""
    rules = {
        "capture_condition": (2, 1),
        "capture_reward": (10.0, 1.0),
        "miscapture_punishment": 0.0,
        "time_reward": 0.0,
        "collision_reward": 0.0,
        "rest_probability": (0.0, 0.0),
        "capture_freezes": True,
        "remove_frozen": True,
        "prevent_cannibalism": True,
        "active_agents": env.num_agents,
        "active_stags": env.num_stags,
        "active_hares": env.num_hares,
        "active_height": env.height,
        "active_width": env.width,
        "num_hunters": 0,
        "hunter_multiplier": 1.0,
    }
    return {name: np.asarray(value) for name, value in rules.items()}


def check_room(entities: int, height: int, width: int, counted: str, sides: str) -> None:
    """Refuses a grid that is too small; `counted` and `sides` name what was given.

    Raises:
        ValueError: if there are more entities than cells.
    """
    if entities > height * width:
        raise ValueError(f"{counted} make {entities} entities, more than the {height * width} cells of {sides} = {height} x {width}")

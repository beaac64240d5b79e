"""Scenarios of SMAX, their options, and sequences of drifting tasks.

Known are the 14 scenarios of JaxMARL, and SMACv2's teams (Ellis et al., 2023, `smacv2/examples/configs` and `distributions.py`):
`{5,10,20}gen_{protoss,terran,zerg}` and `{race}_{N}_vs_{M}`. There SMACv2 draws each unit from a race's three types, of which SMAX lacks
the rarest (colossus, medivac, baneling): they are left out and the other two weights made to sum to 1. As in SMACv2 the allies are the
ones surrounded, by one to four groups.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from envs.base import Tasks, some_of, stack_tasks, unknown_name
from envs.smax.game import Smax
from envs.smax.types import UNIT_TYPES, SmaxParams, UnitStatistics

# Marine, marauder, stalker, zealot, zergling, hydralisk; JaxMARL's numbers, shields folded into health.
STATISTICS: dict[str, tuple[float, ...]] = {
    "speed": (3.15, 2.25, 4.13, 3.15, 4.13, 3.15),
    "attack": (9.0, 10.0, 13.0, 8.0, 5.0, 12.0),
    "attack_range": (5.0, 6.0, 6.0, 2.0, 2.0, 5.0),
    "sight_range": (9.0, 10.0, 10.0, 9.0, 8.0, 9.0),
    "radius": (0.375, 0.5625, 0.625, 0.5, 0.375, 0.625),
    "health": (45.0, 125.0, 160.0, 150.0, 35.0, 80.0),
    "cooldown": (0.61, 1.07, 1.87, 0.86, 0.5, 0.59),
}
RACES = {"protoss": ("stalker", "zealot"), "terran": ("marine", "marauder"), "zerg": ("zergling", "hydralisk")}
STARTS = ("facing", "reflect", "surround")
ATTACK_MODES = ("closest", "random")
LARGEST_HEALTH = 256.0

Team = Mapping[str, int]


class Scenario(NamedTuple):
    """Who fights whom, and from where.

    Attributes:
        allies: how many of each type, in this order.
        enemies: the same.
        random_weights: the law of random teams of these sizes; None for teams as they are.
        smacv2_starts: whether the allies are the ones surrounded, by one to four groups; else either team, by four.
    """

    allies: Team
    enemies: Team
    random_weights: Mapping[str, float] | None = None
    smacv2_starts: bool = False


def _marines(allies: int, enemies: int) -> Scenario:
    return Scenario({"marine": allies}, {"marine": enemies})


def _random_types(units: int) -> Scenario:
    return Scenario({"marine": units}, {"marine": units}, dict.fromkeys(UNIT_TYPES, 1 / len(UNIT_TYPES)))


def _of_race(race: str, allies: int, enemies: int) -> Scenario:
    first = RACES[race][0]
    return Scenario({first: allies}, {first: enemies}, dict.fromkeys(RACES[race], 0.5), smacv2_starts=True)


SCENARIOS: dict[str, Scenario] = {
    "3m": _marines(3, 3),
    "2s3z": Scenario({"stalker": 2, "zealot": 3}, {"stalker": 2, "zealot": 3}),
    "25m": _marines(25, 25),
    "3s5z": Scenario({"stalker": 3, "zealot": 5}, {"stalker": 3, "zealot": 5}),
    "8m": _marines(8, 8),
    "5m_vs_6m": _marines(5, 6),
    "10m_vs_11m": _marines(10, 11),
    "27m_vs_30m": _marines(27, 30),
    "3s5z_vs_3s6z": Scenario({"stalker": 3, "zealot": 5}, {"stalker": 3, "zealot": 6}),
    "3s_vs_5z": Scenario({"stalker": 3}, {"zealot": 5}),
    "6h_vs_8z": Scenario({"hydralisk": 6}, {"zealot": 8}),
    **{f"smacv2_{units}_units": _random_types(units) for units in (5, 10, 20)},
    **{f"{units}gen_{race}": _of_race(race, units, units) for units in (5, 10, 20) for race in RACES},
    **{f"{race}_{a}_vs_{b}": _of_race(race, a, b) for race in RACES for a, b in ((5, 5), (10, 10), (20, 20), (10, 11), (20, 23))},
}


class TaskOptions(NamedTuple):
    """What may differ between tasks of one size.

    Attributes:
        unit_weights: random teams of these types with these chances, which sum to 1; the scenario's own if None.
        start_weights: chances of the start laws `facing`, `reflect` and `surround`, which sum to 1; the scenario's own if None.
        allies_inside: the chance that a surrounded team is the allies; the scenario's own if None.
        group_weights: chances of one, two, three and four groups around it; the scenario's own if None.
        spread: of the clusters, in map units.
        active_allies: how many of the allies take part; all if None.
        active_enemies: how many of the enemies take part; all if None.
        attack_mode: whom the heuristic enemy attacks, `closest` or `random`.
        enemy_shoots: whether it does.
        enemy_idleness: the chance that an enemy unit does nothing on a step.
        ally_scale: factors on the statistics of all ally types, such as `{"health": 0.5}`. Health and attack are rounded to eighths.
        enemy_scale: the same for enemies.
        unit_statistics: numbers of a type in both teams, such as `{"marine": {"attack": 10}}`, before factors.
        damage_reward: for taking all the health of all enemies.
        win_reward: for winning.
        loss_reward: for losing.
        see_enemy_actions: whether agents see what enemies last did.
        walls_cause_death: whether touching the border kills.
    """

    unit_weights: Mapping[str, float] | None = None
    start_weights: Mapping[str, float] | None = None
    allies_inside: float | None = None
    group_weights: Sequence[float] | None = None
    spread: float = 2.0
    active_allies: int | None = None
    active_enemies: int | None = None
    attack_mode: str = "closest"
    enemy_shoots: bool = True
    enemy_idleness: float = 0.0
    ally_scale: Mapping[str, float] | None = None
    enemy_scale: Mapping[str, float] | None = None
    unit_statistics: Mapping[str, Mapping[str, float]] | None = None
    damage_reward: float = 1.0
    win_reward: float = 1.0
    loss_reward: float = 0.0
    see_enemy_actions: bool = True
    walls_cause_death: bool = True


SIZE_OPTIONS = ("allies", "enemies", "max_steps", "observation_type", "legacy")


def make(
    scenario: str = "3m",
    *,
    allies: Team | None = None,
    enemies: Team | None = None,
    max_steps: int = 100,
    observation_type: str = "unit_list",
    legacy: bool = False,
    **options: Any,
) -> tuple[Smax, SmaxParams]:
    """Makes SMAX for a scenario.

    Args:
        scenario: a key of `SCENARIOS`, or `custom` with teams of your own.
        allies: of `custom`: how many of each type, such as `{"marine": 3}`.
        enemies: of `custom`.
        max_steps: the time limit in environment steps (half a second each).
        observation_type: `unit_list` or `conic`.
        legacy: exactly as JaxMARL 0.2, defects included; see `Smax`.
        **options: fields of `TaskOptions`.

    Returns:
        The environment and the task.

    Raises:
        ValueError: with the option's name, for anything unknown or out of range.

    Examples:
        >>> env, params = make("2s3z")
        >>> env.num_agents, env.num_actions, env.observation_size, env.state_size
        (5, 10, 127, 120)
    """
    for name in options:
        if name not in TaskOptions._fields:
            raise unknown_name("option", name, (*TaskOptions._fields, *SIZE_OPTIONS))
    teams = _teams(scenario, allies, enemies)
    unit_types = _listed("allies", teams.allies), _listed("enemies", teams.enemies)
    env = Smax(len(unit_types[0]), len(unit_types[1]), max_steps, observation_type, bool(legacy))
    return env, _params(env, teams, TaskOptions(**options))._replace(unit_types=jnp.array(unit_types[0] + unit_types[1], jnp.int8))


def _params(env: Smax, teams: Scenario, options: TaskOptions) -> SmaxParams:
    """A task of marines alone, unless teams are random."""
    random = teams.random_weights is not None
    weights = teams.random_weights if options.unit_weights is None else options.unit_weights
    starts = options.start_weights or ({"reflect": 0.5, "surround": 0.5} if random else {"facing": 1.0})
    if options.attack_mode not in ATTACK_MODES:
        raise unknown_name("attack_mode", options.attack_mode, ATTACK_MODES)
    inside = (1.0 if teams.smacv2_starts else 0.5) if options.allies_inside is None else options.allies_inside
    groups = (0.25,) * 4 if teams.smacv2_starts else (0.0, 0.0, 0.0, 1.0)
    return SmaxParams(
        statistics=_statistics(options),
        unit_types=jnp.zeros(env.num_units, jnp.int8),
        random_types=jnp.asarray(weights is not None),
        type_weights=_law("unit_weights", weights or {UNIT_TYPES[0]: 1.0}, UNIT_TYPES),
        start_weights=_law("start_weights", starts, STARTS),
        allies_inside=_share("allies_inside", inside),
        group_weights=_group_law(groups if options.group_weights is None else options.group_weights),
        spread=_number("spread", options.spread, 0.0, 8.0),
        active_allies=_count("active_allies", options.active_allies, env.num_agents),
        active_enemies=_count("active_enemies", options.active_enemies, env.num_enemies),
        enemy_shoots=jnp.asarray(bool(options.enemy_shoots)),
        enemy_attacks_randomly=jnp.asarray(options.attack_mode == "random"),
        enemy_idleness=_share("enemy_idleness", options.enemy_idleness),
        damage_reward=_number("damage_reward", options.damage_reward),
        win_reward=_number("win_reward", options.win_reward),
        loss_reward=_number("loss_reward", options.loss_reward),
        see_enemy_actions=jnp.asarray(bool(options.see_enemy_actions)),
        walls_cause_death=jnp.asarray(bool(options.walls_cause_death)),
    )


def default_params(env: Smax) -> SmaxParams:
    """The task of an environment's sizes in which all units are marines that face each other."""
    return make("custom", allies={"marine": env.num_agents}, enemies={"marine": env.num_enemies})[1]


def drift(race: str = "protoss", units: int = 5, only: Sequence[str] | None = None, **options: Any) -> tuple[Smax, Tasks]:
    """Ten tasks for teams of one race, then the first again.

    Team composition, start law, strength of the enemy's policy and unit statistics differ from task to task; sizes, and so shapes, do not.

    Args:
        race: a key of `RACES`.
        units: on each side.
        only: names of the tasks to keep, in their order; all ten if None.
        **options: what `make` takes, for all tasks (a task's own options come first).

    Returns:
        The environment and its tasks.
    """
    if race not in RACES:
        raise unknown_name("race", race, RACES)
    scenario = f"{race}_{units}_vs_{units}"
    if scenario not in SCENARIOS:
        raise ValueError(f"units must be 5, 10 or 20, not {units!r}")
    env, _ = make(scenario, **options)
    tasks = {name: make(scenario, **{**options, **task})[1] for name, task in some_of(_drift_tasks(race, units), only).items()}
    return env, stack_tasks(list(tasks.values()), list(tasks), [*range(len(tasks)), 0])


def _drift_tasks(race: str, units: int) -> dict[str, dict[str, Any]]:
    """The options of every task of a drift."""
    first, second = RACES[race]
    return {
        "mixed": {},
        "first_type": {"unit_weights": {first: 1.0}, "start_weights": {"facing": 1.0}},
        "surrounded": {"start_weights": {"surround": 1.0}, "enemy_scale": {"attack": 0.9}},
        "second_type": {"unit_weights": {second: 1.0}, "start_weights": {"reflect": 1.0}},
        "surrounding": {"start_weights": {"surround": 1.0}, "allies_inside": 0.0},
        "strong_enemy": {"start_weights": {"reflect": 1.0}, "enemy_scale": {"health": 1.1}},
        "erratic_enemy": {"attack_mode": "random", "enemy_idleness": 0.3, "enemy_scale": {"attack": 1.5}},
        "fast_enemy": {"start_weights": {"facing": 1.0}, "enemy_scale": {"speed": 1.5, "attack": 0.9}},
        "outnumbered": {
            "active_allies": units - max(1, units // 5),
            "start_weights": {"facing": 1.0},
            "enemy_scale": {"health": 0.75},
        },
        "short_sighted": {"ally_scale": {"sight_range": 0.6}, "enemy_scale": {"sight_range": 0.6}, "spread": 4.0},
    }


def _teams(scenario: str, allies: Team | None, enemies: Team | None) -> Scenario:
    if scenario == "custom":
        if allies is None or enemies is None:
            raise ValueError('scenario \'custom\' needs the options "allies" and "enemies", such as {"marine": 3}')
        return Scenario(allies, enemies)
    if allies is not None or enemies is not None:
        raise ValueError(f"allies and enemies are options of scenario 'custom', not of {scenario!r}")
    if scenario not in SCENARIOS:
        raise unknown_name("scenario", scenario, [*SCENARIOS, "custom"])
    return SCENARIOS[scenario]


def _listed(path: str, team: Team) -> list[int]:
    """The type of every unit of a team."""
    types = []
    for name, count in team.items():
        if name not in UNIT_TYPES:
            raise unknown_name(f"unit in {path}", name, UNIT_TYPES)
        if isinstance(count, bool) or not (isinstance(count, int) and count >= 0):
            raise ValueError(f"{path}.{name} must be a whole number of at least 0, not {count!r}")
        types += [UNIT_TYPES.index(name)] * count
    if not types:
        raise ValueError(f"{path} must have at least one unit, not {dict(team)!r}")
    return types


def _law(path: str, weights: Mapping[str, float], names: Sequence[str]) -> Any:
    """Chances in the order of the names."""
    for name in weights:
        if name not in names:
            raise unknown_name(f"name in {path}", name, names)
    return _chances(path, [weights.get(name, 0.0) for name in names])


def _group_law(weights: Sequence[float]) -> Any:
    if len(weights) != 4:
        raise ValueError(f"group_weights must be four chances, of one to four groups, not {list(weights)!r}")
    return _chances("group_weights", weights)


def _chances(path: str, weights: Sequence[float]) -> Any:
    values = [float(_number(path, weight, 0.0)) for weight in weights]
    if abs(sum(values) - 1.0) > 1e-4:
        raise ValueError(f"{path} must sum to 1, not to {sum(values):g}")
    return jnp.array(np.array(values) / sum(values), jnp.float32)


def _number(path: str, value: Any, least: float = -math.inf, most: float = math.inf) -> Any:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and least <= value <= most):
        bounds = ("" if math.isinf(least) else f" of at least {least:g}") + ("" if math.isinf(most) else f" and at most {most:g}")
        raise ValueError(f"{path} must be a finite number{bounds}, not {value!r}")
    return jnp.float32(value)


def _share(path: str, value: Any) -> Any:
    return _number(path, value, 0.0, 1.0)


def _count(path: str, value: int | None, most: int) -> Any:
    value = most if value is None else value
    if isinstance(value, bool) or not (isinstance(value, int) and 1 <= value <= most):
        raise ValueError(f"{path} must be a whole number from 1 to {most}, not {value!r}")
    return jnp.int32(value)


def _statistics(options: TaskOptions) -> UnitStatistics:
    """The statistics of both teams, `[2, K]` each."""
    tables = {name: np.array([row, row]) for name, row in STATISTICS.items()}
    for unit, numbers in (options.unit_statistics or {}).items():
        if unit not in UNIT_TYPES:
            raise unknown_name("unit in unit_statistics", unit, UNIT_TYPES)
        for name, value in numbers.items():
            _statistic_name(f"unit_statistics.{unit}", name)
            tables[name][:, UNIT_TYPES.index(unit)] = _positive(f"unit_statistics.{unit}.{name}", value)
    for team, path in enumerate(("ally_scale", "enemy_scale")):
        for name, factor in (getattr(options, path) or {}).items():
            _statistic_name(path, name)
            tables[name][team] *= _positive(f"{path}.{name}", factor)
    for name in ("health", "attack"):
        tables[name] = np.maximum(np.round(tables[name] * 8) / 8, 1 / 8)
        if tables[name].max() >= LARGEST_HEALTH:
            reached = f"but reaches {tables[name].max():g}"
            raise ValueError(f"{name} must stay below {LARGEST_HEALTH:g} (a record keeps it in two bytes), {reached}")
    return UnitStatistics(**{name: jnp.array(table, jnp.float32) for name, table in tables.items()})


def _statistic_name(path: str, name: str) -> None:
    if name not in STATISTICS:
        raise unknown_name(f"statistic in {path}", name, STATISTICS)


def _positive(path: str, value: Any) -> float:
    number = float(_number(path, value, 0.0))
    if number == 0.0:
        raise ValueError(f"{path} must be positive")
    return number

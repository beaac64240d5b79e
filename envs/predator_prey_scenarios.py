"""The published settings of grid predator-prey, tasks made of named and checked rules, and the drift.

This module knows the game; the game does not know it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import Tasks, some_of, stack_tasks, unknown_name
from envs.predator_prey import PredatorPrey, check_room, default_rules
from envs.predator_prey_types import PredatorPreyParams


class Scenario(NamedTuple):
    """A published setting: the sizes of the game and the rules that differ from the defaults.

    Attributes:
        sizes: fields of `PredatorPrey`.
        rules: fields of `PredatorPreyParams`.
    """

    sizes: dict[str, int]
    rules: dict[str, Any]


def _gradps(side: int, agents: int, hunters: int) -> Scenario:
    sizes = {"height": side, "width": side, "num_agents": agents, "num_stags": agents, "num_hares": agents, "radius": 3, "max_steps": 150}
    rules = {"capture_reward": (10.0, 2.0), "num_hunters": hunters, "hunter_multiplier": 5.0}
    return Scenario(sizes, {**rules, "capture_freezes": False, "remove_frozen": False})


def _reborn(side: int, agents: int) -> Scenario:
    sizes = {"height": side, "width": side, "num_agents": agents, "num_stags": 2 * agents, "num_hares": 0, "radius": 1, "max_steps": 150}
    return Scenario(sizes, {"time_reward": -0.1, "capture_freezes": False, "remove_frozen": False})


SCENARIOS: dict[str, Scenario] = {
    "pymarl2": Scenario({}, {}),
    "p05": Scenario({}, {"miscapture_punishment": -0.5}),
    "p15": Scenario({}, {"miscapture_punishment": -1.5}),
    "wqmix": Scenario({}, {"miscapture_punishment": -2.0}),
    "dcg": Scenario({}, {"miscapture_punishment": -2.0}),
    "gradps_small": _gradps(20, 6, 2),
    "gradps_medium": _gradps(25, 10, 3),
    "gradps_large": _gradps(30, 15, 5),
    "reborn_small": _reborn(20, 6),
    "reborn_medium": _reborn(30, 12),
    "reborn_large": _reborn(40, 18),
}


def make(scenario: str = "pymarl2", **overrides: Any) -> tuple[PredatorPrey, PredatorPreyParams]:
    """A game and the parameters of its task.

    The settings are those of pymarl2's `stag_hunt.yaml`, of WQMIX's `pred_prey_punish` and DCG's `rel_overgen` (the same game, with a
    punishment of -2), and of GradPS's three sizes. `p05` and `p15` are pymarl2's with a punishment of -0.5 and -1.5. ReBorn publishes
    sizes, view, rewards and that every prey takes two agents (NeurIPS 2024, Table 4), but no configuration: its 150 steps are taken from
    GradPS, by the same group; that captures do not freeze and miscaptures are not punished is assumed.

    Args:
        scenario: a name in `SCENARIOS`.
        **overrides: fields of `PredatorPrey` or `PredatorPreyParams`. The active numbers and sides follow the static ones unless given.

    Raises:
        ValueError: if the scenario or an override is unknown, or a value is out of range or of the wrong shape.
    """
    _check_names("scenario", [scenario], SCENARIOS)
    sizes, rules = SCENARIOS[scenario]
    static = {field.name for field in fields(PredatorPrey)}
    _check_names("override", overrides, [*sorted(static), *PredatorPreyParams._fields])
    env = PredatorPrey(**{**sizes, **{name: value for name, value in overrides.items() if name in static}})
    return env, _params(env, {**rules, **{name: value for name, value in overrides.items() if name not in static}})


def drift_tasks(env: PredatorPrey, params: PredatorPreyParams, only: Sequence[str] | None = None) -> Tasks:
    """The drift `drift`: a task, seven tasks that each change one thing about it, and the first task again.

    They change the capture condition (one more agent), the capture reward (half), the miscapture punishment (1.5 more), prey speed (it
    rests every other step), numbers (half of the agents and of the prey), the grid (three quarters of its height and width, the
    rest is wall), and whether captures freeze.

    Args:
        env: the game; every task has its sizes.
        params: the first task.
        only: names of the tasks to keep, in their order; all eight if None.

    Raises:
        ValueError: if a task is not possible, for example because its entities do not fit between the walls, or has no such name.
    """
    base = {name: np.asarray(value) for name, value in params._asdict().items()}
    numbers = ("active_agents", "active_stags", "active_hares")
    sides = ("active_height", "active_width")
    changes = {
        "base": {},
        "condition": {"capture_condition": base["capture_condition"] + 1},
        "reward": {"capture_reward": base["capture_reward"] / 2},
        "punishment": {"miscapture_punishment": base["miscapture_punishment"] - 1.5},
        "rest": {"rest_probability": (0.5, 0.5)},
        "numbers": {name: (base[name] + 1) // 2 for name in numbers},
        "walls": {name: (3 * base[name] + 3) // 4 for name in sides},
        "freezing": {"capture_freezes": ~base["capture_freezes"], "remove_frozen": ~base["capture_freezes"]},
    }
    kept = some_of(changes, only)
    tasks = [_params(env, {**base, **change}) for change in kept.values()]
    return stack_tasks(tasks, tuple(kept), (*range(len(kept)), 0))


def _params(env: PredatorPrey, rules: dict[str, Any]) -> PredatorPreyParams:
    """Validated parameters: pymarl2's rules with everyone active, but for `rules`."""
    defaults = default_rules(env).items()
    params = PredatorPreyParams(**{name: _leaf(name, rules.get(name, default), default) for name, default in defaults})
    limits = {
        "capture_condition": (0, np.inf),
        "rest_probability": (0, 1),
        "active_agents": (1, env.num_agents),
        "active_stags": (0, env.num_stags),
        "active_hares": (0, env.num_hares),
        "active_height": (1, env.height),
        "active_width": (1, env.width),
        "num_hunters": (0, env.num_agents),
    }
    for name, (least, most) in limits.items():
        value = getattr(params, name)
        if not ((least <= value) & (value <= most)).all():
            raise ValueError(f"{name} must be at least {least} and at most {most}, not {value.tolist()}")
    prey = params.active_stags + params.active_hares
    if prey == 0:
        raise ValueError("active_stags + active_hares must be at least 1: without prey every episode is over before it starts")
    entities, height, width = int(params.active_agents + prey), int(params.active_height), int(params.active_width)
    check_room(entities, height, width, "active_agents + active_stags + active_hares", "active_height x active_width")
    return jax.tree.map(jnp.asarray, params)


def _leaf(name: str, value: Any, default: np.ndarray) -> Any:
    """One parameter as a NumPy array, in the shape of its default and the type that JAX gives the default."""
    shape, dtype = default.shape, jax.dtypes.canonicalize_dtype(default.dtype)
    leaf = np.asarray(value)
    if leaf.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}{' for [stag, hare]' if shape else ''}, not {leaf.shape}")
    if not np.can_cast(leaf.dtype, dtype, "same_kind"):
        raise ValueError(f"{name} must be of type {dtype}, not {leaf.dtype}")
    if not np.isfinite(leaf).all():
        raise ValueError(f"{name} must be finite, not {leaf.tolist()}")
    return leaf.astype(dtype)


def _check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(what, name, known)

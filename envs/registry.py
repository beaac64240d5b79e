"""Games and task sequences by name."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from envs import jaxmarl_adapter, matrix_game, predator_prey_scenarios, smax
from envs.base import Environment, EnvParams, Tasks, stack_tasks, unknown_name


class Game(NamedTuple):
    """An environment and the tasks that are met in it."""

    env: Environment
    tasks: Tasks


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a game.

    Attributes:
        summary: one line for listings.
        build: `(scenario, **options)` to an environment and the parameters of one task.
        scenarios: names of single tasks.
        default: the scenario taken when none is named.
        drifts: names of task sequences, each with its maker `(**options)`.
        open_ended: whether `build` also knows scenarios that are not listed.
    """

    summary: str
    build: Callable[..., tuple[Environment, EnvParams]]
    scenarios: tuple[str, ...]
    default: str
    drifts: Mapping[str, Callable[..., Game]] = field(default_factory=dict)
    open_ended: bool = False


def _build_matrix(scenario: str, payoff: Any = None) -> tuple[Environment, EnvParams]:
    if payoff is not None:
        return matrix_game.matrix_game(payoff)
    if scenario == "two_step":
        return matrix_game.two_step_game()
    if scenario == "mmdp":
        return matrix_game.mmdp()
    if scenario == "custom":
        raise ValueError("scenario 'custom' needs the option 'payoff', a 2-D array of numbers with rows for agent 0")
    return matrix_game.matrix_game(matrix_game.PAYOFFS[scenario])


def _build_jaxmarl(scenario: str, **options: Any) -> tuple[Environment, EnvParams]:
    env = jaxmarl_adapter.make_jaxmarl(scenario, **options)
    return env, env.default_params


def _permuted(task_seed: int = 0, num_tasks: int = 5) -> Game:
    payoffs = matrix_game.permuted_payoffs(task_seed, num_tasks)
    builds = [matrix_game.matrix_game(payoff) for payoff in payoffs]
    names = [f"permuted_{index + 1}" for index in range(num_tasks)]
    return Game(builds[0][0], stack_tasks([params for _, params in builds], names, [*range(num_tasks), 0]))


def _predator_prey_drift(only: Sequence[str] | None = None, **options: Any) -> Game:
    env, params = predator_prey_scenarios.make(**options)
    return Game(env, predator_prey_scenarios.drift_tasks(env, params, only))


def _smax_drift(race: str, units: int, **options: Any) -> Game:
    return Game(*smax.drift(race, units, **options))


GAMES: dict[str, Entry] = {
    "matrix": Entry(
        "one-step payoffs, the two-step game and the MMDP, two agents",
        _build_matrix,
        scenarios=(*matrix_game.PAYOFFS, "two_step", "mmdp", "custom"),
        default="qtran",
        drifts={"permuted": _permuted},
    ),
    "predator_prey": Entry(
        "grid stag hunt with sequential moves and punished lone catches",
        predator_prey_scenarios.make,
        scenarios=tuple(predator_prey_scenarios.SCENARIOS),
        default="pymarl2",
        drifts={"drift": _predator_prey_drift},
    ),
    "smax": Entry(
        "SMAX, battles of small teams against a heuristic enemy",
        smax.make,
        scenarios=(*smax.SCENARIOS, "custom"),
        default="3m",
        drifts={f"{units}gen_{race}_drift": functools.partial(_smax_drift, race, units) for units in (5, 10, 20) for race in smax.RACES},
    ),
    "jaxmarl": Entry(
        "any environment of JaxMARL by its own name",
        _build_jaxmarl,
        scenarios=("MPE_simple_spread_v3",),
        default="MPE_simple_spread_v3",
        open_ended=True,
    ),
}


def make(name: str, scenario: str | None = None, tasks: Sequence[Mapping[str, Any]] = (), **options: Any) -> Game:
    """Makes a game and its task sequence.

    Args:
        name: a key of `GAMES`; `"matrix/permuted"` is short for name and scenario.
        scenario: a scenario (one task) or a drift (a sequence of tasks) of that game; the game's default if None.
        tasks: a sequence of your own: one mapping of options per task, each over `options`; may name its own `scenario`.
        **options: what the game's maker takes, such as `payoff` or `task_seed`.

    Raises:
        ValueError: for an unknown game, scenario or option, for bad options, and for tasks whose shapes or agents differ.

    Examples:
        >>> game = make("matrix", "permuted", task_seed=0)
        >>> game.tasks.order
        (0, 1, 2, 3, 4, 0)
    """
    if scenario is None and "/" in name:
        name, scenario = name.split("/", 1)
    if name not in GAMES:
        raise unknown_name("game", name, GAMES)
    entry = GAMES[name]
    scenario = entry.default if scenario is None else scenario
    if scenario in entry.drifts:
        if tasks:
            raise ValueError(f"scenario {scenario!r} is itself a sequence of tasks; leave `tasks` empty or name a single task")
        return _called(entry.drifts[scenario], options)
    if not tasks:
        env, params = _build(name, entry, scenario, options)
        return Game(env, stack_tasks([params], [scenario]))
    return _sequence(name, entry, scenario, tasks, options)


def _sequence(name: str, entry: Entry, scenario: str, tasks: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Game:
    """Builds every task of a user's sequence and holds them to one shape."""
    builds = []
    for index, task in enumerate(tasks):
        own = {**options, **task}
        try:
            env, params = _build(name, entry, own.pop("scenario", scenario), own)
        except ValueError as error:
            raise ValueError(f"tasks[{index}]: {error}") from error
        first = builds[0][0] if builds else env
        if env.num_actions != first.num_actions:
            raise ValueError(
                f"tasks[{index}]: {env.num_actions} actions, but tasks[0] has {first.num_actions}; one sequence needs one number"
            )
        if env != first:
            raise ValueError(f"tasks[{index}]: its environment {env} differs in shape from that of tasks[0], {first}")
        builds.append((env, params))
    names = [f"task_{index + 1}" for index in range(len(builds))]
    return Game(builds[0][0], stack_tasks([params for _, params in builds], names))


def _build(name: str, entry: Entry, scenario: str, options: Mapping[str, Any]) -> tuple[Environment, EnvParams]:
    if scenario in entry.drifts:
        raise ValueError(f"scenario {scenario!r} is itself a sequence of tasks, so it cannot be one task of a sequence")
    if scenario not in entry.scenarios and not entry.open_ended:
        raise unknown_name(f"scenario of {name!r}", scenario, (*entry.scenarios, *entry.drifts))
    return _called(entry.build, options, scenario)


def _called(maker: Callable[..., Any], options: Mapping[str, Any], *arguments: Any) -> Any:
    """Calls a maker; an option that it does not take is the user's error, not a crash."""
    parameters = list(inspect.signature(maker).parameters.values())[len(arguments) :]
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
        known = [parameter.name for parameter in parameters]
        for name in options:
            if name not in known:
                raise unknown_name("option", name, known)
    try:
        return maker(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"options {dict(options)!r} are not what this game takes: {error}") from error

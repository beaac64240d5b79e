"""What an experiment trains, read from its one file in `experiments/configs`.

Every method shares settings, learners, seeds, tasks, budgets and evaluations; they differ in the section `plasticity` alone, which
`cells` makes sure of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from envs.base import unknown_name
from experiments.cells import Cell
from experiments.measures import Measure
from knife_jax.config import Config, resolve

DIRECTORY = Path(__file__).parent / "configs"
Nested = dict[str, dict[str, Any]]
Positive = Annotated[int, Field(gt=0)]
Described = TypeVar("Described", bound=BaseModel)


class Scale(BaseModel):
    """How much of an experiment is run.

    Attributes:
        seeds: how many.
        seeds_per_file: how many are trained and kept in one piece.
        base: what is smaller, or larger, than in the experiment's own base.
        methods: which; all if None.
        mixers: which; all if None.
        settings: which; all if None.
        tuned: whether each method takes the options that its tuning found, or its first candidate.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    seeds: Positive
    seeds_per_file: Positive = 1024
    base: Nested = {}
    methods: list[str] | None = None
    mixers: list[str] | None = None
    settings: list[str] | None = None
    tuned: bool = True


class Tuning(BaseModel):
    """How options are chosen: on seeds that no result is shown of, with the first mixer and setting.

    Attributes:
        seeds: how many.
        first_seed: the first of them.
        base: what is changed to make it cheaper.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    seeds: Positive = 8
    first_seed: Positive = 100_000
    base: Nested = {}


class Protocol(BaseModel):
    """An experiment.

    Attributes:
        name: its file's.
        question: what it is to answer.
        measure: what counts as performance.
        base: what everything shares.
        preset: the configuration that `base` changes.
        mixers: what each learner changes.
        settings: what each setting changes.
        methods: the candidates of each method, sections `plasticity`; the first are the literature's.
        only_with: the mixers that a method is for, where that is not all of them.
        tuning: how one of them is chosen.
        scales: `quick`, `standard` and `full`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    question: str
    measure: Measure = "won"
    preset: str
    base: Nested = {}
    mixers: dict[str, Nested]
    settings: dict[str, Nested] = {"default": {}}
    methods: dict[str, list[dict[str, Any]]]
    only_with: dict[str, list[str]] = {}
    tuning: Tuning = Tuning()
    scales: dict[str, Scale]


def read(name: str) -> Protocol:
    """Reads an experiment by name; raises as `read_as`."""
    return read_as(Protocol, name)


def read_as(kind: type[Described], name: str) -> Described:
    """Reads the file of an experiment as what it describes.

    Args:
        kind: a model with a field `name`.
        name: the file's.

    Raises:
        ValueError: for an unknown name, or a file with something in it that has no meaning.
    """
    known = sorted(path.stem for path in DIRECTORY.glob("*.yaml"))
    if name not in known:
        raise unknown_name("experiment", name, known)
    try:
        return kind(name=name, **_described(name))
    except ValidationError as error:
        raise ValueError(f"experiments/configs/{name}.yaml: {error}") from None


def _described(name: str) -> dict[str, Any]:
    """What a file says; of one with the key `like`, over what makes a run of that other experiment."""
    given = yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text())
    other = _described(given.pop("like")) if "like" in given else {}
    return {key: other[key] for key in ("measure", "preset", "base", "mixers") if key in other} | given


def configuration(protocol: Protocol, scale: Scale | Tuning, setting: str, mixer: str, plasticity: Mapping[str, Any]) -> Config:
    """One method's configuration.

    Raises:
        ValueError: for one that cannot be run.
    """
    config = resolve(protocol.preset)
    for part in (protocol.base, protocol.mixers[mixer], protocol.settings[setting], scale.base, {"plasticity": dict(plasticity)}):
        config = Config.from_dict(part, config)
    return resolve(config)


def cells(
    protocol: Protocol, scale: str, *, seeds: int | None = None, chosen: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Cell]:
    """Everything that a scale trains, whole methods after one another.

    Args:
        protocol: the experiment.
        scale: which of its scales.
        seeds: how many, if not as many as the scale says.
        chosen: the section `plasticity` of each method; of those that are missing, the first candidate.

    Raises:
        ValueError: for an unknown scale, or methods, mixers or settings of it that the experiment has not.
    """
    if scale not in protocol.scales:
        raise unknown_name("scale", scale, protocol.scales)
    size = protocol.scales[scale]
    total = seeds or size.seeds
    for setting in _some("setting", size.settings, protocol.settings):
        for mixer in _some("mixer", size.mixers, protocol.mixers):
            for method in _some("method", size.methods, protocol.methods):
                if mixer not in protocol.only_with.get(method, protocol.mixers):
                    continue
                plasticity = (chosen or {}).get(method, protocol.methods[method][0])
                config = configuration(protocol, size, setting, mixer, plasticity)
                for first in range(0, total, size.seeds_per_file):
                    yield Cell(setting, mixer, method, config, first, min(size.seeds_per_file, total - first))


def shared_part(config: Config) -> Config:
    """What the methods of a setting and a mixer must have in common: all but the cure."""
    return replace(config, plasticity=type(config.plasticity)())


def _some(what: str, wanted: Sequence[str] | None, known: Mapping[str, Any]) -> Sequence[str]:
    for name in wanted or ():
        if name not in known:
            raise unknown_name(what, name, known)
    return list(known) if wanted is None else wanted

"""Every cure by name, and its options checked before anything compiles."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from envs.base import unknown_name
from knife_jax.plasticity.continual_backprop import continual_backprop
from knife_jax.plasticity.graph import Graph
from knife_jax.plasticity.injection import plasticity_injection
from knife_jax.plasticity.knife import (
    freeze_and_zero,
    knife,
    knife_without_active,
    knife_without_compensation,
    knife_without_knowledge,
    random_neurons,
)
from knife_jax.plasticity.knife_mixing import knife_mixing
from knife_jax.plasticity.method import Method, Swept, chain, method, none
from knife_jax.plasticity.reborn import reborn
from knife_jax.plasticity.recycle import redo, regrama
from knife_jax.plasticity.regularisers import l2_init, layer_norm, spectral, weight_decay
from knife_jax.plasticity.resets import reset, shrink_perturb
from knife_jax.plasticity.self_normalized_resets import self_normalized_resets


def wide_none(graph: Graph, reserve: float = 1.0) -> Method:
    """No cure, on a wider network: is it just capacity?

    The networks of `make_train` get `1 + 2 reserve` times as many units, all trainable, in every hidden layer that KNIFE treats by default
    (all but the GRU): as many as live, knowledge and compensation neurons together.

    Raises:
        ValueError: for a negative reserve.
    """
    if reserve < 0:
        raise ValueError(f"reserve: at least 0, got {reserve}")
    return method("wide_none")


METHODS: dict[str, Callable[..., Method]] = {
    "none": lambda graph: none(),
    "knife": knife,
    "knife_mixing": knife_mixing,
    "redo": redo,
    "regrama": regrama,
    "reborn": reborn,
    "plasticity_injection": plasticity_injection,
    "reset": reset,
    "shrink_perturb": shrink_perturb,
    "continual_backprop": continual_backprop,
    "self_normalized_resets": self_normalized_resets,
    "l2_init": l2_init,
    "weight_decay": weight_decay,
    "layer_norm": layer_norm,
    "spectral": spectral,
    "random_neurons": random_neurons,
    "knife_without_knowledge": knife_without_knowledge,
    "knife_without_active": knife_without_active,
    "knife_without_compensation": knife_without_compensation,
    "freeze_and_zero": freeze_and_zero,
    "wide_none": wide_none,
}
"""Factories by name, each `(graph, **options) -> Method`."""


class Option(NamedTuple):
    """One option of a method: its type, its default, and whether it may be traced."""

    type: Any
    default: Any
    swept: bool


def options_of(name: str) -> dict[str, Option]:
    """The options of one method.

    Raises:
        ValueError: for an unknown method, with the nearest one.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    factory = METHODS[name]
    hints = get_type_hints(inspect.unwrap(factory), include_extras=True)
    listed = {}
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.name in ("graph", "interventions") or parameter.name.startswith("_"):
            continue
        hint = hints[parameter.name]
        is_swept = get_origin(hint) is Annotated and get_args(hint)[1:] == get_args(Swept)[1:]
        listed[parameter.name] = Option(float if is_swept else hint, parameter.default, is_swept)
    return listed


def check(name: str, options: Mapping[str, Any], siblings: Iterable[str] = ()) -> None:
    """Checks a method's name and options; of a chain (`a+b`), options are given per method.

    Args:
        name: see `METHODS`.
        options: what its factory takes.
        siblings: other names that may have been meant.

    Raises:
        ValueError: for an unknown method or option, or a value of another type, with the nearest name.
    """
    for part, given in parts_of(name, options):
        known = options_of(part)
        for option, value in given.items():
            if option not in known:
                raise ValueError(f"options: {part}: {unknown_name('option', option, [*known, *siblings])}")
            try:
                _adapter(part, option).validate_python(value, strict=False)
            except ValidationError as error:
                raise ValueError(f"options: {part}.{option}: {error.errors()[0]['msg']}, got {value!r}") from None


@cache
def _adapter(name: str, option: str) -> Any:
    """What checks one option, and turns whole numbers into floats where those are meant."""
    return TypeAdapter(options_of(name)[option].type)


def parts_of(name: str, options: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The methods of a chain with the options of each; a single method takes all."""
    names = name.split("+")
    if len(names) == 1:
        return [(name, options)]
    for key, value in options.items():
        if key not in names or not isinstance(value, Mapping):
            raise ValueError(
                f"options: of the chain {name!r}, give options per method, as in {{{names[0]}: {{...}}}}; got {key}: {value!r}"
            )
    return [(part, options.get(part, {})) for part in names]


def swept_options(name: str, options: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that may be traced, `{option: value}`; in a chain `{method.option: value}`."""
    found = {}
    for part, given in parts_of(name, options):
        prefix = f"{part}." if "+" in name else ""
        for option, known in options_of(part).items():
            value = given.get(option, known.default)
            if known.swept and value is not None:
                found[prefix + option] = float(value)
    return found


def make(
    name: str, graph: Graph, options: Mapping[str, Any], swept: Mapping[str, Any] | None = None, interventions: int | None = None
) -> Method:
    """Makes a method, or a chain of several (`a+b`).

    Args:
        name: see `METHODS`.
        graph: the layers.
        options: what its factory takes.
        swept: numbers that replace some of them, see `swept_options`; they may be traced.
        interventions: how many are planned, for methods that size something by it.

    Raises:
        ValueError: for whatever the factory refuses.
    """
    made = []
    for part, given in parts_of(name, options):
        prefix = f"{part}." if "+" in name else ""
        known = options_of(part)
        traced = {option: (swept or {})[prefix + option] for option in known if prefix + option in (swept or {})}
        plain = {option: _adapter(part, option).validate_python(value) for option, value in given.items() if option not in traced}
        planned = {"interventions": interventions} if "interventions" in inspect.signature(METHODS[part]).parameters else {}
        made.append(METHODS[part](graph, **{**plain, **traced, **planned}))
    return made[0] if len(made) == 1 else chain(*made)

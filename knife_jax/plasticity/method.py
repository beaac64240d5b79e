"""The interface of every cure: a NamedTuple of pure functions, as in optax.

A method is made for one graph. Functions it does not need are identities, see `method`.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from knife_jax.plasticity.graph import Params

Variables = dict[str, Any]
Report = dict[str, Array]
Apply = Callable[..., Any]
Swept = Annotated[Any, "sweepable"]
"""Marks a number of a method's factory that may be traced, so that it can be swept inside one compiled program."""


class Trees(NamedTuple):
    """Everything that an intervention may rewrite.

    Attributes:
        variables: the online network's `{"params": ..., "reserve": ...}`.
        target: the target network's variables; None without one.
        opt_state: the state of the optimizer that `wrap_optimizer` gave; None leaves it alone.
        states: running recurrent states of whoever acts with the online network, `{layer: [..., S]}`. Composites on recurrent units rewrite
            them and are refused without; all other methods leave them alone.
    """

    variables: Variables
    target: Variables | None = None
    opt_state: optax.OptState | None = None
    states: dict[str, Array] | None = None


class Method(NamedTuple):
    """A cure for one graph.

    Attributes:
        name: its name.
        allocate: `variables -> variables`: adds collections or parameters of fixed shape (a reserve, affine normalisation, ...).
        lift: `(apply, prefix=()) -> apply`: a Flax apply function that understands what `allocate` added and the collection `taps`;
            `prefix` is the path of the module's parameters within the graph's.
        wrap_optimizer: `tx -> tx`; must treat every entry of a parameter by itself, as `make_train` steps all parameters as one vector.
        taps: `state -> taps`: zeros to pass as the collection `taps` and to differentiate with respect to; their "gradient" holds the
            statistics of activations that `observe` wants. Empty for methods that want none.
        init: `variables -> state`.
        observe: `(state, variables, grads, taps) -> state`: after every gradient, with what `jax.grad` gave for params and taps.
        apply: `(key, state, trees, tx=None) -> (state, trees, report)`: the intervention; `tx` is the wrapped optimizer, needed where its
            state is to be rewritten. The report is `{"<layer>/<measure>": number}`.
        penalty: `(params, state) -> scalar` to add to the loss.
        fade: `reserve -> reserve`: what becomes of the online network's reserve with every gradient step.
        reserved: names of the modules on which it puts frozen units, kept in the collection `reserve`; empty for most.
        every_update: whether `apply` is meant to run after every gradient step rather than on a schedule.
        state_sizes: `{layer: S}`, how many running states recurrent layers have under the lifted function where that is more than their
            live units: H of these, then two per slot. These must be passed to `apply`.
    """

    name: str
    allocate: Callable[[Variables], Variables]
    lift: Callable[..., Apply]
    wrap_optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    taps: Callable[[Any], Any]
    init: Callable[[Variables], Any]
    observe: Callable[[Any, Variables, Params, Any], Any]
    apply: Callable[..., tuple[Any, Trees, Report]]
    penalty: Callable[[Params, Any], Float[Array, ""]]
    fade: Callable[[Any], Any]
    every_update: bool = False
    reserved: frozenset[str] = frozenset()
    state_sizes: Mapping[str, int] = MappingProxyType({})


def keep_state(state: Any, variables: Variables, grads: Params, taps: Any) -> Any:
    """Observes nothing."""
    return state


def no_intervention(key: PRNGKeyArray, state: Any, trees: Trees, tx: Any = None) -> tuple[Any, Trees, Report]:
    """Rewrites nothing."""
    return state, trees, {}


def no_penalty(params: Params, state: Any) -> Float[Array, ""]:
    """Adds nothing to the loss."""
    return jnp.zeros(())


def no_fading(reserve: Any) -> Any:
    """Leaves the reserve alone."""
    return reserve


def method(name: str, **functions: Any) -> Method:
    """A method that does nothing but what is given."""
    identities: dict[str, Any] = {
        "allocate": lambda variables: variables,
        "lift": lambda apply, prefix=(): apply,
        "wrap_optimizer": lambda tx: tx,
        "taps": lambda state: {},
        "init": lambda variables: (),
        "observe": keep_state,
        "apply": no_intervention,
        "penalty": no_penalty,
        "fade": no_fading,
    }
    return Method(name, **(identities | functions))


def none() -> Method:
    """No cure: every function is an identity."""
    return method("none")


def chain(*methods: Method) -> Method:
    """Several cures at once, each seeing what those before it left.

    What one of them re-draws, another still counts as its own: a `reset` after `knife` re-draws the live weights and leaves the reserve's
    frozen function in place, so that the network keeps what it knew through knowledge neurons alone; a `knife` after `reset` adds to a
    fresh network. Taps of the same layer are shared, so that each statistic is gathered once.

    Raises:
        ValueError: if two of them put frozen units on the same module, if a method that keeps the function is chained with `layer_norm`,
            or if some work at every update and some on a schedule.
    """
    _check_chain(methods)

    def allocate(variables: Variables) -> Variables:
        for part in methods:
            variables = part.allocate(variables)
        return variables

    def lift(apply: Apply, prefix: tuple[str, ...] = ()) -> Apply:
        for part in methods:
            apply = part.lift(apply, prefix)
        return apply

    def wrap_optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        for part in methods:
            tx = part.wrap_optimizer(tx)
        return tx

    def init(variables: Variables) -> tuple[Any, ...]:
        return tuple(part.init(variables) for part in methods)

    def observe(state: Any, variables: Variables, grads: Params, taps: Any) -> tuple[Any, ...]:
        return tuple(part.observe(own, variables, grads, taps) for part, own in zip(methods, state, strict=True))

    def apply(key: PRNGKeyArray, state: Any, trees: Trees, tx: Any = None) -> tuple[Any, Trees, Report]:
        states, report = [], {}
        for part, own, part_key in zip(methods, state, jax.random.split(key, len(methods)), strict=True):
            own, trees, said = part.apply(part_key, own, trees, tx)
            states.append(own)
            report |= {f"{part.name}/{name}": value for name, value in said.items()}
        return tuple(states), trees, report

    def penalty(params: Params, state: Any) -> Float[Array, ""]:
        return sum((part.penalty(params, own) for part, own in zip(methods, state, strict=True)), jnp.zeros(()))

    def taps(state: Any) -> Any:
        merged: dict[str, Any] = {}
        for part, own in zip(methods, state, strict=True):
            merged = _merge(merged, part.taps(own))
        return merged

    fading = [part.fade for part in methods if part.fade is not no_fading]

    def fade(reserve: Any) -> Any:
        for part in fading:
            reserve = part(reserve)
        return reserve

    name = "+".join(part.name for part in methods)
    apply = apply if any(part.apply is not no_intervention for part in methods) else no_intervention
    sizes = {layer: size for part in methods for layer, size in part.state_sizes.items()}
    every_update = any(part.every_update for part in methods)
    reserved = frozenset[str]().union(*(part.reserved for part in methods))
    drift = fade if fading else no_fading
    return Method(name, allocate, lift, wrap_optimizer, taps, init, observe, apply, penalty, drift, every_update, reserved, sizes)


def _check_chain(methods: tuple[Method, ...]) -> None:
    """Refuses methods that do not go together."""
    cadences = {part.every_update for part in methods if part.apply is not no_intervention}
    if len(cadences) > 1:
        raise ValueError(f"chain: {', '.join(part.name for part in methods)} intervene partly at every update, partly on a schedule")
    for first, second in combinations(methods, 2):
        if shared := sorted(first.reserved & second.reserved):
            raise ValueError(f"chain: {first.name} and {second.name} both put frozen units on {', '.join(shared)}; part them by `layers`")
    exact = [part.name for part in methods if part.reserved] + [part.name for part in methods if part.name == "reborn"]
    if exact and any(part.name == "layer_norm" for part in methods):
        raise ValueError(f"chain: {exact[0]} keeps what its units give together, which layer_norm's mean over units would change")


def _merge(first: Any, second: Any) -> Any:
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    return first | {name: _merge(first.get(name, {}), value) for name, value in second.items()}

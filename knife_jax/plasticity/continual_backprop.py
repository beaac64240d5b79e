"""Continual backprop: after every gradient step, a small share of the mature units that contribute least starts anew."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from knife_jax.plasticity import taps as tapping
from knife_jax.plasticity.checks import check_choice, check_number
from knife_jax.plasticity.composite import lowest, over_stack
from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, flat, nested, outgoing_view, read
from knife_jax.plasticity.lift import lift
from knife_jax.plasticity.method import Method, Report, Swept, Trees, Variables, method
from knife_jax.plasticity.optimizer import Treatment
from knife_jax.plasticity.recycle import Masks, Rule, count, recycle

_TINY = 1e-12


class ContinualState(NamedTuple):
    """What is remembered of every unit, `{layer: [*K, H]}`.

    Attributes:
        age: gradient steps since the unit started.
        utility: exponential average of its utility, from zero.
        activation: exponential average of its activation, from zero.
        owed: `{layer: [*K]}`, the fraction of a replacement that is due.
    """

    age: dict[str, Array]
    utility: dict[str, Array]
    activation: dict[str, Array]
    owed: dict[str, Array]


class _Settings(NamedTuple):
    rho: Any
    maturity: Any
    decay: Any
    utility: str
    accumulate: bool
    rule: Rule


def continual_backprop(
    graph: Graph,
    rho: Swept = 1e-4,
    maturity: Swept = 10_000,
    decay: Swept = 0.99,
    *,
    layers: str | Sequence[str] = "all",
    utility: str = "contribution",
    accumulate: bool = True,
    bias: str = "zeros",
    optimizer_state: Treatment = "fresh",
    target: bool = False,
) -> Method:
    """Replaces, after every gradient step, `rho` times the number of mature units of a layer: those with the lowest utility.

    A replaced unit gets fresh incoming and zero outgoing weights; what it gave on average is added to the biases of its readers. Utilities
    and mean activations are exponential averages with their bias corrected for the unit's age:

    * `contribution`: mean |outgoing weight| * mean |h|;
    * `zero_contribution`: mean |outgoing weight| * mean |h - mean h|;
    * `adaptable_contribution`: the latter over mean |incoming weight|.

    Args:
        graph: the layers of a model.
        rho: the replacement rate; 1e-6 to 1e-4 in the source.
        maturity: units are safe for so many gradient steps, 100 (supervised learning) to 10,000 (PPO) in the source; a run must be longer.
        decay: of the averages.
        layers: which ones, see `Graph.select`.
        utility: see above.
        accumulate: whether fractions of a replacement add up until one is due, or are tossed for.
        bias: of replaced units, `zeros` or `drawn` by the model's initializer.
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`; `fresh` steps like the source's AdamGnT.
        target: whether the target network is given the same fresh weights.

    Raises:
        ValueError: for numbers out of range, or an option or layer that does not exist.

    References:
        Dohare et al., Loss of plasticity in deep continual learning, 2024 (`lop/algos/gnt.py`). Its code clears the mean activation before
        it moves it into the readers' biases, so that these never change; here they do. The weight from one replaced unit to another ends
        at zero; |h - mean h| takes the mean before this batch, where theirs includes it; weights in a utility are those that the batch was
        computed with; a number of replacements above one that is not whole is tossed up too, where theirs is cut.
    """
    check_number("rho", rho, at_least=0, at_most=1)
    check_number("maturity", maturity, at_least=0)
    check_number("decay", decay, at_least=0, below=1)
    check_choice("utility", utility, ("contribution", "zero_contribution", "adaptable_contribution"))
    chosen = graph.select(layers)
    rule = Rule("zeros", bias, optimizer_state, target).check()
    settings = _Settings(rho, maturity, decay, utility, accumulate, rule)
    return method(
        "continual_backprop",
        lift=partial(lift, graph),
        wrap_optimizer=rule.wrap_optimizer,
        taps=partial(_taps, chosen, settings),
        init=partial(_init, chosen),
        observe=partial(_observe, chosen, settings),
        apply=partial(_apply, chosen, settings),
        every_update=True,
    )


def _init(graph: Graph, variables: Variables) -> ContinualState:
    def zeros(dtype: Any = jnp.float32) -> dict[str, Array]:
        return {layer.name: jnp.zeros((*layer.stack, layer.size), dtype) for layer in graph.layers}

    return ContinualState(zeros(jnp.int32), zeros(), zeros(), {layer.name: jnp.zeros(layer.stack) for layer in graph.layers})


def _corrected(average: Array, age: Array, decay: Any) -> Array:
    """An exponential average from zero, without the bias towards it; 0 at age 0."""
    weight = 1 - jnp.power(decay, age.astype(average.dtype))
    return jnp.where(age > 0, average / jnp.where(age > 0, weight, 1.0), 0.0)


def _taps(graph: Graph, settings: _Settings, state: ContinualState) -> dict[str, tapping.Tap]:
    if settings.utility == "contribution":
        return tapping.zeros(graph, ("absolute", "signed"))
    taps = tapping.zeros(graph, ("centred", "signed"))
    centres = {name: _corrected(mean, state.age[name], settings.decay) for name, mean in state.activation.items()}
    return {name: {**tap, "centre": centres[name]} for name, tap in taps.items()}


def _observe(graph: Graph, settings: _Settings, state: ContinualState, variables: Variables, grads: Any, taps: Any) -> ContinualState:
    leaves, decay = flat(variables["params"]), settings.decay
    age, utility, activation = ({} for _ in range(3))
    for layer in graph.layers:
        name, means = layer.name, tapping.means(taps[layer.name])
        age[name] = state.age[name] + 1
        utility[name] = decay * state.utility[name] + (1 - decay) * _utility(leaves, layer, means, settings.utility)
        activation[name] = decay * state.activation[name] + (1 - decay) * means["signed"]
    return ContinualState(age, utility, activation, state.owed)


def _utility(leaves: Flat, layer: NeuronLayer, means: tapping.Tap, kind: str) -> Float[Array, "*K H"]:
    """The utility of every unit on one batch."""
    units = read(leaves, layer)
    outgoing = jnp.abs(units.outgoing).mean(axis=-1)
    if kind == "contribution":
        return outgoing * means["absolute"]
    contribution = outgoing * means["centred"]
    if kind == "zero_contribution":
        return contribution
    return contribution / jnp.maximum(jnp.abs(units.incoming).mean(axis=-2), _TINY)


def _apply(
    graph: Graph, settings: _Settings, key: PRNGKeyArray, state: ContinualState, trees: Trees, tx: Any = None
) -> tuple[ContinualState, Trees, Report]:
    key_draw, key_toss = jax.random.split(key)
    masks, owed = {}, {}
    for layer, toss in zip(graph.layers, jax.random.split(key_toss, len(graph.layers)), strict=True):
        masks[layer.name], owed[layer.name] = _choose(layer, settings, toss, state)
    means = {name: _corrected(state.activation[name], state.age[name], settings.decay) for name in masks}
    online = _compensated(graph, masks, means, trees.variables)
    target = _compensated(graph, masks, means, trees.target) if settings.rule.target and trees.target is not None else trees.target
    trees = recycle(graph, masks, key_draw, trees._replace(variables=online, target=target), tx, settings.rule)

    def started(values: dict[str, Array]) -> dict[str, Array]:
        return {name: jnp.where(masks[name], jnp.zeros_like(value), value) for name, value in values.items()}

    report = {f"{name}/treated": count(mask) for name, mask in masks.items()}
    return ContinualState(started(state.age), started(state.utility), started(state.activation), owed), trees, report


def _choose(layer: NeuronLayer, settings: _Settings, key: PRNGKeyArray, state: ContinualState) -> tuple[Array, Array]:
    """Whom to replace, and the fraction of a replacement that stays owed."""
    age = state.age[layer.name]
    eligible = age > settings.maturity
    wanted = settings.rho * eligible.sum(axis=-1)
    if settings.accumulate:
        owed = state.owed[layer.name] + wanted
        number = jnp.floor(owed)
        owed = owed - number
    else:
        number, owed = jnp.floor(wanted + jax.random.uniform(key, layer.stack)), state.owed[layer.name]
    utility = _corrected(state.utility[layer.name], age, settings.decay)
    return over_stack(lowest, layer)(eligible, utility, number.astype(jnp.int32)), owed


def _compensated(graph: Graph, masks: Masks, means: dict[str, Array], variables: Variables) -> Variables:
    """Adds to the readers' biases what the masked units give on average."""
    leaves = flat(variables["params"])
    compensated = dict(leaves)
    for layer in graph.layers:
        lost = jnp.where(masks[layer.name], means[layer.name], 0.0)
        for kernel, bias in zip(layer.outgoing, layer.outgoing_biases, strict=False):
            if bias is not None:
                given = jnp.einsum("...h,...ho->...o", lost, outgoing_view(leaves[kernel], layer))
                compensated[bias] = compensated[bias] + given.reshape(leaves[bias].shape)
    return {**variables, "params": nested(compensated, variables["params"])}

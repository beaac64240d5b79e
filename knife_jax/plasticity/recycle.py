"""Recycling of units, fresh incoming weights and zero outgoing ones: ReDo, ReGraMa, and the operator for others that judge otherwise."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from knife_jax.plasticity import scores
from knife_jax.plasticity import taps as tapping
from knife_jax.plasticity.checks import check_choice, check_number
from knife_jax.plasticity.composite import lowest, over_stack
from knife_jax.plasticity.graph import Flat, Graph, NeuronLayer, Path, flat, nested
from knife_jax.plasticity.lift import lift
from knife_jax.plasticity.method import Method, Report, Swept, Trees, Variables, method
from knife_jax.plasticity.optimizer import Treatment, aged, rewrite
from knife_jax.plasticity.regularisers import NORMALISATION

Masks = dict[str, Array]


class Rule(NamedTuple):
    """How units are recycled.

    Attributes:
        outgoing: outgoing weights become `zeros`, or one may `keep` them.
        bias: `drawn` by the model's initializer, or `zeros`.
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`.
        target: whether the target network is given the same weights.
    """

    outgoing: str = "zeros"
    bias: str = "drawn"
    optimizer_state: Treatment = "fresh"
    target: bool = False

    def check(self) -> "Rule":
        """Itself.

        Raises:
            ValueError: for an option that does not exist.
        """
        check_choice("outgoing", self.outgoing, ("zeros", "keep"))
        check_choice("bias", self.bias, ("drawn", "zeros"))
        check_choice("optimizer_state", self.optimizer_state, get_args(Treatment))
        return self

    def wrap_optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimizer that the treatment needs."""
        return aged(tx) if self.optimizer_state == "fresh" else tx


def fresh_leaves(graph: Graph, key: PRNGKeyArray, leaves: Flat) -> Flat:
    """New values for all parameters: drawn by the model's initializers; of an added normalisation, scale 1 and bias 0."""
    drawn = flat(graph.draw(key))

    def fresh(path: Path, leaf: Array) -> Array:
        if path in drawn:
            return drawn[path].astype(leaf.dtype)
        return jnp.full_like(leaf, NORMALISATION[path[-1]]) if path[-1] in NORMALISATION else leaf

    return {path: fresh(path, leaf) for path, leaf in leaves.items()}


def entries(graph: Graph, masks: Masks, leaves: Flat) -> tuple[Flat, Flat]:
    """Which entries of every parameter are incoming weights or biases of masked units, and which are outgoing weights."""
    incoming: Flat = {path: jnp.zeros(leaf.shape, bool) for path, leaf in leaves.items()}
    outgoing = dict(incoming)
    for layer in graph.layers:
        mask, stack = masks[layer.name], layer.stack
        affine = tuple((*layer.module, name) for name in NORMALISATION if (*layer.module, name) in leaves)
        for path in (*layer.incoming, *layer.biases, *affine):
            between = (1,) * (leaves[path].ndim - len(stack) - 1)
            incoming[path] = incoming[path] | mask.reshape(*stack, *between, layer.size)
        for path in layer.outgoing:
            after = (1,) * (leaves[path].ndim - len(stack) - 1)
            outgoing[path] = outgoing[path] | mask.reshape(*stack, layer.size, *after)
    return incoming, outgoing


def recycle(graph: Graph, masks: Masks, key: PRNGKeyArray, trees: Trees, tx: Any, rule: Rule) -> Trees:
    """Recycles the masked units of all layers: first everyone's incoming weights, then everyone's outgoing ones.

    The weight from one recycled unit to another therefore ends at zero.

    Args:
        graph: the layers.
        masks: `{layer: [*K, H]}`.
        key: for the draw of fresh weights.
        trees: what to rewrite.
        tx: the optimizer of `trees.opt_state`.
        rule: how.
    """
    leaves = flat(trees.variables["params"])
    incoming, outgoing = entries(graph, masks, leaves)
    fresh = fresh_leaves(graph, key, leaves)
    if rule.bias == "zeros":
        fresh |= {path: jnp.zeros_like(fresh[path]) for layer in graph.layers for path in layer.biases}

    def rewritten(leaves: Flat) -> Flat:
        params = {path: jnp.where(incoming[path], fresh[path], leaf) for path, leaf in leaves.items()}
        if rule.outgoing == "keep":
            return params
        return {path: jnp.where(outgoing[path], 0, leaf) for path, leaf in params.items()}

    changed = {path: incoming[path] | outgoing[path] for path in leaves} if rule.outgoing == "zeros" else incoming
    return replace(trees, rewritten, changed, tx, rule)


def replace(trees: Trees, new: Callable[[Flat], Flat], changed: Flat, tx: Any, rule: Rule) -> Trees:
    """The trees with new parameters, in the target network too if the rule says so, and the optimizer's state treated.

    Args:
        trees: what to rewrite.
        new: of a network's parameters, those that are replaced.
        changed: a bool for every entry of every parameter.
        tx: the optimizer of `trees.opt_state`.
        rule: how.
    """

    def renewed(variables: Variables) -> Variables:
        leaves = flat(variables["params"])
        return {**variables, "params": nested(leaves | new(leaves), variables["params"])}

    online = renewed(trees.variables)
    target = renewed(trees.target) if rule.target and trees.target is not None else trees.target
    params = online["params"]
    opt_state = rewrite(tx, trees.opt_state, params, nested(changed, params), rule.optimizer_state)
    return trees._replace(variables=online, target=target, opt_state=opt_state)


def limited(layer: NeuronLayer, candidates: Bool[Array, "*K H"], order: Float[Array, "*K H"], max_fraction: float) -> Bool[Array, "*K H"]:
    """At most a share of the layer's units (at least one), the lowest in order first."""
    most = max(1, math.floor(max_fraction * layer.size + 1e-9))
    return over_stack(lambda candidate, value: lowest(candidate, value, most), layer)(candidates, order)


def count(mask: Bool[Array, "*K H"]) -> Float[Array, ""]:
    """How many."""
    return mask.sum().astype(jnp.float32)


def redo(
    graph: Graph,
    tau: Swept = 0.1,
    *,
    layers: str | Sequence[str] = "all",
    window: str = "window",
    max_fraction: float = 1.0,
    outgoing: str = "zeros",
    optimizer_state: Treatment = "fresh",
    target: bool = False,
) -> Method:
    """Recycles dormant units: those whose mean |h| is at most `tau` times their layer's mean.

    All units of a layer that never fires are dormant. Without a batch since the last intervention, nobody is.

    Args:
        graph: the layers of a model.
        tau: the threshold; 0 treats only units that never fire.
        layers: which ones, see `Graph.select`.
        window: mean |h| over all batches since the last intervention (`window`) or over the most recent one (`last`).
        max_fraction: of a layer's units, at most so many per intervention (at least one), the least active first.
        outgoing: outgoing weights become `zeros`, or one may `keep` them.
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`; the source's is `zeros` (of kernels only, counters
            and the moments of biases kept).
        target: whether the target network is given the same fresh weights; not so in the source.

    Raises:
        ValueError: for a negative threshold, a fraction outside (0, 1], or an option or layer that does not exist.

    References:
        Sokar, Agarwal, Castro, Evci, The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023 (`dopamine/labs/redo`). There the
        score comes from 256 fresh replay states, Xavier weights and zero biases are drawn; here it comes from the batches that are learned
        from, without padded steps, and the model's own initializer draws both.
    """
    check_number("tau", tau, at_least=0)
    check_choice("window", window, ("window", "last"))
    chosen = graph.select(layers)

    def judge(state: Any, layer: str) -> tuple[Array, Array]:
        activity = tapping.means(state[layer])["absolute"]
        return scores.dormant(activity, tau) & (state[layer]["count"] > 0), activity

    return _recycler(
        "redo",
        chosen,
        _Judgement("dormant", judge, max_fraction, Rule(outgoing, "drawn", optimizer_state, target)),
        watch(graph, chosen, "absolute", accumulate=window == "window"),
    )


def regrama(
    graph: Graph,
    tau: Swept = 0.01,
    *,
    layers: str | Sequence[str] = "all",
    score: str = "activation",
    max_fraction: float = 1.0,
    outgoing: str = "zeros",
    optimizer_state: Treatment = "fresh",
    target: bool = False,
) -> Method:
    """Recycles inactive units: those whose mean |gradient| on the most recent batch is at most `tau` times their layer's mean.

    Args:
        graph: the layers of a model.
        tau: the threshold.
        layers: which ones, see `Graph.select`.
        score: `activation` takes the mean |dL/dh| over samples, the paper's definition; `weights` the mean |dL/dw| over incoming weights,
            what the authors' code does.
        max_fraction: of a layer's units, at most so many per intervention (at least one), the least active first.
        outgoing: `zeros` is the paper's; their code leaves outgoing weights as they are, `keep`.
        optimizer_state: what becomes of rewritten entries, see `optimizer.Treatment`.
        target: whether the target network is given the same fresh weights.

    Raises:
        ValueError: for a negative threshold, a fraction outside (0, 1], or an option or layer that does not exist.

    References:
        Liu et al., Measure gradients, not activations! Enhancing neuronal activity in deep reinforcement learning, 2025 (arXiv 2505.24061).
        A layer without any gradient is left alone here, where theirs calls all of it inactive: it may as well have converged.
    """
    check_number("tau", tau, at_least=0)
    check_choice("score", score, ("activation", "weights"))
    chosen = graph.select(layers)

    def judge(state: Any, layer: str) -> tuple[Array, Array]:
        gradient = tapping.means(state[layer])["absolute_gradient"] if score == "activation" else state[layer]
        return scores.layer_relative(gradient) <= tau, gradient

    judgement = _Judgement("inactive", judge, max_fraction, Rule(outgoing, "drawn", optimizer_state, target))
    activations = watch(graph, chosen, "absolute_gradient", accumulate=False)
    return _recycler("regrama", chosen, judgement, activations if score == "activation" else _watch_weights(chosen))


class _Judgement(NamedTuple):
    """Who is recycled: `judge` gives of one layer candidates, and an order among them."""

    word: str
    judge: Callable[[Any, str], tuple[Array, Array]]
    max_fraction: float
    rule: Rule


def _recycler(name: str, graph: Graph, judgement: _Judgement, watching: dict[str, Callable]) -> Method:
    """A method that recycles whom its state condemns, and then forgets."""
    check_number("max_fraction", judgement.max_fraction, above=0, at_most=1)
    rule = judgement.rule.check()
    return method(name, wrap_optimizer=rule.wrap_optimizer, apply=partial(_apply, graph, judgement), **watching)


def _apply(graph: Graph, judgement: _Judgement, key: PRNGKeyArray, state: Any, trees: Trees, tx: Any = None) -> tuple[Any, Trees, Report]:
    masks: Masks = {}
    report: Report = {}
    for layer in graph.layers:
        candidates, order = judgement.judge(state, layer.name)
        masks[layer.name] = limited(layer, candidates, order, judgement.max_fraction)
        report[f"{layer.name}/{judgement.word}"] = count(candidates)
        report[f"{layer.name}/treated"] = count(masks[layer.name])
    trees = recycle(graph, masks, key, trees, tx, judgement.rule)
    return jax.tree.map(jnp.zeros_like, state), trees, report


def watch(graph: Graph, chosen: Graph, statistic: str, accumulate: bool) -> dict[str, Callable]:
    """The functions of a method that watches one statistic of its units: `lift`, `taps`, `init` and `observe`.

    Args:
        graph: the layers of the model.
        chosen: those that are watched.
        statistic: see `taps.zeros`.
        accumulate: sums over all batches since the state was cleared, or of the last one alone.
    """

    def observe(state: Any, variables: Variables, grads: Any, taps: Any) -> Any:
        return tapping.add(state if accumulate else jax.tree.map(jnp.zeros_like, state), taps)

    def zeros(_: Any) -> Any:
        return tapping.zeros(chosen, (statistic,))

    return {"lift": partial(lift, graph), "taps": zeros, "init": zeros, "observe": observe}


def _watch_weights(chosen: Graph) -> dict[str, Callable]:
    """The same for a score that the gradients of weights give by themselves."""

    def init(variables: Variables) -> dict[str, Array]:
        return {layer.name: jnp.zeros((*layer.stack, layer.size)) for layer in chosen.layers}

    def observe(state: Any, variables: Variables, grads: Any, taps: Any) -> dict[str, Array]:
        leaves = flat(grads)
        return {layer.name: scores.weight_gradient(leaves, layer) for layer in chosen.layers}

    return {"init": init, "observe": observe}

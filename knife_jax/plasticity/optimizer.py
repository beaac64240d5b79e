"""Optimizer state of rewritten entries: found by structure in any optax chain, and aged so that a first step is one learning rate."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from knife_jax.plasticity.graph import Params

Treatment = Literal["fresh", "zeros", "keep", "layer_mean"]
"""What rewritten entries become: as in `tx.init`, with an age of their own; the same without one; untouched; the mean of their leaf."""


class AgedState(NamedTuple):
    """The state of a wrapped optimizer.

    Attributes:
        inner: the state of the optimizer itself.
        first: of every entry, the first moment's decay to the power of its age since it was rewritten; 0 if it never was.
        second: the same with the second moment's decay.
    """

    inner: optax.OptState
    first: Params
    second: Params


class _Decay(NamedTuple):
    """How one leaf's moments forget: factors per step, 0 for no such moment; and the count of a bias correction, None without one."""

    first: Array
    second: Array
    count: Array | None


def aged(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Corrects the steps of rewritten entries, whose moments are younger than the optimizer thinks.

    A second moment that starts from zero makes the first step 1/sqrt(1 - decay) learning rates under RMSProp (10 for a decay of .99) and
    (1 - b1)/sqrt(1 - b2) under Adam with a large count (3.2). Steps are multiplied by what Adam's bias correction would be for the entry's
    own age over what it was. Entries that were never rewritten are left alone, and so are those without a second moment that starts from
    zero. The whole step is multiplied, with what weight decay or a momentum behind the second moment have added to it.

    Args:
        tx: any chain, with masks or partitions too. Moments are recognised by the field names `mu` and `nu` of its states, a bias
            correction by `count` beside them; decays are read off two steps on scalars.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> AgedState:
        return AgedState(tx.init(params), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Params, state: Any, params: Params | None = None, **extra: Any) -> tuple[Params, AgedState]:
        steps, inner = tx.update(updates, state.inner, params, **extra)
        structure = jax.tree.structure(state.second)
        columns = [structure.flatten_up_to(tree) for tree in (steps, state.first, state.second)]
        stepped = [_step(*leaf) for leaf in zip(*columns, _decays(tx, inner, updates), strict=True)]
        updates, first, second = (structure.unflatten(column) for column in zip(*stepped, strict=True))
        return updates, AgedState(inner, first, second)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(update: Array, first: Array, second: Array, decay: _Decay | None) -> tuple[Array, Array, Array]:
    """One leaf's step, corrected for the age of its entries, and their ages afterwards."""
    if decay is None:
        return update, first, second
    first, second = first * decay.first, second * decay.second
    factor = jnp.sqrt(1 - second)
    if decay.count is not None:
        factor = factor / jnp.sqrt(1 - decay.second**decay.count) * (1 - decay.first**decay.count) / (1 - first)
    return jnp.where(second > 0, factor, 1.0).astype(update.dtype) * update, first, second


def _moments(state: optax.OptState) -> list[Any]:
    """The states with a second moment `nu`."""
    found = jax.tree.leaves(state, is_leaf=lambda node: "nu" in _fields(node))
    return [node for node in found if "nu" in _fields(node)]


def _fields(node: Any) -> tuple[str, ...]:
    """Names of a NamedTuple's fields (every tuple has an attribute `count`, few have such a field)."""
    return getattr(node, "_fields", ())


def _decays(tx: optax.GradientTransformation, state: optax.OptState, like: Params) -> list[_Decay | None]:
    """Decays of every leaf's moments, from two steps with equal gradients; None without a second moment.

    They do not depend on what is traced (but for a traced decay), and are worked out while tracing, so as to be constants of the program.
    """
    structure = jax.tree.structure(like)
    decays: list[_Decay | None] = [None] * structure.num_leaves
    with jax.ensure_compile_time_eval():
        scalars = jax.tree.map(lambda leaf: jnp.ones((), leaf.dtype), like)
        states = [tx.init(scalars)]
        for _ in range(2):
            states.append(tx.update(scalars, states[-1], scalars)[1])
        for now, *steps in zip(_moments(state), *map(_moments, states), strict=True):
            seconds = zip(*(structure.flatten_up_to(step.nu) for step in steps), strict=True)
            firsts = zip(*(structure.flatten_up_to(step.mu if "mu" in _fields(step) else step.nu) for step in steps), strict=True)
            count = now.count if "count" in _fields(now) else None
            for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
                if not _is_masked(second[0]):
                    has_first = count is not None and "mu" in _fields(now)
                    decays[index] = _Decay(_decay(*first) if has_first else jnp.zeros_like(second[0]), _decay(*second), count)
    return decays


def _decay(start: Array, once: Array, twice: Array) -> Array:
    """The decay of an average that starts from zero, from two equal samples; 0 for anything else."""
    from_zero = (start == 0) & (once != 0)
    return jnp.where(from_zero, (twice - once) / jnp.where(from_zero, once, 1.0), 0.0)


def _is_masked(leaf: Any) -> bool:
    """Whether a part of the optimizer leaves this parameter to others."""
    return isinstance(leaf, optax.MaskedNode)


def rewrite(
    tx: optax.GradientTransformation | None,
    state: optax.OptState | None,
    params: Params,
    rewritten: Params,
    treatment: Treatment = "fresh",
) -> optax.OptState | None:
    """Treats the entries of an optimizer's state that belong to rewritten parameters.

    Args:
        tx: the optimizer of `state`.
        state: its state; None stays None.
        params: the parameters after rewriting.
        rewritten: a bool for every entry of every parameter.
        treatment: what becomes of them.

    Raises:
        ValueError: if there is a state to treat and no optimizer to say what it means.
    """
    if state is None or treatment == "keep":
        return state
    if tx is None:
        raise ValueError("apply: the trees hold an optimizer state; pass its optimizer as `tx`, or choose optimizer_state='keep'")
    fresh = tx.init(params)
    masks = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, mask: not _is_masked(leaf) and leaf.shape == mask.shape and mask,
        fresh,
        rewritten,
        transform_non_params=lambda _: False,
        is_leaf=_is_masked,
    )

    def treated(mask: Array | bool, old: Any, new: Any) -> Any:
        if mask is False:
            return old
        if treatment == "layer_mean":
            kept = jnp.where(mask, 0, old).sum() / jnp.maximum((~jnp.asarray(mask)).sum(), 1)
            new = jnp.broadcast_to(kept.astype(old.dtype), old.shape)
        return jnp.where(mask, new, old)

    done = jax.tree.map(treated, masks, state, fresh)
    return _rejuvenate(done, rewritten) if treatment == "fresh" else done


def _rejuvenate(state: optax.OptState, rewritten: Params) -> optax.OptState:
    """Sets the age of rewritten entries to zero."""

    def young(powers: Params) -> Params:
        return jax.tree.map(lambda power, mask: jnp.where(mask, 1.0, power).astype(power.dtype), powers, rewritten)

    def visit(node: Any) -> Any:
        return AgedState(node.inner, young(node.first), young(node.second)) if isinstance(node, AgedState) else node

    return jax.tree.map(visit, state, is_leaf=lambda node: isinstance(node, AgedState))

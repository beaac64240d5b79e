"""Optimizer state of rewritten entries: first steps of one learning rate, and nobody else's bits change."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from knife_jax.plasticity.optimizer import AgedState, aged, rewrite

RATE = 1e-3
PARAMS = {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.full(4, 0.5)}
GRADS = {"kernel": jnp.linspace(0.2, 1.3, 12).reshape(3, 4), "bias": jnp.linspace(-0.9, -0.3, 4)}
REWRITTEN = {"kernel": jnp.zeros((3, 4), bool).at[:, 1].set(True), "bias": jnp.zeros(4, bool).at[1].set(True)}

RMSPROP = functools.partial(optax.rmsprop, decay=0.99, eps=1e-5, eps_in_sqrt=False)
SCHEDULE = optax.linear_schedule(2 * RATE, RATE, 2)
OPTIMIZERS = {
    "rmsprop": lambda: RMSPROP(RATE),
    "adam": lambda: optax.adam(RATE),
    "adamw": lambda: optax.adamw(RATE, weight_decay=1e-2),
    "centered": lambda: RMSPROP(RATE, centered=True),
    "momentum": lambda: RMSPROP(RATE, momentum=0.9),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(SCHEDULE)),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=RATE),
    "swept": lambda: optax.chain(optax.clip_by_global_norm(jnp.array(0.5)), RMSPROP(jnp.array(RATE))),
    "masked": lambda: optax.masked(RMSPROP(RATE), {"kernel": True, "bias": False}),
    "partition": lambda: optax.multi_transform({"a": optax.adam(RATE), "r": RMSPROP(RATE)}, {"kernel": "a", "bias": "r"}),
    "twice": lambda: aged(optax.adam(RATE)),
}


@functools.cache
def run(name, treatment: Any = "fresh", wrapped=True):
    """By how many steps come first: the first 50 steps after a rewrite, in learning rates along the gradient."""
    tx = aged(OPTIMIZERS[name]()) if wrapped else optax.with_extra_args_support(OPTIMIZERS[name]())

    def step(state, _):
        updates, state = tx.update(GRADS, state, PARAMS)
        return state, jax.tree.map(lambda update, grad: -update / RATE * jnp.sign(grad), updates, GRADS)

    def after(steps):
        state = jax.lax.fori_loop(0, steps, lambda _, state: step(state, None)[0], tx.init(PARAMS))
        state = rewrite(tx, state, PARAMS, REWRITTEN, treatment)
        return jax.lax.scan(step, state, length=50)[1]

    return jax.jit(after)


def steps_of(tx, number) -> Any:
    """A state after so many steps."""
    state = tx.init(PARAMS)
    for _ in range(number):
        _, state = tx.update(GRADS, state, PARAMS)
    return state


COUNTS = (2, 5, 40, 3000)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_is_one_learning_rate(name):
    """Of every rewritten entry within 5 %, soon after the start and long after; a part left to another optimizer is left alone."""
    for count in COUNTS:
        taken = run(name)(count)
        np.testing.assert_allclose(taken["kernel"][0, :, 1], 1.0, rtol=0.05)
        expected = np.abs(GRADS["bias"][1]) * (-1 / RATE) if name == "masked" else 1.0
        np.testing.assert_allclose(taken["bias"][0, 1], expected, rtol=0.05)


def test_later_steps_are_those_of_a_fresh_adam():
    """With constant gradients every step of a rewritten entry is that of an optimizer that starts now: one learning rate, all along."""
    for name, rtol in (("adam", 1e-3), ("rmsprop", 1e-3), ("chain", 1e-3), ("adamw", 0.03), ("twice", 1e-3)):
        for count in COUNTS:
            taken = run(name)(count)
            np.testing.assert_allclose(taken["kernel"][:, :, 1], 1.0, rtol=rtol)


def test_varying_gradients_give_the_steps_of_a_fresh_adam():
    """A rewritten entry steps like an Adam that starts now, whatever the gradients and however many steps the others have taken."""
    tx, fresh = aged(optax.adam(RATE)), optax.adam(RATE)
    state = tx.init(PARAMS)

    @jax.jit
    def both(state, other, scale) -> Any:
        grads = jax.tree.map(lambda grad: scale * grad, GRADS)
        updates, state = tx.update(grads, state, PARAMS)
        expected, other = fresh.update(grads, other, PARAMS)
        return updates, state, expected, other

    for scale in np.linspace(1.0, 3.0, 20):
        _, state, _, _ = both(state, fresh.init(PARAMS), scale)
    state, other = rewrite(tx, state, PARAMS, REWRITTEN), fresh.init(PARAMS)
    for scale in np.random.default_rng(0).normal(size=30):
        updates, state, expected, other = both(state, other, scale)
        np.testing.assert_allclose(updates["kernel"][:, 1], expected["kernel"][:, 1], rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_entries_keep_every_bit(name):
    """Entries that were not rewritten step as without wrapping and rewriting (step by step; compiled code may round otherwise)."""
    plain, tx = optax.with_extra_args_support(OPTIMIZERS[name]()), aged(OPTIMIZERS[name]())
    expected, state = plain.init(PARAMS), tx.init(PARAMS)
    updates: Any
    wanted: Any
    for step in range(4):
        if step == 2:
            state = rewrite(tx, state, PARAMS, REWRITTEN)
        updates, state = tx.update(GRADS, state, PARAMS)
        wanted, expected = plain.update(GRADS, expected, PARAMS)
        for path, mask in REWRITTEN.items():
            untouched = ~np.asarray(mask) if step > 1 else np.ones(mask.shape, bool)
            np.testing.assert_array_equal(np.asarray(updates[path])[untouched], np.asarray(wanted[path])[untouched])


def test_treatments():
    """First steps after many: zeros alone 10 (RMSProp) and 3.2 (Adam) learning rates; kept and averaged moments about one."""
    for name, zeros in (("rmsprop", 10.0), ("adam", 0.1 / np.sqrt(0.001))):
        steps = {kind: run(name, kind, wrapped=False)(20_000)["kernel"][0, :, 1] for kind in ("zeros", "keep", "layer_mean")}
        np.testing.assert_allclose(steps["zeros"], zeros, rtol=0.01)
        np.testing.assert_allclose(steps["keep"], 1.0, rtol=1e-3)
        own, others = GRADS["kernel"][:, 1], np.delete(np.asarray(GRADS["kernel"]), 1, axis=1)
        first = own if name == "rmsprop" else 0.9 * others.mean() + 0.1 * own
        second = np.sqrt(0.99 * (others**2).mean() + 0.01 * own**2) if name == "rmsprop" else np.sqrt((others**2).mean())
        np.testing.assert_allclose(steps["layer_mean"], first / second, rtol=1e-2)


def test_state_is_found_by_structure():
    """Moments of rewritten entries are those of `init`; counts, hyperparameters, other entries stay; ages start."""
    for name in ("chain", "inject", "masked", "partition"):
        tx = aged(OPTIMIZERS[name]())
        state = steps_of(tx, 3)
        after: Any = rewrite(tx, state, PARAMS, REWRITTEN)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert isinstance(after, AgedState)
        changed = jax.tree.map(lambda old, new: np.asarray(old != new), state.inner, after.inner)
        counts = {"kernel": 3, "bias": 1}
        for path, leaf in jax.tree_util.tree_leaves_with_path(changed):
            parameter = next((str(key.key) for key in path if getattr(key, "key", None) in PARAMS), None)
            assert leaf.sum() == (counts[parameter] if parameter else 0)
        for moments in jax.tree.leaves(after.inner, is_leaf=lambda node: "nu" in getattr(node, "_fields", ())):
            if "nu" in getattr(moments, "_fields", ()) and not isinstance(moments.nu["kernel"], optax.MaskedNode):
                assert (moments.nu["kernel"][:, 1] == 0).all()
        np.testing.assert_array_equal(after.first["kernel"], REWRITTEN["kernel"])


def test_optimizers_without_second_moments_are_left_alone():
    """Momentum restarts from zero; its steps are not rescaled."""
    tx = aged(optax.sgd(RATE, momentum=0.9))
    rewritten: Any = rewrite(tx, steps_of(tx, 5), PARAMS, REWRITTEN)
    updates: Any = tx.update(GRADS, rewritten, PARAMS)[0]
    np.testing.assert_allclose(updates["kernel"][:, 1], -RATE * GRADS["kernel"][:, 1], rtol=1e-6)
    np.testing.assert_allclose(updates["kernel"][:, 0], -RATE * GRADS["kernel"][:, 0] * (1 - 0.9**6) / 0.1, rtol=1e-5)


def test_a_state_without_its_optimizer_is_refused():
    """Unless there is nothing to treat."""
    state = optax.adam(RATE).init(PARAMS)
    with pytest.raises(ValueError, match="pass its optimizer as `tx`"):
        rewrite(None, state, PARAMS, REWRITTEN)
    assert rewrite(None, state, PARAMS, REWRITTEN, "keep") is state
    assert rewrite(None, None, PARAMS, REWRITTEN) is None

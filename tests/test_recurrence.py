"""The gradients that are written out for the recurrent layer against the one that JAX derives."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knife_jax.networks import recurrence
from knife_jax.networks.recurrence import FEW_ROWS, Projected, Projection, recur, unroll_gates

FEATURES = 3
MANY_ROWS = FEW_ROWS + 3


def _case(seed, length, batch, units, worked_out=True) -> Any:
    """What inputs give, a first state, recurrent weights and biases; episode starts; and how much every output counts."""
    keys = jax.random.split(jax.random.key(seed), 8)
    shapes = ((3, length, batch, units), (3 * units,), (batch, units), (units, 3 * units), (3 * units,), (length, batch, units))
    gates, shift, hidden, kernel, bias, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    projected = Projected(tuple(gates), shift)
    if not worked_out:
        projected = Projection(gates[0, :, :, :FEATURES], jax.random.normal(keys[7], (FEATURES, 3 * units)), shift)
    return (projected, hidden, kernel, bias), jax.random.bernoulli(keys[6], 0.3, (length, batch)), weights


def _derived(projected, starts, hidden, kernel, bias):
    return unroll_gates(lambda state: state @ kernel + bias[None], projected.joint(), starts, hidden)[0]


def _values_and_gradients(function, case):
    arrays, starts, weights = case

    def total(projected, hidden, kernel, bias):
        states = function(projected, starts, hidden, kernel, bias)
        return (weights * states).sum(), states

    gradients, states = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)
    return states, *jax.tree.leaves(gradients)


def _assert_same(ours, derived):
    for one, other in zip(ours, derived, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def _backward_passes(case):
    """What both ways of making the kernels' gradients give, whatever the machine takes."""
    (projection, hidden, kernel, bias), starts, weights = case
    saved = recurrence._saved(projection, starts, hidden, kernel, bias)[1]
    return [jax.jit(function)(saved, weights) for function in (recurrence.products_after, recurrence.products_within)]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), length=st.sampled_from([1, 2, 7]))
def test_the_gradient_is_the_derivative(seed, length):
    """Values and gradients of everything that has one."""
    case = _case(seed, length, batch=4, units=5)
    _assert_same(_values_and_gradients(recur, case), _values_and_gradients(_derived, case))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), length=st.sampled_from([1, 2, 7]), batch=st.sampled_from([4, MANY_ROWS]))
def test_the_gradient_of_what_inputs_are_projected_with_is_the_derivative(seed, length, batch):
    """Also of the inputs and of the weights they are read with, with few rows and with many."""
    case = _case(seed, length, batch, units=5, worked_out=False)
    derived = _values_and_gradients(_derived, case)
    _assert_same(_values_and_gradients(recur, case), derived)
    for gradients in _backward_passes(case):
        _assert_same(jax.tree.leaves(gradients), derived[1:])


@pytest.mark.parametrize("worked_out", [True, False])
def test_the_gradient_is_the_derivative_over_seeds(worked_out):
    """As the program vmaps it."""
    cases = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_case(seed, 6, MANY_ROWS, 5, worked_out) for seed in range(3)])
    ours, derived = (jax.vmap(lambda case, f=function: _values_and_gradients(f, case))(cases) for function in (recur, _derived))
    _assert_same(ours, derived)
    if not worked_out:
        for gradients in jax.vmap(_backward_passes)(cases):
            _assert_same(jax.tree.leaves(gradients), derived[1:])


def test_processors_add_up_within_the_loop_and_accelerators_after_it():
    """After it: products over all rows of all steps. Few rows: after it on every machine."""
    length, units = 7, 5

    def long_products(platform, rows):
        case = _case(0, length, rows, units, worked_out=False)
        traced = jax.jit(jax.grad(lambda arrays: (case[2] * recur(arrays[0], case[1], *arrays[1:])).sum())).trace(case[0])
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return len(re.findall(rf"dot_general.*tensor<(?:{units}|{FEATURES})x{length * rows}xf32>.*-> tensor", text))

    assert long_products("cpu", MANY_ROWS) == 0 < long_products("cuda", MANY_ROWS)
    assert long_products("cpu", FEW_ROWS - 1) > 0


def test_sums_over_steps_are_exact_in_half_precision():
    """Kernels' gradients are sums of float32: in bfloat16, 512 steps that add a 256th of what is there already would add nothing."""
    length, units = 512, 2
    ones = jnp.ones((length, MANY_ROWS, 1), jnp.bfloat16)
    projection = Projection(ones, jnp.zeros((1, 3 * units), jnp.bfloat16), jnp.zeros(3 * units, jnp.bfloat16))
    hidden, kernel = jnp.zeros((MANY_ROWS, units), jnp.bfloat16), jnp.zeros((units, 3 * units), jnp.bfloat16)
    case = (projection, hidden, kernel, projection.bias), jnp.ones((length, MANY_ROWS), bool), jnp.ones((length, MANY_ROWS, units))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, case)
    weights = case[2].astype(jnp.bfloat16)
    ours = _backward_passes((*case[:2], weights))[1]
    expected = _backward_passes(exact)[0]
    assert ours[0].kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours[0].kernel.astype(jnp.float32), expected[0].kernel, rtol=0.01)
    assert float(expected[0].kernel[0, -1]) == pytest.approx(length * MANY_ROWS / 2)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("rows", [2, MANY_ROWS])
def test_nothing_flows_back_across_the_start_of_an_episode(step, rows):
    """Neither to the inputs before it nor to the first state."""
    (projected, hidden, kernel, bias), _, _ = _case(0, 6, rows, 4, worked_out=False)
    starts = jnp.zeros((6, rows), bool).at[step].set(True)

    def last(inputs, hidden):
        return recur(projected._replace(inputs=inputs), starts, hidden, kernel, bias)[-1].sum()

    to_inputs, to_hidden = jax.grad(last, argnums=(0, 1))(projected.inputs, hidden)
    assert not to_hidden.any()
    assert not to_inputs[:step].any() and jnp.abs(to_inputs[step:]).sum(axis=(1, 2)).min() > 0

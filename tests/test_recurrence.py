"""The gradient that is written out for the recurrent layer against the one that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knife_jax.networks.recurrence import Projected, recur, unroll_gates


def _case(seed, length, batch, units):
    """What inputs give, a first state, recurrent weights and biases; episode starts; and how much every output counts."""
    keys = jax.random.split(jax.random.key(seed), 7)
    shapes = ((3, length, batch, units), (3 * units,), (batch, units), (units, 3 * units), (3 * units,), (length, batch, units))
    gates, shift, hidden, kernel, bias, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    return (Projected(tuple(gates), shift), hidden, kernel, bias), jax.random.bernoulli(keys[6], 0.3, (length, batch)), weights


def _derived(projected, starts, hidden, kernel, bias):
    return unroll_gates(lambda state: state @ kernel + bias[None], projected.joint(), starts, hidden)[0]


def _values_and_gradients(function, case):
    arrays, starts, weights = case

    def total(projected, hidden, kernel, bias):
        states = function(projected, starts, hidden, kernel, bias)
        return (weights * states).sum(), states

    gradients, states = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)
    return states, *jax.tree.leaves(gradients)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), length=st.sampled_from([1, 2, 7]))
def test_the_gradient_is_the_derivative(seed, length):
    """Values and gradients of everything that has one."""
    case = _case(seed, length, batch=4, units=5)
    for ours, derived in zip(_values_and_gradients(recur, case), _values_and_gradients(_derived, case), strict=True):
        np.testing.assert_allclose(ours, derived, rtol=2e-5, atol=2e-5)


def test_the_gradient_is_the_derivative_over_seeds():
    """As the program vmaps it."""
    cases = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_case(seed, 6, 4, 5) for seed in range(3)])
    ours, derived = (jax.vmap(lambda case, f=function: _values_and_gradients(f, case))(cases) for function in (recur, _derived))
    for one, other in zip(ours, derived, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("step", [0, 3])
def test_nothing_flows_back_across_the_start_of_an_episode(step):
    """Neither to the inputs before it nor to the first state."""
    (projected, hidden, kernel, bias), _, _ = _case(0, 6, 2, 4)
    starts = jnp.zeros((6, 2), bool).at[step].set(True)

    def last(projected, hidden):
        return recur(projected, starts, hidden, kernel, bias)[-1].sum()

    to_inputs, to_hidden = jax.grad(last, argnums=(0, 1))(projected, hidden)
    assert not to_hidden.any()
    for gate in to_inputs.gates:
        assert not gate[:step].any() and jnp.abs(gate[step:]).sum(axis=(1, 2)).min() > 0

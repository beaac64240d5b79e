"""Functions compiled apart: the same numbers, and one computation whatever is vmapped."""

import jax
import jax.numpy as jnp
import numpy as np

from envs.apart import apart, apart_over_rows, apart_under_vmap


def _scaled(numbers, factor):
    return {"product": numbers * factor, "sum": numbers.sum()}


def test_vmapped_from_outside_it_stays_one_computation():
    """Over none, one and two axes, shared arguments or not: the same results, in a branch of one scalar condition."""
    numbers, factors = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(1.0, 3.0)
    function = apart_under_vmap(_scaled)
    cases = {
        "alone": (lambda f: f, numbers[0, 0], factors[0]),
        "one axis, a shared factor": (lambda f: jax.vmap(f, in_axes=(0, None)), numbers[0], factors[0]),
        "two axes": (lambda f: jax.vmap(jax.vmap(f, in_axes=(0, None))), numbers, factors),
    }
    for name, (mapped, *arguments) in cases.items():
        jax.tree.map(np.testing.assert_array_equal, jax.jit(mapped(function))(*arguments), mapped(_scaled)(*arguments))
        compiled = jax.jit(mapped(function)).lower(*arguments).as_text()
        assert compiled.count("stablehlo.case") >= 1 or compiled.count("stablehlo.if") >= 1, name


def test_gradients_pass_it_by():
    """What is differentiated beside it is, also under vmap; rendered records are data."""
    function = apart_under_vmap(_scaled)

    def loss(weight, numbers):
        return (weight * function(numbers, jnp.float32(2.0))["product"]).sum()

    found = jax.vmap(jax.grad(loss), in_axes=(None, 0))(jnp.float32(1.0), jnp.ones((3, 4)))
    np.testing.assert_array_equal(found, [8.0, 8.0, 8.0])


def test_any_number_takes_the_branch():
    """Also minus infinity and what is not a number as the first of all."""
    for first in (-jnp.inf, jnp.nan, jnp.inf):
        numbers = jnp.array([first, 1.0])
        np.testing.assert_array_equal(jax.jit(apart(jnp.negative))(numbers), -numbers)


def test_it_stands_in_shard_map():
    """With what varies over the devices checked, for one varying argument of two and outputs of which one does not vary."""
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    over, same = jax.sharding.PartitionSpec("device"), jax.sharding.PartitionSpec()
    function = apart(lambda numbers, factor: (numbers * factor, factor + 1.0))
    spread = jax.shard_map(function, mesh=mesh, in_specs=(over, same), out_specs=(over, same))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(spread)(jnp.arange(3.0), jnp.float32(2.0)), (jnp.array([0.0, 2.0, 4.0]), 3.0))


def test_over_rows_what_is_vmapped_becomes_more_rows():
    """Over none, one and two axes, of the rows or of what they share: the same results, of one call of all rows if these share it."""
    numbers, factors = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(1.0, 3.0)
    rows_seen = []

    def scaled(rows, factor):
        rows_seen.append(len(rows))
        return {"product": rows * factor, "sums": (rows + factor)[:, None]}

    function = apart_over_rows(scaled)
    cases = {
        "alone": (lambda f: f, numbers[0, 0], factors[0], 4),
        "one axis": (lambda f: jax.vmap(f, in_axes=(0, None)), numbers[0], factors[0], 12),
        "two axes": (lambda f: jax.vmap(jax.vmap(f, in_axes=(0, None)), in_axes=(0, None)), numbers, factors[0], 24),
        "the factor's": (lambda f: jax.vmap(f, in_axes=(None, 0)), numbers[0, 0], factors, 4),
        "both": (lambda f: jax.vmap(jax.vmap(f, in_axes=(0, None))), numbers, factors, 12),
    }
    for name, (mapped, rows, factor, many) in cases.items():
        rows_seen.clear()
        ours = jax.jit(mapped(function))(rows, factor)
        jax.tree.map(np.testing.assert_array_equal, ours, mapped(scaled)(rows, factor))
        assert many in rows_seen, name

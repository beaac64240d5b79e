"""Functions compiled apart: the same numbers, and one computation whatever is vmapped."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from envs.apart import apart, apart_over_rows, apart_under_vmap
from envs.context import in_one_context


def _scaled(numbers, factor):
    return {"product": numbers * factor, "sum": numbers.sum()}


def _calls(function, *arguments):
    """The calls in the program that a processor runs."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return [line for line in text.splitlines() if " call(" in line]


def test_vmapped_from_outside_it_stays_one_computation():
    """Over none, one and two axes, shared arguments or not: the same results, by a call of one computation."""
    numbers, factors = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(1.0, 3.0)
    function = apart_under_vmap(_scaled)
    cases = {
        "alone": (lambda f: f, numbers[0, 0], factors[0]),
        "one axis, a shared factor": (lambda f: jax.vmap(f, in_axes=(0, None)), numbers[0], factors[0]),
        "two axes": (lambda f: jax.vmap(jax.vmap(f, in_axes=(0, None))), numbers, factors),
    }
    for name, (mapped, *arguments) in cases.items():
        jax.tree.map(np.testing.assert_array_equal, jax.jit(mapped(function))(*arguments), mapped(_scaled)(*arguments))
        assert len(_calls(mapped(function), *arguments)) == 1, name


def test_gradients_pass_it_by():
    """What is differentiated beside it is, also under vmap; rendered records are data."""
    function = apart_under_vmap(_scaled)

    def loss(weight, numbers):
        return (weight * function(numbers, jnp.float32(2.0))["product"]).sum()

    found = jax.vmap(jax.grad(loss), in_axes=(None, 0))(jnp.float32(1.0), jnp.ones((3, 4)))
    np.testing.assert_array_equal(found, [8.0, 8.0, 8.0])


def test_what_reads_it_does_not_compute_it_anew():
    """Sines of 100 numbers, of which all pairs are read: the compiled program calls what makes them, and would fuse it into the pairs."""

    def paired(make):
        def pairs(numbers):
            made = make(numbers)
            return (made[:, None] - made[None]).max(axis=1)

        return pairs

    def sine(numbers):
        return 2.0 * jnp.sin(numbers)

    numbers = jnp.linspace(0.0, 1.0, 100)
    (call,) = _calls(paired(apart(sine)), numbers)
    assert "f32[100]" in call and not _calls(paired(sine), numbers)
    np.testing.assert_allclose(jax.jit(paired(apart(sine)))(numbers), paired(sine)(numbers), rtol=1e-6, atol=1e-6)


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


def test_many_rows_are_taken_in_blocks():
    """Of equal size, over a vmapped axis too, with the same results; all at once on accelerators, and where there are few or no divisor."""
    rows_seen = []

    def halved(rows, factor):
        rows_seen.append(rows.shape)
        return rows * factor

    def finish(rows, outputs):
        return outputs + rows[:, :1]

    function = apart_over_rows(halved, finish, at_once=8)
    for shape, blocks in (((40, 3), 8), ((32, 3), 32), ((37, 3), 37), ((4, 10, 3), 8), ((4, 11, 3), 4)):
        rows_seen.clear()
        jax.clear_caches()
        rows = jax.random.normal(jax.random.key(0), shape)
        mapped = jax.vmap(function, in_axes=(0, None)) if len(shape) == 3 else function
        np.testing.assert_array_equal(jax.jit(mapped)(rows, 0.5), rows * 0.5 + rows[..., :1])
        assert (blocks, 3) in rows_seen
    lowered = {
        platform: jax.jit(function).trace(rows[0].repeat(8, 0), 0.5).lower(lowering_platforms=(platform,)) for platform in ("cpu", "cuda")
    }
    assert {platform: "stablehlo.while" in text.as_text() for platform, text in lowered.items()} == {"cpu": True, "cuda": False}


def test_in_one_context_nothing_is_traced_twice():
    """What is met directly and again under `vmap` of what was traced, as a game's step is: once in the context, twice outside of it."""
    traced = []

    @jax.jit
    def inner(number):
        traced.append(number.shape)
        return jnp.sin(number)

    @custom_vmap
    def outer(number):
        return inner(number)

    @outer.def_vmap
    def many(axis_size, in_batched, numbers):
        return inner(numbers), True

    def program(numbers):
        return inner(numbers) + jax.vmap(lambda one: jax.lax.scan(lambda carry, _: (outer(carry), None), one, length=2)[0])(numbers)

    for wrapped, times in ((program, 2), (in_one_context(program), 1)):
        jax.clear_caches()
        traced.clear()
        jax.jit(wrapped).trace(jnp.zeros(3))
        assert traced.count((3,)) == times

"""A layer's product: the gradient of its kernel, whichever way it is made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knife_jax.networks import products
from knife_jax.networks.products import kernel_gradient, times_kernel

WITH_BLOCKS = (384, 64, 8)


def _case(rows, inputs, units, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, inputs), (inputs, units), (rows, units))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("shape", [WITH_BLOCKS, (300, 64, 8), (7, 3, 2), (256, 64, 200)])
def test_gradients_are_the_derivatives(shape):
    """In blocks and at once, for one seed and for several."""
    rows, kernel, weights = _case(*shape)

    def total(product):
        return lambda rows, kernel: (weights * product(rows, kernel)).sum()

    ours, derived = (jax.grad(total(product), argnums=(0, 1)) for product in (times_kernel, jnp.matmul))
    for one, other in zip(ours(rows, kernel), derived(rows, kernel), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    many = jnp.stack([rows, 2 * rows]), jnp.stack([kernel, kernel + 1])
    for one, other in zip(jax.vmap(ours)(*many), jax.vmap(derived)(*many), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


def test_nothing_is_computed_for_rows_that_take_no_gradient():
    """One product forward and one for the kernel, and a third where rows take a gradient as well."""
    rows, kernel, weights = _case(7, 3, 2)

    def products_of(argnums):
        gradient = jax.grad(lambda rows, kernel: (weights * times_kernel(rows, kernel)).sum(), argnums=argnums)
        return str(jax.make_jaxpr(gradient)(rows, kernel)).count("dot_general")

    assert products_of(1) == 2
    assert products_of((0, 1)) == 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12288, 64, 8), 128),
        ((12288, 64, 64), 128),
        ((12288, 128, 8), 64),
        ((12288, 512, 8), 32),
        ((100, 64, 8), None),
        ((12288, 86, 64), None),
        ((4096, 64, 160), None),
        ((12289, 64, 8), None),
    ],
)
def test_rows_of_a_block(shape, expected):
    """Blocks are equal, as large as may be, and none where they gain nothing: few rows, a row of another length, wide outputs, a prime."""
    assert products._rows_of_a_block(*shape) == expected


def test_only_processors_add_up_over_blocks():
    """Accelerators take all rows in one product."""
    rows, _, back = _case(*WITH_BLOCKS)

    def results(platform):
        text = jax.jit(kernel_gradient).trace(rows, back).lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"dot_general.*-> tensor<([0-9x]+)xf32>", text)

    assert results("cpu") == ["3x64x8"]
    assert results("cuda") == ["64x8"]


def test_blocks_are_added_up_exactly_in_half_precision():
    """In bfloat16 the 256th of what is there already would add nothing."""
    number = 512 * 128
    rows, back = jnp.ones((number, 64), jnp.bfloat16), jnp.ones((number, 8), jnp.bfloat16)
    gradient = kernel_gradient(rows, back)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), number)

"""Many numbers as one array."""

import jax
import jax.numpy as jnp
import numpy as np

from knife_jax.bundle import bundled


def test_numbers_come_out_under_their_names():
    """Through a loop over a batch, in whatever order they were given, joined with others."""

    def step(total, _):
        row = bundled({"loss": total, "area": 2 * total}) | bundled({"q_tot": -total})
        return total + 1.0, row

    rows = jax.jit(jax.vmap(lambda start: jax.lax.scan(step, start, length=3)[1]))(jnp.array([0.0, 10.0]))
    assert rows.names == ("area", "loss", "q_tot") and rows.values.shape == (2, 3, 3)
    found = rows.unpacked()
    np.testing.assert_array_equal(found["loss"], [[0, 1, 2], [10, 11, 12]])
    np.testing.assert_array_equal(found["area"], [[0, 2, 4], [20, 22, 24]])
    np.testing.assert_array_equal(found["q_tot"], [[0, -1, -2], [-10, -11, -12]])


def test_nothing_is_a_bundle_too():
    """A learner without metrics of a kind."""
    assert bundled({}).unpacked() == {} and (bundled({}) | bundled({"loss": jnp.ones(())})).names == ("loss",)

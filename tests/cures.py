"""A small network for the tests of cures, its definition in numpy, and compiled runs over seeds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from knife_jax.networks.neurons import Dense, dense_layer
from knife_jax.plasticity.graph import make_graph
from knife_jax.plasticity.lift import lift
from knife_jax.plasticity.method import Method, Trees

SIZES = {"a": (5, 8), "b": (8, 8), "c": (8, 3)}
LAYERS = {"net/a": ("a", "b"), "net/b": ("b", "c")}
SEEDS, SAMPLES, KEPT = 3, 16, 12
"""The last samples of every batch are padding."""

Net = dict[str, dict[str, np.ndarray]]


class MLP(nn.Module):
    """Two hidden ReLU layers of 8 units."""

    @nn.compact
    def __call__(self, inputs):
        """Applies the network."""
        hidden = nn.relu(Dense(8, name="a")(inputs))
        return Dense(3, name="c")(nn.relu(Dense(8, name="b")(hidden)))


def random_net(seed: int) -> Net:
    """Weights without structure."""
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": rng.normal(size=shape).astype(np.float32) / 2, "bias": rng.normal(size=shape[1:]).astype(np.float32) / 5}
        for name, shape in SIZES.items()
    }


FRESH = random_net(99)
"""What the model's initializer 'draws', whatever the key."""

GRAPH = make_graph(
    [dense_layer("net", "a", "b", 8), dense_layer("net", "b", "c", 8)],
    lambda key: {"net": jax.tree.map(jnp.asarray, FRESH)},
)


def net_with_extremes(seed: int) -> Net:
    """Weights with units that never fire, hardly fire and fire a lot, others for every seed."""
    net = random_net(seed)
    net["a"]["bias"][[seed, seed + 1]] = -50
    net["b"]["bias"][2 * seed] = -50
    for name, unit in (("a", 5), ("b", 6)):
        net[name]["kernel"][:, unit] *= 0.02
        net[name]["bias"][unit] = 0.01
    for name in ("a", "b"):
        net[name]["kernel"][:, 7] *= 8
        net[name]["bias"][7] = 20
    return net


def batches(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, `[number, SAMPLES, ...]`."""
    rng = np.random.default_rng(7)
    return rng.normal(size=(number, SAMPLES, 5)).astype(np.float32), rng.normal(size=(number, SAMPLES, 3)).astype(np.float32)


def stack(nets: list[Net]) -> Any:
    """The networks of all seeds as one tree of parameters."""
    return {"net": jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)}


def unstack(params: Any, seed: int) -> Net:
    """The network of one seed."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[seed]), params["net"])


def hidden(net: Net, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Activations of samples that count, `{layer: [N, H]}`."""
    a = np.maximum(inputs[:KEPT] @ net["a"]["kernel"] + net["a"]["bias"], 0)
    return {"net/a": a, "net/b": np.maximum(a @ net["b"]["kernel"] + net["b"]["bias"], 0)}


def gradients(net: Net, inputs: np.ndarray, targets: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """dL/dh of every sample, and dL/dW_in, of half the mean squared error, by hand."""
    h = hidden(net, inputs)
    error = (h["net/b"] @ net["c"]["kernel"] + net["c"]["bias"] - targets[:KEPT]) / KEPT
    to_b = error @ net["c"]["kernel"].T
    before_b = to_b * (h["net/b"] > 0)
    to_a = before_b @ net["b"]["kernel"].T
    kernels = {"net/a": inputs[:KEPT].T @ (to_a * (h["net/a"] > 0)), "net/b": h["net/a"].T @ before_b}
    return {"net/a": to_a, "net/b": to_b}, kernels


def gradient(method: Method, variables: Any, state: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """What `observe` is given."""
    apply = lift(GRAPH, method.lift(MLP().apply, ("net",)), ("net",))
    counts = jnp.arange(SAMPLES) < KEPT

    def loss(params: Any, taps: Any) -> Any:
        outputs = apply({**variables, "params": params["net"], "taps": taps, "tap_mask": counts}, inputs)
        return 0.5 * (jnp.square(outputs - targets) * counts[:, None]).sum() / KEPT + method.penalty(params, state)

    return jax.grad(loss, argnums=(0, 1))(variables["params"], method.taps(state))


def compiled(method: Method, rewrite_every: int, steps: int) -> Any:
    """`(keys, params, target) -> (opt_state before, trees, report, state)` over seeds.

    Parameters only change by interventions, after every so many gradients; the report is the last one's.
    """
    tx = method.wrap_optimizer(optax.adam(1e-2))
    inputs, targets = map(jnp.asarray, batches(steps))

    def run(key: Any, params: Any, target: Any) -> Any:
        variables = method.allocate({"params": params})
        state, opt_state, seen_opt_state, report = method.init(variables), tx.init(variables["params"]), None, {}
        trees = Trees(variables, method.allocate({"params": target}), opt_state)
        for step in range(steps):
            grads, seen = gradient(method, trees.variables, state, inputs[step], targets[step])
            state = method.observe(state, trees.variables, grads, seen)
            trees = trees._replace(opt_state=tx.update(grads, trees.opt_state, trees.variables["params"])[1])
            trees = jax.lax.optimization_barrier(trees)  # what comes before is computed once, so that bits can be compared
            seen_opt_state = trees.opt_state
            if (step + 1) % rewrite_every == 0:
                state, trees, report = method.apply(jax.random.fold_in(key, step), state, trees, tx)
        return seen_opt_state, trees, report, state

    return jax.jit(jax.vmap(run))


def run(function: Any, nets: list[Net], seed: int = 0) -> Any:
    """Runs a compiled function on networks, with targets of their own."""
    targets = stack([random_net(50 + index) for index in range(SEEDS)])
    return function(jax.random.split(jax.random.key(seed), SEEDS), stack(nets), targets)


def recycled(net: Net, masks: dict[str, np.ndarray], zero_bias: bool = False, keep_outgoing: bool = False) -> Net:
    """The definition: all incoming weights first, then all outgoing ones."""
    new = {name: {leaf: values.copy() for leaf, values in module.items()} for name, module in net.items()}
    for layer, (made, _) in LAYERS.items():
        new[made]["kernel"][:, masks[layer]] = FRESH[made]["kernel"][:, masks[layer]]
        new[made]["bias"][masks[layer]] = 0 if zero_bias else FRESH[made]["bias"][masks[layer]]
    for layer, (_, read) in LAYERS.items():
        if not keep_outgoing:
            new[read]["kernel"][masks[layer]] = 0
    return new


def rewritten(masks: dict[str, np.ndarray], keep_outgoing: bool = False) -> Net:
    """Which entries `recycled` rewrites."""
    entries = {name: {"kernel": np.zeros(shape, bool), "bias": np.zeros(shape[1:], bool)} for name, shape in SIZES.items()}
    for layer, (made, read) in LAYERS.items():
        entries[made]["kernel"] |= masks[layer][None]
        entries[made]["bias"] |= masks[layer]
        if not keep_outgoing:
            entries[read]["kernel"] |= masks[layer][:, None]
    return entries


def filled(value: bool) -> Net:
    """All entries, or none."""
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value), FRESH)


def assert_same(given: Net, expected: Net) -> None:
    """Asserts that two networks are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def assert_close(given: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Asserts that two networks are equal up to rounding."""
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6), given, expected)


def moments(opt_state: Any, seed: int) -> list[Net]:
    """Adam's first and second moments of one seed."""
    return [unstack(optax.tree_utils.tree_get(opt_state, name), seed) for name in ("mu", "nu")]


def assert_moments(before: Any, after: Any, entries: Net, seed: int, cleared: bool = True) -> None:
    """Asserts that the moments of given entries are zero, or kept, and all others kept."""
    for old, new in zip(moments(before, seed), moments(after, seed), strict=True):
        expected = jax.tree.map(lambda values, entry: np.where(entry & cleared, 0, values), old, entries)
        assert_same(new, expected)
    assert int(optax.tree_utils.tree_get(after, "count")[seed]) == int(optax.tree_utils.tree_get(before, "count")[seed])


def assert_ages(opt_state: Any, entries: Net, seed: int) -> None:
    """Asserts that just the given entries are of age zero."""
    for powers in (opt_state.first, opt_state.second):
        assert_same(unstack(powers, seed), jax.tree.map(lambda entry: entry.astype(np.float32), entries))

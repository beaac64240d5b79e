"""Networks under KNIFE for its tests: stacks of ReLU layers, optimizers, and firing on chosen units."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from knife_jax.networks.neurons import Dense, dense_layer
from knife_jax.plasticity.graph import make_graph

INPUTS, ACTIONS, ROWS = 5, 3, 64


class Stack(nn.Module):
    """Dense-ReLU layers `hidden_0`, `hidden_1`, ... and an affine head `output`."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs):
        """Action values."""
        for index, width in enumerate(self.widths):
            inputs = nn.relu(Dense(width, name=f"hidden_{index}")(inputs))
        return Dense(ACTIONS, name="output")(inputs)


@functools.cache
def stack_graph(widths):
    """A stack's module and the graph of its hidden layers, whose parameters lie under `net`."""
    module = Stack(widths)
    names = [*(f"hidden_{index}" for index in range(len(widths))), "output"]
    layers = [dense_layer("net", made, read, width) for made, read, width in zip(names[:-1], names[1:], widths, strict=True)]
    return module, make_graph(layers, lambda key: {"net": module.init(key, jnp.zeros((1, INPUTS)))["params"]})


@functools.cache
def drawing(widths):
    """The compiled drawing of a stack's parameters."""
    return jax.jit(stack_graph(widths)[1].draw)


def applied(method, module):
    """The stack's values from a method's variables and inputs."""
    lifted = method.lift(module.apply, ("net",))
    return lambda variables, inputs: lifted(variables | {"params": variables["params"]["net"]}, inputs)


def firing(state, activity):
    """A state after which, under the reference `error`, the units with less activity than 25 are stagnant."""
    return state._replace(window=state.window._replace(total=activity, count=jnp.ones(())), error=jnp.ones(()) * 100.0)


OPTIMIZERS = {
    "rmsprop": lambda: optax.rmsprop(3e-3, 0.99, 1e-5, eps_in_sqrt=False),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-2),
    "momentum": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1e-1, momentum=0.9)),
    "schedule": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-2, 1e-3, 20))),
}


def stacked(*trees):
    """Trees side by side."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def trained(tx, loss, variables, opt_state, steps):
    """Variables and optimizer state after so many steps on `loss(params, reserve)`."""

    def learn(carry, _):
        variables, opt_state = carry
        grads = jax.grad(loss)(variables["params"], variables["reserve"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        return (variables | {"params": optax.apply_updates(variables["params"], updates)}, opt_state), None

    return jax.lax.scan(learn, (variables, opt_state), length=steps)[0]

"""The laws of parameters, of which those of a whole network are drawn at once.

With a draw of its own for every parameter, a program that draws networks has more than twice as many kernels to compile.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, PRNGKeyArray

Path = tuple[str, ...]
Noise = Literal["uniform", "normal", "truncated", "none"]

_DRAWS: dict[Noise, Callable[..., Array]] = {
    "uniform": partial(jax.random.uniform, minval=-1.0, maxval=1.0),
    "normal": jax.random.normal,
    "truncated": partial(jax.random.truncated_normal, lower=-2.0, upper=2.0),
    "none": lambda _, shape: jnp.zeros(0),
}
_TRUNCATED_DEVIATION = 0.87962566103423978
"""The standard deviation of a normal number that is drawn again beyond two deviations."""


class Law(NamedTuple):
    """How one parameter is drawn.

    Attributes:
        noise: what it is made of, number by number: uniform in [-1, 1), normal, normal within two deviations, or nothing (zeros).
        shape: the parameter's.
        scale: a factor.
        orthogonal: the axes of the matrices that are made orthogonal, inputs and units; None where the noise stays as it is.
    """

    noise: Noise
    shape: tuple[int, ...]
    scale: float = 1.0
    orthogonal: tuple[int, int] | None = None

    def draw(self, key: PRNGKeyArray) -> Array:
        """Draws the parameter alone."""
        return self.made_of(_DRAWS[self.noise](key, shape=(math.prod(self.shape),)))

    def made_of(self, numbers: Float[Array, "N"]) -> Array:
        """The parameter, from as many numbers of noise as it has entries, or none where it has no noise."""
        if self.noise == "none":
            return jnp.zeros(self.shape)
        if self.orthogonal is None:
            return self.scale * numbers.reshape(self.shape)
        inputs, units = (self.shape[axis] for axis in self.orthogonal)
        others = tuple(size for axis, size in enumerate(self.shape) if axis not in {each % len(self.shape) for each in self.orthogonal})
        matrices = numbers.reshape(-1, max(inputs, units), min(inputs, units))
        made = jax.vmap(_orthogonalised)(matrices) if others else _orthogonalised(matrices[0])
        turned = jnp.swapaxes(made, -2, -1) if units > inputs else made
        return self.scale * jnp.moveaxis(turned.reshape(*others, inputs, units), (-2, -1), self.orthogonal)


def uniform_within(shape: Sequence[int], fan_in: int) -> Law:
    """Uniform within 1/sqrt(fan in)."""
    return Law("uniform", tuple(shape), fan_in**-0.5)


def lecun_normal(shape: Sequence[int], fan_in: int) -> Law:
    """Normal within two deviations, with a variance of 1 / fan in."""
    return Law("truncated", tuple(shape), fan_in**-0.5 / _TRUNCATED_DEVIATION)


def orthogonal(shape: Sequence[int], scale: float, axes: tuple[int, int] = (-2, -1)) -> Law:
    """Matrices with orthogonal columns or, if these are more, rows, all of length `scale`."""
    return Law("normal", tuple(shape), scale, axes)


def zeros(shape: Sequence[int]) -> Law:
    """Nothing but zeros."""
    return Law("none", tuple(shape))


def _left_factor(matrix: Float[Array, "long short"]) -> Float[Array, "long short"]:
    """That of the QR decomposition whose right factor has a positive diagonal."""
    left, right = jnp.linalg.qr(matrix)
    return left * jnp.sign(jnp.diagonal(right))[None]


_orthogonalised = custom_vmap(_left_factor)
"""Given a batch, jaxlib has LAPACK factorise it on the threads that execute the program, and the one that asked waits: two such calls, as
for two layers of many seeds, take both threads of two cores and never return (jaxlib 0.10.2). So it is given one matrix after the other."""


@_orthogonalised.def_vmap
def _one_after_the_other(axis_size: int, in_batched: list[bool], matrices: Array) -> tuple[Array, bool]:
    one, all_at_once = partial(jax.lax.map, _orthogonalised), jax.vmap(_left_factor)
    return jax.lax.platform_dependent(matrices, cpu=one, default=all_at_once), True


_NOTED: ContextVar[dict[Path, Law] | None] = ContextVar("_NOTED", default=None)


def drawn(module: nn.Module, name: str, law: Law) -> Array:
    """A parameter of a module, to be called where `module.param` would be; `laws_of` takes note of the law."""
    noted = _NOTED.get()
    if noted is None:
        return module.param(name, law.draw)
    noted[(*module.path, name)] = law
    return module.param(name, lambda _: jnp.zeros(law.shape))


def laws_of(init: Callable[[], Any]) -> dict[Path, Law]:
    """The laws of all parameters that initializing a module draws, by their paths; nothing is computed."""
    token = _NOTED.set({})
    try:
        jax.eval_shape(init)
        noted = _NOTED.get()
    finally:
        _NOTED.reset(token)
    assert noted is not None
    return noted


def draw_all(key: PRNGKeyArray, laws: Mapping[Path, Law]) -> dict[str, Any]:
    """Parameters as nested dicts, each following its law; one draw gives the noise of a kind for all of them."""
    numbers = {noise: _noise(key, noise, [law for law in laws.values() if law.noise == noise]) for noise in _DRAWS}
    return unflatten_dict({path: law.made_of(next(numbers[law.noise])) for path, law in laws.items()})


def _noise(key: PRNGKeyArray, noise: Noise, laws: Sequence[Law]) -> Iterator[Array]:
    """The noise that each of the laws, all of one kind, takes."""
    sizes = [0 if noise == "none" else math.prod(law.shape) for law in laws]
    if laws:
        numbers = _DRAWS[noise](jax.random.fold_in(key, list(_DRAWS).index(noise)), shape=(sum(sizes),))
        ends = itertools.accumulate(sizes)
        yield from (jax.lax.slice(numbers, (end - size,), (end,)) for size, end in zip(sizes, ends, strict=True))

"""What the Dense modules of a Flax model read and give to each other, from the traced program.

Every call of a Dense module is marked at both ends in the trace. Between the marks each array is followed as what it is to the units of the
one call it comes from; inside them nothing needs to be understood.
"""

from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array

from knife_jax.networks.neurons import Path
from knife_jax.plasticity.lift import AFFINE, as_given, one_array

POINTS = np.linspace(-8.0, 8.0, 257)
"""Pre-activations at which activations are compared."""

_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh div eq erf erf_inv erfc
    exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg not or pow reduce_precision rem
    round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())
REMAT = ("remat", "remat2", "checkpoint")
INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", *REMAT)

INSIDE = "it is called inside a loop or a transformation (nn.scan, nn.vmap, nn.jit, ...), where frozen units cannot follow"
SHARED = "its parameters are also used outside of its own calls"
ELSEWHERE = "its kernel is not where its path says"


class Call(NamedTuple):
    """One call of a Dense module.

    Attributes:
        path: the module's.
        stack: leading axes of its kernel.
        stacked_input: whether each member of the stack has an input of its own.
        inputs: the shape that the module saw.
        outputs: the shape that it gave.
    """

    path: Path
    stack: tuple[int, ...]
    stacked_input: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Probe(NamedTuple):
    """A function's values at `POINTS`, or a constant, and the machine epsilon of the coarsest type it was computed in."""

    values: np.ndarray
    epsilon: float

    def equals(self, values: np.ndarray) -> bool:
        """Whether these are the same values, as far as the precision goes."""
        tolerance, mine = max(1e-5, 4 * self.epsilon), self.values.astype(float)
        return mine.shape == values.shape and np.allclose(mine, values.astype(float), rtol=tolerance, atol=tolerance)


class Value(NamedTuple):
    """What is known of an array in the trace.

    Attributes:
        sources: numbers of the calls that it depends on with no other call in between.
        foreign: whether it depends on anything else but parameters, other variables of the model and constants.
        aligned: whether it has the shape of its only source's outputs, each entry made of that unit and statistics of the layer.
        probe: where each entry is a fixed function of its unit alone, the values of this function at `POINTS`; of a constant, its value.
        parameter: its path, if it is one.
    """

    sources: frozenset[int] = frozenset()
    foreign: bool = False
    aligned: bool = False
    probe: Probe | None = None
    parameter: Path | None = None


class Reading(NamedTuple):
    """What one call of a module read.

    Attributes:
        reader: the module.
        value: its input.
        fits: whether frozen units beside the source's would be at hand there.
    """

    reader: Path
    value: Value
    fits: bool


class Flow(NamedTuple):
    """What a trace says about the Dense modules.

    Attributes:
        modules: their calls' numbers, in the order of the dataflow.
        calls: by number.
        readings: in the order of the dataflow.
        returned: the calls whose outputs the model gives.
        spoiled: modules of which not enough is known, with the reason.
        shapes: of all parameters.
    """

    modules: dict[Path, set[int]]
    calls: list[Call]
    readings: list[Reading]
    returned: frozenset[int]
    spoiled: dict[Path, str]
    shapes: dict[Path, tuple[int, ...]]

    def reads_only(self, reader: Path, source: Path) -> bool:
        """Whether all that a module ever reads are the units of one other, each in its place."""
        own = self.modules[source]
        inputs = [(reading.value, reading.fits) for reading in self.readings if reading.reader == reader]
        return reader not in self.spoiled and all(value.aligned and value.sources <= own and fits for value, fits in inputs)


def follow(model: nn.Module, examples: tuple[Any, ...], keywords: dict[str, Any]) -> Flow:
    """Traces a model's forward pass and walks through it."""
    calls: list[Call] = []
    token = uuid4().hex  # marks of an earlier trace may lie in the caches of a jitted function
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda key: model.init(key, *examples, **keywords), key)
    params: dict[Path, Any] = flatten_dict(variables.get("params", {}))
    others = {name: tree for name, tree in variables.items() if name != "params"}
    leaves, structure = jax.tree.flatten(examples)

    def forward(params: dict[Path, Array], others: Any, key: Array, arrays: list[Array]) -> list[Array]:
        arrays = arrays[::-1]
        inputs = jax.tree.unflatten(structure, [arrays.pop() if _is_array(leaf) else leaf for leaf in leaves])
        with nn.intercept_methods(partial(_mark, calls, token)):
            given = {"params": unflatten_dict(params), **others}
            outputs, _ = model.apply(given, *inputs, rngs={"params": key}, mutable=list(others), **keywords)
        return [leaf for leaf in jax.tree.leaves(outputs) if _is_array(leaf)]

    closed = jax.make_jaxpr(forward)(params, others, key, [leaf for leaf in leaves if _is_array(leaf)])
    inputs = [Value(parameter=path) for path in sorted(params)]  # the order in which JAX flattens a dict
    inputs += [Value()] * len(jax.tree.leaves(others))
    inputs += [Value(foreign=True)] * (len(closed.jaxpr.invars) - len(inputs))
    with jax.ensure_compile_time_eval():
        return _Walk(calls, token).finish(closed, inputs, {path: leaf.shape for path, leaf in params.items()})


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _mark(calls: list[Call], token: str, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """Names what enters and what leaves a Dense module's call; an interceptor of Flax."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, AFFINE) or not args:
        return call(*args, **kwargs)
    number = len(calls)
    stack = getattr(module, "stack", None)
    noted = Call(module.path, (stack,) if stack else (), getattr(module, "stacked_input", False), args[0].shape, ())
    calls.append(noted)
    given = call(checkpoint_name(args[0], f"{token} in {number}"), *args[1:], **kwargs)
    outputs = one_array(given)
    calls[number] = noted._replace(outputs=outputs.shape)
    return as_given(checkpoint_name(outputs, f"{token} out {number}"), given)


class _Walk:
    """The state of a walk along the equations of a trace."""

    def __init__(self, calls: list[Call], token: str) -> None:
        self.calls, self.token = calls, token
        self.modules: dict[Path, set[int]] = {call.path: set() for call in calls}
        self.last: dict[Path, tuple[int, list[JaxprEqn]]] = {}
        self.readings: list[Reading] = []
        self.spoiled: dict[Path, str] = {}
        self.open: list[int] = []
        self.around: list[JaxprEqn] = []

    def finish(self, closed: ClosedJaxpr, inputs: list[Value], shapes: dict[Path, tuple[int, ...]]) -> Flow:
        """Walks to the end."""
        outputs = self._equations(closed.jaxpr, closed.consts, inputs)
        self._consume(outputs)
        for path, numbers in self.modules.items():
            if numbers != {number for number, call in enumerate(self.calls) if call.path == path}:
                self.spoiled[path] = INSIDE
            if (*path, "kernel") not in shapes:
                self.spoiled[path] = ELSEWHERE
        returned = frozenset[int]().union(*(value.sources for value in outputs))
        return Flow(self.modules, self.calls, self.readings, returned, self.spoiled, shapes)

    def _equations(self, jaxpr: Jaxpr, consts: Any, inputs: list[Value]) -> list[Value]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(_constant, consts), *inputs], strict=True))

        def value(atom: Var | Literal) -> Value:
            return _constant(np.asarray(atom.val)) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            known.update(zip(equation.outvars, self._step(equation, [value(atom) for atom in equation.invars]), strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _step(self, equation: JaxprEqn, values: list[Value]) -> list[Value]:
        """The outputs of one equation."""
        name, avals = equation.primitive.name, [variable.aval for variable in equation.outvars]
        mark = str(equation.params.get("name")).split() if name == "name" else []
        if mark[:1] == [self.token]:
            number = int(mark[2])
            return [self._enter(number, avals[0], values[0]) if mark[1] == "in" else self._leave(number, avals[0])]
        if name in INLINED and not self.open:
            return self._inline(equation, values)
        self._consume(values)
        if self.open:
            return [Value(foreign=True)] * len(avals)
        return [self._combine(equation, aval, values) for aval in avals]

    def _inline(self, equation: JaxprEqn, values: list[Value]) -> list[Value]:
        inner: Any = equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]
        jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        self.around.append(equation)
        outputs = self._equations(jaxpr, consts, values)
        self.around.pop()
        if equation.primitive.name == "custom_vjp_call":
            return [value._replace(probe=None) for value in outputs]
        return outputs

    def _enter(self, number: int, aval: Any, value: Value) -> Value:
        call = self.calls[number]
        if self.open:
            self.spoiled[call.path] = self.spoiled[self.calls[self.open[-1]].path] = "one Dense module calls another"
        if aval.shape != call.inputs or any(equation.primitive.name not in REMAT for equation in self.around):
            self.spoiled[call.path] = INSIDE
        self._consume([value])
        self.readings.append(Reading(call.path, value, self._fits(call, value)))
        self.open.append(number)
        return Value(foreign=True)

    def _fits(self, reader: Call, value: Value) -> bool:
        """Frozen units are those of a layer's latest call, of the same part of the trace, and of the reader's own member of a stack."""
        sources = {number: self.calls[number] for number in value.sources}
        stacks = all(source.stack == reader.stack for source in sources.values()) and (reader.stacked_input or not reader.stack)
        return stacks and all(self.last[source.path] == (number, self.around) for number, source in sources.items())

    def _leave(self, number: int, aval: Any) -> Value:
        path = self.calls[number].path
        self.open.remove(number)
        self.last[path] = (number, [*self.around])
        self.modules[path].add(number)
        if aval.shape != self.calls[number].outputs:
            self.spoiled[path] = INSIDE
        return Value(frozenset([number]), aligned=True, probe=_probe(POINTS.astype(aval.dtype)))

    def _consume(self, values: list[Value]) -> None:
        """Notes parameters that are used by anything but their own module's call."""
        inside = self.calls[self.open[-1]].path if self.open else None
        for value in values:
            module = value.parameter[:-1] if value.parameter else None
            if module in self.modules and module != inside:
                self.spoiled[module] = SHARED

    def _combine(self, equation: JaxprEqn, aval: Any, values: list[Value]) -> Value:
        """What an equation makes of its inputs."""
        sources = frozenset[int]().union(*(value.sources for value in values))
        foreign = any(value.foreign for value in values)
        name = equation.primitive.name
        shaped = len(sources) == 1 and aval.shape == self.calls[min(sources)].outputs
        aligned = name in ELEMENTWISE and shaped and not foreign and any(value.aligned for value in values)
        probe = None
        if aligned or not (sources or foreign):
            probe = _evaluate(equation, values)
        return Value(sources, foreign, aligned, probe)


def _constant(value: Any) -> Value:
    """A constant of the trace; only single numbers are looked at."""
    number = np.ndim(value) == 0 and (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool)
    return Value(probe=_probe(np.asarray(value)) if number else None)


def _probe(values: np.ndarray, *others: Probe) -> Probe:
    own = float(jnp.finfo(values.dtype).eps) if jnp.issubdtype(values.dtype, jnp.floating) else 0.0
    return Probe(values, max([own, *(other.epsilon for other in others)]))


def _evaluate(equation: JaxprEqn, values: list[Value]) -> Probe | None:
    """Values at `POINTS` (or a constant's); None if any input is known less well."""
    probes = [value.probe for value in values if value.probe is not None]
    name = equation.primitive.name
    if len(probes) < len(values) or not probes or name == "stop_gradient":
        return None
    if name == "broadcast_in_dim":
        return probes[0]
    if name not in ELEMENTWISE:
        return None
    shape = np.broadcast_shapes(*(probe.values.shape for probe in probes))
    operands = [jnp.broadcast_to(probe.values, shape) for probe in probes]
    return _probe(np.asarray(equation.primitive.bind(*operands, **equation.params)), *probes)

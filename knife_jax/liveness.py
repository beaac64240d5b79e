"""How many bytes a traced function holds at once, from its jaxpr alone: no lowering, no compilation.

Every value lives from the equation that makes it to the last one that reads it, loops and branches included. What XLA never writes to
memory is left out: views of other values, updates in place, and results of one arithmetic operation that only the next one reads.
"""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

_IN_PLACE = ("dynamic_update_slice", "scatter")
_VIEWS = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "iota",
    "random_wrap",
    "random_unwrap",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
)
_READERS = ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum")
_ARITHMETIC = (
    *("abs", "add", "add_any", "and", "clamp", "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt"),
    *("select_n", "shift_left", "shift_right_logical", "sign", "sin", "sqrt", "square", "sub", "tanh", "xor"),
)
_FUSED_READERS = frozenset((*_ARITHMETIC, *_READERS, *_VIEWS))


def tree_bytes(tree: Any) -> int:
    """The bytes of a pytree of arrays or of their shapes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def peak_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes that a jaxpr holds at once beside its inputs; its outputs count."""
    last, readers = _uses(jaxpr)
    held: dict[Var, int] = {}
    peak = live = 0
    for index, eqn in enumerate(jaxpr.eqns):
        dying = [var for var in _variables(eqn.invars) if last[var] == index]
        made = _made(eqn, dying, readers)
        peak = max(peak, live + max(_inside(eqn), sum(made.values())))
        held |= {var: size for var, size in made.items() if var in last}
        for var in set(dying):
            held.pop(var, None)
        live = sum(held.values())
    return peak


def _uses(jaxpr: Jaxpr) -> tuple[dict[Var, int], dict[Var, list[str]]]:
    """Where each variable is last read, and by which primitives; outputs are read at the very end."""
    last: dict[Var, int] = {}
    readers: dict[Var, list[str]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for var in _variables(eqn.invars):
            last[var] = index
            readers.setdefault(var, []).append(eqn.primitive.name)
    for var in _variables(jaxpr.outvars):
        last[var] = len(jaxpr.eqns)
        readers.setdefault(var, []).append("return")
    return last, readers


def _made(eqn: JaxprEqn, dying: list[Var], readers: dict[Var, list[str]]) -> dict[Var, int]:
    """The bytes of each output that gets memory of its own."""
    name, outputs = eqn.primitive.name, [var for var in eqn.outvars if isinstance(var, Var)]
    if name in _VIEWS or name.startswith(_IN_PLACE):
        return {}
    sizes = {var: _bytes(var.aval) for var in outputs}
    if name in _ARITHMETIC:
        return {var: size for var, size in sizes.items() if not _is_fused(readers.get(var, []))}
    if name == "scan":
        first, count = eqn.params["num_consts"], eqn.params["num_carry"]
        for given, carried in zip(eqn.invars[first : first + count], eqn.outvars[:count], strict=True):
            if given in dying:
                sizes[carried] = 0
    return sizes


def _is_fused(readers: list[str]) -> bool:
    return len(readers) <= 1 and all(name in _FUSED_READERS for name in readers)


def _inside(eqn: JaxprEqn) -> int:
    """The most that the bodies of a loop, branch or call hold at once, beside the stacked outputs of a scan."""
    most = max((peak_bytes(body) for body in _bodies(eqn)), default=0)
    if eqn.primitive.name == "scan":
        most += sum(_bytes(var.aval) for var in eqn.outvars[eqn.params["num_carry"] :])
    return most


def _bodies(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs within; of branches by platform, the one of this process's."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:
        yield eqn.params["branches"][_place_of_ours(platforms)].jaxpr
        return
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            body = getattr(item, "jaxpr", item)
            if isinstance(body, Jaxpr):
                yield body


def _place_of_ours(platforms: tuple[tuple[str, ...] | None, ...]) -> int:
    """Which of the branches of `jax.lax.platform_dependent` is taken; None stands for all other platforms."""
    names = {"gpu": {"gpu", "cuda", "rocm"}}.get(jax.default_backend(), {jax.default_backend()})
    return next(place for place, named in enumerate(platforms) if named is None or names & set(named))


def _variables(atoms: Any) -> list[Var]:
    return [atom for atom in atoms if isinstance(atom, Var)]


def _bytes(aval: Any) -> int:
    """Typed keys are two words of 32 bits."""
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return int(getattr(aval, "size", 0)) * int(itemsize)

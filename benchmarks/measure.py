"""What the benchmarks measure with: interleaved timing, and the arithmetic of a program."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np

CLOCKS = {"cpu": "processor", "wall": "wall"}
"""What the two kinds of time are called."""


class Timed(NamedTuple):
    """Seconds of a call: medians over the repeats, and the least."""

    wall: float
    cpu: float
    least_wall: float
    least_cpu: float


def clock() -> str:
    """Which time speaks of the work done: the processor's, which other jobs disturb less, unless an accelerator does the work."""
    import jax

    return "cpu" if jax.default_backend() == "cpu" else "wall"


def interleaved(programs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, Timed]:
    """Times every program once in each of the repeats; the first round is thrown away. Each is called with the number of the repeat."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, run in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(repeat)
            if repeat:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: _summary(each) for name, each in seconds.items()}


def _summary(seconds: list[tuple[float, float]]) -> Timed:
    wall, cpu = zip(*seconds, strict=True)
    return Timed(median(wall), median(cpu), min(wall), min(cpu))


def count_flops(jaxpr: Any, loops_once: bool = False) -> float:
    """FLOPs of all matrix products of a jaxpr, those in scans as often as they run, or once as XLA's cost analysis counts them.

    Of the branches of a condition (platforms are one) the most that any does.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        scanned = equation.primitive.name == "scan" and not loops_once
        times = equation.params["length"] if scanned else 1
        for value in equation.params.values():
            inside = [getattr(inner, "jaxpr", inner) for inner in (value if isinstance(value, tuple | list) else (value,))]
            counted = [count_flops(inner, loops_once) for inner in inside if hasattr(inner, "eqns")]
            total += times * (max(counted, default=0.0) if equation.primitive.name == "cond" else sum(counted))
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval.shape
            total += 2 * np.prod(equation.outvars[0].aval.shape) * np.prod([operand[axis] for axis in contracted])
    return float(total)


def significant(number: float) -> float:
    """Four digits, for people."""
    return float(f"{number:.4g}")

"""A finished run.

Shapes: S seeds, N evaluations.
"""

from typing import Any, NamedTuple

import numpy as np

from knife_jax.config import Config


class RunResult(NamedTuple):
    """A finished run.

    Attributes:
        config: the resolved configuration.
        metrics: `{name: [S, ...]}`, see `make_train`; plus `env_steps` `[N]`, slots collected before each evaluation.
        task_names: the distinct tasks.
        task_order: the distinct task met at each position.
        variables: `{"params": {"agent": ..., "mixer": ...}, "reserve": ...}` of the online networks, with the seed axis in front.
        report: what the cure did over the whole run, `{"<layer>/<measure>": [S]}`; empty without one.
        provenance: seeds, how many of them side by side, times, versions, device and code revision.
    """

    config: Config
    metrics: dict[str, np.ndarray]
    task_names: tuple[str, ...]
    task_order: tuple[int, ...]
    variables: Any
    report: dict[str, np.ndarray]
    provenance: dict[str, Any]

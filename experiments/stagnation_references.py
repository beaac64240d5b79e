"""What each reference of relative update activity flags on a healthy, converged network and on a collapsed one.

    python -m experiments.stagnation_references --seeds 16

Healthy: QMIX after one permuted payoff, the seeds that solved it. Collapsed: QMIX after all six positions of `matrix/permuted`, the seeds
that no longer solve the last, which is the first again. Activity is averaged over the last window of gradient steps, by KNIFE's own
bookkeeping with a threshold of 0, which treats nobody.
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from knife_jax import Config, make_train
from knife_jax.plasticity import scores
from knife_jax.results import new_directory
from knife_jax.runner import environment_facts, seed_keys
from knife_jax.statistics import mean_estimate

REFERENCES = get_args(scores.Reference)
WATCH = {"name": "knife", "threshold": 0.0, "reference": "error", "reserve": 0.01, "when_full": "skip", "interval_updates": 500}


def last_window(scenario: dict[str, Any], seeds: int) -> tuple[np.ndarray, Any]:
    """Trains; returns final success `[S]` and the cure's state."""
    config = Config.from_dict({"preset": "matrix_drift", **scenario, "plasticity": {**WATCH, "diagnostics": False}})
    out = jax.jit(jax.vmap(make_train(config)))(seed_keys(seeds))
    return np.asarray(out["metrics"]["eval/won"])[:, -1], out["runner_state"].learner.cure


def flagged(state: Any, threshold: float) -> dict[str, dict[str, np.ndarray]]:
    """`{reference: {layer: share of stagnant units [S]}}`, with `all` for every layer together."""
    shares = {}
    for reference in REFERENCES:

        def masks(state: Any, reference: scores.Reference = reference) -> Any:
            error = state.error / state.window.count
            relative = scores.relative_activity(state.window, reference, error)
            return {layer: scores.stagnant(values, threshold) for layer, values in relative.items()}

        found = jax.vmap(masks)(state)
        shares[reference] = {layer: np.asarray(mask).mean(axis=-1) for layer, mask in found.items()}
        shares[reference]["all"] = np.concatenate([np.asarray(mask) for mask in found.values()], axis=-1).mean(axis=-1)
    return shares


def main() -> None:
    """Prints the table; writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.25)
    parser.add_argument("--out", type=Path, help="a new directory for references.json")
    arguments = parser.parse_args()
    healthy_won, healthy = last_window({"env": {"name": "matrix", "scenario": "paper"}}, arguments.seeds)
    collapsed_won, collapsed = last_window({}, arguments.seeds)
    groups = {"healthy": (healthy, healthy_won == 1), "collapsed": (collapsed, collapsed_won == 0)}
    table = Table(title=f"Share of units below {arguments.threshold:g}, mean over seeds [95 % interval]", title_justify="left")
    for column in ("reference", "layer", *(f"{name}, {kept.sum()} seeds" for name, (_, kept) in groups.items())):
        table.add_column(column)
    shares = {name: flagged(state, arguments.threshold) for name, (state, _) in groups.items()}
    rows = []
    for reference in REFERENCES:
        for layer in shares["healthy"][reference]:
            cells = {name: mean_estimate(shares[name][reference][layer][kept]) for name, (_, kept) in groups.items()}
            table.add_row(reference, layer, *(str(cell) for cell in cells.values()))
            rows.append({"reference": reference, "layer": layer} | {name: cell._asdict() for name, cell in cells.items()})
    Console(width=120).print(table)
    if arguments.out:
        seeds = {name: int(kept.sum()) for name, (_, kept) in groups.items()}
        content = {"threshold": arguments.threshold, "seeds": seeds, "rows": rows, "provenance": environment_facts()}
        with new_directory(arguments.out) as unfinished:
            (unfinished / "references.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How hard SMAX's scenarios and drifting tasks are: two policies that do not learn, in complete episodes.

    python -m experiments.smax_difficulty --scenarios 3m 2s3z 5gen_protoss_drift --episodes 2048 --out difficulty.json

`random` takes any available action; `heuristic` plays the allies by the rules of the scripted enemy.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from rich.console import Console
from rich.table import Table

from envs.registry import make
from envs.smax import Smax, SmaxParams
from envs.smax.baseline import HeuristicMemory, first_memory, heuristic_allies
from envs.wrappers import EpisodeStatistics, IdleAfterEnd
from knife_jax.runner import environment_facts
from knife_jax.statistics import mean_estimate

POLICIES = ("random", "heuristic")


class Episodes(NamedTuple):
    """One entry per episode, `[n]` each."""

    returns: Array
    won: Array
    timeout: Array
    lengths: Array


def play(env: Smax, params: SmaxParams, policy: str, key: PRNGKeyArray, number: int) -> Episodes:
    """Plays complete episodes with one of `POLICIES`."""
    return _player(env, policy)(jax.random.split(key, number), params)


def _player(env: Smax, policy: str) -> Callable[..., Episodes]:
    wrapped = IdleAfterEnd(EpisodeStatistics(env))

    def episode(key: PRNGKeyArray, params: SmaxParams) -> Episodes:
        key_start, key_play = jax.random.split(key)
        start = wrapped.reset(key_start, params)

        def step(carry: tuple[Any, HeuristicMemory], key: PRNGKeyArray) -> tuple[Any, tuple[Array, ...]]:
            state, memory = carry
            key_act, key_step = jax.random.split(key)
            if policy == "heuristic":
                actions, memory = heuristic_allies(env, key_act, state.env.env, memory, params)
            else:
                mask = wrapped.observe(wrapped.record(state), params).action_mask
                actions = jax.random.categorical(key_act, jnp.where(mask, 0.0, -jnp.inf)).astype(jnp.int32)
            state, outcome = wrapped.step(key_step, state, actions, params)
            return (state, memory), (outcome.reward, outcome.info["won"], outcome.info["timeout"], ~outcome.info["reset"])

        keys = jax.random.split(key_play, env.max_steps + int(env.legacy))
        rewards, won, timeout, played = jax.lax.scan(step, (start, first_memory(env, start.env.env)), keys)[1]
        return Episodes(rewards.sum(), won.any(), timeout.any(), played.sum())

    return jax.jit(jax.vmap(episode, in_axes=(0, None)))


def measure(scenario: str, number: int, seed: int) -> list[dict[str, Any]]:
    """One row per task and policy: means, with four digits, and a 95 % interval of the win rate."""
    env, tasks = make("smax", scenario)
    assert isinstance(env, Smax)
    rows = []
    for policy in POLICIES:
        player = _player(env, policy)
        for index, name in enumerate(tasks.names):
            told = player(jax.random.split(jax.random.key(seed), number), tasks.at(index))
            won = mean_estimate(np.asarray(told.won, np.float64))
            rows.append(
                {
                    "scenario": scenario,
                    "task": name,
                    "policy": policy,
                    "won": round(won.value, 4),
                    "won_low": round(won.low, 4),
                    "won_high": round(won.high, 4),
                    "return": round(float(told.returns.mean()), 4),
                    "return_standard_error": round(float(told.returns.std()) / number**0.5, 4),
                    "timeout": round(float(told.timeout.mean()), 4),
                    "length": round(float(told.lengths.mean()), 2),
                }
            )
    return rows


def main() -> None:
    """Prints a table; writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["5gen_protoss_drift", "5gen_terran_drift", "5gen_zerg_drift"])
    parser.add_argument("--episodes", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    if settings.out and settings.out.exists():
        sys.exit(f"{settings.out} exists; nothing is overwritten")
    rows = [row for scenario in settings.scenarios for row in measure(scenario, settings.episodes, settings.seed)]
    table = Table("scenario", "task", "policy", "won", "return", "timeout", "length")
    for row in rows:
        won = f"{row['won']:.2f} [{row['won_low']:.2f}, {row['won_high']:.2f}]"
        table.add_row(row["scenario"], row["task"], row["policy"], won, *(f"{row[name]:.2f}" for name in ("return", "timeout", "length")))
    Console().print(table)
    if settings.out:
        partial = settings.out.with_suffix(".part")
        partial.write_text(json.dumps({"episodes": settings.episodes, "rows": rows, "facts": environment_facts()}, indent=1) + "\n")
        partial.replace(settings.out)


if __name__ == "__main__":
    main()

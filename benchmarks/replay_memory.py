"""Bytes of a stored slot and of a whole replay, ours against JaxMARL's layout at the same capacity.

    python -m benchmarks.replay_memory --out replay_memory.json --plot replay_memory.png
    python -m benchmarks.replay_memory --games smax/2s3z jaxmarl/2s3z --capacity 100000

JaxMARL's QMIX stores, per slot and by agent, what its `CTRolloutManager` returns: observations with the agent's identity, actions, rewards,
dones and available actions, and under `__all__` the global state, the team's reward and done. Its sizes are those of the real wrappers
around the real environment, traced and never run. Where JaxMARL has no such game (`peer` says so), the environment is ours under
JaxMARL's interface, with our global state in place of the longer concatenation of observations. Nothing is timed.
"""

import argparse
from typing import Any

from benchmarks.report import Row, add_output, draw, refuse_existing, say, write

NUM_ENVS, ROLLOUT = 16, 128
CAPACITY = 5000 // NUM_ENVS * NUM_ENVS * ROLLOUT
"""JaxMARL's default on SMAX: 5,000 rollouts of 128 slots, shared by 16 environments."""

STORAGES = ("float32", "float16", "int8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", help="`game/scenario`; all of SMAX, predator-prey and matrix games if left out")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="slots per seed")
    add_output(parser)
    return parser.parse_args()


def default_games() -> list[str]:
    """Every SMAX scenario and predator-prey, the matrix games by their shapes, and two battles of JaxMARL's own through the adapter."""
    from envs.registry import GAMES

    smax = [name for name in GAMES["smax"].scenarios if name != "custom"]
    games = {
        "smax": smax,
        "predator_prey": GAMES["predator_prey"].scenarios,
        "matrix": ("qtran", "two_step", "mmdp"),
        "jaxmarl": ("3m", "2s3z"),
    }
    return [f"{game}/{scenario}" for game, scenarios in games.items() for scenario in scenarios]


def measured(game: str, storage: str | None, capacity: int) -> Row:
    """One row: bytes per slot and per seed of both layouts."""
    ours, slots = our_bytes(game, storage, capacity)
    theirs, peer = their_bytes_per_slot(game)
    row: Row = {"game": game, "storage": storage or "records", "slots": slots, "peer": peer}
    row |= {"bytes_per_slot": round(ours / slots, 1), "jaxmarl_bytes_per_slot": theirs}
    row |= {"mb_per_seed": round(ours / 1e6, 2), "jaxmarl_mb_per_seed": round(theirs * slots / 1e6, 2)}
    return row | {"ratio": round(theirs * slots / ours, 2)}


def our_bytes(game: str, storage: str | None, capacity: int) -> tuple[int, int]:
    """Bytes of one seed's replay as a run makes it, and the slots in it."""
    import jax

    from knife_jax import Config, make_program
    from knife_jax.liveness import tree_bytes

    name, scenario = game.split("/")
    options = {} if storage is None else {"storage": storage}
    config = Config.from_dict(
        {
            "env": {"name": name, "scenario": scenario, "options": options},
            "learner": {"mixer": "vdn"},
            "collect": {"mode": "rollout", "num_envs": NUM_ENVS, "rollout_length": ROLLOUT},
            "replay": {"capacity_env_steps": capacity, "batch_size": 1},
        }
    )
    program = make_program(config)
    replay = jax.eval_shape(lambda key: program.init(key, config.hyper), jax.random.key(0)).replay
    return tree_bytes(replay), program.plan.ring_capacity * NUM_ENVS


def their_bytes_per_slot(game: str) -> tuple[int, str]:
    """Bytes of a `Timestep` of JaxMARL's `qmix_rnn.py`, and whose environment it was traced from."""
    import jax

    from envs.jaxmarl_quiet import in_jaxmarl
    from knife_jax.liveness import tree_bytes

    env, peer = their_environment(game)
    with in_jaxmarl():
        timestep = jax.eval_shape(lambda key: one_timestep(env, key), jax.random.PRNGKey(0))
    return tree_bytes(timestep), peer


def their_environment(game: str) -> tuple[Any, str]:
    """JaxMARL's environment where it has one, else ours under its interface."""
    from envs import registry, to_jaxmarl
    from envs.jaxmarl_adapter import make_jaxmarl
    from envs.jaxmarl_quiet import import_jaxmarl

    name, scenario = game.split("/")
    known = import_jaxmarl().environments.smax.smax_env.MAP_NAME_TO_SCENARIO
    if name in ("smax", "jaxmarl") and scenario in known:
        return make_jaxmarl(scenario).env, "JaxMARL's environment"
    made = registry.make(name, scenario)
    return to_jaxmarl(made.env, made.tasks.at(0)), "our game under JaxMARL's interface"


def one_timestep(env: Any, key: Any) -> dict[str, Any]:
    """The fields that `qmix_rnn.py` stores of one step of one environment."""
    import jax
    from jaxmarl.wrappers.baselines import CTRolloutManager, LogWrapper

    logged: Any = LogWrapper(env)
    manager = CTRolloutManager(logged, batch_size=1)
    observations, state = manager.batch_reset(key)
    actions = {agent: manager.batch_sample(key, agent) for agent in env.agents}
    available = manager.get_valid_actions(state.env_state)
    _, _, rewards, dones, _ = manager.batch_step(key, state, actions)
    stored = {"obs": observations, "actions": actions, "rewards": rewards, "dones": dones, "avail_actions": available}
    return jax.tree.map(lambda leaf: leaf[0], stored)


def paint(figure: Any, rows: list[Row]) -> None:
    """Bytes per slot of both, game by game."""
    figure.set_size_inches(8, 0.22 * len(rows) + 1)
    axes = figure.subplots()
    labels = [row["game"] if row["storage"] == "records" else f"{row['game']}, {row['storage']}" for row in rows]
    for index, row in enumerate(rows):
        low, high = row["bytes_per_slot"], row["jaxmarl_bytes_per_slot"]
        axes.plot([low, high], [index, index], color="0.8", zorder=1)
        axes.annotate(f"{row['ratio']:.1f}x", (high, index), (6, 0), textcoords="offset points", va="center", fontsize=7)
    axes.scatter([row["bytes_per_slot"] for row in rows], range(len(rows)), label="knife_jax")
    axes.scatter([row["jaxmarl_bytes_per_slot"] for row in rows], range(len(rows)), label="JaxMARL's layout")
    axes.set(xscale="log", xlabel="bytes per stored slot", yticks=range(len(rows)))
    axes.set_yticklabels(labels, fontsize=7)
    axes.margins(x=0.1, y=0.01)
    axes.invert_yaxis()
    axes.legend(loc="lower left")


def main() -> None:
    """Prints a JSON line per row; writes and draws them where asked."""
    settings = arguments()
    refuse_existing(settings.out, settings.plot)
    rows = []
    for game in settings.games or default_games():
        for storage in STORAGES if game.startswith("jaxmarl/") else (None,):
            rows.append(measured(game, storage, settings.capacity))
            say(rows[-1])
    write(rows, settings.out, num_envs=NUM_ENVS, rollout_length=ROLLOUT)
    draw(rows, settings.plot, paint)


if __name__ == "__main__":
    main()

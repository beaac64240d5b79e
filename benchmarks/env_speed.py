"""Environment steps per second of our SMAX and of JaxMARL's, in one process, with interleaved repeats; or of any game of ours alone.

    python -m benchmarks.env_speed --scenarios 3m 2s3z --envs 32 256 --cores 1
    python -m benchmarks.env_speed --scenarios 3m --envs 64x8 256x4        # seeds x environments, both under vmap
    python -m benchmarks.env_speed --scenarios 3m --envs 256 --parts       # where our time goes
    python -m benchmarks.env_speed --scenarios 3m --envs 1024 --devices 2  # also with each core a device of its own
    python -m benchmarks.env_speed --scenarios predator_prey/gradps_small --envs 1 256 --ours-alone

A step is what collecting data needs: the battle against the heuristic enemy for a random action per ally (attacks out of range do nothing
in either), automatic reset, and the allies' observations, world state and action masks. One JSON line per row. Rates are steps per second
of processor time (`_cpu`), which other jobs on the machine disturb less, and of wall time (`_wall`). With `--devices` both sides run in two
ways: as one program whose operations share the cores, and with the environments split over devices (`jax.shard_map`), as the command line
of this library splits seeds; `best_ratio_wall` is of the better way of either side.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.measure import interleaved
from benchmarks.report import add_output, refuse_existing, say, use_processor, write

SCENARIOS = ("3m", "2s3z", "smacv2_5_units", "smacv2_10_units")
STEPS = 100


class Program(NamedTuple):
    """A compiled rollout `run(key)`, the environment steps it makes, and what compiling took."""

    run: Callable[[Any], Any]
    env_steps: int
    compile_seconds: float


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS)
    parser.add_argument("--envs", nargs="+", default=["32", "256", "1024", "4096"], help="environments, or seeds x environments")
    parser.add_argument("--cores", type=int, help="use only so many processor cores; all if left out")
    parser.add_argument("--devices", type=int, help="make so many devices of the processor and also split the environments over them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours-alone", action="store_true", help="leave JaxMARL out")
    parser.add_argument("--parts", action="store_true", help="time the parts of our step instead")
    add_output(parser, plot=False)
    return parser.parse_args()


def sizes(text: str) -> tuple[int | None, int]:
    """`64x8` as seeds and environments."""
    seeds, _, envs = text.rpartition("x")
    return (int(seeds) if seeds else None), int(envs)


def rollout(reset: Callable[..., Any], step: Callable[..., Any], see: Callable[..., Any], num_envs: int) -> Callable[[Any], Any]:
    """`STEPS` steps of `num_envs` environments.

    Args:
        reset: `key -> state`.
        step: `(key, state, actions [A]) -> (state, reward)`, with automatic reset.
        see: `state -> (mask [A, U], observations)`.
        num_envs: their number.
    """
    import jax
    import jax.numpy as jnp

    def act(key: Any, mask: Any) -> Any:
        return (jax.random.bits(key, mask.shape[:-1]) % mask.shape[-1]).astype(jnp.int32)

    def run(key: Any) -> Any:
        key_reset, key_play = jax.random.split(key)
        state = jax.vmap(reset)(jax.random.split(key_reset, num_envs))

        def advance(carry: Any, key: Any) -> tuple[Any, None]:
            state, seen, total = carry
            key_act, key_step = jax.random.split(key)
            state, reward = jax.vmap(step)(jax.random.split(key_step, num_envs), state, act(key_act, seen[0]))
            return (state, jax.vmap(see)(state), total + reward.sum()), None

        return jax.lax.scan(advance, (state, jax.vmap(see)(state), jnp.zeros(())), jax.random.split(key_play, STEPS))[0]

    return run


def ours(scenario: str, num_envs: int) -> Callable[[Any], Any]:
    """A rollout of our engine, or of another game of ours where the scenario names one."""
    from envs.registry import make
    from envs.wrappers import AutoReset

    game = make(scenario if "/" in scenario else f"smax/{scenario}")
    env, params = AutoReset(game.env), game.tasks.at(0)

    def step(key: Any, state: Any, actions: Any) -> Any:
        state, outcome = env.step(key, state, actions, params)
        return state, outcome.reward

    def see(state: Any) -> Any:
        seen = env.observe(env.record(state), params)
        return seen.action_mask, (seen.agents, seen.state)

    return rollout(lambda key: env.reset(key, params), step, see, num_envs)


def theirs(scenario: str, num_envs: int) -> Callable[[Any], Any]:
    """A rollout of JaxMARL's."""
    import jax.numpy as jnp

    from envs.jaxmarl_quiet import import_jaxmarl

    jaxmarl = import_jaxmarl()
    env = jaxmarl.make("HeuristicEnemySMAX", scenario=jaxmarl.environments.smax.map_name_to_scenario(scenario))

    def stacked(by_agent: Any) -> Any:
        return jnp.stack([by_agent[agent] for agent in env.agents])

    def reset(key: Any) -> Any:
        observations, state = env.reset(key)
        return state, (stacked(observations), observations["world_state"])

    def step(key: Any, state: Any, actions: Any) -> Any:
        named = {agent: actions[index] for index, agent in enumerate(env.agents)}
        observations, inner, rewards, _, _ = env.step(key, state[0], named)
        return (inner, (stacked(observations), observations["world_state"])), rewards[env.agents[0]]

    return rollout(reset, step, lambda state: (stacked(env.get_avail_actions(state[0])), state[1]), num_envs)


def compiled(run: Callable[[Any], Any], seeds: int | None, env_steps: int) -> Program:
    """Compiles a rollout, over seeds if there are any."""
    import jax

    from knife_jax.cores import compile_wide

    def keys(number: int) -> Any:
        return jax.random.split(jax.random.key(number), seeds) if seeds else jax.random.key(number)

    started = time.process_time()
    program = compile_wide(jax.jit(jax.vmap(run) if seeds else run).lower(keys(0)))
    took = time.process_time() - started
    return Program(lambda number: jax.block_until_ready(program(keys(number))), env_steps, took)


def split(run: Callable[[Any], Any], devices: int) -> Callable[[Any], Any]:
    """A rollout on each of the first devices, with a key of its own."""
    import jax
    from jax.sharding import AxisType, PartitionSpec

    over = PartitionSpec("device")

    def on_each(keys: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], run(keys[0]))

    mesh = jax.make_mesh((devices,), ("device",), axis_types=(AxisType.Auto,))
    on_all = jax.shard_map(on_each, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    return lambda key: on_all(jax.random.split(key, devices))


def compare(scenario: str, text: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One row: both sides of one scenario and size."""
    seeds, num_envs = sizes(text)
    env_steps = (seeds or 1) * num_envs * STEPS
    sides = {"ours": ours} if settings.ours_alone else {"ours": ours, "jaxmarl": theirs}
    programs = {name: compiled(side(scenario, num_envs), seeds, env_steps) for name, side in sides.items()}
    if settings.devices:
        for name, side in sides.items():
            run = split(side(scenario, num_envs // settings.devices), settings.devices)
            programs[f"{name}_split"] = compiled(run, None, env_steps)
    timed = interleaved({name: program.run for name, program in programs.items()}, settings.repeats)
    row: dict[str, Any] = {"scenario": scenario, "envs": text, "cores": settings.cores or os.cpu_count()}
    if settings.devices:
        row["devices"] = settings.devices
    for name, program in programs.items():
        row[f"{name}_cpu"] = round(program.env_steps / timed[name].cpu)
        row[f"{name}_wall"] = round(program.env_steps / timed[name].wall)
        row[f"{name}_compile_cpu_s"] = round(program.compile_seconds, 2)
    if not settings.ours_alone:
        row["ratio_cpu"] = round(timed["jaxmarl"].cpu / timed["ours"].cpu, 2)
        row["ratio_wall"] = round(timed["jaxmarl"].wall / timed["ours"].wall, 2)
    if settings.devices and not settings.ours_alone:
        fastest = {side: min(each.wall for name, each in timed.items() if name.startswith(side)) for side in sides}
        row["best_ratio_wall"] = round(fastest["jaxmarl"] / fastest["ours"], 2)
    return row


def parts(scenario: str, text: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One row: microseconds of processor time per environment step of the parts of ours, each alone in a loop; they overlap."""
    import jax

    from knife_jax.cores import compile_wide

    seeds, num_envs = sizes(text)
    if seeds:
        raise SystemExit("--parts takes environments without seeds")
    bodies = part_bodies(scenario, num_envs)

    def looped(body: Callable[[Any], Any], start: Any) -> Any:
        run = jax.jit(lambda carry: jax.lax.scan(lambda c, _: (body(c), None), carry, None, length=STEPS)[0])
        return compile_wide(run.lower(start))

    programs = {name: looped(body, start) for name, (start, body) in bodies.items()}
    runs = {name: lambda _, name=name: jax.block_until_ready(programs[name](bodies[name][0])) for name in bodies}
    row: dict[str, Any] = {"scenario": scenario, "envs": text, "cores": settings.cores or os.cpu_count()}
    return row | {f"{name}_us": round(each.cpu / num_envs / STEPS * 1e6, 3) for name, each in interleaved(runs, settings.repeats).items()}


def part_bodies(scenario: str, num_envs: int) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """For each part what a loop carries at first, and the body."""
    import jax
    import jax.numpy as jnp

    from envs import smax
    from envs.smax.game import batched
    from envs.smax.start import num_draws
    from envs.wrappers import AutoReset

    env, params = smax.make(scenario)
    wrapped, whole = AutoReset(env), batched(env)
    keys = jax.random.split(jax.random.key(0), num_envs)
    state = jax.vmap(lambda key: wrapped.reset(key, params))(keys)
    actions = jnp.ones((num_envs, env.num_agents), jnp.int32)
    bits = jax.random.bits(jax.random.key(1), (num_envs, num_draws(env.num_units)))

    def healed(state: Any) -> Any:
        return state._replace(health=jnp.maximum(state.health, 1.0))

    def battle(state: Any) -> Any:
        step = jax.vmap(lambda bits, state, actions: whole.step(bits, state, actions, params))
        return healed(step(bits[:, : env.num_units + env.num_enemies], state, actions)[0])

    def steps(game: Any, mend: Callable[[Any], Any]) -> Callable[[Any], Any]:
        step = jax.vmap(lambda key, state, actions: game.step(key, state, actions, params))
        return lambda carry: (mend(step(carry[1], carry[0], actions)[0]), jax.lax.optimization_barrier(carry[1]))

    def start(state: Any) -> Any:
        return jax.vmap(lambda bits: whole.start(bits, params))(bits + state.steps[:, None].astype(jnp.uint32))

    def observe(state: Any) -> Any:
        return jax.vmap(lambda state: env.observe(env.record(state), params))(state)

    def look(carry: Any) -> Any:
        seen = observe(carry[0])
        return carry[0]._replace(x=carry[0].x + 1e-6 * seen.agents[:, :1, 0]), seen

    return {
        "battle": (state.env, battle),
        "battle_and_draws": ((state.env, keys), steps(env, healed)),
        "start": (state.env, start),
        "with_automatic_reset": ((state, keys), steps(wrapped, lambda state: state)),
        "observations": ((state.env, observe(state.env)), look),
    }


def check_and_spread(settings: argparse.Namespace) -> None:
    """Makes the devices that were asked for; ends the program if what was asked for does not go together."""
    if any("/" in scenario for scenario in settings.scenarios) and (settings.parts or not settings.ours_alone):
        raise SystemExit("--scenarios: games other than SMAX are timed with --ours-alone, without --parts")
    if not settings.devices:
        return
    if any(sizes(text)[0] or sizes(text)[1] % settings.devices for text in settings.envs):
        raise SystemExit("--devices takes numbers of environments that it divides, without seeds")
    from knife_jax.cores import spread_over_cores

    spread_over_cores(settings.devices)


def main() -> None:
    """Prints a JSON line per row; writes them where asked."""
    settings = arguments()
    use_processor(settings.cores)
    refuse_existing(settings.out)
    check_and_spread(settings)
    rows = []
    for scenario in settings.scenarios:
        for text in settings.envs:
            rows.append((parts if settings.parts else compare)(scenario, text, settings))
            say(rows[-1])
    write(rows, settings.out)


if __name__ == "__main__":
    main()

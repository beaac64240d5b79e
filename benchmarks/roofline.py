"""The time of a gradient step over that of the same matrix products alone, in one process, with interleaved repeats.

    python -m benchmarks.roofline --cores 1 --out roofline_1_core.json --plot roofline_1_core.png
    python -m benchmarks.roofline --games smax/3m --hidden 64 --mixers qmix qplex
    python -m benchmarks.roofline --devices 2 --hidden 64     # each core a device, with its share of every batch
    python -m benchmarks.roofline --games smax/3m --hidden 64 --config '{qmix: {embed_size: 64, hypernet_size: 256}}'    # JaxMARL's mixer
    python -m benchmarks.roofline --quick

A gradient step is what a round of `make_train` does: sampling, rendering the records, loss, gradient, optimizer, target network. The
products alone are the *speed-of-light program* of `benchmarks/light.py`, whose FLOPs are those of the step within 2 %, and all of which
XLA's cost analysis must find in the compiled program. Both run several times inside one compiled loop, as they do in training.

One JSON line per row; the first is the machine: the rate of a 1024 x 1024 product and of streaming through an array of 128 MB. Times are
milliseconds of one step, `_cpu` of processor time (which other jobs on the machine disturb less) and `_wall`, medians; `_least` are the
least. `share` is light's least processor time over the step's (wall time on an accelerator), `share_median` the same of medians. FLOPs
are those of the products; `xla_mb` are the bytes that XLA's cost analysis says a step accesses, which counts the bodies of loops (over
time) once, on each device.

With `--devices` a batch is split over devices, as `make_train(config, devices=...)` does, and so are the products alone.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from benchmarks.light import make_light, repeated
from benchmarks.measure import CLOCKS, Timed, clock, count_flops, interleaved, significant
from benchmarks.report import Row, add_output, draw, refuse_existing, say, use_processor, write
from knife_jax import Config, collect, learner, make_program, replay
from knife_jax.compiled import seeds_mesh
from knife_jax.config import parse_yaml
from knife_jax.cores import compile_training, compile_wide, spread_over_cores
from knife_jax.program import Program

GAMES = ("smax/3m", "smax/2s3z", "predator_prey/wqmix")
COLLECT = {"num_envs": 8, "rollout_length": 16}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=GAMES, help="`game/scenario`")
    parser.add_argument("--mixers", nargs="+", default=["qmix"], choices=("none", "vdn", "qmix", "qplex"))
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 512], help="units of each layer of the agents")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences")
    parser.add_argument("--slots", type=int, default=128, help="slots of a sequence")
    parser.add_argument("--config", default="{}", help="YAML of a nested dict over all else, such as '{qmix: {embed_size: 64}}'")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long each call lasts, of at least two steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="hidden size 64 and three repeats")
    parser.add_argument("--cores", type=int, help="use only so many processor cores; all if left out")
    parser.add_argument("--devices", type=int, default=1, help="make so many devices of the processor and split each batch over them")
    add_output(parser)
    settings = parser.parse_args()
    if settings.quick:
        settings.hidden, settings.repeats = [64], 3
    if settings.devices < 1 or settings.batch_size % settings.devices:
        sys.exit(f"--devices: at least 1, and --batch-size, {settings.batch_size}, must be a multiple of it")
    return settings


def machine(repeats: int) -> Row:
    """What the machine can do: GFLOP/s of a large product, and GB/s of reading and writing an array that no cache holds."""
    size, length, times = 1024, 2**25, 4
    square, line = jnp.full((size, size), 1 / size), jnp.ones(length)

    def repeat(body: Callable[[Any], Any], start: Any) -> Callable[[int], Any]:
        run = compile_wide(jax.jit(lambda start: jax.lax.scan(lambda carry, _: (body(carry), None), start, length=times)[0]).lower(start))
        return lambda _: jax.block_until_ready(run(start))

    programs = {"product": repeat(lambda carry: carry @ square, square), "stream": repeat(lambda carry: carry * 0.5 + 1.0, line)}
    timed = interleaved(programs, repeats)
    row: Row = {"machine": jax.devices()[0].device_kind}
    row |= {f"peak_gflops_{kind}": significant(times * 2e-9 * size**3 / seconds) for kind, seconds in _least(timed["product"])}
    return row | {f"bandwidth_gbs_{kind}": significant(times * 8e-9 * length / seconds) for kind, seconds in _least(timed["stream"])}


def _least(timed: Timed) -> tuple[tuple[str, float], ...]:
    return ("cpu", timed.least_cpu), ("wall", timed.least_wall)


def configuration(settings: argparse.Namespace, game: str, mixer: str, hidden: int) -> Config:
    """The configuration of one row."""
    capacity = max(8192, 2 * settings.batch_size * settings.slots)
    base = Config.from_dict(
        {
            "env": {"name": game},
            "agent": {"hidden_size": hidden},
            "learner": {"mixer": mixer},
            "collect": COLLECT,
            "replay": {"capacity_env_steps": capacity, "batch_size": settings.batch_size, "sequence_length": settings.slots - 1},
            "plasticity": {"diagnostics": False},
        }
    )
    return Config.from_dict(parse_yaml(settings.config), base=base)


def stored_play(program: Program) -> tuple[learner.LearnerState, replay.ReplayState]:
    """A learner that has learned nothing, and a replay full of its play."""
    hyper, task = program.config.hyper, jnp.int32(0)

    def fill(key: Any) -> Any:
        key, key_play = jax.random.split(key)
        state = program.begin_task(program.init(key, hyper), task, hyper)

        def one_rollout(carry: Any, key: Any) -> tuple[Any, None]:
            collector, stored = carry
            keys = jax.random.split(key, (program.plan.rollout_length, 1 + program.config.collect.num_envs))
            collector, rollout, _ = collect.explore(keys, state.learner.variables, program.networks, collector, task, hyper)
            return (collector, replay.add(stored, rollout)), None

        rollouts = program.plan.ring_capacity // program.plan.rollout_length
        (_, stored), _ = jax.lax.scan(one_rollout, (state.collector, state.replay), jax.random.split(key_play, rollouts))
        return state.learner, stored

    return jax.block_until_ready(jax.jit(fill)(jax.random.key(0)))


def make_step(program: Program) -> Callable[..., learner.LearnerState]:
    """A gradient step as a round does it: `(learner, updates, replay, key)` to the learner."""
    config, plan, networks = program.config, program.plan, program.networks
    settings, only = config.replay, jnp.int32(0) if config.switch.replay == "clear" else None

    def step(learned: learner.LearnerState, updates: Any, stored: replay.ReplayState, key: Any) -> learner.LearnerState:
        sizes = (settings.batch_size, plan.sequence_slots, plan.sequence_stride, settings.burn_in)
        batch = replay.sample(key, stored, *sizes, networks.split)
        learned, _ = learner.gradient_step(learned, networks, batch._replace(task=only), config.hyper)
        return learner.update_target(learned, networks, updates + 1, config.hyper)

    return step


def measured(settings: argparse.Namespace, game: str, mixer: str, hidden: int, peak: float) -> Row:
    """One row.

    Raises:
        SystemExit: if the products are not those of the step, or the compiler left some of them out.
    """
    config, devices = configuration(settings, game, mixer, hidden), settings.devices
    program = make_program(config)
    given = (*stored_play(program), jax.random.key(0))
    slots, batch_size, agents = program.plan.sequence_slots, settings.batch_size // devices, program.networks.env.num_agents
    networks, data = make_light(jax.random.key(1), given[0].params, slots, batch_size, agents)

    step = make_step(make_program(config, devices))

    def steps_in_a_row(number: int) -> Any:
        return _split(lambda learned, stored, key: _steps(step, number, learned, stored, key), devices)

    flops = count_flops(jax.make_jaxpr(steps_in_a_row(1))(*given).jaxpr)
    inside = min(max(2, round(settings.seconds * peak * 1e9 / flops / devices / 2)), 16)
    steps = compile_training(steps_in_a_row(inside).lower(*given), program.plan.samples_per_update)
    bare = _split(lambda networks, data: repeated(inside, networks, data), devices)
    light = compile_wide(bare.lower(networks, data))
    light_flops = _whole(jax.make_jaxpr(bare)(networks, data).jaxpr, light, inside, flops, f"{game}, {mixer}, hidden size {hidden}")
    programs = {
        "step": lambda number: jax.block_until_ready(steps(*given[:2], jax.random.key(number))),
        "light": lambda _: jax.block_until_ready(light(networks, data)),
    }
    timed = interleaved(programs, settings.repeats)
    flops, light_flops = devices * flops, devices * light_flops
    row: Row = {"game": game, "mixer": mixer, "hidden": hidden, "cores": settings.cores or "all", "devices": devices}
    if settings.config != "{}":
        row["config"] = settings.config
    row |= {"gflop": significant(flops / 1e9), "light_gflop": significant(light_flops / 1e9)}
    for name, compiled, count in (("step", steps, flops), ("light", light, light_flops)):
        for kind, seconds in timed[name]._asdict().items():
            row[f"{name}_ms_{kind}"] = significant(1e3 * seconds / inside)
        row[f"{name}_gflops"] = significant(count * inside / getattr(timed[name], f"least_{clock()}") / 1e9)
        row[f"{name}_xla_mb"] = significant(_cost(compiled)["bytes accessed"] / 1e6)
    for name, kind in (("share", f"least_{clock()}"), ("share_median", clock()), ("share_wall", "wall")):
        row[name] = round(getattr(timed["light"], kind) / getattr(timed["step"], kind), 3)
    return row | {"share_of_peak": round(row["step_gflops"] / peak, 3)}


def _split(function: Callable[..., Any], devices: int) -> Any:
    """Compiles a function over so many devices that share the work of a seed, or for one."""
    if devices == 1:
        return jax.jit(function)
    places = PartitionSpec()
    return jax.jit(jax.shard_map(function, mesh=seeds_mesh(devices, devices), in_specs=places, out_specs=places, check_vma=False))


def _steps(step: Callable[..., Any], number: int, learned: Any, stored: Any, key: Any) -> Any:
    def one(carry: Any, key: Any) -> tuple[Any, None]:
        learned, updates = carry
        return (step(learned, updates, stored, key), updates + 1), None

    return jax.lax.scan(one, (learned, jnp.int32(0)), jax.random.split(key, number))[0]


def _whole(jaxpr: Any, compiled: Any, inside: int, expected: float, what: str) -> float:
    """The FLOPs of one run of the products, after making sure that they are what is expected and that the compiler kept them all."""
    flops, once, found = count_flops(jaxpr) / inside, count_flops(jaxpr, loops_once=True), _cost(compiled)["flops"]
    if abs(flops / expected - 1) > 0.02:
        sys.exit(f"{what}: the speed-of-light program does {flops:.4g} FLOP, a gradient step {expected:.4g}; they must agree within 2 %")
    if found < 0.98 * once:
        sys.exit(f"{what}: the compiler left products out, {found:.4g} FLOP of {once:.4g} are there (bodies of loops counted once)")
    return flops


def _cost(compiled: Any) -> dict[str, float]:
    """XLA's cost analysis."""
    analysis = compiled.cost_analysis()
    return analysis[0] if isinstance(analysis, list) else analysis


def paint(figure: Any, rows: list[Row]) -> None:
    """Rates of both, row by row, and the machine's."""
    peak, rows = rows[0][f"peak_gflops_{clock()}"], rows[1:]
    figure.set_size_inches(8, 0.35 * len(rows) + 1.2)
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["light_gflops"] for row in rows], color="0.85", label="the same products alone")
    axes.barh(places, [row["step_gflops"] for row in rows], height=0.5, label="a gradient step")
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f"{row['share']:.0%}", (row["step_gflops"], place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(peak, color="k", linestyle=":", label="a product of 1024 x 1024")
    axes.set(xlabel=f"GFLOP per second of {CLOCKS[clock()]} time", yticks=places)
    axes.set_yticklabels([f"{row['game']}, {row['mixer']}, {row['hidden']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize=7)


def main() -> None:
    """Prints a JSON line per row; writes and draws them where asked."""
    settings = arguments()
    use_processor(settings.cores)
    if settings.devices > 1:
        spread_over_cores(settings.devices)
    refuse_existing(settings.out, settings.plot)
    rows = [machine(settings.repeats)]
    say(rows[0])
    for game in settings.games:
        for mixer in settings.mixers:
            for hidden in settings.hidden:
                rows.append(measured(settings, game, mixer, hidden, rows[0][f"peak_gflops_{clock()}"]))
                say(rows[-1])
    sizes = {"batch_size": settings.batch_size, "slots": settings.slots, "collect": COLLECT}
    write(rows, settings.out, cores=settings.cores, devices=settings.devices, **sizes)
    draw(rows, settings.plot, paint)


if __name__ == "__main__":
    main()

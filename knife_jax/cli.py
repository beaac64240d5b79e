"""The command line: `knife-jax train`, `compare`, `evaluate`, `watch` and `list`."""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar, get_args, get_type_hints

import jax
import tyro
from rich.console import Console
from rich.table import Table

from envs.registry import GAMES
from knife_jax import compare as comparing
from knife_jax import comparison_files, results, runner
from knife_jax import policy as policies
from knife_jax import watch as watching
from knife_jax.cache import keep_compiled_programs
from knife_jax.config import Config, LearnerConfig
from knife_jax.cores import spread_over_cores
from knife_jax.hosts import Hosts, connect, is_first, most
from knife_jax.interrupts import RunStoppedError
from knife_jax.memory import available_memory, check_seeds, fit_seeds, seed_memory
from knife_jax.plan import make_game
from knife_jax.plasticity.registry import METHODS
from knife_jax.presets import PRESETS, preset_config
from knife_jax.program import make_program
from knife_jax.progress import ProgressLine
from knife_jax.run_directory import Saving, read_run_file
from knife_jax.run_result import RunResult
from knife_jax.statistics import mean_estimate
from knife_jax.sweep import parse_sweep
from knife_jax.sweep_directory import Place
from knife_jax.wandb_log import WandbSettings

DEFAULT_PRESET = "matrix_drift"

SEEDS_FOR_A_CORE = 32
"""With many more seeds side by side what a processor works on leaves its caches, and every seed takes longer (see README, measured)."""


@dataclass(frozen=True)
class TrainArguments:
    """Trains one configuration for many seeds in one compiled program.

    Writes checkpoints into a new directory on the way, and metrics.npz, config.yaml, summary.json and learning_curve.png once all is done.
    Ctrl-C saves and stops, a second one leaves at once; --resume goes on.
    """

    preset: str = DEFAULT_PRESET
    """The named configuration to start from, see `knife-jax list`; the fields below override it."""
    config: Path | None = None
    """A YAML file with configuration fields, laid over the preset."""
    seeds: int = 1
    """How many seeds, trained side by side."""
    first_seed: int = 0
    """The first of them."""
    sweep: tuple[str, ...] = ()
    """Every combination of some values: optimizer.learning_rate=1e-4,5e-4 agent.hidden_size=32,64. Numbers that are data are trained
    side by side with the seeds; each value of anything else (sizes, intervals, cures) is a program of its own, one after the other."""
    seeds_per_batch: int | None = None
    """At most so many side by side, the batches following one another; as many as an estimate says fit into memory if not given."""
    devices: int | None = None
    """Over how many devices the seeds are spread; as many as there are, and no more than seeds, if not given. A multiple of the seeds side
    by side has several devices share each of them. Without an accelerator every processor core is one."""
    chunk_rounds: int | None = None
    """Rounds between two looks at the clock, the log and signals; as many as last about two seconds if not given. Changes no result."""
    out: Path | None = None
    """The new directory for results; runs/<preset>-<date>-<time> if not given."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint; what else is given must be what it was started with."""
    saving: Saving = field(default_factory=Saving)
    """Checkpoints."""
    wandb: WandbSettings = field(default_factory=WandbSettings)
    """Weights & Biases."""
    hosts: Hosts = field(default_factory=Hosts)
    """Several processes or machines that make this run together."""
    fields: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class CompareArguments:
    """Trains several cures on the same seeds, one after the other, and compares them with the first.

    With directories of finished runs in the place of flags (`knife-jax compare RUN RUN... --out DIR`) those are compared, and nothing is
    trained.

    Writes comparison.json, comparison.png (learning curves, a bar per task, performance profiles) and the files of `train` for every
    method into a new directory, once all is done.
    """

    preset: str = DEFAULT_PRESET
    """The named configuration to start from, see `knife-jax list`; the fields below override it."""
    config: Path | None = None
    """A YAML file with configuration fields, laid over the preset."""
    methods: tuple[str, ...] = ("none", "knife", "{name: reset, which: all}")
    """Names of cures, or YAML mappings with a name and options."""
    seeds: int = 1
    """How many seeds, trained side by side."""
    first_seed: int = 0
    """The first of them."""
    out: Path | None = None
    """The new directory for results; runs/<preset>-compare-<date>-<time> if not given."""
    fields: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class CompareRunsArguments:
    """Compares finished runs, seed by seed, with the first of them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs with the same tasks, evaluations and seeds."""
    out: Path | None = None
    """A new directory for comparison.json and comparison.png; none are written if not given."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Plays complete greedy episodes of every task with what a run learned."""

    path: tyro.conf.Positional[Path]
    """The directory of a finished run."""
    episodes: int = 100
    """Episodes of each task, for every seed."""
    seed: int | None = None
    """Whose agents; those of all seeds if not given."""
    first_key: int = 0
    """Another number gives other episodes."""


@dataclass(frozen=True)
class WatchArguments:
    """Draws what a run learned: an episode, or the values of a matrix game."""

    path: tyro.conf.Positional[Path]
    """The directory of a finished run."""
    out: Path | None = None
    """A .gif, .mp4 or .png (a strip of moments); watch.gif in the run's directory, for matrix games watch.png, if not given."""
    seed: int | None = None
    """Whose agents; the first seed's if not given."""
    task: str | None = None
    """The task's name; the first one if not given."""
    key: int = 0
    """Another number gives another episode."""


Arguments = TypeVar("Arguments", TrainArguments, CompareArguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (2 for what the user must mend)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "train": train_command,
        "compare": compare_command,
        "evaluate": evaluate_command,
        "watch": watch_command,
        "list": list_command,
    }
    if not given or given[0] not in commands:
        wants_help = bool(given) and given[0] in ("-h", "--help")
        stream = sys.stdout if wants_help else sys.stderr
        known = ", ".join(commands)
        print(f"usage: knife-jax COMMAND ...\n\ncommands: {known}; each explains itself with --help", file=stream)
        if given and not wants_help:
            print(f"\nunknown command {given[0]!r}", file=sys.stderr)
        return 0 if wants_help else 2
    keep_compiled_programs()
    try:
        return commands[given[0]](given[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"knife-jax: {error}", file=sys.stderr)
        return 2


def train_command(arguments: Sequence[str]) -> int:
    """`knife-jax train`: parse, train with a progress line and checkpoints, print the table, write the files."""
    parsed = parse(TrainArguments, arguments)
    if not parsed.hosts.given:
        spread_over_cores(parsed.devices)
    connect(parsed.hosts)
    if jax.process_count() > 1 and parsed.out is None:
        raise ValueError("--out: several processes need the same directory to write to")
    out = parsed.out or Path("runs") / f"{parsed.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    reports_wins = make_game(parsed.fields)[0].reports_wins
    console = _console()
    finished: dict[str, RunResult] = {}
    try:
        for place in runner.sweep_places(parsed.fields, parse_sweep(parsed.sweep), out, parsed.resume, parsed.seeds, parsed.first_seed):
            finished |= _train_part(console, place, parsed)
    except RunStoppedError as stopped:
        print(f"knife-jax: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    for label, result in finished.items():
        summary = results.summarise(result, reports_wins)
        console.print(*([label] if label else []), results.as_table(summary), sep="\n")
        if summary.plasticity_loss:
            console.print(summary.plasticity_loss)
    console.print(f"results in {out}", soft_wrap=True)
    return 0


def _train_part(console: Console, place: Place, parsed: TrainArguments) -> dict[str, RunResult]:
    """One program of a sweep, or the whole run, with a progress line; see `runner.run_part`."""
    config = place.part.config
    if place.part.label:
        console.print(f"{place.part.label}:" + (" done before" if place.done else ""))
    options = {name: getattr(parsed, name) for name in ("seeds", "first_seed", "seeds_per_batch", "devices")}
    if place.done:
        return runner.run_part(place, **options)
    console.print(runner.describe_plan(config, parsed.seeds))
    lanes = parsed.seeds * math.prod(len(values) for values in place.part.sweep.values())
    if place.resume:
        assert place.out is not None
        saved = read_run_file(place.out)
        options |= {name: options[name] or saved[name] for name in ("seeds_per_batch", "devices")}
    devices = runner.choose_devices(lanes, options["seeds_per_batch"], parsed.devices)
    if not place.resume:
        options["seeds_per_batch"] = _fitting(console, config, lanes, parsed.seeds_per_batch, devices)
    parts = runner.parts_of_a_seed(lanes, options["seeds_per_batch"], devices)
    width = runner.batch_width(lanes, options["seeds_per_batch"], devices // parts)
    with ProgressLine(console, config, lanes, width) as line:
        told = {name: getattr(parsed, name) for name in ("chunk_rounds", "saving", "wandb")}
        finished = runner.run_part(place, progress=line, **options, **told)
    took = next(iter(finished.values())).provenance
    console.print(f"compiled in {took['compile_seconds']:.0f} s, ran in {took['run_seconds']:.0f} s")
    return finished


def _fitting(console: Console, config: Config, seeds: int, seeds_per_batch: int | None, devices: int) -> int:
    """How many seeds are trained side by side, by the memory they take, which is said before anything compiles.

    On processors no more than fit their caches, `SEEDS_FOR_A_CORE`.

    Raises:
        ValueError: if not even one seed fits, or not as many as were asked for.
    """
    memory, available = seed_memory(config), available_memory()
    groups = devices // runner.parts_of_a_seed(seeds, seeds_per_batch, devices)
    if jax.default_backend() == "cpu":
        available //= devices // jax.process_count()  # which share the machine's memory
    available = -int(most(-available)[0])  # the same everywhere, for the same batches
    if seeds_per_batch is None:
        most_on_each = -(-seeds // groups)
        if jax.default_backend() == "cpu":
            most_on_each = min(most_on_each, SEEDS_FOR_A_CORE)
        seeds_per_batch = groups * fit_seeds(memory, config, most_on_each, available)
    width = runner.batch_width(seeds, seeds_per_batch, groups)
    console.print(memory.describe(width // groups, available) + (" on each device" if devices > 1 else ""), highlight=False)
    check_seeds(memory, config, width // groups, available)
    if width < seeds:
        console.print(f"  {-(-seeds // width)} batches of {width} seeds")
    return seeds_per_batch


def compare_command(arguments: Sequence[str]) -> int:
    """`knife-jax compare`: every method in turn, or runs that are done; then the table, the differences and the files."""
    if arguments and not arguments[0].startswith("-"):
        return _compare_runs(arguments)
    parsed = parse(CompareArguments, arguments)
    spread_over_cores()
    out = parsed.out or Path("runs") / f"{parsed.preset}-compare-{time.strftime('%Y%m%d-%H%M%S')}"
    configs = comparing.method_configs(parsed.fields, parsed.methods)
    for config in configs.values():
        make_program(config)  # refuses what cannot be run before the first hour is spent
    env, _ = make_game(parsed.fields)
    console, runs, together = _console(), {}, {}
    devices = runner.choose_devices(parsed.seeds, None, None)
    for method, config in configs.items():  # what does not fit into memory is refused before the first hour, too
        console.print(runner.describe_plan(config, parsed.seeds))
        together[method] = _fitting(console, config, parsed.seeds, None, devices)
    with results.new_directory(out) as unfinished:
        for method, config in configs.items():
            console.print(f"{method}:")
            with ProgressLine(console, config, parsed.seeds, runner.batch_width(parsed.seeds, together[method], devices)) as line:
                options = {"first_seed": parsed.first_seed, "seeds_per_batch": together[method], "devices": devices}
                runs[method] = runner.run(config, seeds=parsed.seeds, progress=line, **options)
            took = runs[method].provenance
            console.print(f"  compiled in {took['compile_seconds']:.0f} s, ran in {took['run_seconds']:.0f} s")
        comparison_files.write(runs, unfinished, env.reports_wins)
    _print_comparison(console, runs, env.reports_wins)
    console.print(f"results in {out}", soft_wrap=True)
    return 0


def _compare_runs(arguments: Sequence[str]) -> int:
    """`knife-jax compare RUN...`: finished runs, from their files."""
    parsed = tyro.cli(CompareRunsArguments, args=list(arguments), prog="knife-jax compare", use_underscores=True)
    runs = comparing.load_runs(parsed.runs)
    reports_wins = make_game(next(iter(runs.values())).config)[0].reports_wins
    if parsed.out is not None:
        with results.new_directory(parsed.out) as unfinished:
            comparison_files.write_comparison(runs, unfinished, reports_wins)
    _print_comparison(_console(), runs, reports_wins)
    return 0


def _print_comparison(console: Console, runs: Mapping[str, RunResult], reports_wins: bool) -> None:
    first = next(iter(runs.values()))
    comparison = comparing.compare(runs, reports_wins)
    console.print(comparing.as_table(comparison, [first.task_names[task] for task in first.task_order]))
    console.print("\n".join(comparison.sentences), soft_wrap=True)
    for method, chance in comparison.improvement.items():
        console.print(f"a seed of {method} does better than one of {next(iter(runs))} with probability {chance}", soft_wrap=True)


def evaluate_command(arguments: Sequence[str]) -> int:
    """`knife-jax evaluate`: a table of return, success and length on every task."""
    parsed = tyro.cli(EvaluateArguments, args=list(arguments), prog="knife-jax evaluate", use_underscores=True)
    played = policies.evaluate(parsed.path, parsed.episodes, parsed.seed, parsed.first_key)
    seeds, episodes = next(iter(played.values()))["return"].shape
    over = f"{seeds} seeds, {episodes} episodes each" if seeds > 1 else f"{episodes} episodes"
    table = Table("task", title=f"Greedy play: mean over {over}, 95 % intervals", title_justify="left")
    measures = ("return", "won", "length")
    for measure in measures:
        table.add_column(measure, justify="right")
    for task, metrics in played.items():
        values = {name: metrics[name].mean(axis=1) if seeds > 1 else metrics[name][0] for name in measures}
        table.add_row(task, *(str(mean_estimate(values[name])) for name in measures))
    _console().print(table)
    return 0


def watch_command(arguments: Sequence[str]) -> int:
    """`knife-jax watch`: one picture of what a run learned."""
    parsed = tyro.cli(WatchArguments, args=list(arguments), prog="knife-jax watch", use_underscores=True)
    policy = policies.load_policy(parsed.path, parsed.seed)
    is_table = policy.config.env.name.split("/")[0] == "matrix"
    out = parsed.out or parsed.path / ("watch.png" if is_table else "watch.gif")
    said = watching.watch(policy, out, policies.task_index(policy, parsed.task), jax.random.key(parsed.key))
    print(f"{said}: {out}")
    return 0


def parse(kind: type[Arguments], arguments: Sequence[str]) -> Arguments:
    """Reads the flags of a command: first the preset and the file, then every field over them.

    Raises:
        ValueError: for an unknown preset or bad fields.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    named, _ = first.parse_known_args(arguments)
    default = kind(preset=named.preset or DEFAULT_PRESET, config=named.config)
    if kind is TrainArguments and named.resume:
        default = _resumed(default, named.out, is_named=bool(named.preset or named.config))
    else:
        default = replace(default, fields=preset_config(default.preset))
    base = default.fields
    if named.config is not None:
        base = Config.from_yaml(named.config, base)
    if any(word.split("=")[0] == "--env.name" for word in arguments):
        base = Config.from_dict({"env": {"name": base.env.name}}, base)  # another game leaves the preset's scenario behind
    default = replace(default, fields=base)
    command = "train" if kind is TrainArguments else "compare"
    parsed = tyro.cli(kind, args=list(arguments), default=default, prog=f"knife-jax {command}", use_underscores=True)
    parsed = replace(parsed, fields=Config.from_dict(parsed.fields.to_dict()))  # what only the whole configuration can be checked for
    if parsed.seeds < 1:
        raise ValueError(f"--seeds: at least 1, got {parsed.seeds}")
    return parsed


def _resumed(default: Arguments, out: Path | None, is_named: bool) -> Arguments:
    """Arguments as those of the run in `out`; its configuration comes from there unless a preset or a file is named."""
    if out is None:
        raise ValueError("--resume: needs --out, the directory of the run to go on with")
    saved = read_run_file(out)
    config = preset_config(default.preset) if is_named else Config.from_dict(saved["config"])
    if sweep := saved.get("sweep"):
        default = replace(default, sweep=tuple(f"{name}={','.join(map(str, values))}" for name, values in sweep.items()))
    counts = {name: saved.get(name) for name in ("seeds", "first_seed", "seeds_per_batch", "devices")}
    return replace(default, fields=config, **counts)


def list_command(arguments: Sequence[str]) -> int:
    """`knife-jax list`: games, scenarios, mixers, cures and presets."""
    argparse.ArgumentParser(prog="knife-jax list", description="Lists games, scenarios, mixers, cures and presets.").parse_args(arguments)
    spread_over_cores()
    console = _console()
    games = Table("game", "what it is", "scenarios", "task sequences", title="Games", title_justify="left")
    for name, entry in GAMES.items():
        games.add_row(name, entry.summary, ", ".join(entry.scenarios), ", ".join(entry.drifts))
    console.print(games)
    mixers = get_args(get_type_hints(LearnerConfig)["mixer"])
    console.print(f"Mixers: {', '.join(mixers)}")
    console.print(f"Cures: {', '.join(METHODS)}")
    console.print(f"Presets: {', '.join(PRESETS)}")
    console.print(f"Devices: {', '.join(str(device) for device in jax.devices())}")
    return 0


def _console() -> Console:
    """A console wide enough for the tables where there is no terminal to ask; of several processes only the first one speaks."""
    console = Console(quiet=not is_first())
    return console if console.is_terminal else Console(width=140, quiet=not is_first())


if __name__ == "__main__":
    sys.exit(main())

"""Environment steps and gradient steps per second of whole rounds of training, and what compiling takes.

    python -m benchmarks.train_speed --games smax/3m jaxmarl/3m --cores 1     # our SMAX against JaxMARL's through the adapter
    python -m benchmarks.train_speed --games smax/2s3z --mixers vdn qmix qplex --hidden 64 128 --seeds 1 8
    python -m benchmarks.train_speed --games predator_prey/wqmix --config '{preset: pymarl_qmix}'
    python -m benchmarks.train_speed --games smax/3m --peer ~/JaxMARL --cores 1
    python -m benchmarks.train_speed --games smax/3m --seeds 2 --devices 2    # each core a device, with its share of the seeds
    python -m benchmarks.train_speed --quick

A round collects, stores and makes gradient steps, as in `make_train`; rounds are timed once learning has begun, those of all games of a
mixer, size and number of seeds in turn. One JSON line per row. Rates are over all seeds, per second of wall time (`_wall`) and of
processor time (`_cpu`, which other jobs on the machine disturb less); `over_first` is the rate of gradient steps over the first game's.

`--peer` times JaxMARL's `qmix_rnn.py`, from a checkout of its repository, against the preset `jaxmarl_qmix_smax`, in one process and in
turn: same sizes, batches, optimizer and rounds, a replay of 512 rollouts, no tests and no evaluations. Gradient steps are timed apart
from collecting, by runs that never learn; as differences, these rates come from the least times of the repeats. Both are compiled several
times in turn, from nothing, and the least counts.

What differs: the script stores observations where ours stores records and renders them; its environments reset within the step that ends
an episode, ours on the next one; it bootstraps through the ends of episodes; its epsilon counts rounds, ours steps. Its environment is
that of the JaxMARL that is installed.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import CLOCKS, clock, interleaved, significant
from benchmarks.report import Row, add_output, draw, refuse_existing, say, use_processor, write
from benchmarks.rounds import Rounds
from knife_jax import Config, make_program
from knife_jax.config import parse_yaml
from knife_jax.cores import spread_over_cores

GAMES = ("smax/3m", "jaxmarl/3m", "smax/2s3z", "jaxmarl/2s3z", "predator_prey/wqmix")
QUICK = ("smax/3m", "jaxmarl/3m")
BASE: dict[str, Any] = {
    "collect": {"num_envs": 16, "rollout_length": 16},
    "replay": {"capacity_env_steps": 32_768, "batch_size": 32, "sequence_length": 32},
    "train": {"updates_per_round": 4},
    "plasticity": {"diagnostics": False},
}
EVALUATIONS = 100_000
"""So many are never reached; what matters is the rounds between two."""

ROLLOUTS, WARM_UP = 512, 32
"""Rollouts that both replays hold against the peer, the least that its script takes, and its rounds before the first that learns."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", help="`game/scenario`")
    parser.add_argument("--mixers", nargs="+", default=["qmix"], choices=("none", "vdn", "qmix", "qplex"))
    parser.add_argument("--hidden", nargs="+", type=int, default=[64], help="units of each layer of the agents")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--config", default="{}", help="YAML over this benchmark's configuration, or with the key `preset` instead of it")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each call, learning ones of the peer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compilations", type=int, default=3, help="of both sides with `--peer`; the least counts")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)}, and three repeats")
    parser.add_argument("--peer", type=Path, help="a checkout of JaxMARL's repository, whose QMIX script is timed against ours")
    parser.add_argument("--cores", type=int, help="use only so many processor cores; all if left out")
    parser.add_argument("--devices", type=int, help="make so many devices of the processor and split the seeds over them")
    add_output(parser)
    settings = parser.parse_args()
    settings.games = settings.games or (QUICK if settings.quick or settings.peer else GAMES)
    if min(settings.rounds, settings.repeats, settings.compilations) < 1:
        sys.exit("--rounds, --repeats and --compilations: at least 1")
    settings.repeats = min(settings.repeats, 3) if settings.quick else settings.repeats
    if settings.peer and (settings.mixers != ["qmix"] or not all(game.startswith(("smax/", "jaxmarl/")) for game in settings.games)):
        sys.exit("--peer: JaxMARL's script is QMIX, and is timed on its SMAX scenarios; leave --mixers out, and give games as smax/3m")
    if settings.devices and (settings.peer or any(seeds % settings.devices for seeds in settings.seeds)):
        sys.exit("--devices: not with --peer, and every number of seeds must be a multiple of it")
    if settings.peer and settings.rounds >= WARM_UP:
        sys.exit(f"--rounds: at most {WARM_UP - 1} with --peer, so that a call of rounds that only collect comes before learning")
    return settings


def with_rounds(base: Config, values: dict[str, Any], rounds: int) -> Config:
    """The configuration with `values` over it, and so many rounds between two evaluations."""
    config = Config.from_dict(values, base=base)
    slots = make_program(config).plan.round_env_steps
    length = {"train": {"env_steps_per_task": rounds * slots * EVALUATIONS}, "evaluation": {"per_task": EVALUATIONS, "episodes": 1}}
    return Config.from_dict(length, base=config)


def section(game: str) -> dict[str, Any]:
    """The configuration's `env` of a game, whatever scenario was there before."""
    name, _, scenario = game.partition("/")
    return {"name": name, "scenario": scenario or None}


def measured(settings: argparse.Namespace, mixer: str, hidden: int, seeds: int) -> list[Row]:
    """Rows of all games, in turn."""
    base = Config.from_dict(parse_yaml(settings.config), base=Config.from_dict(BASE))
    compiled = {}
    for game in settings.games:
        chosen = {"env": section(game), "learner": {"mixer": mixer}, "agent": {"hidden_size": hidden}}
        compiled[game] = Rounds(make_program(with_rounds(base, chosen, settings.rounds)), seeds, devices=settings.devices or 1)
        compiled[game].begin_learning()
    timed = interleaved({game: lambda _, rounds=rounds: rounds.advance() for game, rounds in compiled.items()}, settings.repeats)
    rows: list[Row] = []
    for game, rounds in compiled.items():
        row: Row = {"game": game, "mixer": mixer, "hidden": hidden, "seeds": seeds, "cores": settings.cores or "all"}
        if settings.devices:
            row["devices"] = settings.devices
        for name, count in (("env_steps", rounds.env_steps), ("gradient_steps", rounds.updates)):
            row |= {f"{name}_per_s_{kind}": significant(count / getattr(timed[game], kind)) for kind in ("cpu", "wall")}
        row |= {"compile_cpu_s": round(rounds.compile_cpu, 1), "compile_wall_s": round(rounds.compile_wall, 1)}
        rows.append(row)
    for row in rows:
        row["over_first"] = round(row[f"gradient_steps_per_s_{clock()}"] / rows[0][f"gradient_steps_per_s_{clock()}"], 3)
    return rows


def against_peer(settings: argparse.Namespace, game: str, hidden: int, seeds: int) -> Row:
    """One row: our rounds and those of JaxMARL's script."""
    from benchmarks.peer import NEVER, compile_peer

    slots = 16 * 128
    values = {
        "env": section(game),
        "agent": {"hidden_size": hidden},
        "replay": {"capacity_env_steps": ROLLOUTS * 128},
        "train": {"learning_starts_env_steps": WARM_UP * slots},
        "plasticity": {"diagnostics": False},
    }
    config = with_rounds(Config.from_dict({"preset": "jaxmarl_qmix_smax"}), values, settings.rounds)
    sides = []
    for _ in range(settings.compilations):
        jax.clear_caches()
        ours = Rounds(make_program(config), seeds)
        sides.append((ours, compile_peer(settings.peer, ours.program.config, WARM_UP - 1 + settings.rounds, seeds)))
    ours, peer = sides[-1]
    learning, chunks = copy.copy(ours), max((WARM_UP - 1) // settings.rounds, 1)
    learning.begin_learning()

    def collect(_: int) -> None:
        ours.begin()
        for _ in range(chunks):
            ours.advance()

    programs = {
        "ours_collect": collect,
        "ours_learn": lambda _: learning.advance(),
        "jaxmarl_collect": lambda _: peer.run(NEVER),
        "jaxmarl_learn": lambda _: peer.run(0),
    }
    if (made := peer.run(0)) != ours.updates:
        sys.exit(f"--peer: JaxMARL's script made {made} gradient steps where {ours.updates} were expected")
    timed = interleaved(programs, settings.repeats)
    row: Row = {"game": game, "hidden": hidden, "seeds": seeds, "cores": settings.cores or "all", "gradient_steps": ours.updates}
    for index, (name, collected) in enumerate((("ours", chunks * settings.rounds), ("jaxmarl", peer.rounds))):
        for kind in ("cpu", "wall"):
            row[f"{name}_compile_{kind}_s"] = round(min(getattr(pair[index], f"compile_{kind}") for pair in sides), 1)
            collecting = getattr(timed[f"{name}_collect"], f"least_{kind}") / collected
            whole = getattr(timed[f"{name}_learn"], f"least_{kind}") / settings.rounds
            if name == "jaxmarl":  # its runs begin with rounds that only collect
                whole -= collecting * (collected / settings.rounds - 1)
            row[f"{name}_env_steps_per_s_{kind}"] = significant(seeds * slots / collecting)
            row[f"{name}_gradient_steps_per_s_{kind}"] = significant(ours.updates / settings.rounds / (whole - collecting))
            row[f"{name}_round_ms_{kind}"] = significant(1e3 * whole)
    for name in ("env_steps", "gradient_steps"):
        row[f"{name}_ratio"] = round(row[f"ours_{name}_per_s_{clock()}"] / row[f"jaxmarl_{name}_per_s_{clock()}"], 2)
    return row | {"compile_ratio": round(row["ours_compile_cpu_s"] / row["jaxmarl_compile_cpu_s"], 3)}


def paint(figure: Any, rows: list[Row]) -> None:
    """Gradient steps per second, row by row."""
    figure.set_size_inches(8, 0.35 * len(rows) + 1.2)
    axes = figure.subplots()
    labels = [", ".join(str(row[field]) for field in ("game", "mixer", "hidden", "seeds") if field in row) for row in rows]
    names = ("ours_", "jaxmarl_") if "gradient_steps_ratio" in rows[0] else ("",)
    for index, name in enumerate(names):
        rates = [row[f"{name}gradient_steps_per_s_{clock()}"] for row in rows]
        places = [place + (index - (len(names) - 1) / 2) * 0.4 for place in range(len(rows))]
        axes.barh(places, rates, height=0.8 / len(names), label={"ours_": "knife_jax", "jaxmarl_": "JaxMARL's qmix_rnn.py"}.get(name))
    axes.set(xlabel=f"gradient steps per second of {CLOCKS[clock()]} time", yticks=range(len(rows)))
    axes.set_yticklabels(labels, fontsize=7)
    axes.invert_yaxis()
    if len(names) > 1:
        figure.legend(loc="outside upper center", ncols=2, fontsize=7)


def main() -> None:
    """Prints a JSON line per row; writes and draws them where asked."""
    settings = arguments()
    use_processor(settings.cores)
    if settings.devices:
        spread_over_cores(settings.devices)
    refuse_existing(settings.out, settings.plot)
    jax.config.update("jax_enable_compilation_cache", False)
    rows: list[Row] = []
    for hidden in settings.hidden:
        for seeds in settings.seeds:
            if settings.peer:
                groups = ([against_peer(settings, game, hidden, seeds)] for game in settings.games)
            else:
                groups = (measured(settings, mixer, hidden, seeds) for mixer in settings.mixers)
            for made in groups:
                rows += made
                for row in made:
                    say(row)
    write(rows, settings.out, cores=settings.cores, rounds=settings.rounds, base=BASE, config=settings.config)
    draw(rows, settings.plot, paint)


if __name__ == "__main__":
    main()

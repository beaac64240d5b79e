"""Typed, frozen, validated configuration, from and to nested dicts and YAML.

Every number that the literature leaves open is a field here. Units are in the name wherever they could be mistaken: `_env_steps` are slots,
steps of one environment added up over the parallel ones, those spent on a reset or idle after an episode's end included (only exploration,
which may depend on the seed, counts true steps alone); `_updates` are gradient steps, `_episodes` are complete episodes.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from tyro.constructors import PrimitiveConstructorSpec

from envs.base import nearest, unknown_name
from knife_jax.plasticity import registry

_SETTINGS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def parse_yaml(text: str) -> Any:
    """Reads YAML; what is wrong with it is a ValueError like any other bad input."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


class Sweepable:
    """Marks a field whose value is an argument of the compiled program, so that `vmap` can batch it."""


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Swept = Annotated[float, Field(ge=0), Sweepable]
Share = Annotated[float, Field(ge=0, le=1), Sweepable]
InitializerName = Literal["torch_uniform", "flax", "orthogonal"]
_YAML = PrimitiveConstructorSpec(
    nargs=1,
    metavar="YAML",
    instance_from_str=lambda words: parse_yaml(words[0]),
    is_instance=lambda value: isinstance(value, dict | list | tuple),
    str_from_instance=lambda value: [yaml.safe_dump(value, default_flow_style=True).strip()],
)


@dataclass(frozen=True, config=_SETTINGS)
class EnvConfig:
    """The game."""

    name: str = "matrix"
    """The game's name, see `knife-jax list`; `matrix/permuted` is short for name and scenario."""
    scenario: str | None = None
    """A single task or a drift (a sequence of tasks) of that game; the game's default if none."""
    options: Annotated[dict[str, Any], _YAML] = Field(default_factory=dict)
    """What the game's maker takes, for instance '{payoff: [[8, -12], [-12, 0]]}' or '{task_seed: 1}'."""
    tasks: Annotated[tuple[dict[str, Any], ...], Field(strict=False), _YAML] = ()
    """A sequence of tasks of your own: a list with the options of each, over the options above."""


@dataclass(frozen=True, config=_SETTINGS)
class SwitchConfig:
    """What happens when the task changes."""

    replay: Literal["clear", "keep"] = "clear"
    """Forget or keep what was collected in earlier tasks."""
    exploration: Literal["restart", "continue"] = "restart"
    """Anneal epsilon anew for each task, or once over the whole run."""
    optimizer: Literal["keep", "reset"] = "keep"
    """Keep or re-initialise the optimizer's state."""
    observe_task: bool = False
    """Give agents and mixer the one-hot of the task."""


@dataclass(frozen=True, config=_SETTINGS)
class AgentConfig:
    """The agents' shared network."""

    hidden_size: Positive = 64
    """Units of each hidden layer and of the GRU."""
    recurrent: bool = True
    """Dense-ReLU-GRU-Dense if true, Dense-ReLU-Dense-ReLU-Dense if false."""
    last_action: bool = True
    """Feed the one-hot of the agent's last action (zeros at the start of an episode)."""
    agent_id: bool = True
    """Feed the one-hot of the agent's index."""
    initializer: InitializerName = "torch_uniform"
    """Weights and biases uniform within 1/sqrt(fan in), Flax's defaults, or orthogonal with zero biases."""
    init_scale: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the orthogonal initializer."""


@dataclass(frozen=True, config=_SETTINGS)
class LearnerConfig:
    """Targets and loss."""

    mixer: Literal["none", "vdn", "qmix", "qplex"] = "qmix"
    """How agents' values become a team value; `none` is independent Q-learning (IQL)."""
    double_q: bool = True
    """Choose the next action with the online network, value it with the target network."""
    gamma: Share = 0.99
    """Discount."""
    td_lambda: Share = 0.0
    """Lambda of the TD(lambda) returns."""
    reward_scale: Swept = 1.0
    """Multiplies rewards in the loss only; reported returns stay in the game's units."""
    loss_scale: Swept = 1.0
    """Multiplies the squared error; PyMARL takes 1, pymarl2 takes 0.5."""
    loss_mean: Literal["valid", "all"] = "valid"
    """Divide the loss by the number of valid transitions, or by all slots of the batch as JaxMARL does."""
    target_update: Literal["hard", "polyak"] = "hard"
    """Copy the online network every `target_interval_updates`, or move towards it at every update."""
    target_interval_updates: Positive = 200
    """Gradient steps between hard copies."""
    polyak_tau: Share = 0.005
    """Step towards the online network at every update."""
    mixer_initializer: InitializerName = "torch_uniform"
    """As the agents' one, for the mixer."""
    mixer_init_scale: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the mixer's orthogonal initializer."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradient steps compute the networks in; parameters, values, targets and the optimizer are float32 either way. bfloat16 is for
    accelerators: processors are slower with it."""


@dataclass(frozen=True, config=_SETTINGS)
class QmixConfig:
    """Sizes of the QMIX mixer."""

    embed_size: Positive = 32
    """Units of the mixing layer."""
    hypernet_layers: Literal[1, 2] = 2
    """Layers of the two weight hypernetworks."""
    hypernet_size: Positive = 64
    """Hidden units of the weight hypernetworks."""


@dataclass(frozen=True, config=_SETTINGS)
class QplexConfig:
    """Sizes of the QPLEX mixer ("dmaq")."""

    num_kernels: Positive = 4
    """Kernels of the lambda-net."""
    adv_layers: Literal[1, 2, 3] = 2
    """Layers of each kernel's three networks."""
    adv_size: Positive = 64
    """Hidden units of the kernels."""
    hypernet_size: Positive = 64
    """Hidden units of the networks of w and v."""
    weighted_head: bool = True
    """Transform each agent's value by w and v."""
    is_minus_one: bool = True
    """Weigh advantages with lambda - 1 rather than lambda."""


@dataclass(frozen=True, config=_SETTINGS)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["rmsprop", "adam", "radam"] = "rmsprop"
    """Which one."""
    learning_rate: Swept = 5e-4
    """Step size."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """RMSProp's averaging of squared gradients."""
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's and RAdam's averaging of gradients."""
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's and RAdam's averaging of squared gradients."""
    eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the root of the second moment, outside of it."""
    max_grad_norm: Swept = 10.0
    """Clip the global norm of the gradient."""


@dataclass(frozen=True, config=_SETTINGS)
class ExplorationConfig:
    """Epsilon-greedy exploration over available actions, one coin per agent and step."""

    epsilon_start: Share = 1.0
    """Epsilon at the first step (of each task, if exploration restarts)."""
    epsilon_finish: Share = 0.05
    """Epsilon after annealing."""
    anneal_env_steps: Swept = 50_000.0
    """True environment steps (no resets, no idle slots) over which epsilon falls linearly."""


@dataclass(frozen=True, config=_SETTINGS)
class CollectConfig:
    """How experience is collected."""

    num_envs: Positive = 8
    """Parallel environments per seed."""
    rollout_length: Positive = 16
    """Slots collected from each environment per round; ignored by the mode `episode`."""
    mode: Literal["continuous", "rollout", "episode"] = "continuous"
    """`continuous`: episodes go on across rounds, training sequences start anywhere. `rollout`: environments restart every round, a
    training sequence is a whole rollout (JaxMARL). `episode`: every round is one complete episode per environment, idle and masked after
    its end, and so is a training sequence (PyMARL)."""


@dataclass(frozen=True, config=_SETTINGS)
class ReplayConfig:
    """The replay of sequences."""

    capacity_env_steps: Positive = 100_000
    """Slots held per seed, over all environments."""
    capacity_episodes: Annotated[int, Field(gt=0)] | None = None
    """Episodes held per seed, instead; for the mode `episode` only."""
    batch_size: Positive = 32
    """Sequences per gradient step."""
    sequence_length: Positive = 16
    """Transitions per sequence in the mode `continuous`; the other modes train on whole rollouts."""
    burn_in: NonNegative = 0
    """Transitions at the front of a sequence that starts inside an episode which only warm the recurrent state up."""


@dataclass(frozen=True, config=_SETTINGS)
class TrainConfig:
    """How long, and how often."""

    env_steps_per_task: Positive = 100_000
    """Slots collected in each task, over all environments; rounded up to whole rounds and evaluations."""
    updates_per_round: Positive = 1
    """Gradient steps after each round of collection."""
    learning_starts_env_steps: NonNegative = 0
    """Slots in the replay before the first gradient step; one sequence per batch entry and per environment is always awaited."""


@dataclass(frozen=True, config=_SETTINGS)
class EvaluationConfig:
    """Greedy evaluation on complete episodes."""

    episodes: Positive = 32
    """Complete episodes per evaluation."""
    per_task: Positive = 10
    """Evaluations per task, evenly spaced, beside the one before the task's first step."""


@dataclass(frozen=True, config=_SETTINGS)
class PlasticityConfig:
    """The cure, and when it is applied."""

    name: str = "none"
    """The method, see `knife-jax list`; several at once as `layer_norm+redo`."""
    when: Literal["interval", "task_switch", "once"] = "interval"
    """Every `interval_updates`; at every task switch (which is to know the boundaries); or once, after `interval_updates`. Methods that
    work at every gradient step (continual backprop, ...) do so whatever this says."""
    interval_updates: Annotated[int, Field(gt=0)] | None = None
    """Gradient steps between interventions; if none, the length of a task in a task sequence (which all but knows the boundaries),
    1,000 otherwise."""
    diagnostics: bool = True
    """Measure stagnant, dormant and other units before every evaluation, as `plasticity/<layer>/<measure>`."""
    diagnostic_batches: Positive = 4
    """Batches that these are measured on."""
    options: Annotated[dict[str, Any], _YAML] = Field(default_factory=dict)
    """What the method takes, for instance '{threshold: 0.25, layers: agent}'; in dicts and files they may stand beside `name`."""


@dataclass(frozen=True, config=_SETTINGS)
class Config:
    """All of an experiment but its seeds."""

    env: EnvConfig = EnvConfig()
    switch: SwitchConfig = SwitchConfig()
    agent: AgentConfig = AgentConfig()
    learner: LearnerConfig = LearnerConfig()
    qmix: QmixConfig = QmixConfig()
    qplex: QplexConfig = QplexConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    exploration: ExplorationConfig = ExplorationConfig()
    collect: CollectConfig = CollectConfig()
    replay: ReplayConfig = ReplayConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    plasticity: PlasticityConfig = PlasticityConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: "Config | None" = None) -> "Config":
        """Reads a nested dict over `base` (the defaults if None); the key `preset` names another base.

        Raises:
            ValueError: for an unknown field (the nearest one is suggested), a wrong type or a bad value, with the field's path.
        """
        from knife_jax.presets import preset_config

        values = dict(values)
        if not all(isinstance(key, str) for key in values):
            raise ValueError(f"the fields of a configuration are names; got {list(values)!r}")
        if "preset" in values:
            base = preset_config(values.pop("preset"))
        merged = _merge((base or cls()).to_dict(), values, cls)
        sections, mistakes = {}, []
        for name, section in get_type_hints(cls).items():
            try:
                sections[name] = section(**merged[name])
            except ValidationError as error:
                mistakes += _explain(error, name, section)
        if mistakes:
            raise ValueError("\n".join(mistakes))
        _check_method(sections["plasticity"])
        return cls(**sections)

    @classmethod
    def from_yaml(cls, path: str | Path, base: "Config | None" = None) -> "Config":
        """Reads a YAML file over `base`; errors as in `from_dict`."""
        content = parse_yaml(Path(path).read_text()) or {}
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} must hold a mapping of configuration fields; got {type(content).__name__}")
        return cls.from_dict(content, base)

    def to_dict(self) -> dict[str, Any]:
        """The nested dict from which `from_dict` makes this configuration again."""
        return asdict(self)  # pyright: ignore[reportArgumentType]

    def to_yaml(self) -> str:
        """The YAML text from which `from_yaml` makes this configuration again."""
        plain = self.to_dict()
        plain["env"]["tasks"] = list(plain["env"]["tasks"])
        return yaml.safe_dump(plain, sort_keys=False)

    @property
    def hyper(self) -> dict[str, dict[str, float]]:
        """The numbers that may be swept inside one compiled program, as `{section: {field: value}}`."""
        swept = {section.name: _swept(getattr(self, section.name)) for section in fields(self)}  # pyright: ignore[reportArgumentType]
        swept["plasticity"] = registry.swept_options(self.plasticity.name, self.plasticity.options)
        return {section: values for section, values in swept.items() if values}


def resolve(config: "Config | Mapping[str, Any] | str") -> Config:
    """A configuration from itself, a nested dict or a preset's name.

    Raises:
        ValueError: as in `Config.from_dict`, or for an unknown preset.
        TypeError: for anything else.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, str):
        return Config.from_dict({"preset": config})
    if isinstance(config, Mapping):
        return Config.from_dict(config)
    raise TypeError(f"a configuration is a Config, a nested dict or a preset's name; got {type(config).__name__}")


def merge_hyper(config: Config, overrides: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """`config.hyper` with some leaves replaced, for instance by traced or batched arrays.

    Raises:
        ValueError: for a field that does not exist or cannot be swept because shapes or schedules depend on it.
    """
    hyper = {section: dict(values) for section, values in config.hyper.items()}
    known = [f"{section}.{name}" for section, values in hyper.items() for name in values]
    for section, values in (overrides or {}).items():
        if not isinstance(values, Mapping):
            raise ValueError(f"{section}: expected a section with sweepable fields, got {values!r}")
        for name, value in values.items():
            if f"{section}.{name}" not in known:
                raise unknown_name("sweepable field", f"{section}.{name}", known)
            hyper[section][name] = value
    return hyper


def _swept(section: Any) -> dict[str, float]:
    hints = get_type_hints(type(section), include_extras=True)
    return {name: float(getattr(section, name)) for name, hint in hints.items() if Sweepable in getattr(hint, "__metadata__", ())}


def _merge(base: dict[str, Any], values: Mapping[Any, Any], cls: type, path: str = "") -> dict[str, Any]:
    """Lays `values` over `base`, section by section; refuses names that are no fields."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise _unknown_field(path, str(name), list(hints))
        if is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}{name}: expected a section with fields, got {value!r}")
            value = _gather_options(value, base[name]) if name == "plasticity" else value
            base[name] = _merge(_without_old_game(name, base[name], value), value, hints[name], f"{path}{name}.")
        else:
            base[name] = value
    return base


def _check_method(plasticity: PlasticityConfig) -> None:
    """Checks the cure's name and options.

    Raises:
        ValueError: with the field's path.
    """
    try:
        registry.check(plasticity.name, plasticity.options, get_type_hints(PlasticityConfig))
    except ValueError as error:
        field = "" if str(error).startswith("options: ") else "name: "
        raise ValueError(f"plasticity.{field}{error}") from None


def _gather_options(values: Mapping[Any, Any], base: Mapping[str, Any]) -> dict[Any, Any]:
    """Puts what is no field of the section among the method's options; a newly named method leaves older ones behind."""
    known = get_type_hints(PlasticityConfig)
    loose = {name: value for name, value in values.items() if name not in known}
    gathered = {name: value for name, value in values.items() if name in known}
    if loose or "name" in values or "options" in values:
        older = {} if "name" in values else base["options"]
        gathered["options"] = {**older, **values.get("options", {}), **loose}
    return gathered


def _without_old_game(section: str, base: dict[str, Any], values: Mapping[Any, Any]) -> dict[str, Any]:
    """A newly named game leaves the scenario, options and tasks of the one below it behind."""
    return asdict(EnvConfig()) if section == "env" and "name" in values else base  # pyright: ignore[reportArgumentType]


def _unknown_field(path: str, name: str, siblings: list[str]) -> ValueError:
    """The error for a field that does not exist, with the nearest of its siblings."""
    near = nearest(name, siblings)
    return ValueError(f"{path}{name}: no such field; did you mean {path}{near}? Known: {', '.join(siblings)}")


def _explain(error: ValidationError, section_name: str, section: type) -> list[str]:
    """One line per mistake: the field's path, what was expected, what was given, and the nearest valid name."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in (section_name, *item["loc"]))
        line = f"{path}: {item['msg']}, got {item['input']!r}"
        choices = [choice for choice in get_args(get_type_hints(section)[str(item["loc"][0])]) if isinstance(choice, str)]
        if choices and isinstance(item["input"], str):
            line += f"; did you mean {nearest(item['input'], choices)!r}?"
        elif isinstance(item["input"], str) and _is_number(item["input"]):
            line += "; a number in YAML is not quoted and has a point before its exponent, as in 5.0e-4"
        lines.append(line)
    return lines


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

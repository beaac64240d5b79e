"""JaxMARL's games under our interface, and ours under JaxMARL's (`to_jaxmarl`).

JaxMARL (Rutherford et al., 2023, arXiv:2311.10090) keys agents by name, resets an ended episode within the step and calls every end `done`.
Here agents are an array axis, the last observation of an episode is the true one, and an end by the time limit is a truncation.

Importing JaxMARL takes seconds, so nothing here does before it is needed.

Shapes: A agents, U actions, D observation features, G state features.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray, Shaped, UInt8

from envs.base import Actions, Environment, EnvParams, Flag, Observation, Outcome, Scalar, unknown_name
from envs.jaxmarl_quiet import import_jaxmarl, in_jaxmarl
from envs.storage import EXACT, Storage, make_storage

_TEAM_REWARDS: dict[str, Callable[[Float[Array, "A"]], Scalar]] = {
    "first": lambda rewards: rewards[0],
    "sum": jnp.sum,
    "mean": jnp.mean,
}

# JaxMARL's cooperative games: "first" where every agent is given the same reward, "sum" where each has a part of its own.
_TEAM_REWARD_OF_GAME: dict[str, str] = {
    "EnemySMAX": "first",
    "Overcooked": "first",
    "OvercookedV2": "first",
    "HanabiEnv": "first",
    "SwitchRiddle": "first",
    "ToJaxMARL": "first",
    "SimpleSpreadMPE": "sum",
    "SimpleReferenceMPE": "sum",
    "SimpleSpeakerListenerMPE": "sum",
    "JaxNav": "sum",
}

# A game's clock, a field of its state, and the attribute with the reading at which JaxMARL ends the episode.
_CLOCKS = (("step", "max_steps"), ("outer_t", "num_outer_steps"))

# Beyond the largest number in a scaled SMAX state, 34/32, a position over the map's edge; 1 is a whole number of its 127 steps.
_SMAX_BOUND = 127 / 119

_SMAX_DEFAULTS = {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": "closest", "observation_type": "unit_list"}


class FromJaxMARLRecord(NamedTuple):
    """What is kept of a state, complete: JaxMARL's observations are not recomputed.

    Attributes:
        agents: each agent's observation, flattened, padded with zeros and stored as `FromJaxMARL.storage` says.
        world_state: the game's own global state, stored alike; None where the observations, concatenated, stand for it.
        action_mask: the available actions, eight to a byte; None where they never change.
    """

    agents: Num[Array, "A D"]
    world_state: Num[Array, "G"] | None
    action_mask: UInt8[Array, "A W"] | None


class FromJaxMARLState(NamedTuple):
    """JaxMARL's state, what is seen of it, and the steps taken in this episode."""

    inner: Any
    record: FromJaxMARLRecord
    step: Int[Array, ""]


@dataclass(frozen=True)
class FromJaxMARL(Environment):
    """A JaxMARL game as an `Environment`; built by `from_jaxmarl` and `make_jaxmarl`.

    JaxMARL's clock is held short of JaxMARL's own limit, so that its `done` is the game's own ending, and steps are counted here. That is
    also what makes SMAX (101 steps in JaxMARL) and MPE (26) last their declared 100 and 25. An environment that reports `terminated` or
    `won` in its info is believed. Where the clock is part of the observation, it is seen to stand still for the steps that it is held.

    Attributes:
        env: the JaxMARL environment; it is not copied and not changed.
        team_reward: how the agents' rewards become the team's.
        global_state: what the mixer sees.
        action_counts: the actions of each agent; the others of the U are masked.
        observation_sizes: the features of each agent, before padding.
        storage: how observations and global state are stored, and so how precisely they are seen, in play and in learning alike.
    """

    env: Any
    team_reward: str
    global_state: str
    action_counts: tuple[int, ...]
    observation_sizes: tuple[int, ...]
    state_size: int
    max_steps: int
    reports_wins: bool
    storage: Storage = EXACT

    @property
    def num_agents(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A, the agents that are ours to control."""
        return len(self.action_counts)

    @property
    def num_actions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """U, the most actions that any agent has."""
        return max(self.action_counts)

    @property
    def observation_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """D, the most features that any agent has."""
        return max(self.observation_sizes)

    @property
    def default_params(self) -> EnvParams:
        """Nothing: the parameters of a JaxMARL game are fixed when it is built."""
        return ()

    def reset(self, key: PRNGKeyArray, params: EnvParams) -> FromJaxMARLState:
        """Draws the first state of an episode."""
        del params
        with in_jaxmarl():
            observations, inner = self.env.reset(key)
            record = self._record(observations, inner)
        return FromJaxMARLState(jax.tree.map(_without_weak_type, inner), record, jnp.zeros((), jnp.int32))

    def step(self, key: PRNGKeyArray, state: FromJaxMARLState, actions: Actions, params: EnvParams) -> tuple[FromJaxMARLState, Outcome]:
        """Advances one environment step by JaxMARL's `step_env`, which never resets."""
        del params
        named_actions = {agent: actions[i] for i, agent in enumerate(self.env.agents)}
        with in_jaxmarl():
            observations, inner, rewards, dones, info = self.env.step_env(key, self._hold_clock(state.inner), named_actions)
            record = self._record(observations, inner)
            won = jnp.asarray(self._won(inner, info), bool)
        rewards = jnp.stack([jnp.asarray(rewards[agent], jnp.float32).reshape(()) for agent in self.env.agents])
        ended = jnp.asarray(dones["__all__"], bool).reshape(())
        terminated = jnp.asarray(info.get("terminated", ended), bool)
        step = state.step + 1
        truncated = ~terminated & (ended | (step >= self.max_steps))
        inner = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), inner, state.inner)
        outcome = Outcome(_TEAM_REWARDS[self.team_reward](rewards), terminated, truncated, {"won": won})
        return FromJaxMARLState(inner, record, step), outcome

    def record(self, state: FromJaxMARLState) -> FromJaxMARLRecord:
        """What was seen of the state when it was made."""
        return state.record

    def observe(self, record: FromJaxMARLRecord, params: EnvParams) -> Observation:
        """Unpacks a record."""
        del params
        agents = self.storage.decode(record.agents)
        if record.world_state is None:
            state = jnp.concatenate([agents[i, :size] for i, size in enumerate(self.observation_sizes)])
        else:
            state = self.storage.decode(record.world_state)
        return Observation(agents, state, self._unpacked_mask(record.action_mask), jnp.ones((self.num_agents,), bool))

    def _record(self, observations: Mapping[str, Shaped[Array, "..."]], inner: Any) -> FromJaxMARLRecord:
        agents = jnp.stack([_padded(observations[agent], self.observation_size) for agent in self.env.agents])
        world_state = self.storage.encode(self._world_state(observations, inner)) if self.global_state == "world_state" else None
        return FromJaxMARLRecord(self.storage.encode(agents), world_state, self._packed_mask(inner))

    def _packed_mask(self, inner: Any) -> UInt8[Array, "A W"] | None:
        available = _available_actions(self.env)
        if available is None:
            return None
        masks = available(inner)
        return jnp.packbits(jnp.stack([_padded(masks[agent], self.num_actions) for agent in self.env.agents]).astype(bool), axis=-1)

    def _unpacked_mask(self, packed: UInt8[Array, "A W"] | None) -> Bool[Array, "A U"]:
        if packed is None:
            return jnp.arange(self.num_actions)[None, :] < jnp.asarray(self.action_counts)[:, None]
        return jnp.unpackbits(packed, axis=-1, count=self.num_actions).astype(bool)

    def _world_state(self, observations: Mapping[str, Shaped[Array, "..."]], inner: Any) -> Float[Array, "G"]:
        del inner
        return observations["world_state"].reshape(-1).astype(jnp.float32)

    def _won(self, inner: Any, info: Mapping[str, Any]) -> Flag | bool:
        del inner
        return info.get("won", False)

    def _hold_clock(self, inner: Any) -> Any:
        return _held(self.env, inner)


@dataclass(frozen=True)
class FromSMAX(FromJaxMARL):
    """A SMAX battle: won when every enemy is dead and an ally is alive.

    Attributes:
        legacy_state: keeps JaxMARL's world state, with positions in map units (0 to 32), unbounded cooldowns in seconds (down to -50) and
            type numbers (0 to 5). By default every feature is scaled to [0, 1], as in the units' own observations; the zeros of the dead
            stay. (Positions may be up to 2/32 outside: units push each other over the edge, and SMACv2's generator puts some there.)
    """

    legacy_state: bool = False

    def _units(self, inner: Any) -> Any:
        return inner.state if hasattr(inner, "enemy_policy_state") else inner

    def _hold_clock(self, inner: Any) -> Any:
        held = _held(self.env, self._units(inner))
        return inner.replace(state=held) if hasattr(inner, "enemy_policy_state") else held

    def _won(self, inner: Any, info: Mapping[str, Any]) -> Flag | bool:
        del info
        allies, enemies = jnp.split(self._units(inner).unit_alive, [self.env.num_allies])
        return jnp.any(allies) & ~jnp.any(enemies)

    def _world_state(self, observations: Mapping[str, Shaped[Array, "..."]], inner: Any) -> Float[Array, "G"]:
        raw = super()._world_state(observations, inner)
        return raw if self.legacy_state else _normalised_world_state(self.env, self._units(inner), raw)


def from_jaxmarl(
    env: Any,
    *,
    team_reward: str | None = None,
    max_steps: int | None = None,
    global_state: str | None = None,
    legacy_state: bool = False,
    storage: str = "float32",
    storage_bound: int | float | None = None,
) -> FromJaxMARL:
    """Gives a JaxMARL environment our interface.

    Args:
        env: a `jaxmarl` `MultiAgentEnv` with discrete actions, unwrapped. It is neither copied nor changed.
        team_reward: how the agents' rewards become one: that of the `first` agent, their `sum` or their `mean`. By default `first` where
            JaxMARL gives all agents the same (SMAX, Overcooked, Hanabi, switch riddle) and `sum`, as JaxMARL's own Q-learners do, where
            they differ (MPE's spread, reference and speaker-listener, JaxNav); other games are not clearly cooperative and need a choice.
        max_steps: the time limit in environment steps; the environment's own by default.
        global_state: the game's `world_state` or the agents' `observations`, concatenated; the former by default, where there is one.
        legacy_state: leaves SMAX's world state as JaxMARL makes it; see `FromSMAX`.
        storage: how observations and global state are stored: exactly in `float32`, or in `float16` or `int8`; see `envs.storage.Storage`.
        storage_bound: the largest absolute number that `int8` can store; 127/119 by default in SMAX, whose numbers
            are scaled to [-1, 1] (34/32 for positions over the map's edge).

    Raises:
        TypeError: if `env` is not an unwrapped JaxMARL environment.
        ValueError: if its actions are not discrete, if it does not key its observations by agent (Storm), if it has no time limit or no
            default team reward and none is given, or if an option does not apply to it.
    """
    jaxmarl = import_jaxmarl()
    game = type(env).__name__
    if not isinstance(env, jaxmarl.environments.MultiAgentEnv):
        raise TypeError(
            f"expected an unwrapped JaxMARL MultiAgentEnv, got {game}; pass the environment itself, not a JaxMARL wrapper of it"
        )
    is_smax = isinstance(env, jaxmarl.environments.SMAX | jaxmarl.environments.smax.heuristic_enemy_smax_env.EnemySMAX)
    if legacy_state and not is_smax:
        raise ValueError(f"legacy_state is an option of SMAX's world state, which {game} does not have")
    stored = make_storage(storage, storage_bound, _SMAX_BOUND if is_smax and not legacy_state else None)
    with in_jaxmarl():
        observations, _ = jax.eval_shape(env.reset, jax.random.key(0))
    if not (isinstance(observations, Mapping) and all(hasattr(observations.get(agent), "shape") for agent in env.agents)):
        raise ValueError(f"{game} does not return one observation array per agent name, so it cannot be adapted")
    sizes = tuple(math.prod(observations[agent].shape) for agent in env.agents)
    choices = ("world_state", "observations") if "world_state" in observations else ("observations",)
    if global_state is None:
        global_state = choices[0]
    if global_state not in choices:
        raise ValueError(f"global_state of {game} must be one of {', '.join(choices)}, got {global_state!r}")
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1):
        raise ValueError(f"max_steps must be a positive number of steps, got {max_steps!r}")
    facts = {
        "env": env,
        "team_reward": _team_reward(env, team_reward),
        "global_state": global_state,
        "action_counts": tuple(_action_count(env, agent) for agent in env.agents),
        "observation_sizes": sizes,
        "state_size": math.prod(observations["world_state"].shape) if global_state == "world_state" else sum(sizes),
        "max_steps": _time_limit(env) if max_steps is None else max_steps,
        "storage": stored,
    }
    if is_smax:
        return FromSMAX(**facts, reports_wins=True, legacy_state=legacy_state)
    return FromJaxMARL(**facts, reports_wins=getattr(env, "reports_wins", False))


def make_jaxmarl(
    name: str,
    *,
    team_reward: str | None = None,
    max_steps: int | None = None,
    global_state: str | None = None,
    legacy_state: bool = False,
    storage: str = "float32",
    storage_bound: int | float | None = None,
    **env_options: Any,
) -> FromJaxMARL:
    """Builds a JaxMARL game by name.

    A SMAX scenario is fought against JaxMARL's heuristic enemy, with enemy actions seen, deadly walls, `attack_mode` "closest" and
    unit-list observations, as in JaxMARL's baselines.

    Args:
        name: a SMAX scenario ("3m", "2s3z", "smacv2_5_units", ...) or an id that JaxMARL registers ("MPE_simple_spread_v3", ...).
        team_reward: see `from_jaxmarl`.
        max_steps: see `from_jaxmarl`. (Overcooked and JaxNav observe how near JaxMARL's own limit is; to move that one too, build the
            environment with `jaxmarl.make` and hand it to `from_jaxmarl`.)
        global_state: see `from_jaxmarl`.
        legacy_state: see `from_jaxmarl`.
        storage: see `from_jaxmarl`.
        storage_bound: see `from_jaxmarl`.
        **env_options: for JaxMARL's constructor.

    Raises:
        ValueError: if there is no such name; and as `from_jaxmarl` does.
    """
    jaxmarl = import_jaxmarl()
    names = (*jaxmarl.environments.smax.smax_env.MAP_NAME_TO_SCENARIO, *jaxmarl.registered_envs)
    if name not in names:
        raise unknown_name("game of JaxMARL", name, names)
    env = _built(name, **env_options) if env_options else _stock(name)
    return from_jaxmarl(
        env,
        team_reward=team_reward,
        max_steps=max_steps,
        global_state=global_state,
        legacy_state=legacy_state,
        storage=storage,
        storage_bound=storage_bound,
    )


def _built(name: str, **options: Any) -> Any:
    jaxmarl = import_jaxmarl()
    scenarios = jaxmarl.environments.smax.smax_env.MAP_NAME_TO_SCENARIO
    if options.get("attack_mode", "closest") not in ("closest", "random"):
        raise unknown_name("attack_mode", options["attack_mode"], ("closest", "random"))
    with in_jaxmarl():
        if name in scenarios:
            return jaxmarl.make("HeuristicEnemySMAX", scenario=scenarios[name], **{**_SMAX_DEFAULTS, **options})
        return jaxmarl.make(name, **options)


# JaxMARL's objects are equal only to themselves; one per name lets equal games share their compiled programs.
_stock = functools.cache(_built)


def to_jaxmarl(env: Environment, params: EnvParams = None) -> Any:
    """Gives one of our games JaxMARL's interface, for JaxMARL's learners and wrappers.

    Args:
        env: the game.
        params: the task; the game's default one if None.

    Returns:
        A `jaxmarl` `MultiAgentEnv`; see `envs.jaxmarl_export.ToJaxMARL`.
    """
    from envs.jaxmarl_export import ToJaxMARL

    return ToJaxMARL(env, env.default_params if params is None else params)


def _held(env: Any, state: Any) -> Any:
    """Holds the clock two short of its limit, since some games compare it before and some after it ticks."""
    for clock, limit in _CLOCKS:
        if hasattr(env, limit) and hasattr(state, clock):
            state = state.replace(**{clock: jnp.minimum(getattr(state, clock), getattr(env, limit) - 2)})
    return state


def _time_limit(env: Any) -> int:
    if hasattr(env, "max_steps"):
        return env.max_steps
    if hasattr(env, "num_outer_steps"):
        return env.num_inner_steps * env.num_outer_steps
    raise ValueError(f"{type(env).__name__} has no time limit of its own; give max_steps")


def _team_reward(env: Any, given: str | None) -> str:
    if given is not None and given not in _TEAM_REWARDS:
        raise ValueError(f"team_reward must be one of {', '.join(_TEAM_REWARDS)}, got {given!r}")
    defaults = [_TEAM_REWARD_OF_GAME[kind.__name__] for kind in type(env).__mro__ if kind.__name__ in _TEAM_REWARD_OF_GAME]
    if given is None and not defaults and len(env.agents) > 1:
        raise ValueError(f"the agents of {type(env).__name__} may not share one aim; give team_reward: {', '.join(_TEAM_REWARDS)}")
    return given if given is not None else (*defaults, "first")[0]


def _action_count(env: Any, agent: str) -> int:
    space = env.action_space(agent)
    if not hasattr(space, "n"):
        raise ValueError(f"only discrete actions are supported, but {agent} of {type(env).__name__} has a {type(space).__name__} of them")
    return int(space.n)


def _available_actions(env: Any) -> Callable[[Any], Mapping[str, Shaped[Array, "U"]]] | None:
    """The function that lists the available actions, where the game has one (Hanabi's has another name)."""
    if hasattr(env, "get_legal_moves"):
        return env.get_legal_moves
    overridden = any("get_avail_actions" in vars(kind) for kind in type(env).__mro__ if kind.__name__ != "MultiAgentEnv")
    return env.get_avail_actions if overridden else None


def _normalised_world_state(smax: Any, units: Any, raw: Float[Array, "G"]) -> Float[Array, "G"]:
    """Scales health, x, y, cooldown and type bits of every unit, then its team and type, to [0, 1]."""
    num_units, num_features = units.unit_types.size, len(smax.own_features)
    features = raw[: num_units * num_features].reshape(num_units, num_features)
    position = features[:, 1:3] / jnp.array([smax.map_width, smax.map_height])
    cooldown = jnp.clip(features[:, 3:4] / smax.unit_type_weapon_cooldowns[units.unit_types][:, None], 0.0, 1.0)
    features = jnp.concatenate([features[:, :1], position, cooldown, features[:, 4:]], axis=1)
    teams, types = jnp.split(raw[num_units * num_features :], 2)
    return jnp.concatenate([features.reshape(-1), teams, types / (smax.unit_type_bits - 1)])


def _padded(array: Shaped[Array, "..."], size: int) -> Shaped[Array, "{size}"]:
    flat = array.reshape(-1)
    return jnp.pad(flat, (0, size - flat.size))


def _without_weak_type(leaf: Any) -> Array:
    """A scan refuses a carry whose leaf is a Python number at reset and an array afterwards."""
    return jnp.asarray(leaf, jnp.result_type(leaf))

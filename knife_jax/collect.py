"""Acting in vmapped environments: exploring to fill the replay, and greedily to evaluate.

Shapes: E environments, T slots of a rollout, A agents, U actions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from envs.base import Environment, EnvParams, Observation, Outcome
from envs.wrappers import AutoReset, EpisodeStatistics, IdleAfterEnd
from knife_jax.bundle import Bundle, bundled
from knife_jax.learner import Metrics
from knife_jax.model import Hyper, Networks, task_code
from knife_jax.networks.agents import agent_inputs, mask_unavailable
from knife_jax.plasticity.method import Variables
from knife_jax.replay import Continuation, Slot, cut_ends, starts_after

METRICS = ("env_steps", "episodes", "epsilon", "length", "return", "won")
"""What `explore` tells of a rollout."""

IS_LAST = np.array([name == "epsilon" for name in METRICS])
"""Of which of that the latest is of interest; the rest is added up over rollouts."""


class ActorState(NamedTuple):
    """Where the environments are, and what the agents remember, between slots."""

    env: Any
    hidden: Float[Array, "E A S"]
    last_actions: Int[Array, "E A"]
    starts: Bool[Array, "E"]


class CollectorState(NamedTuple):
    """The actors, and the environment steps since exploration (re)started, which count true steps and so depend on the seed."""

    actors: ActorState
    explored_env_steps: Float[Array, ""]


def acting_environment(env: Environment, mode: str) -> AutoReset:
    """The environment as the collector steps it: one that resets itself, or idles after its one episode."""
    counted = EpisodeStatistics(env)
    return IdleAfterEnd(counted) if mode == "episode" else AutoReset(counted)


def init_actors(keys: Key[Array, "E"], networks: Networks, env: Environment, params: EnvParams) -> ActorState:
    """Fresh episodes of one task, and empty memories; one key for each environment."""
    state = jax.vmap(env.reset, in_axes=(0, None))(keys, params)
    agents = (len(keys), env.num_agents)
    return ActorState(state, networks.initial_hidden(agents), jnp.zeros(agents, jnp.int32), jnp.ones(len(keys), bool))


def explore(
    keys: Key[Array, "T K"], variables: Variables, networks: Networks, collector: CollectorState, task: Int[Array, ""], hyper: Hyper
) -> tuple[CollectorState, Slot, Bundle]:
    """Collects a rollout of T slots with epsilon-greedy actions.

    Args:
        keys: of each slot, one for all actions and then one for each environment.
        variables: of the acting network.
        networks: the modules.
        collector: where to go on.
        task: the task.
        hyper: sweepable numbers.

    Returns:
        The collector, the rollout `[T, E, ...]` (its last slots go on into the next rollout) and metrics: `return`, `won` and `length`,
        summed over the episodes that ended; `episodes`, how many did; `env_steps`, the true steps taken; and `epsilon`, the mean one.
    """
    env = acting_environment(networks.env, networks.config.collect.mode)
    task_params = networks.tasks.at(task)
    split = networks.split.of(len(collector.actors.starts))

    def one_slot(collector: CollectorState, keys: tuple[PRNGKeyArray, Array]) -> tuple[CollectorState, tuple[Slot, Bundle]]:
        epsilon = epsilon_at(collector.explored_env_steps, hyper)

        def choose(values: Array, action_mask: Array) -> Array:
            return split.drawn(lambda values, mask: epsilon_greedy(keys[0], values, mask, epsilon), values, action_mask)

        actors, slot, outcome = _advance(choose, keys[1], variables, networks, env, collector.actors, task, task_params)
        steps = (~outcome.info["reset"]).sum().astype(jnp.float32)
        collector = CollectorState(actors, collector.explored_env_steps + split.summed(steps))
        return collector, (slot, bundled({**_ended(outcome), "env_steps": steps, "epsilon": epsilon}))

    own = collector._replace(actors=split.own(collector.actors))
    collector, (rollout, of_slots) = jax.lax.scan(one_slot, own, (keys[:, 0], split.own(keys[:, 1:], axis=1)))
    metrics = Bundle(of_slots.names, split.summed(of_slots.values.sum(axis=0)) / np.where(IS_LAST, len(keys) * split.parts, 1))
    return collector._replace(actors=split.gathered(collector.actors)), split.gathered(rollout, axis=1), metrics


def cut_rollout(rollout: Slot) -> Slot:
    """Marks the last slots of a rollout as not continued, where the environments will be reset."""
    return rollout._replace(continuation=rollout.continuation.at[-1].set(cut_ends(rollout.continuation[-1])))


def evaluate(key: PRNGKeyArray, variables: Variables, networks: Networks, task: Int[Array, ""], episodes: int) -> Metrics:
    """Plays complete episodes greedily.

    Returns:
        `return`, `won`, `length`: means over exactly `episodes` complete episodes; and `optimum_share`, the return over the best possible
        one (NaN where that is not known or not positive).
    """
    env = IdleAfterEnd(EpisodeStatistics(networks.env))
    task_params = networks.tasks.at(task)
    key_reset, key_steps = jax.random.split(key)
    split = networks.split.of(episodes)
    actors = init_actors(split.own(jax.random.split(key_reset, episodes)), networks, env, task_params)

    def one_step(actors: ActorState, key: PRNGKeyArray) -> tuple[ActorState, Metrics]:
        keys = split.own(jax.random.split(key, episodes))
        actors, _, outcome = _advance(greedily, keys, variables, networks, env, actors, task, task_params)
        return actors, _ended(outcome)

    _, sums = jax.lax.scan(one_step, actors, jax.random.split(key_steps, env.max_steps))
    metrics = split.summed({name: sums[name].sum() / episodes for name in ("return", "won", "length")})
    optimum = networks.env.optimal_return(task_params)
    return {**metrics, "optimum_share": jnp.where(optimum > 0, metrics["return"] / jnp.where(optimum > 0, optimum, 1.0), jnp.nan)}


def epsilon_at(env_steps: Float[Array, ""], hyper: Hyper) -> Float[Array, ""]:
    """Epsilon, linear in environment steps."""
    swept = hyper["exploration"]
    progress = jnp.clip(env_steps / jnp.maximum(swept["anneal_env_steps"], 1.0), 0.0, 1.0)
    return swept["epsilon_start"] + progress * (swept["epsilon_finish"] - swept["epsilon_start"])


def epsilon_greedy(
    key: PRNGKeyArray, values: Float[Array, "*N U"], action_mask: Bool[Array, "*N U"], epsilon: Float[Array, ""]
) -> Int[Array, "*N"]:
    """Draws each agent's action from a mixture of the greedy action and a uniform one, over available actions only."""
    greedy = jax.nn.one_hot(greedily(values, action_mask), values.shape[-1])
    uniform = action_mask / action_mask.sum(axis=-1, keepdims=True)
    return distrax.Categorical(probs=(1 - epsilon) * greedy + epsilon * uniform).sample(seed=key)


def greedily(values: Float[Array, "*N U"], action_mask: Bool[Array, "*N U"]) -> Int[Array, "*N"]:
    """Each agent's best available action."""
    return mask_unavailable(values, action_mask).argmax(axis=-1)


def _advance(
    choose: Callable[[Array, Array], Array],
    keys: Key[Array, "E"],
    variables: Variables,
    networks: Networks,
    env: AutoReset,
    actors: ActorState,
    task: Int[Array, ""],
    task_params: EnvParams,
) -> tuple[ActorState, Slot, Outcome]:
    """One slot in every environment, with a key for each; `choose` makes actions of values and of which are available."""
    num_envs = actors.starts.shape[0]
    record = jax.vmap(env.record)(actors.env)
    observation = jax.vmap(env.observe, in_axes=(0, None))(record, task_params)
    values, hidden = _act_values(variables, networks, observation, actors, task)
    actions = choose(values, observation.action_mask)
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    state, outcome = step(keys, actors.env, actions.astype(jnp.int32), task_params)
    continuation = continuation_of(outcome)
    tasks = jnp.full(num_envs, task, jnp.int16)
    slot = Slot(record, actions.astype(action_dtype(env.num_actions)), outcome.reward, continuation, tasks)
    return ActorState(state, hidden, actions.astype(jnp.int32), starts_after(continuation)), slot, outcome


def _act_values(variables: Variables, networks: Networks, observation: Observation, actors: ActorState, task: Array) -> tuple[Array, Array]:
    """One step of the agent network; the time axis of length 1 comes and goes here."""
    starts = actors.starts[None]
    code = task_code(networks, jnp.full(starts.shape, task))
    view = jax.tree.map(lambda leaf: leaf[None], observation)
    inputs = agent_inputs(networks.config.agent, view, actors.last_actions[None], starts, code)
    values, hidden = networks.apply_agent(variables, inputs, starts, actors.hidden)
    return jnp.asarray(values)[0], jnp.asarray(hidden)


def action_dtype(num_actions: int) -> Any:
    """The smallest integer type that holds an action."""
    return jnp.int8 if num_actions <= 127 else jnp.int16


def continuation_of(outcome: Outcome) -> Int[Array, "*N"]:
    """How a slot goes on, from what a self-resetting environment said of it."""
    continuation = jnp.where(outcome.terminated, Continuation.TERMINATED, Continuation.CONTINUE)
    continuation = jnp.where(outcome.truncated, Continuation.TRUNCATED, continuation)
    return jnp.where(outcome.info["reset"], Continuation.CUT, continuation).astype(jnp.int8)


def _ended(outcome: Outcome) -> Metrics:
    """Sums over the episodes that ended on this slot."""
    info = outcome.info
    ended = info["episode_ended"].astype(jnp.float32)
    return {
        "return": (ended * info["episode_return"]).sum(),
        "won": (ended * info["won"]).sum(),
        "length": (ended * info["episode_length"]).sum(),
        "episodes": ended.sum(),
    }

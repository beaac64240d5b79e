"""Targets, loss and one gradient step.

Shapes: T slots of a sequence, B sequences, A agents, U actions, M team values (1, or A for independent learners).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from envs.base import Environment, Observation, Tasks
from knife_jax.config import Config
from knife_jax.networks.agents import AgentNetwork, agent_inputs, initial_hidden, mask_unavailable
from knife_jax.networks.mixers import MixerInputs, make_mixer
from knife_jax.replay import Continuation, Sequences

Params = Any
Hyper = dict[str, dict[str, Any]]
Metrics = dict[str, Array]


class LearnerState(NamedTuple):
    """Everything that a gradient step changes: `{"agent": ..., "mixer": ...}` parameters, their targets, the optimizer's state."""

    params: Params
    target_params: Params
    opt_state: optax.OptState


class Networks(NamedTuple):
    """The modules and static facts that losses and policies close over."""

    agent: AgentNetwork
    mixer: nn.Module
    env: Environment
    tasks: Tasks
    config: Config


class TeamValues(NamedTuple):
    """Agents' values turned into team values, and where the action taken is the greedy one; see `team_values`."""

    online: Float[Array, "T B M"]
    target: Float[Array, "T B M"]
    agrees: Bool[Array, "T B A"]


def make_networks(config: Config, env: Environment, tasks: Tasks) -> Networks:
    """Builds the modules that a configuration names."""
    return Networks(AgentNetwork(env.num_actions, config.agent), make_mixer(config), env, tasks, config)


def make_optimizer(config: Config, hyper: Hyper) -> optax.GradientTransformation:
    """The clipped optimizer; learning rate and clip come from `hyper` and may be traced.

    RMSProp's epsilon is outside the root, as PyTorch's is (optax puts it inside unless told otherwise).
    """
    settings, swept = config.optimizer, hyper["optimizer"]
    if settings.name == "rmsprop":
        optimizer = optax.rmsprop(swept["learning_rate"], settings.decay, settings.eps, eps_in_sqrt=False)
    else:
        make = {"adam": optax.adam, "radam": optax.radam}[settings.name]
        optimizer = make(swept["learning_rate"], settings.b1, settings.b2, settings.eps)
    return optax.chain(optax.clip_by_global_norm(swept["max_grad_norm"]), optimizer)


def init(key: PRNGKeyArray, networks: Networks, hyper: Hyper) -> LearnerState:
    """Draws parameters; the target network starts as a copy."""
    key_agent, key_mixer = jax.random.split(key)
    observation = _zero_observation(networks)
    num_agents = networks.env.num_agents
    task = task_code(networks, jnp.zeros((1, 1), jnp.int32))
    starts = jnp.ones((1, 1), bool)
    inputs = agent_inputs(networks.config.agent, observation, jnp.zeros((1, 1, num_agents), jnp.int32), starts, task)
    agent = networks.agent.init(key_agent, inputs, starts, initial_hidden(networks.config.agent, (1, num_agents)))
    values = jnp.zeros((1, 1, num_agents))
    actions = jnp.zeros((1, 1, num_agents, networks.env.num_actions))
    mixer = networks.mixer.init(key_mixer, MixerInputs(values, values, actions, _mixer_state(observation, task)))
    params = {"agent": agent["params"], "mixer": mixer.get("params", {})}
    return LearnerState(params, params, make_optimizer(networks.config, hyper).init(params))


def td_lambda_returns(
    reward: Float[Array, "T B M"],
    values: Float[Array, "T B M"],
    continuation: Int[Array, "T B"],
    gamma: Float[Array, ""] | float,
    td_lambda: Float[Array, ""] | float,
) -> Float[Array, "T B M"]:
    """TD(lambda) returns of every slot, exact for ends of each kind.

    `G_t = r_t + gamma b_t ((1 - lambda) V_{t+1} + lambda G_{t+1})`, where `b_t` is 0 after a termination and 1 otherwise, and the return of
    a cut slot (of which nothing is known) is its value. A truncated slot is followed by its last observation, which is cut, and so
    bootstraps from that observation's value alone. The last slot must be cut or terminated.

    Args:
        reward: rewards.
        values: target values of every slot.
        continuation: how each slot goes on.
        gamma: discount.
        td_lambda: 0 gives one-step targets, 1 Monte Carlo returns.

    Returns:
        Returns; those of cut slots mean nothing and must be masked.
    """
    bootstraps = (continuation != Continuation.TERMINATED)[..., None]
    is_cut = (continuation == Continuation.CUT)[..., None]

    def one_step(following: tuple[Array, Array], slot: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_return = following
        r, value, bootstrap, unknown = slot
        mixed = (1 - td_lambda) * next_value + td_lambda * next_return
        here = jnp.where(unknown, value, r + gamma * jnp.where(bootstrap, mixed, 0.0))
        return (value, here), here

    beyond = jnp.zeros_like(values[-1])
    _, returns = jax.lax.scan(one_step, (beyond, beyond), (reward, values, bootstraps, is_cut), reverse=True)
    return returns


def loss_fn(params: Params, target_params: Params, networks: Networks, batch: Sequences, hyper: Hyper) -> tuple[Float[Array, ""], Metrics]:
    """The masked TD error of a batch of sequences.

    Returns:
        The loss, and metrics: `loss`, `td_error` (root mean square over valid transitions), `q_tot`, `target` (their means), `greedy_share`
        (how often the action taken is the greedy one) and `valid_share`.
    """
    settings, swept = networks.config.learner, hyper["learner"]
    slots = batch.slots
    observation = observe(networks, slots.record, slots.task)
    values = team_values(params, target_params, networks, batch, observation)
    reward = jnp.broadcast_to(slots.reward[..., None] * swept["reward_scale"], values.online.shape)
    targets = td_lambda_returns(reward, values.target, slots.continuation, swept["gamma"], swept["td_lambda"])
    valid = ((slots.continuation != Continuation.CUT) & ~batch.burn_in)[..., None]
    acting = (valid & observation.agent_mask).astype(reward.dtype)
    if values.online.shape[-1] > 1:
        valid = valid & observation.agent_mask
    mask = jnp.broadcast_to(valid, values.online.shape).astype(values.online.dtype)
    error = mask * (values.online - jax.lax.stop_gradient(targets))
    count = jnp.maximum(mask.sum(), 1.0)
    mean_square = jnp.square(error).sum() / count
    scale = swept["loss_scale"] if settings.loss_mean == "valid" else swept["loss_scale"] * count / mask.size
    metrics = {
        "loss": mean_square * scale,
        "td_error": jnp.sqrt(mean_square),
        "q_tot": (mask * values.online).sum() / count,
        "target": (mask * targets).sum() / count,
        "greedy_share": (acting * values.agrees).sum() / jnp.maximum(acting.sum(), 1.0),
        "valid_share": mask.mean(),
    }
    return mean_square * scale, metrics


def team_values(params: Params, target_params: Params, networks: Networks, batch: Sequences, observation: Observation) -> TeamValues:
    """Team values of the actions taken (online) and of the next greedy actions (target), at every slot.

    Sequences of one slot hold only terminated steps, which bootstrap from nothing; their target network is not run.
    """
    task = task_code(networks, batch.slots.task)
    inputs = agent_inputs(networks.config.agent, observation, batch.last_actions, batch.starts, task)
    state = _mixer_state(observation, task)
    online = _unroll(params, networks, inputs, batch)
    greedy = mask_unavailable(online, observation.action_mask).argmax(axis=-1)
    detached = jax.lax.stop_gradient(mask_unavailable(online, observation.action_mask))
    taken = _mix(params, networks, batch.slots.actions, online, detached.max(axis=-1), state, observation)
    agreement = batch.slots.actions == greedy
    if batch.starts.shape[0] == 1:
        return TeamValues(taken, jnp.zeros_like(taken), agreement)
    target = _unroll(target_params, networks, inputs, batch)
    available = mask_unavailable(target, observation.action_mask)
    best = greedy if networks.config.learner.double_q else available.argmax(axis=-1)
    following = _mix(target_params, networks, best, target, available.max(axis=-1), state, observation)
    return TeamValues(taken, following, agreement)


def gradient_step(state: LearnerState, networks: Networks, batch: Sequences, hyper: Hyper) -> tuple[LearnerState, Metrics]:
    """One step of the optimizer on one batch; adds the gradient's norm before clipping, `grad_norm`, to the loss's metrics."""
    optimizer = make_optimizer(networks.config, hyper)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, state.target_params, networks, batch, hyper)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state), {**metrics, "grad_norm": optax.tree.norm(grads)}


def update_target(state: LearnerState, networks: Networks, updates: Int[Array, ""], hyper: Hyper) -> LearnerState:
    """Moves the target network after the gradient step number `updates`, which must not depend on the seed."""
    settings = networks.config.learner
    if settings.target_update == "polyak":
        tau = hyper["learner"]["polyak_tau"]
        target = jax.tree.map(lambda old, new: old + tau * (new - old), state.target_params, state.params)
    else:
        due = updates % settings.target_interval_updates == 0
        target = jax.lax.cond(due, lambda: state.params, lambda: state.target_params)
    return state._replace(target_params=target)


def observe(networks: Networks, record: Any, task: Int[Array, "*N"]) -> Observation:
    """Renders recorded states under the parameters of their tasks, over any batch axes."""
    render = networks.env.observe
    for _ in range(task.ndim):
        render = jax.vmap(render)
    return render(record, networks.tasks.at(task))


def task_code(networks: Networks, task: Int[Array, "*N"]) -> Float[Array, "*N K"] | None:
    """The one-hot of the task, if agents and mixer are to see it."""
    if not networks.config.switch.observe_task:
        return None
    return jax.nn.one_hot(task, len(networks.tasks.names))


def _unroll(params: Params, networks: Networks, inputs: Array, batch: Sequences) -> Array:
    hidden = initial_hidden(networks.config.agent, inputs.shape[1:-1])
    values, _ = networks.agent.apply({"params": params["agent"]}, inputs, batch.starts, hidden)
    return jnp.asarray(values)


def _mix(params: Params, networks: Networks, actions: Array, values: Array, best: Array, state: Array, observation: Observation) -> Array:
    """Team values of given actions; agents that do not exist in the task add nothing."""
    one_hot = jax.nn.one_hot(actions, values.shape[-1], dtype=values.dtype)
    exists = observation.agent_mask
    chosen = jnp.where(exists, (values * one_hot).sum(axis=-1), 0.0)
    inputs = MixerInputs(chosen, jnp.where(exists, best, 0.0), jnp.where(exists[..., None], one_hot, 0.0), state, exists)
    return jnp.asarray(networks.mixer.apply({"params": params["mixer"]}, inputs))


def _mixer_state(observation: Observation, task: Array | None) -> Array:
    return observation.state if task is None else jnp.concatenate([observation.state, task], axis=-1)


def _zero_observation(networks: Networks) -> Observation:
    """An observation `[1, 1, ...]` of zeros."""
    env = networks.env
    return Observation(
        jnp.zeros((1, 1, env.num_agents, env.observation_size)),
        jnp.zeros((1, 1, env.state_size)),
        jnp.ones((1, 1, env.num_agents, env.num_actions), bool),
        jnp.ones((1, 1, env.num_agents), bool),
    )

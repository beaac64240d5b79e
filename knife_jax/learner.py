"""Targets, loss and one gradient step.

Shapes: T slots of a sequence, B sequences, A agents, U actions, M team values (1, or A for independent learners).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from envs.base import Observation
from knife_jax.blocks import in_blocks
from knife_jax.config import Config
from knife_jax.model import Hyper, Networks, Params, States, draw_params, mixer_state, observe_fed, task_code
from knife_jax.networks.agents import mask_unavailable
from knife_jax.networks.mixers import MixerInputs
from knife_jax.plasticity.method import Trees, Variables, keep_state, no_fading, no_penalty
from knife_jax.replay import Continuation, Sequences

Metrics = dict[str, Array]

CACHED_BYTES = 2**18
"""About how much a layer of the target network gives at once on processors: the next one then finds it in a cache."""

METRICS = ("grad_norm", "greedy_share", "loss", "q_tot", "target", "td_error", "valid_share")
"""What `gradient_step` tells of itself."""


class LearnerState(NamedTuple):
    """Everything that a gradient step or an intervention changes.

    Attributes:
        params: `{"agent": ..., "mixer": ...}`.
        target_params: those of the target network.
        opt_state: the state of `optimizer_of`.
        reserve: the frozen part that the cure added, empty for most.
        target_reserve: that of the target network.
        cure: the cure's state.
        report: what the cure did so far, `{"<layer>/<measure>": number}`; see `intervene`.
    """

    params: Params
    target_params: Params
    opt_state: optax.OptState
    reserve: Any
    target_reserve: Any
    cure: Any
    report: Metrics

    @property
    def variables(self) -> Variables:
        """The online network's `{"params": ..., "reserve": ...}`."""
        return {"params": self.params, "reserve": self.reserve}

    @property
    def target_variables(self) -> Variables:
        """The target network's."""
        return {"params": self.target_params, "reserve": self.target_reserve}


class TeamValues(NamedTuple):
    """Agents' values turned into team values, and where the action taken is the greedy one; see `team_values`."""

    online: Float[Array, "T B M"]
    target: Float[Array, "T B M"]
    agrees: Bool[Array, "T B A"]


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
    return optax.chain(clip_by_global_norm(swept["max_grad_norm"]), optimizer)


def optimizer_of(networks: Networks, hyper: Hyper) -> optax.GradientTransformation:
    """The optimizer as the cure wants it, of all parameters as one vector.

    With a kernel for every parameter and each of its moments, these are a quarter of what XLA compiles of a gradient step. Moments are
    vectors, for which interventions see trees, see `moments_as_trees`.
    """
    return optax.flatten(_tree_optimizer(networks, hyper))


def _tree_optimizer(networks: Networks, hyper: Hyper) -> optax.GradientTransformation:
    return networks.cure(hyper).wrap_optimizer(make_optimizer(networks.config, hyper))


def moments_as_trees(tx: optax.GradientTransformation, state: optax.OptState, params: Params) -> optax.OptState:
    """The state that `tx` would have, from that of `optax.flatten(tx)`."""
    return optax.tree_utils.tree_map_params(tx, ravel_pytree(params)[1], state)


def moments_as_vectors(tx: optax.GradientTransformation, state: optax.OptState) -> optax.OptState:
    """What `moments_as_trees` was given."""
    return optax.tree_utils.tree_map_params(tx, lambda tree: ravel_pytree(tree)[0], state, is_leaf=lambda _: True)


def clip_by_global_norm(max_norm: Array | float) -> optax.GradientTransformation:
    """optax's, with a norm that takes the compiler a tenth of the time: see `global_norm`."""

    def clipped(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        norm = global_norm(updates)
        return jax.tree.map(lambda leaf: jnp.where(norm < max_norm, leaf, leaf / norm * max_norm), updates), state

    return optax.GradientTransformation(optax.init_empty_state, clipped)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The square root of the sum of all squares, of all leaves as one vector: two kernels, and not two for every leaf."""
    return jnp.linalg.norm(jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]))


def init(key: PRNGKeyArray, networks: Networks, hyper: Hyper) -> LearnerState:
    """Draws parameters; the target network starts as a copy."""
    cure = networks.cure(hyper)
    variables = cure.allocate({"params": draw_params(key, networks), "reserve": {}})
    params, reserve = variables["params"], variables["reserve"]
    opt_state = optimizer_of(networks, hyper).init(params)
    state = LearnerState(params, params, opt_state, reserve, reserve, cure.init(variables), {})
    said = jax.eval_shape(partial(_report, networks=networks, hyper=hyper), state)
    return state._replace(report=jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), said))


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


def loss_fn(
    variables: Variables, target: Variables, networks: Networks, batch: Sequences, hyper: Hyper
) -> tuple[Float[Array, ""], Metrics]:
    """The masked TD error of a batch of sequences.

    Args:
        variables: of the online network: `params`, and where the cure has them `reserve` and `taps`.
        target: of the target network.
        networks: the modules.
        batch: sequences from the replay.
        hyper: sweepable numbers.

    Returns:
        The loss, of a seed that is split this device's part of it; and metrics of the whole: `loss`, `td_error` (root mean square over
        valid transitions), `q_tot`, `target` (their means), `greedy_share` (how often the action taken is the greedy one) and
        `valid_share`.
    """
    settings, swept, split = networks.config.learner, hyper["learner"], networks.split
    slots = batch.slots
    observation = observed(networks, batch)
    valid = ((slots.continuation != Continuation.CUT) & ~batch.burn_in)[..., None]
    acting = valid & observation.agent_mask
    if variables.get("taps"):
        variables = {**variables, "tap_mask": {"agent": acting, "mixer": valid[..., 0]}}
    values = team_values(variables, target, networks, batch, observation)
    reward = jnp.broadcast_to(slots.reward[..., None] * swept["reward_scale"], values.online.shape)
    targets = td_lambda_returns(reward, values.target, slots.continuation, swept["gamma"], swept["td_lambda"])
    if values.online.shape[-1] > 1:
        valid = acting
    acting = acting.astype(reward.dtype)
    mask = jnp.broadcast_to(valid, values.online.shape).astype(values.online.dtype)
    error = mask * (values.online - jax.lax.stop_gradient(targets))
    number, acted = split.summed((mask.sum(), acting.sum()))
    count, slots_of_all = jnp.maximum(number, 1.0), mask.size * split.parts
    mean_square = jnp.square(error).sum() / count
    scale = swept["loss_scale"] if settings.loss_mean == "valid" else swept["loss_scale"] * count / slots_of_all
    shares = {
        "loss": mean_square * scale,
        "td_error": mean_square,
        "q_tot": (mask * values.online).sum() / count,
        "target": (mask * targets).sum() / count,
        "greedy_share": (acting * values.agrees).sum() / jnp.maximum(acted, 1.0),
    }
    metrics = split.summed(jax.lax.stop_gradient(shares)) | {"valid_share": number / slots_of_all}
    return shares["loss"], metrics | {"td_error": jnp.sqrt(metrics["td_error"])}


def observed(networks: Networks, batch: Sequences) -> Observation:
    """Renders a batch; what it says of `agents` is all that their network is fed, see `agent_inputs`."""
    slots = batch.slots
    return observe_fed(networks, slots.record, slots.task, batch.task, batch.last_actions, batch.starts)


def team_values(variables: Variables, target: Variables, networks: Networks, batch: Sequences, observation: Observation) -> TeamValues:
    """Team values of the actions taken (online) and of the next greedy actions (target), at every slot.

    Sequences of one slot hold only terminated steps, which bootstrap from nothing; their target network is not run.

    Args:
        variables: of the online network.
        target: of the target network.
        networks: the modules.
        batch: sequences from the replay.
        observation: `observed(networks, batch)`.
    """
    state = mixer_state(observation, task_code(networks, batch.slots.task))
    online, _ = _unroll(variables, networks, observation.agents, batch.starts, _no_memory(networks, observation))
    greedy = mask_unavailable(online, observation.action_mask).argmax(axis=-1)
    detached = jax.lax.stop_gradient(mask_unavailable(online, observation.action_mask))
    taken = _mix(variables, networks, batch.slots.actions, online, detached.max(axis=-1), state, observation)
    agreement = batch.slots.actions == greedy
    if batch.starts.shape[0] == 1:
        return TeamValues(taken, jnp.zeros_like(taken), agreement)
    return TeamValues(taken, _greedy_values(target, networks, batch, observation, greedy), agreement)


def _greedy_values(target: Variables, networks: Networks, batch: Sequences, observation: Observation, greedy: Array) -> Array:
    """The target network's team values of the greedy actions, its own unless learning is double-Q.

    No gradient goes through it, so that on processors all of it is worked out for some slots before the next ones: what layers and mixer
    hand on then never leaves the caches.
    """

    def some_slots(hidden: Array, slots: tuple[Observation, Array, Array, Array]) -> tuple[Array, Array]:
        observation, starts, task, best = slots
        values, hidden = _unroll(target, networks, observation.agents, starts, hidden)
        available = mask_unavailable(values, observation.action_mask)
        if not networks.config.learner.double_q:
            best = available.argmax(axis=-1)
        state = mixer_state(observation, task_code(networks, task))
        return hidden, _mix(target, networks, best, values, available.max(axis=-1), state, observation)

    memory, slots = _no_memory(networks, observation), (observation, batch.starts, batch.slots.task, greedy)
    slot_bytes = 4 * greedy[0].size * networks.config.agent.hidden_size
    return in_blocks(some_slots, memory, slots, CACHED_BYTES // slot_bytes)


def gradient_step(state: LearnerState, networks: Networks, batch: Sequences, hyper: Hyper) -> tuple[LearnerState, Metrics]:
    """One step of the optimizer on one batch, which the cure may watch.

    Adds the gradient's norm before clipping, `grad_norm`, to the loss's metrics.
    """
    cure, optimizer = networks.cure(hyper), optimizer_of(networks, hyper)

    def objective(params: Params, taps: Any) -> tuple[Array, Metrics]:
        variables = {"params": params, "reserve": state.reserve, "taps": taps}
        loss, metrics = loss_fn(variables, state.target_variables, networks, batch, hyper)
        if cure.penalty is not no_penalty:
            loss = loss + cure.penalty(params, state.cure) / networks.split.parts
        return loss, metrics

    of_part, metrics = jax.grad(objective, argnums=(0, 1), has_aux=True)(state.params, cure.taps(state.cure))
    grads, seen = networks.split.summed(of_part)
    if cure.observe is not keep_state:
        state = state._replace(cure=cure.observe(state.cure, state.variables, grads, {**seen, "error": error_gradient(metrics)}))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if cure.fade is not no_fading:
        state = state._replace(reserve=cure.fade(state.reserve))
    return state._replace(params=params, opt_state=opt_state), {**metrics, "grad_norm": global_norm(grads)}


def error_gradient(metrics: Metrics) -> Float[Array, ""]:
    """The root mean square of dL/dQ_tot up to the number of transitions, from a loss's metrics."""
    return 2 * metrics["loss"] / jnp.maximum(metrics["td_error"], 1e-12)


def intervene(key: PRNGKeyArray, state: LearnerState, acting: States, networks: Networks, hyper: Hyper) -> tuple[LearnerState, States]:
    """Lets the cure rewrite both networks, the optimizer's state, and the memory of agents at play.

    What it reports is added to `state.report`, except for states of affairs (`reserve_in_use`), which are kept as they are.

    Args:
        key: for what it draws.
        state: the learner.
        acting: see `Networks.running_states`.
        networks: the modules.
        hyper: sweepable numbers.
    """
    cure, optimizer = networks.cure(hyper), _tree_optimizer(networks, hyper)
    moments = moments_as_trees(optimizer, state.opt_state, state.params)
    trees = Trees(state.variables, state.target_variables, moments, acting)
    memory, trees, said = cure.apply(key, state.cure, trees, optimizer)
    assert trees.target is not None and trees.opt_state is not None and trees.states is not None
    before = state.report or said
    report = {name: value if name.endswith("in_use") else before[name] + value for name, value in said.items()}
    online, target = trees.variables, trees.target
    opt_state = moments_as_vectors(optimizer, trees.opt_state)
    state = LearnerState(online["params"], target["params"], opt_state, online["reserve"], target["reserve"], memory, report)
    return state, trees.states


def _report(state: LearnerState, networks: Networks, hyper: Hyper) -> Metrics:
    """What an intervention says, with nobody at play."""
    nobody = networks.running_states(networks.initial_hidden((0,)))
    return intervene(jax.random.key(0), state, nobody, networks, hyper)[0].report


def update_target(state: LearnerState, networks: Networks, updates: Int[Array, ""], hyper: Hyper) -> LearnerState:
    """Moves the target network after the gradient step number `updates`, which must not depend on the seed."""
    settings = networks.config.learner
    if settings.target_update == "polyak":
        tau = hyper["learner"]["polyak_tau"]
        target = jax.tree.map(partial(_towards, tau), state.target_variables, state.variables)
    else:
        due = updates % settings.target_interval_updates == 0
        target = jax.lax.cond(due, lambda: state.variables, lambda: state.target_variables)
    return state._replace(target_params=target["params"], target_reserve=target["reserve"])


def _towards(tau: Array | float, old: Array, new: Array) -> Array:
    """A step from old to new; what is no number but a link between neurons is the same in both networks."""
    return old + tau * (new - old) if jnp.issubdtype(old.dtype, jnp.floating) else new


def _no_memory(networks: Networks, observation: Observation) -> Array:
    """The agents' memory before the first slot, `[B, A, S]`."""
    return _to_compute_in(networks, networks.initial_hidden(observation.agents.shape[1:-1]))


def _unroll(variables: Variables, networks: Networks, inputs: Array, starts: Array, hidden: Array) -> tuple[Array, Array]:
    """Values of all actions, and the memory after the last slot."""
    variables, inputs = _to_compute_in(networks, (variables, inputs))
    values, hidden = networks.apply_agent(variables, inputs, starts, hidden)
    return jnp.asarray(values, jnp.float32), hidden


VALUE_LAYERS = ("output", "v_output")
"""Modules whose output is a value, or is added to one as it is: they compute in float32 whatever the others do."""


def _to_compute_in(networks: Networks, tree: Any) -> Any:
    """Inputs and variables in `learner.compute_dtype`, except for layers of values, and for taps, which count samples."""
    if networks.config.learner.compute_dtype == "float32":
        return tree

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [str(getattr(part, "key", "")).rsplit("/")[-1] for part in path]
        stays = "taps" in names or any(name in VALUE_LAYERS for name in names) or leaf.dtype != jnp.float32
        return leaf if stays else leaf.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, tree)


def _mix(
    variables: Variables, networks: Networks, actions: Array, values: Array, best: Array, state: Array, observation: Observation
) -> Array:
    """Team values of given actions; agents that do not exist in the task add nothing."""
    one_hot = jax.nn.one_hot(actions, values.shape[-1], dtype=values.dtype)
    exists = observation.agent_mask
    chosen = jnp.where(exists, (values * one_hot).sum(axis=-1), 0.0)
    variables, one_hot, state = _to_compute_in(networks, (variables, one_hot, state))
    inputs = MixerInputs(chosen, jnp.where(exists, best, 0.0), jnp.where(exists[..., None], one_hot, 0.0), state, exists)
    return networks.apply_mixer(variables, inputs).astype(jnp.float32)

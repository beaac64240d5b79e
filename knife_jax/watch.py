"""What learned agents do, to look at: an episode of a game that has a picture, or the values of a matrix game.

Shapes: T environment steps, X states of a table, U actions.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure

from envs import predator_prey_render
from envs.base import Outcome
from envs.files import checked_path, complete_or_not
from envs.matrix_game import TabularGame
from envs.predator_prey import PredatorPrey
from envs.smax import render
from envs.smax.game import Smax
from knife_jax.networks.mixers import MixerInputs
from knife_jax.policy import Memory, Policy


def watch(policy: Policy, path: str | Path, task: int = 0, key: PRNGKeyArray | None = None) -> str:
    """Writes a picture of a policy: a `.gif`, `.mp4` or `.png` of an episode, or a `.png` of a matrix game's values.

    Args:
        policy: the agents.
        path: to the file.
        task: the distinct task.
        key: of the episode.

    Returns:
        What is to be seen, in a few words.

    Raises:
        ValueError: for a game without a picture, or a suffix that is not known.
        FileNotFoundError: if the directory does not exist.
    """
    env = policy.networks.env
    params = policy.networks.tasks.at(task)
    if isinstance(env, TabularGame):
        path = checked_path(path, (".png",))
        with complete_or_not(path) as unfinished:
            plot_values(policy, task).savefig(unfinished, dpi=100)
        return "the values of all joint actions"
    if not isinstance(env, PredatorPrey | Smax):
        raise ValueError(f"env.name: there is no picture of {policy.config.env.name!r}; there are of matrix, predator_prey and smax")
    checked_path(path, render.ANIMATIONS + render.FILMSTRIPS)
    states, outcomes = play(policy, task, jax.random.key(0) if key is None else key)
    rewards = np.asarray(outcomes.reward)
    said = f"an episode of {len(rewards)} steps, return {rewards.sum():g}"
    if isinstance(env, PredatorPrey):
        predator_prey_render.save_episode(env, params, states, rewards, path)
        return said
    won, lost, truncated = (bool(flags[-1]) for flags in (outcomes.info["won"], outcomes.info["lost"], outcomes.truncated))
    episode = render.Episode(states, states.last_actions[1:], rewards, won, lost, truncated)
    save = render.save_filmstrip if Path(path).suffix.lower() in render.FILMSTRIPS else render.save_animation
    save(env, params, episode, path)
    return said


def play(policy: Policy, task: int, key: PRNGKeyArray) -> tuple[Any, Outcome]:
    """Plays one complete greedy episode: the states at all T + 1 times, and the T outcomes, in numpy."""
    env, params = policy.networks.env, policy.networks.tasks.at(task)

    def step(carry: tuple[Any, Memory], key: PRNGKeyArray) -> tuple[tuple[Any, Memory], tuple[Any, Outcome]]:
        state, memory = carry
        view = env.observe(env.record(state), params)
        actions, memory = policy.act(view.agents, memory, view.action_mask, task=task)
        state, outcome = env.step(key, state, actions, params)
        return (state, memory), (state, outcome)

    @jax.jit
    def rollout(key: PRNGKeyArray) -> tuple[Any, tuple[Any, Outcome]]:
        key_start, key_steps = jax.random.split(key)
        first = env.reset(key_start, params)
        keys = jax.random.split(key_steps, env.max_steps)
        return first, jax.lax.scan(step, (first, policy.initial_memory()), keys)[1]

    first, (states, outcomes) = jax.device_get(rollout(key))
    length = int(np.argmax(outcomes.terminated | outcomes.truncated)) + 1
    outcomes = jax.tree.map(lambda leaf: leaf[:length], outcomes)
    return jax.tree.map(lambda start, later: np.concatenate([start[None], later[:length]]), first, states), outcomes


def joint_values(policy: Policy, task: int = 0) -> Float[Array, "X U U"]:
    """The team's value of every joint action in every state of a tabular game, to agents that remember nothing."""
    networks = policy.networks
    env, params = networks.env, networks.tasks.at(task)
    assert isinstance(env, TabularGame)
    actions = jnp.stack(jnp.meshgrid(jnp.arange(env.num_actions), jnp.arange(env.num_actions), indexing="ij"), axis=-1)
    one_hot = jax.nn.one_hot(actions, env.num_actions)

    def of_state(state: Array) -> Array:
        view = env.observe(state.astype(jnp.uint8), params)
        values, _ = policy.values(view.agents, policy.initial_memory(), task)
        best = jnp.where(view.action_mask, values, -jnp.inf).max(axis=-1)
        code = jax.nn.one_hot(task, len(networks.tasks.names)) if networks.config.switch.observe_task else jnp.zeros(0)
        whole = jnp.broadcast_to(jnp.concatenate([view.state, code]), (*actions.shape[:-1], env.state_size + code.size))
        chosen = (values[None, None] * one_hot).sum(axis=-1)
        return networks.apply_mixer(policy.variables, MixerInputs(chosen, jnp.broadcast_to(best, chosen.shape), one_hot, whole)).sum(
            axis=-1
        )

    return jax.jit(jax.vmap(of_state))(jnp.arange(env.num_states))


def plot_values(policy: Policy, task: int = 0) -> Figure:
    """Tables of the team's values beside the rewards; what the agents choose is framed."""
    env, params = policy.networks.env, policy.networks.tasks.at(task)
    values, rewards = np.asarray(joint_values(policy, task)), np.asarray(params.reward)
    available = np.asarray(params.action_mask[0])[:, None] & np.asarray(params.action_mask[1])[None, :]
    figure = Figure(figsize=(8, 3.8 * len(values)), layout="constrained")
    panels = figure.subplots(len(values), 2, squeeze=False)
    for state, row in enumerate(panels):
        for axes, table, title in zip(row, (rewards[state], values[state]), ("reward", "learned value"), strict=True):
            axes.imshow(np.where(available, table, np.nan), cmap="RdYlGn")
            for (first, second), number in np.ndenumerate(table):
                if available[first, second]:
                    axes.annotate(f"{number:.3g}", (second, first), ha="center", va="center")
            best = np.unravel_index(np.argmax(np.where(available, values[state], -np.inf)), table.shape)
            axes.plot(best[1], best[0], marker="s", markersize=40, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
            axes.set(title=f"{title}, state {state + 1}" if env.num_states > 1 else title, xlabel="agent 2", ylabel="agent 1")  # pyright: ignore[reportAttributeAccessIssue]
            axes.set_xticks(range(table.shape[1]))
            axes.set_yticks(range(table.shape[0]))
    figure.suptitle(
        f"{policy.config.learner.mixer} on {policy.networks.tasks.names[task]}, seed {policy.seed}; the highest value is framed"
    )
    return figure

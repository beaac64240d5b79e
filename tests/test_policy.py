"""What a run learned, loaded again: the same agents, asked, evaluated and drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from envs import predator_prey_render
from envs.predator_prey import PredatorPrey
from knife_jax import cli, collect, policy, runner, watch
from knife_jax.config import resolve
from knife_jax.plan import make_game
from knife_jax.program import make_program
from knife_jax.run_result import RunResult

TINY = {"agent": {"hidden_size": 4}, "qmix": {"embed_size": 2, "hypernet_size": 2}, "replay": {"batch_size": 2, "sequence_length": 2}}
GAMES = {
    "matrix": {"env": {"name": "matrix", "scenario": "permuted", "options": {"num_tasks": 2}}, "switch": {"observe_task": True}},
    "predator_prey": {"env": {"name": "predator_prey", "scenario": "wqmix", "options": {"max_steps": 5}}},
    "smax": {"env": {"name": "smax", "scenario": "3m", "options": {"max_steps": 4}}},
}


def _untrained(name, tmp_path, seeds=2, **fields):
    """The directory of a run of no steps: what `runner.run` returns at its start, written as ever."""
    config = resolve({**TINY, **GAMES[name], **fields})
    program, tasks = make_program(config), make_game(config)[1]
    keys = runner.seed_keys(seeds, 5)
    learner = jax.vmap(lambda key: program.init(key, config.hyper).learner)(keys)
    nothing = {"eval/return": np.zeros((seeds, 1))}
    result = RunResult(config, nothing, tasks.names, tasks.order, jax.device_get(learner.variables), {}, {"first_seed": 5})
    policy.save(result, tmp_path)
    return program, result


@pytest.mark.parametrize("name", ["matrix", pytest.param("predator_prey", marks=pytest.mark.slow)])
def test_loaded_agents_act_as_those_that_were_trained(name, tmp_path):
    """Greedy actions over a whole episode, with memory, last actions, identity and task, are the collector's."""
    program, result = _untrained(name, tmp_path, plasticity={"name": "knife", "when_full": "skip"})
    networks, task = program.networks, 0
    loaded = policy.load_policy(tmp_path, seed=6)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, jax.tree.map(lambda leaf: leaf[1], result.variables))
    states, outcomes = watch.play(loaded, task, jax.random.key(3))
    env, params = networks.env, networks.tasks.at(task)
    actors = collect.ActorState(None, networks.initial_hidden((1, env.num_agents)), jnp.zeros((1, env.num_agents), int), jnp.ones(1, bool))
    memory, act = loaded.initial_memory(), jax.jit(loaded.act)
    ask = jax.jit(lambda view, actors: collect._act_values(loaded.variables, networks, view, actors, jnp.int32(task)))
    for step in range(len(outcomes.reward)):
        view = env.observe(env.record(jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf[step]), states)), params)
        batched = jax.tree.map(lambda leaf: leaf[None], view)
        values, hidden = ask(batched, actors)
        wanted = jnp.where(batched.action_mask, values, -jnp.inf).argmax(axis=-1)
        actions, memory = act(view.agents, memory, view.action_mask)
        np.testing.assert_array_equal(actions, wanted[0])
        np.testing.assert_allclose(memory.hidden, hidden[0], atol=1e-6)
        actors = collect.ActorState(None, hidden, wanted, jnp.zeros(1, bool))


def test_exploring_agents_take_available_actions_and_need_a_key(tmp_path):
    """Under `vmap` and `jit`."""
    _untrained("predator_prey", tmp_path)
    loaded = policy.load_policy(tmp_path)
    env = loaded.networks.env
    mask = jnp.arange(env.num_actions)[None, :] < jnp.arange(1, env.num_agents + 1)[:, None].clip(max=3)
    seen = jnp.zeros((env.num_agents, env.observation_size))
    ask = jax.jit(jax.vmap(lambda key: loaded.act(seen, loaded.initial_memory(), mask, key, epsilon=1.0)[0]))
    actions = np.asarray(ask(jax.random.split(jax.random.key(0), 200)))
    np.testing.assert_array_equal(actions.max(axis=0), mask.sum(axis=1) - 1)
    with pytest.raises(ValueError, match=r"epsilon: exploring with 0\.5 needs a key"):
        loaded.act(seen, loaded.initial_memory(), mask, epsilon=0.5)


def test_evaluation_plays_every_task_with_every_seed(tmp_path, capsys):
    """On a deterministic game the return is the payoff of the greedy joint action, which the table of values shows too."""
    _untrained("matrix", tmp_path)
    played = policy.evaluate(tmp_path, 3)
    loaded = policy.load_policy(tmp_path, 6)
    for task, name in enumerate(loaded.networks.tasks.names):
        returns = played[name]["return"]
        assert returns.shape == (2, 3) and np.ptp(returns, axis=1).max() == 0
        best = np.unravel_index(np.argmax(watch.joint_values(loaded, task)[0]), (3, 3))  # QMIX is monotone
        assert returns[1, 0] == loaded.networks.tasks.params.reward[task, 0][best]
    assert cli.main(["evaluate", str(tmp_path), "--episodes", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 seeds, 2 episodes each" in said and "permuted_2" in said


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("matrix", "png"), ("predator_prey", "gif"), ("predator_prey", "png"), pytest.param("smax", "gif", marks=pytest.mark.slow)],
)
def test_watch_draws_every_game(name, suffix, tmp_path, capsys):
    """A picture of the right kind that is not blank; animations with a frame for every step at least."""
    _untrained(name, tmp_path)
    out = tmp_path / f"picture.{suffix}"
    assert cli.main(["watch", str(tmp_path), "--out", str(out), "--seed", "6"]) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.format == suffix.upper()
        assert len(image.convert("RGB").getcolors(2**20) or []) > 10
        assert suffix == "png" or getattr(image, "n_frames", 1) >= 4
    assert not list(tmp_path.glob(".picture*"))


def test_predator_prey_is_drawn_where_things_are(tmp_path):
    """Numbered agents and the prey alive, at (column, row), walls and what is frozen told apart."""
    from matplotlib.figure import Figure

    _untrained("predator_prey", tmp_path)
    loaded = policy.load_policy(tmp_path)
    env, params = loaded.networks.env, loaded.networks.tasks.at(0)
    assert isinstance(env, PredatorPrey)
    states, outcomes = watch.play(loaded, 0, jax.random.key(0))
    axes = Figure().subplots()
    predator_prey_render.draw(axes, env, params, states, np.asarray(outcomes.reward), 0)
    drawn = {tuple(np.asarray(line.get_xydata(), int)[0].tolist()) for line in axes.lines}
    here = {(int(column), int(row)) for row, column in (*states.agents[0], *states.prey[0][states.alive[0]])}
    assert drawn == here
    assert {text.get_text() for text in axes.texts} == {str(number + 1) for number in range(env.num_agents)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "no policy in nowhere: policy.json is missing"),
        (["evaluate", "{run}", "--episodes", "0"], "episodes: at least 1"),
        (["evaluate", "{run}", "--seed", "0"], "seeds 5 to 6, not 0"),
        (["watch", "{run}", "--task", "permuted_3"], "unknown task 'permuted_3'; did you mean 'permuted_2'"),
        (["watch", "{run}", "--out", "{run}/picture.gif"], "path must end in .png"),
        (["watch", "{run}", "--out", "nowhere/picture.png"], "the directory nowhere of picture.png does not exist"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path, capsys):
    """Status 2 and what is wrong."""
    _untrained("matrix", tmp_path)
    assert cli.main([word.replace("{run}", str(tmp_path)) for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_policy_is_told(tmp_path):
    """Weights cut short, and a description that is none."""
    _untrained("matrix", tmp_path)
    weights = tmp_path / policy.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"policy in .* is damaged"):
        policy.load_policy(tmp_path)
    (tmp_path / policy.DESCRIPTION).write_text("{")
    with pytest.raises(ValueError, match=r"policy in .* is damaged"):
        policy.load_policy(tmp_path)

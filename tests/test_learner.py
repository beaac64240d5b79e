"""Targets and losses: the table of TD(lambda) returns, and the same numbers through the real collector, replay and learner."""

import functools
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from envs.base import stack_tasks
from knife_jax import collect, learner, make_program, replay
from knife_jax.config import Config
from knife_jax.model import draw_params, make_networks, observe
from knife_jax.networks.agents import UNAVAILABLE, agent_inputs, initial_hidden
from knife_jax.networks.mixers import MixerInputs
from knife_jax.replay import Continuation
from tests.probe import ProbeGame, ProbeParams

CONTINUE, TERMINATED, TRUNCATED, CUT = (int(kind) for kind in Continuation)

TABLE = {
    "terminal at t=3": (
        [CONTINUE, CONTINUE, CONTINUE, TERMINATED, CUT],
        {0.0: [19, 29, 39, 4], 0.6: [20.815696, 23.3624, 19.56, 4], 1.0: [8.146, 7.94, 6.6, 4]},
    ),
    "truncated at the end": (
        [CONTINUE, CONTINUE, CONTINUE, TRUNCATED, CUT],
        {0.0: [19, 29, 39, 49], 0.6: [27.901576, 36.4844, 43.86, 49], 1.0: [40.951, 44.39, 47.1, 49]},
    ),
    "cut at the end": (
        [CONTINUE, CONTINUE, CONTINUE, CONTINUE, CUT],
        {0.0: [19, 29, 39, 49], 0.6: [27.901576, 36.4844, 43.86, 49], 1.0: [40.951, 44.39, 47.1, 49]},
    ),
    "terminal at t=1, padded": (
        [CONTINUE, TERMINATED, CUT, CUT, CUT],
        {0.0: [19, 2, 0, 0], 0.6: [9.28, 2, 0, 0], 1.0: [2.8, 2, 0, 0]},
    ),
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("td_lambda", [0.0, 0.6, 1.0])
def test_td_lambda_table(case, td_lambda):
    """Published worked example: gamma .9, rewards 1 to 4, values 10 to 50; padded rows are masked."""
    kinds, expected = TABLE[case]
    reward, values = jnp.array([1.0, 2, 3, 4, 0])[:, None, None], jnp.array([10.0, 20, 30, 40, 50])[:, None, None]
    continuation = jnp.array(kinds)[:, None]
    returns = learner.td_lambda_returns(reward, values, continuation, 0.9, td_lambda)
    masked = jnp.where(continuation[..., None] == CUT, 0.0, returns)[:-1, 0, 0]
    np.testing.assert_allclose(masked, expected[td_lambda], atol=1e-5)


def test_a_truncation_in_the_middle_does_not_leak_into_what_comes_before():
    """A short truncated episode bootstraps from its own last observation, not from whatever follows in the sequence."""
    kinds = jnp.array([CONTINUE, TRUNCATED, CUT, CONTINUE, CUT])[:, None]
    reward, values = jnp.array([1.0, 2, 0, 100, 0])[:, None, None], jnp.array([10.0, 20, 30, 1000, 1000])[:, None, None]
    returns = learner.td_lambda_returns(reward, values, kinds, 0.9, 1.0)[:, 0, 0]
    np.testing.assert_allclose(returns[:2], [1 + 0.9 * (2 + 0.9 * 30), 2 + 0.9 * 30], rtol=1e-6)


VALUES = np.array([10.0, 20.0, 30.0, 40.0])
"""The target network's team value of each of the probe game's four observations."""


def _probe(mode, td_lambda, **replay_fields):
    """A configuration, networks and a collector on the probe game, whose two tasks end by rule and by time limit."""
    config = Config.from_dict(
        {
            "agent": {"recurrent": False, "hidden_size": 4, "last_action": False, "agent_id": False},
            "learner": {"mixer": "vdn", "gamma": 0.9, "td_lambda": td_lambda, "double_q": False},
            "collect": {"mode": mode, "num_envs": 3},
            "replay": {"batch_size": 16, **replay_fields},
        }
    )
    game = ProbeGame()
    rewards = jnp.array([1.0, 2.0, 3.0])
    tasks = stack_tasks([ProbeParams(jnp.array(True), rewards), ProbeParams(jnp.array(False), rewards)], ["ends", "stops"])
    return config, make_networks(config, game, tasks)


def _known_values(state):
    """Parameters whose agents' values add up to `VALUES`: the first layer passes the one-hot on, the last one reads it out."""
    agent = jax.tree.map(jnp.zeros_like, state.params["agent"])
    for name in ("hidden_1", "hidden_2"):
        agent[name]["kernel"] = jnp.eye(4)
    agent["output"]["kernel"] = jnp.tile(jnp.asarray(VALUES / 2, jnp.float32)[:, None], (1, 2))
    return {**state.params, "agent": agent}


@functools.cache
def _probe_collector(mode, length, rollouts):
    """The compiled collection on the probe game by task; the learner's numbers play no part in it."""
    config, networks = _probe(mode, 0.0)
    return jax.jit(lambda task: _collect(config, networks, task, length, rollouts))


def _collected(config, task, length, rollouts):
    """A replay filled by the real collector on the probe game, and freshly drawn learner state."""
    return _probe_collector(config.collect.mode, length, rollouts)(jnp.int32(task))


def _collect(config, networks, task, length, rollouts):
    """A replay filled by the real collector, and freshly drawn learner state."""
    env = collect.acting_environment(networks.env, config.collect.mode)
    state = learner.init(jax.random.key(0), networks, config.hyper)

    def fresh(key):
        return collect.init_actors(jax.random.split(key, config.collect.num_envs), networks, env, networks.tasks.at(task))

    collector = collect.CollectorState(fresh(jax.random.key(1)), jnp.zeros(()))
    stored = None
    for index in range(rollouts):
        if config.collect.mode != "continuous":
            collector = collector._replace(actors=fresh(jax.random.key(index)))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(2), index), (length, 1 + config.collect.num_envs))
        collector, rollout, _ = collect.explore(keys, state.variables, networks, collector, task, config.hyper)
        if config.collect.mode == "rollout":
            rollout = collect.cut_rollout(rollout)
        if stored is None:
            slot = jax.tree.map(lambda leaf: leaf[0, 0], rollout)
            stored = replay.init(slot, config.collect.num_envs, 4 * length)
        stored = replay.add(stored, rollout)
    return stored, state


_sampler = jax.jit(replay.sample, static_argnums=(2, 3, 4))


def _sample(stored, batch_size, length, stride=1):
    return _sampler(jax.random.key(3), stored, batch_size, length, stride)


def _targets(config, networks, state, batch):
    """The real learner's target of every slot, NaN where it is not trained on."""
    params = _known_values(state)
    values = _team_values(params, networks, batch)
    swept = config.hyper["learner"]
    reward = batch.slots.reward[..., None]
    targets = learner.td_lambda_returns(reward, values.target, batch.slots.continuation, swept["gamma"], swept["td_lambda"])
    return np.where(np.asarray(batch.slots.continuation) == CUT, np.nan, np.asarray(targets[..., 0]))


def _team_values(params, networks, batch, **masks):
    def values(params, batch):
        observation = learner.observed(networks, batch)._replace(**masks)
        return learner.team_values({"params": params}, {"params": params}, networks, batch, observation)

    return jax.jit(values)(params, batch)


def _expected(terminates, td_lambda, following):
    """Targets of the three steps by hand, when only the next `following` steps of the episode are in the sequence."""
    gamma, rewards = 0.9, [1.0, 2.0, 3.0]
    targets = {}
    for step in range(3):
        last = min(step + following - 1, 2)
        value = 0.0 if terminates and last == 2 else VALUES[last + 1]
        result = rewards[last] + gamma * value
        for earlier in range(last - 1, step - 1, -1):
            result = rewards[earlier] + gamma * ((1 - td_lambda) * VALUES[earlier + 1] + td_lambda * result)
        targets[step] = result
    return targets


@pytest.mark.parametrize("td_lambda", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("terminates", [True, False])
def test_targets_through_collector_replay_and_learner(terminates, td_lambda):
    """Terminal, truncated and cut transitions, in sequences that mix episodes at every offset, with auto-reset in between."""
    config, networks = _probe("continuous", td_lambda)
    stored, state = _collected(config, 0 if terminates else 1, 5, 3)
    batch = _sample(stored, 64, 7)
    targets = jax.tree.map(np.asarray, _targets(config, networks, state, batch))
    step, kinds = np.asarray(batch.slots.record), np.asarray(batch.slots.continuation)
    assert set(step[0]) == {0, 1, 2, 3}
    for time in range(7):
        for column in range(64):
            if step[time, column] == 3 or (time == 6 and kinds[time, column] != TERMINATED):
                assert np.isnan(targets[time, column])
                continue
            ends_on_last_slot = terminates and time + 2 - step[time, column] == 6
            following = 7 - time if ends_on_last_slot else 6 - time
            expected = _expected(terminates, td_lambda, following)[step[time, column]]
            np.testing.assert_allclose(targets[time, column], expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["episode", "rollout"])
@pytest.mark.parametrize("terminates", [True, False])
def test_targets_of_whole_rollouts(mode, terminates):
    """Idle slots after an episode, and the cut end of a rollout, are never trained on."""
    length = 4 if mode == "episode" else 6
    config, networks = _probe(mode, 0.6)
    stored, state = _collected(config, 0 if terminates else 1, length, 3)
    batch = _sample(stored, 16, length, length)
    targets, step = _targets(config, networks, state, batch), np.asarray(batch.slots.record)
    np.testing.assert_array_equal(step[:, 0], [0, 1, 2, 3] if mode == "episode" else [0, 1, 2, 3, 0, 1])
    whole = _expected(terminates, 0.6, following=3)
    np.testing.assert_allclose(targets[:3], np.tile([[whole[time]] for time in range(3)], (1, 16)), rtol=1e-5)
    assert np.isnan(targets[3]).all()
    if mode == "rollout":
        np.testing.assert_allclose(targets[4], _expected(terminates, 0.6, following=1)[0], rtol=1e-5)
        assert np.isnan(targets[5]).all()


def test_an_episode_shorter_than_the_rollout_idles():
    """In the mode `episode` nothing happens after the end: no reward, no reset, no valid transition."""
    config, _ = _probe("episode", 0.0)
    stored, _ = _collected(config, 0, 6, 1)
    np.testing.assert_array_equal(stored.slots.record[0, :6], [0, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(stored.slots.continuation[0, :6], [CONTINUE, CONTINUE, TERMINATED, CUT, CUT, CUT])
    np.testing.assert_array_equal(stored.slots.reward[0, :6], [1, 2, 3, 0, 0, 0])


def test_masked_slots_have_no_part_in_the_loss():
    """Whatever stands in a cut slot's reward, neither loss nor gradient sees it; burn-in neither."""
    config, networks = _probe("continuous", 0.0)
    stored, state = _collected(config, 0, 5, 3)
    batch = _sample(stored, 16, 7)
    spoiled = jnp.where(batch.slots.continuation == CUT, 1e6, batch.slots.reward)
    loss = jax.jit(
        lambda batch: jax.value_and_grad(learner.loss_fn, has_aux=True)(state.variables, state.variables, networks, batch, config.hyper)
    )
    (clean, metrics), grads = loss(batch)
    (same, _), same_grads = loss(batch._replace(slots=batch.slots._replace(reward=spoiled)))
    assert clean == same
    jax.tree.map(np.testing.assert_array_equal, grads, same_grads)
    assert 0 < metrics["valid_share"] < 1
    warm = batch._replace(burn_in=jnp.ones_like(batch.burn_in))
    assert loss(warm)[0][0] == 0


def test_independent_learners_are_trained_apart():
    """Without a mixer each agent has its own error, and the mean is over agents too."""
    config, networks = _probe("continuous", 0.0)
    config = Config.from_dict({"learner": {"mixer": "none"}}, config)
    networks = make_networks(config, networks.env, networks.tasks)
    stored, state = jax.jit(lambda: _collect(config, networks, jnp.int32(0), 5, 3))()
    batch = _sample(stored, 16, 7)
    assert _team_values(state.params, networks, batch).online.shape == (7, 16, 2)
    loss, metrics = jax.jit(lambda variables: learner.loss_fn(variables, variables, networks, batch, config.hyper))(state.variables)
    np.testing.assert_allclose(loss, metrics["td_error"] ** 2, rtol=1e-5)


def test_rmsprop_is_the_one_of_torch():
    """`p -= lr g / (sqrt(v) + eps)`: epsilon outside the root, no bias correction, after clipping the global norm."""
    config = Config.from_dict({"optimizer": {"learning_rate": 0.1, "eps": 0.5, "max_grad_norm": 5.0}})
    optimizer = learner.make_optimizer(config, config.hyper)
    params = jnp.array([1.0, 1.0])
    grads = jnp.array([6.0, 8.0])
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    clipped = np.array([3.0, 4.0])
    updated = jnp.asarray(optax.apply_updates(params, updates))
    np.testing.assert_allclose(updated, 1 - 0.1 * clipped / (np.sqrt(0.01 * clipped**2) + 0.5), rtol=1e-6)


@pytest.mark.parametrize("cure", ["none", "knife", "weight_decay"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_one_vector_of_parameters_is_stepped_as_a_tree_of_them_is(cure, optimizer):
    """Two steps, clipped and not, and what an intervention sees of the state: as the tree's optimizer has them, there and back."""
    config = Config.from_dict({"preset": "matrix_drift", "optimizer": {"name": optimizer}, "plasticity": {"name": cure}})
    networks = make_program(config).networks
    hyper = networks.config.hyper
    params = draw_params(jax.random.key(0), networks)
    flat, tree = learner.optimizer_of(networks, hyper), networks.cure(hyper).wrap_optimizer(learner.make_optimizer(networks.config, hyper))
    ours, theirs = flat.init(params), tree.init(params)
    for size in (1e-3, 10.0):
        grads = jax.tree.map(lambda leaf, size=size: size * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), params)
        updates, ours = flat.update(grads, ours, params)
        expected, theirs = tree.update(grads, theirs, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-9)
    seen = learner.moments_as_trees(tree, ours, params)
    chex.assert_trees_all_equal_structs(seen, theirs)
    chex.assert_trees_all_close(seen, theirs, rtol=1e-5, atol=1e-9)
    chex.assert_trees_all_equal(learner.moments_as_vectors(tree, seen), ours)
    sizes = {leaf.shape for leaf in jax.tree.leaves(ours) if leaf.ndim}
    assert sizes == {(sum(leaf.size for leaf in jax.tree.leaves(params)),)}


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_is_that_of_optax(max_norm):
    """Of leaves of several shapes, where the norm is above the limit and where it is not."""
    draws = np.random.default_rng(0)
    grads = {name: jnp.asarray(draws.normal(size=shape), jnp.float32) for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", ()))}
    assert float(learner.global_norm(grads)) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    ours, theirs = learner.clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)
    clipped, state = ours.update(grads, ours.init(grads))
    expected, expected_state = theirs.update(grads, theirs.init(grads))
    assert state == expected_state
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)


def test_exploration_takes_available_actions_only():
    """The mixture is uniform over what is available with probability epsilon, and greedy among it otherwise."""
    values = jnp.tile(jnp.array([[5.0, 1.0, 2.0, 9.0]]), (40_000, 1))
    mask = jnp.tile(jnp.array([[True, True, True, False]]), (40_000, 1))
    actions = np.asarray(collect.epsilon_greedy(jax.random.key(0), values, mask, jnp.float32(0.3)))
    shares = np.bincount(actions, minlength=4) / len(actions)
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1, 0.0], atol=0.01)
    assert shares[3] == 0
    greedy = collect.epsilon_greedy(jax.random.key(0), values, mask, jnp.float32(0.0))
    assert (greedy == 0).all()
    assert UNAVAILABLE < -1e6


def test_epsilon_is_linear_in_environment_steps():
    """From start to finish, then flat."""
    config = Config.from_dict({"exploration": {"epsilon_start": 1.0, "epsilon_finish": 0.2, "anneal_env_steps": 100.0}})
    steps = jnp.array([0.0, 50.0, 100.0, 1e6])
    np.testing.assert_allclose(jax.vmap(lambda s: collect.epsilon_at(s, config.hyper))(steps), [1.0, 0.6, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("kind", ["hard", "polyak"])
def test_target_updates(kind):
    """Hard copies at multiples of the interval, Polyak steps always."""
    config, networks = _probe("continuous", 0.0)
    config = Config.from_dict({"learner": {"target_update": kind, "target_interval_updates": 10, "polyak_tau": 0.25}}, config)
    networks = networks._replace(config=config)
    state = learner.init(jax.random.key(0), networks, config.hyper)
    state = state._replace(target_params=jax.tree.map(jnp.zeros_like, state.params))
    for updates, share in ((9, 0.0), (10, 1.0)) if kind == "hard" else ((9, 0.25), (10, 0.25)):
        target = learner.update_target(state, networks, jnp.int32(updates), config.hyper).target_params
        jax.tree.map(lambda t, p, share=share: np.testing.assert_allclose(t, share * p, rtol=1e-6), target, state.params)


def test_agents_that_do_not_exist_add_nothing():
    """A masked agent changes neither the team value nor any gradient."""
    config, networks = _probe("continuous", 0.0)
    stored, state = _collected(config, 0, 5, 3)
    batch = _sample(stored, 4, 3)
    params = _known_values(state)
    both = _team_values(params, networks, batch).online
    one = _team_values(params, networks, batch, agent_mask=jnp.ones((3, 4, 2), bool).at[..., 1].set(False)).online
    np.testing.assert_allclose(both, 2 * one, rtol=1e-6)


@dataclass(frozen=True)
class _MaskedProbe(ProbeGame):
    """The probe game where the second action is missing after an odd number of steps."""

    def observe(self, record, params):
        """As the probe game's, with the mask."""
        seen = super().observe(record, params)
        return seen._replace(action_mask=seen.action_mask.at[:, 1].set(record % 2 == 0))


@functools.partial(jax.jit, static_argnums=0)
def _applied(module, params, *inputs):
    """A network's outputs; compiled once for all slots."""
    return module.apply({"params": params}, *inputs)


def _step_by_step(networks, params, batch, observation):
    """Action values of every slot, one application per slot as the actor makes them, `[T][B, A, U]`."""
    hidden = initial_hidden(networks.config.agent, (batch.starts.shape[1], networks.env.num_agents))
    values = []
    for time in range(batch.starts.shape[0]):
        now = jax.tree.map(lambda leaf, time=time: leaf[time : time + 1], (observation, batch.last_actions, batch.starts))
        inputs = agent_inputs(networks.config.agent, *now)
        q, hidden = _applied(networks.agent, params["agent"], inputs, now[2], hidden)
        values.append(np.asarray(q)[0])
    return values


def _reference_loss(config, networks, params, target_params, batch):
    """The loss from its definition, slot by slot: double-Q, masks, mixing, TD(lambda), mean over valid slots."""
    observation = observe(networks, batch.slots.record, batch.slots.task)
    swept = config.hyper["learner"]
    online, target = (_step_by_step(networks, tree, batch, observation) for tree in (params, target_params))
    mask, state = np.asarray(observation.action_mask), np.asarray(observation.state)
    kinds, reward = np.asarray(batch.slots.continuation), np.asarray(batch.slots.reward)
    length, size = kinds.shape

    def team(tree, q, actions, time, row):
        best = np.where(mask[time, row], q, -np.inf).max(-1)
        chosen = np.take_along_axis(q, actions[:, None], -1)[:, 0]
        one_hot = jax.nn.one_hot(actions, networks.env.num_actions)
        inputs = MixerInputs(jnp.asarray(chosen), jnp.asarray(best), one_hot, jnp.asarray(state[time, row]))
        return float(_applied(networks.mixer, tree["mixer"], inputs)[0])

    errors, targets = [], []
    for row in range(size):
        following = []
        for time in range(length):
            selector = online if config.learner.double_q else target
            greedy = np.where(mask[time, row], selector[time][row], -np.inf).argmax(-1)
            following.append(team(target_params, target[time][row], greedy, time, row))
        result = following[-1]
        for time in reversed(range(length)):
            if kinds[time, row] == CUT:
                result = following[time]
                continue
            value = 0.0
            if kinds[time, row] != TERMINATED:
                value = (1 - swept["td_lambda"]) * following[time + 1] + swept["td_lambda"] * result
            result = swept["reward_scale"] * reward[time, row] + swept["gamma"] * value
            taken = np.asarray(batch.slots.actions[time, row], int)
            targets.append(result)
            errors.append(team(params, online[time][row], taken, time, row) - result)
    return swept["loss_scale"] * np.mean(np.square(errors)), np.mean(targets)


@pytest.mark.parametrize(("mixer", "double_q"), [("vdn", False), ("qmix", True), ("qplex", True), ("qplex", False)])
def test_the_loss_is_its_definition(mixer, double_q):
    """Distinct online and target networks, memory, missing actions, every kind of end: against a slot-by-slot computation."""
    config = Config.from_dict(
        {
            "agent": {"hidden_size": 8},
            "learner": {"mixer": mixer, "double_q": double_q, "gamma": 0.9, "td_lambda": 0.6, "reward_scale": 0.5, "loss_scale": 0.5},
            "qplex": {"num_kernels": 2, "adv_size": 8, "hypernet_size": 8},
            "qmix": {"embed_size": 8, "hypernet_size": 8},
            "collect": {"num_envs": 3},
        }
    )
    rewards = jnp.array([1.0, 2.0, 3.0])
    tasks = stack_tasks([ProbeParams(jnp.array(True), rewards), ProbeParams(jnp.array(False), rewards)], ["ends", "stops"])
    networks = make_networks(config, _MaskedProbe(), tasks)
    trees = []
    for seed in (0, 1):
        drawn = learner.init(jax.random.key(seed), networks, config.hyper).params
        noise = np.random.default_rng(seed)
        trees.append(jax.tree.map(lambda leaf, noise=noise: leaf + jnp.asarray(noise.normal(size=leaf.shape), leaf.dtype), drawn))
    collected = jax.jit(lambda task: _collect(config, networks, task, 5, 3))
    loss_fn = jax.jit(lambda v, t, b: learner.loss_fn(v, t, networks, b, config.hyper))
    for task in (0, 1):
        batch = _sample(collected(jnp.int32(task))[0], 6, 7)
        online, target = ({"params": tree} for tree in trees)
        loss, metrics = loss_fn(online, target, batch)
        expected_loss, expected_target = _reference_loss(config, networks, trees[0], trees[1], batch)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["target"], expected_target, rtol=1e-4, atol=1e-5)

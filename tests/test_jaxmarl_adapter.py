"""JaxMARL's games seen through our interface, and ours through JaxMARL's."""

import functools
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import smax
from envs.base import Environment, Observation, Outcome
from envs.jaxmarl_adapter import from_jaxmarl, make_jaxmarl, to_jaxmarl
from envs.jaxmarl_quiet import import_jaxmarl, in_jaxmarl
from envs.wrappers import AutoReset, EpisodeStatistics

BATCH = 8

# name: observation size, state size, actions
SCENARIO_SIZES = {
    "3m": (75, 72, 8),
    "2s3z": (127, 120, 10),
    "8m": (205, 192, 13),
    "3s5z": (205, 192, 13),
    "25m": (647, 600, 30),
    "5m_vs_6m": (140, 132, 11),
    "10m_vs_11m": (270, 252, 16),
    "27m_vs_30m": (738, 684, 35),
    "3s5z_vs_3s6z": (218, 204, 14),
    "3s_vs_5z": (101, 96, 10),
    "6h_vs_8z": (179, 168, 13),
    "smacv2_5_units": (127, 120, 10),
    "smacv2_10_units": (257, 240, 15),
    "smacv2_20_units": (517, 480, 25),
}


@jax.jit
def random_actions(key, action_mask):
    """Draws uniformly among the available actions."""
    return jax.random.categorical(key, jnp.where(action_mask, 0.0, -jnp.inf)).astype(jnp.int32)


class Trace(NamedTuple):
    """One random-policy step: what was seen before it, and what came of it."""

    before: Observation
    outcome: Outcome


def rollout(env: Environment, key, num_envs: int, num_steps: int) -> Trace:
    """Steps `num_envs` environments with uniform available actions; every leaf has the axes [step, environment]."""
    params = env.default_params

    def one_step(state, key):
        key_action, key_step = jax.random.split(key)
        seen = env.observe(env.record(state), params)
        state, outcome = env.step(key_step, state, random_actions(key_action, seen.action_mask), params)
        return state, Trace(seen, outcome)

    def one_env(key):
        key_reset, key_steps = jax.random.split(key)
        return jax.lax.scan(one_step, env.reset(key_reset, params), jax.random.split(key_steps, num_steps))[1]

    return jax.jit(jax.vmap(one_env, out_axes=1))(jax.random.split(key, num_envs))


def with_resets(env: Environment) -> Environment:
    """As collection runs a game."""
    return AutoReset(EpisodeStatistics(env))


# --- stepping like JaxMARL ---


@functools.cache
def compiled(env: Environment):
    """The vmapped reset and step of a game without parameters; cached, for a SMAX step takes seconds to compile."""
    reset = jax.vmap(lambda key: env.reset(key, ()))
    step = jax.vmap(lambda key, state, actions: env.step(key, state, actions, ()))
    return jax.jit(reset), jax.jit(step)


@pytest.mark.parametrize(
    ("name", "options", "team_rule"),
    [
        ("3m", {}, lambda rewards: rewards[0]),
        pytest.param("smacv2_5_units", {"legacy_state": True}, lambda rewards: rewards[0], marks=pytest.mark.slow),
        ("MPE_simple_spread_v3", {"team_reward": "mean"}, lambda rewards: sum(rewards) / len(rewards)),
        ("overcooked", {}, lambda rewards: rewards[0]),
    ],
)
def test_steps_are_those_of_jaxmarl(key, name, options, team_rule):
    """The same keys and actions give JaxMARL's own rewards, ends, observations and states."""
    ours = make_jaxmarl(name, **options)
    agents = ours.env.agents
    reset, step = compiled(ours)
    their_step = jax.jit(jax.vmap(ours.env.step_env))
    look = jax.jit(jax.vmap(lambda state: ours.observe(ours.record(state), ())))
    state = reset(jax.random.split(key, BATCH))
    for time in range(24):
        key_action, key_step = jax.random.split(jax.random.fold_in(key, time))
        actions = random_actions(key_action, look(state).action_mask)
        keys = jax.random.split(key_step, BATCH)
        with in_jaxmarl():
            observations, inner, rewards, dones, _ = their_step(keys, state.inner, dict(zip(agents, actions.T, strict=True)))
        state, outcome = step(keys, state, actions)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state.inner, inner)
        expected = np.stack([np.asarray(observations[agent], np.float32).reshape(BATCH, -1) for agent in agents], axis=1)
        np.testing.assert_allclose(state.record.agents, expected, atol=1e-6)
        if options.get("legacy_state"):
            np.testing.assert_allclose(state.record.world_state, observations["world_state"], atol=1e-6)
        np.testing.assert_allclose(outcome.reward, team_rule([rewards[agent] for agent in agents]), atol=1e-5)
        np.testing.assert_array_equal(outcome.terminated, dones["__all__"])
        assert not np.any(outcome.truncated)


def test_observations_and_actions_of_different_sizes_are_padded(key):
    """The speaker sees 3 numbers and says one of 3 words; the listener sees 11 and makes one of 5 moves."""
    env = make_jaxmarl("MPE_simple_speaker_listener_v4")
    seen = jax.jit(lambda key: env.observe(env.reset(key, ()).record, ()))(key)
    np.testing.assert_array_equal(seen.action_mask, [[True, True, True, False, False], [True] * 5])
    np.testing.assert_array_equal(seen.agents[0, 3:], 0.0)
    np.testing.assert_array_equal(seen.state, np.concatenate([seen.agents[0, :3], seen.agents[1]]))


def test_the_default_team_reward_is_that_of_the_game():
    """`sum` only where JaxMARL's agents have rewards of their own."""
    rules = {name: make_jaxmarl(name).team_reward for name in ("3m", "overcooked", "MPE_simple_spread_v3", "MPE_simple_v3")}
    assert rules == {"3m": "first", "overcooked": "first", "MPE_simple_spread_v3": "sum", "MPE_simple_v3": "first"}


@pytest.mark.parametrize("name", SCENARIO_SIZES)
def test_smax_scenarios_have_the_known_sizes(name):
    """Observations 13 (A - 1) + 13 E + 10, state 12 (A + E) and 5 + E actions, for A allies and E enemies."""
    env = make_jaxmarl(name)
    seen = jax.eval_shape(lambda key: env.observe(env.record(env.reset(key, ())), ()), jax.random.key(0))
    observation_size, state_size, num_actions = SCENARIO_SIZES[name]
    assert seen.agents.shape == (env.num_agents, observation_size)
    assert seen.state.shape == (state_size,)
    assert seen.action_mask.shape == (env.num_agents, num_actions)
    assert (env.observation_size, env.state_size, env.num_actions) == SCENARIO_SIZES[name]
    assert env.max_steps == 100
    assert env.reports_wins


def test_scenario_names_are_all_of_jaxmarls():
    """Every scenario that JaxMARL has is among those whose sizes are checked, and is one of our own engine's."""
    assert set(import_jaxmarl().environments.smax.smax_env.MAP_NAME_TO_SCENARIO) == set(SCENARIO_SIZES) <= set(smax.SCENARIOS)


# --- how an episode ends ---


def at_step(state, step: int, **units):
    """A batched SMAX state with the clocks at `step` and some unit fields replaced."""
    batch = state.step.shape
    clock = jnp.full(batch, step, jnp.int32)
    inner = state.inner.state.replace(step=clock, **{name: jnp.broadcast_to(value, (*batch, 6)) for name, value in units.items()})
    return state._replace(inner=state.inner.replace(state=inner), step=clock)


def stop(key, state):
    """Every ally of 3m stands still."""
    _, step = compiled(make_jaxmarl("3m"))
    return step(jax.random.split(key, BATCH), state, jnp.full((BATCH, 3), 4, jnp.int32))


@pytest.fixture
def marines(key):
    """First states of 3m."""
    reset, _ = compiled(make_jaxmarl("3m"))
    return reset(jax.random.split(key, BATCH))


def test_a_smax_episode_is_cut_at_its_hundredth_step(key, marines):
    """Not at JaxMARL's 101st; and the last observation is that of the last state."""
    state = at_step(marines, 97)
    for expected in (False, False, True):
        state, outcome = stop(key, state)
        np.testing.assert_array_equal(outcome.truncated, expected)
        assert not np.any(outcome.terminated)
        assert not np.any(outcome.info["won"])
    assert np.all(state.step == 100)
    own_position = state.inner.state.unit_positions[:, :3] / 32.0
    np.testing.assert_allclose(state.record.agents[:, :, -9:-7], own_position, rtol=1e-6)


@pytest.mark.parametrize(("health", "won"), [([45, 45, 45, 0, 0, 0], True), ([0, 0, 0, 45, 45, 45], False), ([0, 0, 0, 0, 0, 0], False)])
def test_an_end_by_rule_on_the_last_step_is_a_termination(key, marines, health, won):
    """Where both happen at once the rule counts; a draw is not won."""
    _, outcome = stop(key, at_step(marines, 99, unit_health=jnp.array(health, jnp.float32)))
    assert np.all(outcome.terminated)
    assert not np.any(outcome.truncated)
    np.testing.assert_array_equal(outcome.info["won"], won)


@pytest.mark.parametrize(("name", "limit"), [("MPE_simple_spread_v3", 25), ("overcooked", 400)])
def test_games_that_end_by_time_only_are_cut(key, name, limit):
    """Two episodes run for exactly their limit, though JaxMARL's MPE would run one step more."""
    env = make_jaxmarl(name)
    outcome = rollout(with_resets(env), key, 2, 2 * limit + 2).outcome
    assert env.max_steps == limit
    assert not np.any(outcome.terminated)
    assert not np.any(outcome.info["won"])
    np.testing.assert_array_equal(np.flatnonzero(outcome.truncated[:, 0]), [limit - 1, 2 * limit])
    np.testing.assert_array_equal(np.flatnonzero(outcome.info["reset"][:, 0]), [limit, 2 * limit + 1])


def test_an_environment_handed_over_is_left_as_it_was_and_may_outlast_its_own_limit(key):
    """JaxMARL's clock is held in the state, not in the environment."""
    with in_jaxmarl():
        theirs = import_jaxmarl().make("MPE_simple_spread_v3", max_steps=7)
    attributes = dict(vars(theirs))
    assert from_jaxmarl(theirs).max_steps == 7
    outcome = rollout(from_jaxmarl(theirs, max_steps=12), key, 2, 12).outcome
    assert np.all(outcome.truncated[11])
    assert not np.any(outcome.truncated[:11] | outcome.terminated[:11])
    assert all(vars(theirs)[name] is value for name, value in attributes.items())


def test_equal_games_share_their_compiled_programs():
    """`jit` finds a program by the equality of its static arguments."""
    assert make_jaxmarl("3m") == make_jaxmarl("3m")
    assert hash(make_jaxmarl("3m")) == hash(make_jaxmarl("3m"))
    assert make_jaxmarl("3m") != make_jaxmarl("3m", legacy_state=True)


# --- SMAX under a random policy ---


def check_random_policy(trace: Trace, expected_return: float):
    """The stated mean is rounded to 0.005; the sample mean has four standard errors."""
    ended = trace.outcome.terminated | trace.outcome.truncated
    first_end = np.argmax(ended, axis=0)
    assert np.all(np.any(ended, axis=0))
    episodes = np.arange(ended.shape[1])
    returns = trace.outcome.info["episode_return"][first_end, episodes]
    error = 4 * np.std(returns) / np.sqrt(returns.size)
    assert abs(np.mean(returns) - expected_return) < 0.005 + error
    assert np.max(trace.outcome.info["episode_length"]) <= 100
    won = trace.outcome.info["won"][first_end, episodes]
    assert np.mean(won) < 0.005 + 4 * np.sqrt(0.005 / won.size)


@pytest.fixture(scope="module")
def random_marines():
    """Random play of 3m over episode ends."""
    return rollout(with_resets(make_jaxmarl("3m")), jax.random.key(1), 384, 130)


def test_random_marines_do_as_in_jaxmarl(random_marines):
    """JaxMARL's own mean return is 0.18, without wins."""
    check_random_policy(random_marines, 0.18)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected_return"), [("2s3z", 0.20), ("5m_vs_6m", 0.14), ("6h_vs_8z", 0.32), ("smacv2_5_units", 0.26)])
def test_random_policies_do_as_in_jaxmarl(key, name, expected_return):
    """JaxMARL's own mean returns of 512 episodes, without wins."""
    check_random_policy(rollout(with_resets(make_jaxmarl(name)), key, 512, 100), expected_return)


def test_the_smax_state_is_normalised_as_the_units_see_themselves(random_marines):
    """Every feature is in [0, 1], but for units over the map's edge; the dead are zero."""
    seen = random_marines.before
    assert np.min(seen.state) >= -2 / 32
    assert np.max(seen.state) <= 34 / 32
    allies = seen.state[..., :30].reshape(*seen.state.shape[:2], 3, 10)
    np.testing.assert_allclose(allies, seen.agents[..., -10:], atol=1e-6)
    dead = ~np.any(seen.action_mask[..., :4], axis=-1)
    assert np.any(dead)
    np.testing.assert_array_equal(allies[dead], 0.0)


def test_the_first_observation_of_a_new_episode_is_not_zeroed(random_marines):
    """Also not for agents that were dead at the end of the last one: all have full health."""
    after_reset = np.asarray(random_marines.outcome.info["reset"])[:-1]
    first = random_marines.before.agents[1:][after_reset]
    assert first.shape[0] > 100
    np.testing.assert_array_equal(first[..., -10], 1.0)


def test_every_agent_always_has_an_action(random_marines):
    """Also the dead."""
    assert np.all(np.any(random_marines.before.action_mask, axis=-1))
    assert np.all(random_marines.before.agent_mask)


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("3n", {}, "did you mean '3m'"),
        ("MPE_simple_spred_v3", {}, "did you mean 'MPE_simple_spread_v3'"),
        ("MPE_simple_tag_v3", {}, "give team_reward"),
        ("MPE_simple_spread_v3", {"team_reward": "max"}, "first, sum, mean"),
        ("MPE_simple_spread_v3", {"legacy_state": True}, "SMAX"),
        ("MPE_simple_spread_v3", {"global_state": "world_state"}, "must be one of observations"),
        ("MPE_simple_spread_v3", {"action_type": "Continuous"}, "discrete"),
        ("hanabi", {}, "give max_steps"),
        ("3m", {"storage": "float8"}, "did you mean 'float32'"),
        ("3m", {"storage_bound": 2.0}, "is for the storage 'int8'"),
        ("3m", {"storage": "int8", "storage_bound": -1}, "must be a positive number"),
        ("3m", {"storage": "int8", "legacy_state": True}, "needs storage_bound"),
        ("MPE_simple_spread_v3", {"storage": "int8"}, "needs storage_bound"),
        ("storm_2p", {}, "one observation array per agent"),
    ],
)
def test_what_cannot_be_adapted_is_refused(name, options, message):
    """The message tells what to give instead."""
    with pytest.raises(ValueError, match=message):
        make_jaxmarl(name, **options)


def test_a_wrapped_environment_is_refused(baselines):
    """JaxMARL's wrappers pass the inner `step_env` through, but not its state."""
    with pytest.raises(TypeError, match="not a JaxMARL wrapper"):
        from_jaxmarl(baselines.LogWrapper(make_jaxmarl("MPE_simple_spread_v3").env))


def test_importing_is_lazy_and_silent():
    """JaxMARL's import also replaces the standard streams; that is undone."""
    code = (
        "import sys, envs.jaxmarl_adapter as adapter; assert 'jaxmarl' not in sys.modules; streams = sys.stdout, sys.stderr; "
        "adapter.import_jaxmarl(); assert (sys.stdout, sys.stderr) == streams"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- our games in JaxMARL ---


class DialState(NamedTuple):
    """The dial and the time."""

    dial: Any
    time: Any


@dataclass(frozen=True)
class Dial(Environment):
    """Two agents turn one dial by 0, 1 or 2; past 6 the game is won. An agent may not repeat a turn by 2 while the dial is odd."""

    num_agents: int = 2
    num_actions: int = 3
    observation_size: int = 4
    state_size: int = 2
    max_steps: int = 5
    gain: float = 1.0

    @property
    def default_params(self):
        """The reward per mark on the dial."""
        return jnp.float32(self.gain)

    def reset(self, key, params):
        """Starts at 0 or 1."""
        return DialState(jax.random.randint(key, (), 0, 2), jnp.zeros((), jnp.int32))

    def step(self, key, state, actions, params):
        """Turns the dial, sometimes by one more."""
        dial = state.dial + jnp.sum(actions) + jax.random.randint(key, (), 0, 2)
        time = state.time + 1
        won = dial > 6
        return DialState(dial, time), Outcome(params * dial, won, ~won & (time >= self.max_steps), {"won": won})

    def record(self, state):
        """All of it."""
        return state

    def observe(self, record, params):
        """Dial and time, for each agent behind its number."""
        state = jnp.stack([record.dial, record.time]).astype(jnp.float32)
        agents = jnp.concatenate([jnp.eye(2), jnp.broadcast_to(state[None], (2, 2))], axis=1)
        mask = jnp.ones((2, 3), bool).at[:, 2].set(record.dial % 2 == 0)
        return Observation(agents, state, mask, jnp.ones(2, bool))


@pytest.fixture(scope="module")
def baselines():
    """JaxMARL's wrappers; some of what they import warns."""
    import_jaxmarl()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxmarl.wrappers.baselines

    return jaxmarl.wrappers.baselines


def test_a_round_trip_steps_like_the_game(key):
    """Same facts, observations, rewards, ends and resets, under the task that was given."""
    game = Dial(gain=2.0)
    there_and_back = from_jaxmarl(to_jaxmarl(Dial(), jnp.float32(2.0)))
    facts = ("num_agents", "num_actions", "observation_size", "state_size", "max_steps", "reports_wins")
    assert [getattr(there_and_back, name) for name in facts] == [getattr(game, name) for name in facts]
    expected = rollout(with_resets(game), key, 64, 20)
    jax.tree.map(np.testing.assert_array_equal, rollout(with_resets(there_and_back), key, 64, 20), expected)
    assert np.any(expected.outcome.terminated)
    assert np.any(expected.outcome.truncated)


def test_jaxmarls_rollout_manager_plays_our_game(key, baselines):
    """With our world state, the team's reward once, our masks, and JaxMARL's own reset at once."""
    game, batch = Dial(), 16
    with in_jaxmarl():
        manager = baselines.CTRolloutManager(to_jaxmarl(game), batch)
        observations, state = manager.batch_reset(key)
        ended_before = np.zeros(batch, bool)
        for step in range(12):
            np.testing.assert_array_equal(observations["__all__"], np.stack([state.game.dial, state.game.time], -1))
            valid = manager.get_valid_actions(state)
            np.testing.assert_array_equal(valid["agent_0"][:, 2], state.game.dial % 2 == 0)
            assert observations["agent_1"].shape == (batch, game.observation_size + 2)
            actions = {agent: jnp.where(valid[agent][:, 2], step % 3, 1) for agent in manager.agents}
            np.testing.assert_array_equal(state.step[ended_before], 0)
            observations, state, rewards, dones, info = manager.batch_step(jax.random.fold_in(key, step), state, actions)
            ended_before = np.asarray(dones["__all__"])
            np.testing.assert_array_equal(ended_before, info["terminated"] | info["truncated"])
            np.testing.assert_array_equal(info["won"], info["terminated"])
            np.testing.assert_array_equal(rewards["__all__"], rewards["agent_0"])
            np.testing.assert_array_equal(rewards["agent_0"], rewards["agent_1"])

"""Our SMAX in legacy mode against JaxMARL's, step for step, for given states, actions and noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.jaxmarl_quiet import import_jaxmarl, in_jaxmarl
from envs.smax import engine, game
from envs.smax.batching import batch_last
from envs.smax.enemy import heuristic_actions
from envs.smax.scenarios import SCENARIOS
from tests.smax_oracle import Oracle, converted, deviations, oracle, random_orders, stacked, start_states

THEIR_SCENARIOS = tuple(SCENARIOS)[:14]
IN_DEFAULT_SUITE = ("3s5z_vs_3s6z",)
BATTLES, STEPS = 32, 60

per_scenario = pytest.mark.parametrize(
    "scenario", [name if name in IN_DEFAULT_SUITE else pytest.param(name, marks=pytest.mark.slow) for name in THEIR_SCENARIOS]
)


@functools.cache
def their_battles(scenario: str):
    """Their trajectories for random orders: actions `[T, E, N]`, keys, and everything they say of every step, `[T, E, ...]`."""
    both = oracle(scenario)
    actions = jnp.array(random_orders(both, 1, (STEPS, BATTLES)))
    keys = jax.random.split(jax.random.key(2), (STEPS, BATTLES))

    def one(key, state, actions):
        orders = both.theirs._decode_discrete_actions(actions)
        views, state, reward, done, _ = both.theirs.step_env_no_decode(key, state, orders)
        return state, (state, views, both.theirs.get_avail_actions(state), reward["ally_0"], done["__all__"])

    @jax.jit
    def run(state):
        def step(state, given):
            return jax.vmap(one)(given[0], state, given[1])

        return jax.lax.scan(step, state, (keys, actions))[1]

    states = start_states(both, 0, BATTLES)
    with in_jaxmarl():
        told = run(states)
    before = jax.tree.map(lambda first, later: jnp.concatenate([first[None], later[:-1]]), states, told[0])
    return actions, keys, before, told


def all_steps(function):
    """Maps over `[T, E]`."""
    return jax.jit(jax.vmap(jax.vmap(function)))


@per_scenario
def test_steps_are_theirs(scenario):
    """Health and ends exactly, cooldowns, rewards and positions to rounding: 1,920 steps of everyone, each from their own state."""
    both = oracle(scenario)
    actions, keys, before, (after, _, _, reward, done) = their_battles(scenario)
    advance = batch_last(functools.partial(advanced, both.ours))

    def ours(key, state, actions):
        deviation = deviations(key, both.ours.num_units)
        return advance(deviation, converted(both.ours, state), actions, both.params)

    state, our_reward, over = all_steps(ours)(keys, before, actions)
    expected = converted(both.ours, after)
    np.testing.assert_array_equal(state.health, expected.health)
    np.testing.assert_allclose(state.cooldown, expected.cooldown, atol=4e-6)
    np.testing.assert_array_equal(state.steps, expected.steps)
    np.testing.assert_array_equal(over, done)
    np.testing.assert_allclose(our_reward, reward, rtol=1e-6, atol=1e-7)
    assert float((expected.health == 0).mean()) > 0.05, "somebody must die"
    for own, theirs in ((state.x, expected.x), (state.y, expected.y)):
        np.testing.assert_allclose(own, theirs, atol=2e-4)


def advanced(env, deviation, state, actions, params):
    """A step for given actions of everyone: state, reward, whether the episode is over by JaxMARL's rules."""
    after, statistics = game.advance(env, deviation, state, actions, params)
    reward, allies_dead, enemies_dead = engine.rewards(state.health, after.health, statistics.health, params, env.num_agents)
    return after, reward, allies_dead | enemies_dead | (after.steps >= env.max_steps + 1)


@per_scenario
def test_observations_are_theirs(scenario):
    """What both teams see, the world state, and what they may do."""
    both = oracle(scenario)
    env, (_, _, _, (after, views, available, _, _)) = both.ours, their_battles(scenario)

    def ours(state):
        record = env.record(converted(env, state))
        return env.observe(record, both.params), env.observe_as_enemy(record, both.params)

    allies, enemies = all_steps(ours)(after)
    names = both.theirs.agents[: env.num_agents], both.theirs.agents[env.num_agents :]
    for seen, agents in ((allies, names[0]), (enemies, names[1])):
        np.testing.assert_allclose(seen.agents, jnp.moveaxis(stacked(views, agents), 0, 2), atol=1e-5)
        np.testing.assert_array_equal(seen.action_mask, jnp.moveaxis(stacked(available, agents), 0, 2).astype(bool))
    np.testing.assert_allclose(allies.state, views["world_state"], atol=1e-5)


@pytest.mark.parametrize("attack_mode", ["closest", "random"])
@per_scenario
def test_the_heuristic_enemy_decides_as_theirs(scenario, attack_mode):
    """Given the same states and memories: the same attacks; where chance decides, what theirs does is among what ours may do."""
    both = oracle(scenario)
    env, (_, _, before, _) = both.ours, their_battles(scenario)
    params = both.params._replace(enemy_attacks_randomly=jnp.asarray(attack_mode == "random"))
    actions, targets, remembered = their_enemy(both, before, attack_mode)
    start = converted(env, jax.tree.map(lambda leaf: leaf[:1], before))
    states = converted(env, before)._replace(
        goal_x=jnp.broadcast_to(env.map_width - start.x[..., env.num_agents :], targets.shape),
        goal_y=jnp.broadcast_to(env.map_height - start.y[..., env.num_agents :], targets.shape),
        last_target=remembered.astype(jnp.int8),
    )
    possible = our_enemy(env, params)(states)
    alive = np.asarray(states.health[..., env.num_agents :] > 0)
    our_actions, our_targets = (np.asarray(each) for each in possible)
    assert ((our_actions == np.asarray(actions)).any(0) | ~alive).all()
    assert ((our_targets == np.asarray(targets)).any(0) | ~alive).all()
    if attack_mode == "closest":
        assert (our_targets == our_targets[0]).all(), "no luck is needed"
    attacks = np.asarray(targets) >= 0
    assert attacks[alive].mean() > 0.02 and (~attacks)[alive].mean() > 0.02


def our_enemy(env, params):
    """Actions and targets `[luck, T, E, M]` for every number that luck can distinguish."""

    def decide(luck, state, params):
        statistics = engine.statistics_of(params.statistics, state.unit_types.astype(jnp.int32), env.num_agents)
        bits = jnp.broadcast_to(luck, (env.num_enemies, state.x.shape[-1]))
        return heuristic_actions(bits, state, statistics, params, env.num_agents)

    # For every possible number of candidates c = 1 .. A, each of its c outcomes.
    shares = sorted({(index + 0.5) / count for count in range(1, min(env.num_agents, 10) + 1) for index in range(count)} | {0.999})
    if env.num_agents > 10:
        shares = sorted({*shares, *((index + 0.5) / 64 for index in range(64))})
    luck = jnp.array([int(share * 2**32) for share in shares], jnp.uint32)
    single = batch_last(decide)
    return lambda states: jax.lax.map(lambda bits: jax.vmap(jax.vmap(lambda state: single(bits, state, params)))(states), luck)


def their_enemy(both: Oracle, states, attack_mode: str):
    """Their enemy's actions, the allies it attacks, and the allies it remembered before, `[T, E, M]` each, in our counting."""
    heuristic = import_jaxmarl().environments.smax.heuristic_enemy
    decide = heuristic.create_heuristic_policy(both.theirs, 1, shoot=True, attack_mode=attack_mode)
    enemies = both.theirs.agents[both.ours.num_agents :]

    def step(memory, given):
        key, state = given

        def battle(key, memory, state):
            seen = stacked(both.theirs.get_obs_unit_list(state), enemies)
            return jax.vmap(decide)(jax.random.split(key, len(enemies)), memory, seen)

        actions, later = jax.vmap(battle)(jax.random.split(key, BATTLES), memory, state)
        return later, (actions, later.last_attacked_enemy, memory.last_attacked_enemy)

    memory = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (BATTLES, len(enemies), *jnp.shape(leaf))),
        heuristic.get_heuristic_policy_initial_state(),
    )
    keys = jax.random.split(jax.random.key(3), STEPS)
    with in_jaxmarl():
        actions, attacked, remembered = jax.jit(lambda states: jax.lax.scan(step, memory, (keys, states)))(states)[1]

    def counted(index):
        return jnp.where(index < 0, -1, both.ours.num_agents - 1 - index)

    return actions, counted(attacked), counted(remembered)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["3s5z_vs_3s6z", "smacv2_5_units"])
def test_conic_views_are_theirs(scenario):
    """With unit 0 missing and the dead shown; but for observers who have somebody on the line between two sectors."""
    both = oracle(scenario, "conic")
    env, (_, _, _, (after, *_)) = both.ours, their_battles(scenario)
    after = jax.tree.map(lambda leaf: leaf[::6], after)

    def views(state):
        return stacked(both.theirs.get_obs_conic(state), both.theirs.agents[: env.num_agents])

    with in_jaxmarl():
        theirs = np.asarray(all_steps(views)(after))
    state = converted(env, after)
    ours = np.asarray(all_steps(lambda state: env.observe(env.record(state), both.params).agents)(state))
    x, y = np.asarray(state.x), np.asarray(state.y)
    sector = (np.arctan2(y[..., None, :] - y[..., :, None], x[..., None, :] - x[..., :, None]) + np.pi) * 32 / (2 * np.pi)
    between = np.abs(sector - np.round(sector)) > 1e-3
    certain = np.all(between | np.eye(env.num_units, dtype=bool), axis=-1)[..., : env.num_agents]
    assert certain.mean() > 0.5
    np.testing.assert_allclose(ours[certain], theirs[certain], atol=1e-5)
    assert (np.abs(theirs[certain][:, :-10]) > 0).any()

"""Our SMAX by its own lights: the batch axis, starts, invariants of battles, views, tasks, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import smax
from envs.smax import game, views
from envs.smax.batching import batch_last
from envs.smax.start import num_draws
from envs.smax.types import FIRST_ATTACK, NOBODY, STOP, SmaxRecord
from envs.wrappers import AutoReset

EPISODES, STEPS = 16, 40


# --- the batch axis ---


def test_any_number_of_vmaps_is_one_batch_on_the_last_axis():
    """Shapes as the function sees them, and values as those of a plain function."""
    shapes = set()

    def plain(values, factor):
        return values * factor

    def scaled(values, factor):
        shapes.add((values.shape, factor.shape))
        return plain(values, factor)

    single = batch_last(scaled)
    values, factors = jnp.arange(24.0).reshape(2, 4, 3), jnp.array([[2.0], [3.0]])
    np.testing.assert_array_equal(jax.vmap(jax.vmap(single, in_axes=(0, None)), in_axes=(0, None))(values, factors[0]), values * 2)
    outer = jax.vmap(jax.vmap(single, in_axes=(0, None)))(values, factors)
    np.testing.assert_array_equal(outer, jax.vmap(jax.vmap(plain, in_axes=(0, None)))(values, factors))
    np.testing.assert_array_equal(single(values[0, 1], factors[1]), values[0, 1] * 3)
    several = jax.vmap(single, in_axes=(None, 0))(values[0, 1], factors)
    np.testing.assert_array_equal(several, values[0, 1][None] * factors)
    # Parameters that all share are not repeated; everything else is.
    assert shapes >= {((3, 8), (1, 1)), ((3, 8), (1, 8)), ((3, 1), (1, 1)), ((3, 2), (1, 2))}


def test_one_battle_is_what_it_is_among_many():
    """Single, vmapped and doubly vmapped steps agree."""
    env, params = smax.make("smacv2_5_units")
    keys = jax.random.split(jax.random.key(0), (2, 3))
    actions = jnp.full(env.num_agents, 1, jnp.int32)

    def two_steps(key):
        state = env.reset(key, params)
        return env.step(key, env.step(key, state, actions, params)[0], actions, params)

    many = jax.jit(jax.vmap(jax.vmap(two_steps)))(keys)
    one = jax.jit(two_steps)(keys[1, 2])
    jax.tree.map(lambda single, batch: np.testing.assert_allclose(single, batch[1, 2], rtol=1e-5, atol=1e-5), one, many)


def test_one_draw_serves_a_step_and_the_start_that_may_replace_it():
    """`step_or_reset` is the step of the first of its bits, or the start of those that follow, one by one in a batch."""
    env, params = smax.make("smacv2_5_units")
    keys = jax.random.split(jax.random.key(0), 4)
    over = jnp.array([False, True, False, True])
    state = jax.vmap(lambda key: env.reset(key, params))(keys)
    actions = jnp.full((4, env.num_agents), STOP, jnp.int32)
    draws = env.num_units + env.num_enemies
    bits = jax.vmap(lambda key: jax.random.bits(key, (draws + num_draws(env.num_units),)))(keys)

    found, _ = jax.jit(jax.vmap(lambda key, state, over, actions: env.step_or_reset(key, state, over, actions, params)))(
        keys, state, over, actions
    )
    stepped, _ = jax.jit(jax.vmap(lambda *args: game.batched(env).step(*args, params)))(bits[:, :draws], state, actions)
    fresh = jax.jit(jax.vmap(lambda bits: game.batched(env).start(bits, params)))(bits[:, draws:])
    jax.tree.map(lambda leaf, like: np.testing.assert_allclose(leaf[over], like[over], rtol=1e-5), found, fresh)
    jax.tree.map(lambda leaf, like: np.testing.assert_allclose(leaf[~over], like[~over], rtol=1e-5), found, stepped)
    assert np.any(found.x[over] != state.x[over]) and (found.steps == jnp.array([1, 0, 1, 0])).all()


def test_a_derived_game_keeps_its_own_step_under_automatic_reset():
    """Here one that pays a point for every step."""

    class Paid(smax.Smax):
        def step(self, key, state, actions, params):
            state, outcome = super().step(key, state, actions, params)
            return state, outcome._replace(reward=outcome.reward + 1.0)

    env = AutoReset(Paid())
    params = env.default_params
    state = env.reset(jax.random.key(0), params)
    _, outcome = jax.jit(env.step)(jax.random.key(1), state, jnp.full(env.num_agents, STOP, jnp.int32), params)
    assert float(outcome.reward) == 1.0


def test_battles_are_split_over_devices_with_what_varies_checked():
    """Under `jax.shard_map`, as of one batch."""
    env, params = smax.make("3m")
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec("device")
    keys = jax.random.split(jax.random.key(0), 4)

    def seen(keys):
        return jax.vmap(lambda key: env.observe(env.record(env.reset(key, params)), params))(keys)

    spread = jax.jit(jax.shard_map(seen, mesh=mesh, in_specs=over, out_specs=over))(keys)
    jax.tree.map(lambda leaf, like: np.testing.assert_allclose(leaf, like, rtol=1e-6), spread, jax.jit(seen)(keys))


# --- battles ---


def remembered(function):
    """Keeps results by the text of the arguments, which may be dictionaries."""
    results = {}

    @functools.wraps(function)
    def looked_up(*args, **options):
        name = repr((args, sorted(options.items())))
        if name not in results:
            results[name] = function(*args, **options)
        return results[name]

    return looked_up


@remembered
def battles(scenario: str, **options):
    """A compiled function of a key: random play, `[T, E]` each: the states before, actions, the states after, outcomes."""
    env, params = smax.make(scenario, **options)

    def episode(key):
        start, play = jax.random.split(key)

        def step(state, key):
            key_policy, key_step = jax.random.split(key)
            mask = env.observe(env.record(state), params).action_mask
            actions = jax.random.categorical(key_policy, jnp.where(mask, 0.0, -jnp.inf)).astype(jnp.int32)
            after, outcome = env.step(key_step, state, actions, params)
            return after, (state, actions, after, outcome)

        return jax.lax.scan(step, env.reset(start, params), jax.random.split(play, STEPS))[1]

    run = jax.jit(lambda seed: jax.vmap(episode)(jax.random.split(jax.random.key(seed), EPISODES)))
    return env, params, run


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_invariants_of_battles(seed):
    """The dead do nothing, health never rises, nobody is off the map, rewards add up."""
    env, params, run = battles("smacv2_5_units", enemy_idleness=0.2, attack_mode="random")
    before, actions, after, outcome = run(seed)
    dead = np.asarray(before.health) <= 0
    assert dead.any()
    for name in ("x", "y", "health"):
        np.testing.assert_array_equal(np.asarray(getattr(after, name))[dead], np.asarray(getattr(before, name))[dead])
    assert (np.asarray(actions)[dead[..., : env.num_agents]] == STOP).all()
    assert (after.health <= before.health).all()
    for position in (after.x, after.y):
        assert (position >= 0).all() and (position <= 32).all()
    full = np.asarray(params.statistics.health)[1, np.asarray(before.unit_types)]
    lost = ((np.asarray(before.health) - np.asarray(after.health)) / full)[..., env.num_agents :].sum(-1) / env.num_enemies
    np.testing.assert_allclose(outcome.reward - np.asarray(outcome.info["won"]), lost, atol=1e-5)
    assert not (outcome.terminated & outcome.truncated).any()
    np.testing.assert_array_equal(outcome.terminated, (after.health[..., :5] <= 0).all(-1) | (after.health[..., 5:] <= 0).all(-1))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_masks_allow_exactly_what_is_possible(seed):
    """Against distances in plain NumPy."""
    env, params, run = battles("3s5z_vs_3s6z")
    state = run(seed)[2]
    mask = np.asarray(jax.vmap(jax.vmap(lambda s: env.observe(env.record(s), params).action_mask))(state))
    x, y, alive = np.asarray(state.x), np.asarray(state.y), np.asarray(state.health) > 0
    allies, enemies = np.arange(env.num_agents), np.arange(env.num_agents, env.num_units)
    distance = np.hypot(x[..., allies, None] - x[..., None, enemies], y[..., allies, None] - y[..., None, enemies])
    reach = np.asarray(params.statistics.attack_range)[0, np.asarray(state.unit_types)[..., allies]]
    certain = np.abs(distance - reach[..., None]) > 1e-4
    possible = (distance < reach[..., None]) & alive[..., allies, None] & alive[..., None, enemies]
    assert (mask[..., FIRST_ATTACK:] == possible)[certain].all() and possible.any()
    np.testing.assert_array_equal(mask[..., :STOP], np.broadcast_to(alive[..., allies, None], (*alive.shape[:-1], env.num_agents, 4)))
    assert mask[..., STOP].all()


def test_allies_that_change_places_see_the_same_in_other_places():
    """A permutation of allies permutes their views of themselves, of the enemies, and the masks."""
    env, params, run = battles("3s5z_vs_3s6z")
    record = jax.vmap(env.record)(jax.tree.map(lambda leaf: leaf[:, 20], run(0)[2]))
    order = np.array([3, 0, 7, 1, 2, 6, 5, 4])
    units = np.concatenate([order, np.arange(8, env.num_units)])
    observe = jax.jit(jax.vmap(lambda record: env.observe(record, params)))
    seen, permuted = observe(record), observe(jax.tree.map(lambda leaf: leaf[:, units], record))
    np.testing.assert_array_equal(permuted.action_mask, seen.action_mask[:, order])
    others = views.UNIT_FEATURES * (env.num_agents - 1)
    np.testing.assert_allclose(permuted.agents[..., others:], seen.agents[:, order][..., others:], atol=1e-6)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_battle_without_shots_lasts_as_long_as_the_limit_says(legacy):
    """100 steps, JaxMARL's 101; a truncation, and no defeat."""
    env, params = smax.make("3m", enemy_shoots=False, legacy=legacy)
    state = env.reset(jax.random.key(0), params)
    still = jnp.full(3, STOP, jnp.int32)
    step = jax.jit(lambda state, key: env.step(key, state, still, params))
    outcome = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 101))[1]
    last = 100 if legacy else 99
    assert int(outcome.truncated.argmax()) == last and bool(outcome.info["timeout"][last])
    assert not outcome.terminated.any() and not outcome.info["lost"].any()


# --- starts ---


@remembered
def starts(scenario: str, **options):
    """4,096 first states."""
    env, params = smax.make(scenario, **options)
    return env, jax.jit(jax.vmap(lambda key: env.reset(key, params)))(jax.random.split(jax.random.key(3), 4096))


@pytest.mark.parametrize("legacy", [False, True])
def test_extra_enemies_and_edges(legacy):
    """By default extra enemies are of all types and nobody starts off the map; JaxMARL's are marines, and some do."""
    _, state = starts("protoss_10_vs_11", unit_weights=dict.fromkeys(smax.UNIT_TYPES, 1 / 6), allies_inside=0.5, legacy=legacy)
    np.testing.assert_array_equal(state.unit_types[:, :10], state.unit_types[:, 10:20])
    extra = np.bincount(np.asarray(state.unit_types[:, 20]), minlength=6) / 4096
    np.testing.assert_allclose(extra, [1, 0, 0, 0, 0, 0] if legacy else [1 / 6] * 6, atol=0.03)
    off = (np.minimum(state.x, state.y) <= 0) | (np.maximum(state.x, state.y) >= 32)
    assert off.any() == legacy


def test_teams_are_drawn_from_their_weights_and_races_do_not_mix():
    """SMACv2's weights without the type that SMAX lacks."""
    _, state = starts("5gen_zerg")
    share = np.bincount(np.asarray(state.unit_types).reshape(-1), minlength=6) / state.unit_types.size
    np.testing.assert_allclose(share, [0, 0, 0, 0, 0.5, 0.5], atol=0.02)


def test_a_reflected_start_is_a_mirror_image():
    """Up to the pushing apart; the allies fill the western half."""
    _, state = starts("10gen_terran", start_weights={"reflect": 1.0})
    x = np.asarray(state.x)
    np.testing.assert_allclose(np.median(np.abs(32 - x[:, :10] - x[:, 10:])), 0.0, atol=1e-5)
    np.testing.assert_allclose([x[:, :10].mean(), x[:, :10].std()], [8, 16 / 12**0.5], atol=0.05)


@pytest.mark.parametrize(("inside", "spread_of"), [(1.0, slice(5, 10)), (0.0, slice(0, 5))])
def test_a_surrounded_team_is_in_the_middle(inside, spread_of):
    """Within the spread (and a push); the others on the diagonals, in one to four groups with equal chances."""
    _, state = starts("5gen_protoss", start_weights={"surround": 1.0}, allies_inside=inside)
    middle = slice(5, 10) if spread_of.start == 0 else slice(0, 5)
    assert np.abs(np.asarray(state.x)[:, middle] - 16).max() < 4
    corner = (np.asarray(state.x)[:, spread_of] > 16) * 2 + (np.asarray(state.y)[:, spread_of] > 16)
    assert np.abs(np.asarray(state.x)[:, spread_of].mean() - 16) < 0.3
    one_group = (corner == corner[:, :1]).all(-1).mean()
    # One group, or all five units in the same of g groups; units near the middle may stand in a neighbour's quarter.
    expected = np.mean([1.0, 2**-4, 3**-4, 4**-4])
    assert abs(one_group - expected) < 0.08


def test_units_that_take_no_part_are_dead_from_the_start():
    """And do not count for reward or victory."""
    env, params = smax.make("3m", active_allies=2, active_enemies=1)
    state = env.reset(jax.random.key(0), params)
    np.testing.assert_array_equal(state.health > 0, [True, True, False, True, False, False])
    seen = env.observe(env.record(state), params)
    np.testing.assert_array_equal(seen.agent_mask, [True, True, False])
    wounded = state._replace(health=state.health.at[3].set(0.125), x=state.x.at[3].set(state.x[0] + 1), y=state.y.at[3].set(state.y[0]))
    after, outcome = env.step(jax.random.key(1), wounded, jnp.array([FIRST_ATTACK, STOP, STOP]), params)
    assert bool(outcome.info["won"]) and float(after.health[3]) == 0
    np.testing.assert_allclose(outcome.reward, 0.125 / 45 + 1, rtol=1e-6)


# --- views ---


# JaxMARL's 14 and one of SMACv2's; the races' others have sizes that are among these.
RECORDED = (*tuple(smax.SCENARIOS)[:14], "terran_10_vs_11")


@pytest.mark.parametrize(
    "scenario", [name if name == "smacv2_5_units" else pytest.param(name, marks=pytest.mark.slow) for name in RECORDED]
)
@pytest.mark.parametrize("observation_type", ["unit_list", "conic"])
def test_a_record_shows_what_its_state_shows(scenario, observation_type):
    """Bit for bit what a record at full precision shows, also for health that is not whole; 16 bytes per unit."""
    scales = {"ally_scale": {"health": 0.7}, "enemy_scale": {"health": 1.3, "attack": 0.6}}
    env, params, run = battles(scenario, observation_type=observation_type, **scales)
    state = jax.tree.map(lambda leaf: leaf[:8, ::4].reshape(-1, *leaf.shape[2:]), run(5)[2])
    assert (np.asarray(state.health) % 1 != 0).any()
    record = jax.vmap(env.record)(state)
    assert sum(leaf.nbytes for leaf in record) == 16 * env.num_units * record.x.shape[0]
    exact = SmaxRecord(state.x, state.y, state.cooldown, state.health, state.unit_types, state.last_actions)
    observe = jax.jit(jax.vmap(lambda record: game.batched(env).observe(record, params)))
    jax.tree.map(np.testing.assert_array_equal, observe(record), observe(exact))


def test_a_conic_view_shows_the_two_closest_of_every_sector():
    """Against a plain loop over battles, observers and others."""
    env, params, run = battles("smacv2_5_units", observation_type="conic")
    state = jax.tree.map(lambda leaf: np.asarray(leaf)[:3, ::8].reshape(-1, leaf.shape[-1] if leaf.ndim > 2 else 1), run(1)[2])
    record = SmaxRecord(state.x, state.y, state.cooldown, state.health.astype(np.float16), state.unit_types, state.last_actions)
    agents = np.asarray(jax.vmap(lambda record: env.observe(record, params).agents)(jax.tree.map(jnp.asarray, record)))
    cones = agents[..., :-10].reshape(*agents.shape[:2], 32, 2, 13)
    sight = np.asarray(params.statistics.sight_range)[0]
    shown = 0
    for battle, observer in np.ndindex(*agents.shape[:2]):
        expected = np.zeros((32, 2))
        placed: dict[int, list[float]] = {}
        for other in range(env.num_units):
            delta = state.x[battle, other] - state.x[battle, observer], state.y[battle, other] - state.y[battle, observer]
            distance = np.hypot(*delta)
            alive = state.health[battle, other] > 0 and state.health[battle, observer] > 0
            if other != observer and alive and distance < sight[state.unit_types[battle, observer]]:
                placed.setdefault(int((np.arctan2(delta[1], delta[0]) + np.pi) / (2 * np.pi) * 32) % 32, []).append(float(distance))
        for sector, distances in placed.items():
            for rank, distance in enumerate(sorted(distances)[:2]):
                expected[sector, rank] = distance / sight[state.unit_types[battle, observer]]
                shown += 1
        np.testing.assert_allclose(np.hypot(cones[battle, observer, ..., 1], cones[battle, observer, ..., 2]), expected, atol=1e-5)
    assert shown > 20


# --- enemies and tasks ---


def test_a_learned_enemy_plays_through_the_hook():
    """It sees what allies would in its place, and its parameters are part of the task."""

    def policy(key, seen, weights):
        del key
        assert seen.agents.shape == (6, 140 + 13 - 13) and seen.action_mask.shape == (6, 10)
        return jnp.where(seen.action_mask[:, FIRST_ATTACK:].any(-1), FIRST_ATTACK + seen.action_mask[:, FIRST_ATTACK:].argmax(-1), weights)

    env, params = smax.make("5m_vs_6m")
    learned = smax.Smax(env.num_agents, env.num_enemies, enemy_policy=policy)
    still = jnp.full(5, STOP, jnp.int32)

    def play(move):
        task = params._replace(enemy=jnp.int32(move))
        step = jax.jit(lambda state, key: learned.step(key, state, still, task))
        return jax.lax.scan(step, learned.reset(jax.random.key(0), task), jax.random.split(jax.random.key(1), 30))

    (stopped, _), (western, outcome) = play(STOP), play(3)
    assert (stopped.health == 45).all()
    assert (western.x[5:] < stopped.x[5:] - 5).all()
    assert bool(outcome.info["lost"].any()) and (western.last_target == NOBODY).all()


def test_a_drift_has_ten_tasks_and_returns_to_the_first():
    """Of one shape; no two are the same."""
    env, tasks = smax.drift("terran", 5)
    assert tasks.order == (*range(10), 0) and len(set(tasks.names)) == 10
    leaves = [np.asarray(leaf).reshape(10, -1) for leaf in jax.tree.leaves(tasks.params)]
    rows = np.concatenate(leaves, axis=1)
    assert len(np.unique(rows, axis=0)) == 10
    assert int(tasks.at(8).active_allies) == 4 and env.num_agents == 5


def test_a_task_is_data_for_the_automatic_reset_too():
    """One compiled step serves two tasks that differ in who plays, from where, and how strong."""
    env, tasks = smax.drift("zerg", 5)
    wrapped = AutoReset(env)

    @jax.jit
    def play(key, task):
        params = tasks.at(task)
        state = wrapped.reset(key, params)

        def step(state, key):
            state, outcome = wrapped.step(key, state, jnp.full(env.num_agents, 1, jnp.int32), params)
            return state, (outcome.info["lost"], state.env.health.max())

        return jax.lax.scan(step, state, jax.random.split(key, 120))[1]

    results = [play(jax.random.key(0), jnp.int32(task)) for task in (0, 5)]
    assert all(lost.any() for lost, _ in results)
    assert float(results[0][1].max()) in (35, 80) and float(results[1][1].max()) in (38.5, 88)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenario": "3mm"}, "unknown scenario '3mm'; did you mean '3m'"),
        ({"scenario": "custom"}, 'needs the options "allies" and "enemies"'),
        ({"allies": {"marine": 3}}, "allies and enemies are options of scenario 'custom'"),
        ({"scenario": "custom", "allies": {"marin": 3}, "enemies": {"zealot": 1}}, "unknown unit in allies 'marin'; did you mean 'marine'"),
        ({"scenario": "custom", "allies": {"marine": 3}, "enemies": {"zealot": 0}}, "enemies must have at least one unit"),
        ({"scenario": "custom", "allies": {"marine": -1}, "enemies": {"zealot": 1}}, "allies.marine must be a whole number of at least 0"),
        ({"scenario": "custom", "allies": {"marine": 121}, "enemies": {"zealot": 1}}, "at most 120"),
        ({"unit_weights": {"marine": 0.5, "zealot": 0.4}}, "unit_weights must sum to 1, not to 0.9"),
        ({"unit_weights": {"marine": 1.5, "zealot": -0.5}}, "unit_weights must be a finite number of at least 0, not -0.5"),
        ({"unit_weights": {"marine": float("nan")}}, "unit_weights must be a finite number"),
        ({"start_weights": {"facing": 0.7}}, "start_weights must sum to 1"),
        ({"start_weights": {"around": 1.0}}, "unknown name in start_weights 'around'"),
        ({"group_weights": [1.0]}, "group_weights must be four chances"),
        ({"allies_inside": 1.1}, "allies_inside must be a finite number of at least 0 and at most 1"),
        ({"active_allies": 4}, "active_allies must be a whole number from 1 to 3"),
        ({"active_enemies": 0}, "active_enemies must be a whole number from 1 to 3"),
        ({"attack_mode": "nearest"}, "unknown attack_mode 'nearest'"),
        ({"enemy_idleness": float("inf")}, "enemy_idleness must be"),
        ({"enemy_scale": {"helth": 2.0}}, "unknown statistic in enemy_scale 'helth'; did you mean 'health'"),
        ({"enemy_scale": {"speed": 0.0}}, "enemy_scale.speed must be positive"),
        ({"ally_scale": {"health": 6.0}}, "health must stay below 256"),
        ({"unit_statistics": {"marine": {"speed": -1.0}}}, "unit_statistics.marine.speed must be a finite number of at least 0"),
        ({"unit_statistics": {"ghost": {}}}, "unknown unit in unit_statistics 'ghost'"),
        ({"win_reward": float("nan")}, "win_reward must be a finite number"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1"),
        ({"observation_type": "list"}, "observation_type must be one of unit_list, conic"),
    ],
)
def test_what_cannot_be_is_refused_with_the_options_name(options, message):
    """Before anything is compiled."""
    with pytest.raises(ValueError, match=message):
        smax.make(**options)


def test_drifts_that_cannot_be_are_refused():
    """By race and size."""
    with pytest.raises(ValueError, match="unknown race 'protos'; did you mean 'protoss'"):
        smax.drift("protos")
    with pytest.raises(ValueError, match="units must be 5, 10 or 20, not 7"):
        smax.drift("zerg", 7)


def test_environments_that_are_equal_share_what_is_compiled():
    """And one that records differently does not."""
    assert smax.make("3m")[0] == smax.make("3m")[0] and game.batched(smax.make("3m")[0]) is game.batched(smax.make("3m")[0])
    assert smax.make("3m")[0] != smax.make("3m", legacy=True)[0]

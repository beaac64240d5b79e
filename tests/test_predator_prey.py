"""The grid predator-prey game: its rules by hand and by exhaustive enumeration, and how it starts."""

import itertools
from collections import Counter
from functools import partial
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings

from envs.predator_prey import ACTIONS, DIRECTIONS, PredatorPrey
from envs.predator_prey_scenarios import make
from envs.predator_prey_types import PredatorPreyState
from envs.wrappers import AutoReset, EpisodeStatistics

RIGHT, DOWN, LEFT, UP, STAY, CATCH = range(6)
NUM_KEYS = 128

# One small game serves every hand-made situation: three agents, two stags and a hare on 5 x 5 cells. Prey rest unless told otherwise.
ENV = PredatorPrey(height=5, width=5, num_agents=3, num_stags=2, num_hares=1, radius=1, max_steps=4)


def rules(**overrides):
    """Parameters of `ENV` in which nothing moves by chance."""
    sizes = {"height": 5, "width": 5, "num_agents": 3, "num_stags": 2, "num_hares": 1, "radius": 1, "max_steps": 4}
    env, params = make("pymarl2", **{**sizes, "rest_probability": (1.0, 1.0), "miscapture_punishment": -2.0, **overrides})
    assert env == ENV
    return params


def situation(agents, stags=(), hares=(), frozen=(), steps=0):
    """A state of `ENV` with these positions, and parameters' fields for as many active entities."""
    filled = [list(positions) + [(0, 0)] * (size - len(positions)) for positions, size in ((agents, 3), (stags, 2), (hares, 1))]
    alive = [index < len(stags) for index in range(2)] + [len(hares) > 0]
    state = PredatorPreyState(
        agents=jnp.array(filled[0], jnp.int32),
        prey=jnp.array(filled[1] + filled[2], jnp.int32),
        frozen=jnp.array([agent in frozen for agent in range(3)]),
        alive=jnp.array(alive),
        steps=jnp.int32(steps),
    )
    return state, {"active_agents": len(agents), "active_stags": len(stags), "active_hares": len(hares)}


@partial(jax.jit, static_argnums=(0, 1))
def step_often(env, times, key, state, actions, params):
    """One step from the same state under `times` keys."""
    return jax.vmap(env.step, (0, None, None, None))(jax.random.split(key, times), state, actions, params)


@partial(jax.jit, static_argnums=0)
def look(env, state, params):
    """What is observed of a state."""
    return env.observe(env.record(state), params)


def play(agents, actions, stags=(), hares=(), frozen=(), steps=0, times=NUM_KEYS, **overrides):
    """Steps one situation under many keys."""
    state, active = situation(agents, stags, hares, frozen, steps)
    actions = jnp.array([*actions, *[STAY] * (3 - len(actions))], jnp.int32)
    states, outcome = step_often(ENV, times, jax.random.key(7), state, actions, rules(**{**active, **overrides}))
    return jax.tree.map(np.asarray, (states, outcome))


def seen(values):
    """The distinct values over the keys."""
    return {tuple(np.ravel(value).tolist()) for value in values}


class TestAgentMoves:
    """Agents move one after the other, and not through anyone."""

    def test_two_agents_that_want_one_cell(self):
        """Whoever is first gets it."""
        states, _ = play([(0, 0), (0, 2)], [RIGHT, LEFT], stags=[(4, 4)])
        assert seen(states.agents[:, :2]) == {(0, 1, 0, 2), (0, 0, 0, 1)}

    def test_a_follower_moves_only_if_its_leader_went_first(self):
        """The second agent always moves, the first only if the cell was left before its turn."""
        states, _ = play([(0, 0), (0, 1)], [RIGHT, RIGHT], stags=[(4, 4)])
        assert seen(states.agents[:, :2]) == {(0, 0, 0, 2), (0, 1, 0, 2)}

    def test_two_agents_cannot_swap(self):
        """In either order the first of them is blocked, and so is then the second."""
        states, _ = play([(0, 0), (0, 1)], [RIGHT, LEFT], stags=[(4, 4)])
        assert seen(states.agents[:, :2]) == {(0, 0, 0, 1)}

    def test_prey_block_agents(self):
        """Stags and hares do."""
        states, _ = play([(0, 0), (2, 2)], [RIGHT, UP], stags=[(0, 1)], hares=[(1, 2)])
        assert seen(states.agents[:, :2]) == {(0, 0, 2, 2)}

    def test_every_direction(self):
        """Actions 0 to 3 are right, down, left and up."""
        for action, direction in enumerate(DIRECTIONS):
            states, _ = play([(2, 2)], [action], stags=[(4, 4)])
            assert seen(states.agents[:, 0]) == {(2 + direction[0], 2 + direction[1])}

    def test_inactive_agents_and_dead_prey_block_nobody(self):
        """Their unused positions are (0, 0), which can be entered."""
        states, _ = play([(0, 1)], [LEFT], stags=[(4, 4)])  # the others' unused positions are (0, 0)
        assert seen(states.agents[:, 0]) == {(0, 0)}

    @pytest.mark.parametrize(("removed", "end"), [(True, (0, 1)), (False, (0, 0))])
    def test_frozen_agents_block_only_where_they_are_not_removed(self, removed, end):
        """A frozen agent that stands on the grid is an obstacle."""
        states, _ = play([(0, 0), (0, 1)], [RIGHT, STAY], stags=[(4, 4)], frozen=[1], remove_frozen=removed)
        assert seen(states.agents[:, 0]) == {end}

    def test_time_and_collision_rewards(self):
        """Agent 0 moves, agent 1 is blocked by agent 2, and agent 2 stays, which counts as meeting itself."""
        _, outcome = play([(4, 0), (0, 0), (0, 1)], [RIGHT, RIGHT, STAY], stags=[(4, 4)], time_reward=-0.1, collision_reward=-1.0)
        np.testing.assert_allclose(outcome.reward, -2.1, rtol=1e-6)


class TestCaptures:
    """Who is captured, frozen, paid and punished."""

    def test_two_catchers_capture_a_stag_and_freeze(self):
        """The condition of a stag is two."""
        states, outcome = play([(0, 1), (1, 0), (4, 4)], [CATCH, CATCH, STAY], stags=[(1, 1), (3, 3)])
        assert set(outcome.reward) == {10.0} and set(outcome.info["captures"]) == {1} and not outcome.terminated.any()
        assert seen(states.alive) == {(False, True, False)} and seen(states.frozen) == {(True, True, False)}

    def test_without_freezing_nobody_freezes(self):
        """`capture_freezes` is data."""
        states, outcome = play([(0, 1), (1, 0)], [CATCH, CATCH], stags=[(1, 1), (3, 3)], capture_freezes=False)
        assert set(outcome.reward) == {10.0} and not states.frozen.any()

    def test_a_bystander_who_does_not_catch_stays_free(self):
        """Only catchers freeze."""
        states, _ = play([(0, 1), (1, 0), (1, 2)], [CATCH, CATCH, STAY], stags=[(1, 1), (4, 4)])
        assert seen(states.frozen) == {(True, True, False)}

    def test_three_catchers_all_freeze(self):
        """Also the one that was not needed; with nobody left the episode is over."""
        states, outcome = play([(0, 1), (1, 0), (1, 2)], [CATCH, CATCH, CATCH], stags=[(1, 1), (4, 4)])
        assert seen(states.frozen) == {(True, True, True)} and set(outcome.reward) == {10.0}
        assert outcome.terminated.all() and outcome.info["won"].all()

    def test_diagonal_agents_catch_nothing(self):
        """Nor are they punished."""
        _, outcome = play([(0, 0), (2, 2)], [CATCH, CATCH], stags=[(1, 1)])
        assert set(outcome.reward) == {0.0} and set(outcome.info["miscaptures"]) == {0}

    def test_one_catch_counts_for_two_prey(self):
        """The agent stands between a stag (punished) and a hare (captured); without freezing their order is irrelevant."""
        _, outcome = play([(2, 2)], [CATCH], stags=[(2, 1)], hares=[(2, 3)], capture_freezes=False)
        assert set(outcome.reward) == {1.0 - 2.0}

    def test_freezing_is_at_once(self):
        """As above, but where the hare is first its catcher is frozen when the stag's turn comes."""
        _, outcome = play([(2, 2), (4, 4)], [CATCH, STAY], stags=[(2, 1)], hares=[(2, 3)])
        assert set(outcome.reward) == {1.0, 1.0 - 2.0}

    @pytest.mark.parametrize(
        ("freezes", "reward", "alive"), [(True, 10.0, {(True, False), (False, True)}), (False, 20.0, {(False, False)})]
    )
    def test_two_stags_between_the_same_two_agents(self, freezes, reward, alive):
        """With freezing only the first one is captured, and the second is not a miscapture."""
        states, outcome = play([(0, 0), (1, 1), (4, 4)], [CATCH, CATCH, STAY], stags=[(0, 1), (1, 0)], capture_freezes=freezes)
        assert set(outcome.reward) == {reward} and seen(states.alive[:, :2]) == alive
        assert set(outcome.info["miscaptures"]) == {0}

    def test_punishment_is_per_prey_and_not_per_agent(self):
        """Two agents at one prey cost one punishment, one agent at two prey two."""
        _, two_agents = play([(0, 1), (1, 0)], [CATCH, CATCH], stags=[(1, 1)], capture_condition=(3, 1))
        _, two_prey = play([(1, 1)], [CATCH], stags=[(0, 1), (1, 0)])
        assert set(two_agents.reward) == {-2.0} and set(two_agents.info["miscaptures"]) == {1}
        assert set(two_prey.reward) == {-4.0} and set(two_prey.info["miscaptures"]) == {2}

    def test_prey_meet_the_agents_where_they_have_moved_to(self):
        """One catcher leaves before the stag's turn, and one agent comes without catching."""
        _, outcome = play([(0, 1), (1, 0), (1, 3)], [CATCH, DOWN, LEFT], stags=[(1, 1)])
        assert set(outcome.reward) == {-2.0}

    def test_cannibalism(self):
        """A prey with condition 0 is captured by whoever is beside it, without prevention even by nobody."""
        alone = play([(4, 4)], [STAY], stags=[(1, 1)], capture_condition=(0, 1))[0].alive[:, 0]
        beside = play([(0, 1)], [STAY], stags=[(1, 1)], capture_condition=(0, 1))[0].alive[:, 0]
        allowed = play([(4, 4)], [STAY], stags=[(1, 1)], capture_condition=(0, 1), prevent_cannibalism=False)[0].alive[:, 0]
        assert alone.all() and not beside.any() and not allowed.any()

    def test_a_removed_agent_does_not_count_as_beside_but_one_that_stands_there_does(self):
        """Frozen agents matter for cannibalism where they have a marker."""
        fields = {"stags": [(1, 1)], "frozen": [1], "capture_condition": (0, 1)}
        assert play([(4, 4), (0, 1)], [STAY, STAY], remove_frozen=True, **fields)[0].alive[:, 0].all()
        assert not play([(4, 4), (0, 1)], [STAY, STAY], remove_frozen=False, **fields)[0].alive[:, 0].any()

    def test_hunters_multiply_hares_only(self):
        """A hunter must be among the catchers."""
        hunting = {"num_hunters": 1, "hunter_multiplier": 5.0, "capture_reward": (10.0, 2.0), "capture_freezes": False}
        assert set(play([(0, 1), (4, 4)], [CATCH, STAY], hares=[(1, 1)], **hunting)[1].reward) == {10.0}
        assert set(play([(4, 4), (0, 1)], [STAY, CATCH], hares=[(1, 1)], **hunting)[1].reward) == {2.0}
        assert set(play([(1, 0), (0, 1)], [CATCH, CATCH], hares=[(1, 1)], **hunting)[1].reward) == {10.0}
        assert set(play([(1, 0), (0, 1)], [STAY, CATCH], hares=[(1, 1)], **hunting)[1].reward) == {2.0}
        assert set(play([(1, 0), (0, 1)], [CATCH, CATCH], stags=[(1, 1)], **hunting)[1].reward) == {10.0}


class TestPreyMoves:
    """Prey move at random among free cells."""

    def test_prey_move_uniformly_to_free_neighbours(self):
        """An agent above and a hare below leave two cells."""
        states, _ = play([(0, 1)], [STAY], stags=[(1, 1)], hares=[(2, 1)], times=4096, rest_probability=(0.0, 1.0))
        counts = Counter(map(tuple, states.prey[:, 0].tolist()))
        assert set(counts) == {(1, 0), (1, 2)}
        assert abs(counts[1, 0] - 2048) < 5 * 32

    def test_boxed_in_prey_stay(self):
        """The stag in the corner can leave only after the other stag has left."""
        states, _ = play([(0, 1)], [STAY], stags=[(0, 0), (1, 0)], rest_probability=(0.0, 0.0))
        first_cells = seen(states.prey[:, 0])
        assert (0, 0) in first_cells  # when its turn is before the other stag's, which then leaves
        assert first_cells == {(0, 0), (1, 0)}

    def test_prey_stay_at_the_wall(self):
        """In a grid of one row the other rows are wall."""
        states, _ = play([(0, 1)], [STAY], stags=[(0, 0)], rest_probability=(0.0, 0.0), active_height=1)
        assert seen(states.prey[:, 0]) == {(0, 0)}

    def test_prey_rest_by_kind(self):
        """Stags rest with probability 1/4, hares always."""
        states, _ = play([(4, 4)], [STAY], stags=[(0, 0)], hares=[(2, 2)], times=4096, rest_probability=(0.25, 1.0))
        rested = (states.prey[:, 0] == 0).all(axis=1)
        assert abs(rested.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4096)
        assert seen(states.prey[:, 2]) == {(2, 2)}


class TestEnds:
    """Termination and truncation are kept apart."""

    def test_the_limit_truncates(self):
        """And is not a win."""
        _, before = play([(0, 0)], [STAY], stags=[(4, 4)], steps=2)
        _, at = play([(0, 0)], [STAY], stags=[(4, 4)], steps=3)
        assert not before.truncated.any() and not before.terminated.any()
        assert at.truncated.all() and not at.terminated.any() and not at.info["won"].any()

    @pytest.mark.parametrize("steps", [0, 3])
    def test_no_prey_alive_terminates_even_at_the_limit(self, steps):
        """Where both coincide the episode is terminated only."""
        _, outcome = play([(0, 1), (1, 0), (4, 4)], [CATCH, CATCH, STAY], stags=[(1, 1)], steps=steps)
        assert outcome.terminated.all() and outcome.info["won"].all() and not outcome.truncated.any()

    def test_no_agent_left_terminates(self):
        """Though a stag is alive."""
        _, outcome = play([(0, 1), (1, 0)], [CATCH, CATCH], stags=[(1, 1), (3, 3)])
        assert outcome.terminated.all() and outcome.info["won"].all()

    def test_automatic_reset_and_statistics(self, key):
        """Under the wrappers an episode of four steps takes five."""
        env = AutoReset(EpisodeStatistics(ENV))
        params = rules()

        def body(state, key):
            state, outcome = env.step(key, state, jnp.full(3, STAY), params)
            return state, outcome

        _, outcome = jax.jit(lambda key: jax.lax.scan(body, env.reset(key, params), jax.random.split(key, 10)))(key)
        assert np.flatnonzero(outcome.truncated).tolist() == [3, 8]
        assert np.flatnonzero(outcome.info["reset"]).tolist() == [4, 9]
        assert outcome.info["episode_length"][3] == 4


class TestObservation:
    """What agents and mixers see."""

    def test_windows_by_hand(self):
        """Two agents, a stag and a hare in the upper left corner."""
        state, active = situation([(0, 0), (1, 1)], stags=[(1, 0)], hares=[(2, 2)])
        observation = look(ENV, state, rules(**active))
        windows = np.zeros((3, 3, 3, 3))
        windows[0, 1, 1, 0] = windows[0, 2, 2, 0] = 1  # agent 0 in the corner: itself, agent 1 below to the right
        windows[0, 2, 1, 1] = 1  # and the stag below
        windows[1, 1, 1, 0] = windows[1, 0, 0, 0] = windows[1, 1, 0, 1] = windows[1, 2, 2, 2] = 1
        np.testing.assert_array_equal(observation.agents, windows.reshape(3, -1))
        grid = np.zeros((5, 5, 3))
        grid[0, 0, 0] = grid[1, 1, 0] = grid[1, 0, 1] = grid[2, 2, 2] = 1
        np.testing.assert_array_equal(observation.state, grid.ravel())
        assert observation.agent_mask.tolist() == [True, True, False]

    def test_frozen_agents(self):
        """Removed ones see and show nothing; those that stand do both; either may only stay."""
        state, active = situation([(0, 0), (0, 1)], stags=[(1, 1)], frozen=[1])
        removed = look(ENV, state, rules(**active))
        standing = look(ENV, state, rules(**active, remove_frozen=False))
        assert not removed.agents[1].any() and removed.agents[0].reshape(3, 3, 3)[..., 0].sum() == 1
        assert standing.agents[1].any() and standing.agents[0].reshape(3, 3, 3)[..., 0].sum() == 2
        assert removed.action_mask[1].tolist() == standing.action_mask[1].tolist() == [name == "stay" for name in ACTIONS]
        assert removed.agent_mask.tolist() == [True, True, False]

    def test_action_masks(self):
        """Moves end at the walls only, and catching needs a prey beside."""
        state, active = situation([(0, 0), (2, 2)], stags=[(0, 1), (1, 1)])
        mask = look(ENV, state, rules(**active)).action_mask
        # Agent 0: in the corner, a stag to its right (a taken cell may be tried); agent 1: in the open, the stag is diagonal.
        assert mask[0].tolist() == [True, True, False, False, True, True]
        assert mask[1].tolist() == [True, True, True, True, True, False]
        assert mask[2].tolist() == [False, False, False, False, True, False]

    def test_walls(self):
        """Beyond the active grid nobody can go."""
        state, active = situation([(2, 3)], stags=[(0, 0)])
        params = rules(**active, active_height=3, active_width=4)
        assert look(ENV, state, params).action_mask[0].tolist() == [False, False, True, True, True, False]
        corner = play([(0, 0)], [STAY], stags=[(2, 3)], active_height=3, active_width=4, rest_probability=(0.0, 0.0))[0]
        assert seen(corner.prey[:, 0]) == {(1, 3), (2, 2)}
        pushed = play([(2, 3)], [DOWN], stags=[(0, 0)], active_height=3, active_width=4)[0]
        assert seen(pushed.agents[:, 0]) == {(2, 3)}


class Rules(NamedTuple):
    """The oracle's parameters: a few of the game's, as Python numbers."""

    condition: tuple[int, int]
    freezes: bool
    removes: bool
    rest: float


def enumerate_outcomes(agents, prey, kinds, actions, frozen, rules):
    """The exact distribution of one step, by trying every order and every choice; written from the rules, sharing no code with the game."""
    total = Counter()
    agent_orders = list(itertools.permutations(range(len(agents))))
    prey_orders = list(itertools.permutations(range(len(prey))))
    for agent_order in agent_orders:
        moved = list(agents)
        for a in agent_order:
            if actions[a] < 4 and a not in frozen:
                cell = (moved[a][0] + DIRECTIONS[actions[a]][0], moved[a][1] + DIRECTIONS[actions[a]][1])
                others = [moved[b] for b in range(len(agents)) if b not in frozen or not rules.removes]
                if cell not in others and cell not in prey and min(cell) >= 0 and max(cell) < 5:
                    moved[a] = cell
        for prey_order in prey_orders:
            weight = 1 / len(agent_orders) / len(prey_orders)
            hunt(moved, list(prey), kinds, actions, frozenset(frozen), prey_order, rules, weight, (0, 0), total)
    return total


def hunt(agents, prey, kinds, actions, frozen, order, rules, weight, events, total):
    """The turns of the prey in `order`, of which None are dead; adds the probability of every end to `total`."""
    if not order:
        total[(tuple(agents), tuple(prey), frozen, events)] += weight
        return
    continue_with = partial(hunt, agents, kinds=kinds, actions=actions, order=order[1:], rules=rules, total=total)
    p, (captures, misses) = order[0], events
    around = [(prey[p][0] + dy, prey[p][1] + dx) for dy, dx in DIRECTIONS]
    standing = [cell for a, cell in enumerate(agents) if a not in frozen or not rules.removes]
    catchers = {a for a, cell in enumerate(agents) if a not in frozen and actions[a] == CATCH and cell in around}
    if len(catchers) >= rules.condition[kinds[p]] and any(cell in around for cell in standing):
        left = [*prey[:p], None, *prey[p + 1 :]]
        continue_with(prey=left, frozen=frozen | catchers if rules.freezes else frozen, weight=weight, events=(captures + 1, misses))
        return
    events = (captures, misses + bool(catchers))
    free = [cell for cell in around if cell not in standing and cell not in prey and min(cell) >= 0 and max(cell) < 5]
    stay = rules.rest if free else 1.0
    if stay:
        continue_with(prey=prey, frozen=frozen, weight=weight * stay, events=events)
    for cell in free if stay < 1 else []:
        continue_with(prey=[*prey[:p], cell, *prey[p + 1 :]], frozen=frozen, weight=weight * (1 - stay) / len(free), events=events)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking would take minutes
@given(st.data())
def test_every_outcome_of_a_step_has_the_probability_that_the_rules_give_it(data):
    """Crowded random situations against the enumeration of all orders and choices."""
    times = 8192
    near = st.tuples(st.integers(0, 2), st.integers(0, 2))  # crowded in a corner
    cells = data.draw(st.lists(near, min_size=6, max_size=6, unique=True))
    actions = data.draw(st.lists(st.sampled_from([RIGHT, DOWN, LEFT, UP, STAY, CATCH, CATCH, CATCH]), min_size=3, max_size=3))
    frozen = data.draw(st.sampled_from([(), (), (1,)]))
    rule = data.draw(st.builds(Rules, st.sampled_from([(2, 1), (3, 2), (0, 1)]), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5])))
    options = {"capture_condition": rule.condition, "capture_freezes": rule.freezes, "remove_frozen": rule.removes}
    expected = enumerate_outcomes(cells[:3], cells[3:], (0, 0, 1), actions, frozen, rule)
    actions = [STAY if agent in frozen else action for agent, action in enumerate(actions)]
    states, outcome = play(
        cells[:3], actions, cells[3:5], cells[5:], frozen, times=times, rest_probability=(rule.rest, rule.rest), **options
    )
    observed = Counter()
    for agents, prey, alive, ice, captures, misses in zip(
        states.agents.tolist(),
        states.prey.tolist(),
        states.alive.tolist(),
        states.frozen.tolist(),
        outcome.info["captures"].tolist(),
        outcome.info["miscaptures"].tolist(),
        strict=True,
    ):
        ends = tuple(tuple(cell) if lives else None for cell, lives in zip(prey, alive, strict=True))
        observed[(tuple(map(tuple, agents)), ends, frozenset(np.flatnonzero(ice).tolist()), (captures, misses))] += 1
    assert set(observed) <= set(expected)
    for end, probability in expected.items():
        # The last term is for outcomes so rare that their counts are not normally distributed.
        assert abs(observed[end] / times - probability) < 5 * np.sqrt(probability / times) + 10 / times


def test_reset_places_every_ordered_pair_of_cells_equally_often():
    """An agent and a stag on six cells: 30 pairs."""
    env, params = make("pymarl2", height=2, width=3, num_agents=1, num_stags=1, radius=1)
    states = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(3), 30000), params)
    pairs = np.concatenate([states.agents, states.prey], axis=1).reshape(-1, 4)
    counts = Counter(map(tuple, pairs.tolist()))
    assert len(counts) == 30
    assert all(abs(count - 1000) < 5 * np.sqrt(1000) for count in counts.values())


def test_a_full_grid_can_be_placed():
    """Sixteen entities on sixteen cells."""
    env, params = make("pymarl2", height=4, width=4)
    states = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(3), 500), params)
    cells = np.sort(np.concatenate([states.agents, states.prey], axis=1) @ np.array([4, 1]), axis=1)
    np.testing.assert_array_equal(cells, np.tile(np.arange(16), (500, 1)))


def test_records_are_small():
    """Three bytes for each of the sixteen entities."""
    env, params = make("pymarl2")
    record = env.record(env.reset(jax.random.key(0), params))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(record)) == 3 * 16

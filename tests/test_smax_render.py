"""Pictures of SMAX: which episode is played, what is said to be in a picture, and that files are complete or absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.animation import FFMpegWriter
from PIL import Image

from envs.base import Observation
from envs.smax import drawing, render
from envs.smax.drawing import moment_of, view_of
from envs.smax.render import Episode, hits, play, random_policy, save_animation, save_filmstrip
from envs.smax.scenarios import make
from envs.smax.types import NOBODY, SmaxState

SIZE = {"width": 3.0, "dpi": 40}


def attack_or_go_east(key, observation):
    """The first attack that is available; else to the east, or nowhere if dead."""
    del key
    attacks = observation.action_mask[:, 5:]
    return jnp.where(attacks.any(-1), 5 + jnp.argmax(attacks, -1), jnp.where(observation.action_mask[:, 1], 1, 4))


def game(attack_range, **options):
    """Two marines against one (there is room for two); at most six steps."""
    numbers = {"marine": {"attack_range": attack_range, "sight_range": 50.0}}
    options = {"max_steps": 6, "active_enemies": 1, "unit_statistics": numbers, **options}
    return make("custom", allies={"marine": 2}, enemies={"marine": 2}, **options)


@pytest.fixture(scope="module")
def won():
    """An episode in which all shoot from the first step on."""
    env, params = game(50.0)
    return env, params, play(env, params, attack_or_go_east, jax.random.key(0))


@pytest.fixture(scope="module")
def peaceful():
    """An episode in which all walk until the time is up."""
    env, params = game(0.1, enemy_shoots=False)
    return env, params, play(env, params, attack_or_go_east, jax.random.key(0))


def test_an_episode_ends_where_the_game_ends(won, peaceful):
    """Two against one win before the time is up, as soon as the enemy has no health; without shots the time limit ends it."""
    _, _, episode = won
    length = len(episode.rewards)
    assert (episode.won, episode.lost, episode.truncated) == (True, False, False)
    assert length < 6
    assert episode.actions.shape == (length, 4)
    assert episode.states.health.shape == (length + 1, 4)
    enemies = episode.states.health[:, 2:].sum(axis=1)
    assert (enemies[:-1] > 0).all() and enemies[-1] == 0
    assert episode.rewards.sum() == pytest.approx(2.0)
    _, _, episode = peaceful
    assert (episode.won, episode.lost, episode.truncated, len(episode.rewards)) == (False, False, True, 6)
    assert (episode.actions[:, :2] == 1).all()
    np.testing.assert_array_equal(episode.states.steps, np.arange(7))


def test_random_actions_are_available(key):
    """And all that are available occur."""
    mask = jnp.array([[True, False, True], [False, True, False]])
    observation = Observation(jnp.zeros((2, 1)), jnp.zeros(1), mask, jnp.ones(2, bool))
    actions = jax.vmap(lambda key: random_policy(key, observation))(jax.random.split(key, 64))
    assert set(actions[:, 0].tolist()) == {0, 2}
    assert set(actions[:, 1].tolist()) == {1}


def test_hits_account_for_all_damage(won):
    """The health that every unit loses in every step is nine for each hit on it, or all that it had."""
    _, _, episode = won
    targets, health = hits(episode, 2), episode.states.health
    suffered = 9.0 * (targets[:, :, None] == np.arange(4)).sum(axis=1)
    np.testing.assert_allclose(health[:-1] - health[1:], np.minimum(suffered, health[:-1]))
    assert (targets == NOBODY).any() and (targets[:, :2] == 2).any() and np.isin(targets[:, 2], (0, 1)).any()
    assert (targets[:, 3] == NOBODY).all()


def test_orders_without_a_shot_are_no_hits():
    """Of four units ordered to attack, one is out of range, one reloads, one shoots at once and one as soon as it has reloaded."""
    still = np.zeros((2, 4), np.float32)
    cooldown = np.array([[-1.0, 0.6, -0.7, 0.3], [-1.5, 0.1, 0.17, 0.48]], np.float32)
    actions = np.array([[4, 4, 4, 4], [5, 6, 5, 6]], np.int8)
    types, goal = np.zeros((2, 4), np.int8), np.zeros((2, 2), np.float32)
    states = SmaxState(still, still, still + 45, cooldown, types, actions, goal, goal, np.zeros((2, 2), np.int8), np.arange(2))  # pyright: ignore[reportArgumentType]
    episode = Episode(states, actions[1:], np.zeros(1, np.float32), False, False, True)
    np.testing.assert_array_equal(hits(episode, 2), [[NOBODY, NOBODY, 1, 0]])
    walking = episode._replace(actions=np.full((1, 4), 4, np.int8))
    np.testing.assert_array_equal(hits(walking, 2), np.full((1, 4), NOBODY))


def test_a_moment_has_the_living_the_fallen_and_the_shots(won):
    """Between two steps all is halfway; units fall at the end of a step; units that take no part are neither living nor fallen."""
    env, params, episode = won
    battle, last = render._battle(env, params, episode, whole_map=False), len(episode.rewards)
    start, halfway, end = moment_of(battle, 0), moment_of(battle, last, 0.5), moment_of(battle, last)
    assert start.shots == []
    assert start.alive.tolist() == [True, True, True, False]
    assert not start.fallen.any()
    assert halfway.alive[2] and halfway.health[2] == pytest.approx(battle.health[last - 1, 2] / 2)
    assert end.fallen.tolist() == [False, False, True, False]
    assert end.shots == halfway.shots == [(unit, target) for unit, target in enumerate(battle.targets[-1]) if target != NOBODY]
    assert {target for unit, target in end.shots if unit < 2} == {2}


def test_the_view_holds_the_living_and_stays_near_the_map():
    """Whatever the dead do; and it is never slim."""
    x, y = np.array([[1.0, 30.0, 900.0]]), np.array([[16.0, 16.0, 900.0]])
    view = view_of(x, y, np.array([[True, True, False]]), (32.0, 32.0))
    assert view.west == pytest.approx(-drawing.RIM)
    assert view.width == pytest.approx(29.0 + 2 * drawing.MARGIN)
    assert view.height == pytest.approx(drawing.SLIMMEST * view.width)
    assert view.south + view.height / 2 == pytest.approx(16.0)


def test_a_gif_has_all_frames(peaceful, tmp_path):
    """The start, then two for each step, the last of which stays."""
    save_animation(*peaceful, path=tmp_path / "battle.gif", steps_per_second=5.0, **SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["battle.gif"]
    with Image.open(tmp_path / "battle.gif") as image:
        assert getattr(image, "n_frames", 1) == 1 + 2 * 6
        assert image.width == int(40 * (3.0 + 2 * drawing.GAP))
        assert image.info["duration"] == 100
        image.seek(12)
        assert image.info["duration"] == 1500


@pytest.mark.skipif(not FFMpegWriter.isAvailable(), reason="needs the program ffmpeg")
def test_an_mp4_is_written(peaceful, tmp_path):
    """It begins as such a file does."""
    save_animation(*peaceful, path=tmp_path / "battle.mp4", frames_per_step=1, **SIZE)
    assert (tmp_path / "battle.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(("frames", "steps"), [(2, [0, 6]), (4, [0, 2, 4, 6]), (99, [0, 1, 2, 3, 4, 5, 6])])
def test_a_filmstrip_goes_from_start_to_end(peaceful, tmp_path, monkeypatch, frames, steps):
    """Its moments are evenly spaced, and no more than there are."""
    drawn = []
    monkeypatch.setattr(drawing, "draw", lambda axes, battle, step: drawn.append(step))
    save_filmstrip(*peaceful, path=tmp_path / "battle.png", frames=frames, **SIZE)
    assert drawn == steps


def test_a_filmstrip_is_a_grid(won, tmp_path):
    """Two columns are as wide as two moments and the gaps; titles say when and how much, the last one how it ended."""
    env, params, episode = won
    save_filmstrip(env, params, episode, tmp_path / "battle.png", columns=2, frames=3, whole_map=True, **SIZE)
    with Image.open(tmp_path / "battle.png") as image:
        assert image.width == int(40 * (2 * 3.0 + 3 * drawing.GAP))
        assert image.height == int(40 * (2 * (3.0 + drawing.HEADER) + drawing.FOOTER))
    battle = render._battle(env, params, episode, whole_map=True)
    _, (axes,) = drawing.panels(battle, 1, 1, 3.0)
    drawing.draw(axes, battle, len(episode.rewards))
    assert axes.get_title() == f"step {len(episode.rewards)} · 2.00 reward so far · won"
    assert [text.get_text() for text in axes.texts if text.get_text() in drawing.LETTERS] == ["m", "m"]


@pytest.mark.parametrize(("save", "name"), [(save_animation, "battle.gif"), (save_filmstrip, "battle.png")])
def test_a_failed_drawing_leaves_what_was_there(peaceful, tmp_path, monkeypatch, save, name):
    """An old file stays as it is, and nothing new lies about."""
    (tmp_path / name).write_text("old")
    draw = drawing.draw

    def fail_later(axes, battle, step, share=1.0):
        if step == 6:
            raise RuntimeError("no ink")
        draw(axes, battle, step, share)

    monkeypatch.setattr(drawing, "draw", fail_later)
    with pytest.raises(RuntimeError, match="no ink"):
        save(*peaceful, path=tmp_path / name, **SIZE)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"


def test_errors_name_what_was_expected(peaceful, tmp_path, monkeypatch):
    """Suffixes, directories, numbers and programs are checked before anything is drawn."""
    monkeypatch.setattr(drawing, "draw", None)
    with pytest.raises(ValueError, match=r"must end in \.gif or \.mp4, not 'battle\.avi'"):
        save_animation(*peaceful, path=tmp_path / "battle.avi")
    with pytest.raises(ValueError, match=r"must end in \.png, not 'battle'"):
        save_filmstrip(*peaceful, path=tmp_path / "battle")
    for save, name in ((save_animation, "battle.gif"), (save_filmstrip, "battle.png")):
        with pytest.raises(FileNotFoundError, match=r"directory .*nowhere of battle\.\w+ does not exist"):
            save(*peaceful, path=tmp_path / "nowhere" / name)
        with pytest.raises(ValueError, match="dpi must be at least 1, not 0"):
            save(*peaceful, path=tmp_path / name, dpi=0)
        with pytest.raises(ValueError, match="width must be positive"):
            save(*peaceful, path=tmp_path / name, width=-1.0)
    with pytest.raises(ValueError, match="frames must be at least 2, not 1"):
        save_filmstrip(*peaceful, path=tmp_path / "battle.png", frames=1)
    with pytest.raises(ValueError, match="frames_per_step must be at least 1, not 0"):
        save_animation(*peaceful, path=tmp_path / "battle.gif", frames_per_step=0)
    monkeypatch.setattr(FFMpegWriter, "isAvailable", lambda: False)
    with pytest.raises(ValueError, match=r"battle\.mp4 needs the program ffmpeg.*battle\.gif"):
        save_animation(*peaceful, path=tmp_path / "battle.mp4")
    assert list(tmp_path.iterdir()) == []

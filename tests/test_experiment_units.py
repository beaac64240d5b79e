"""Where stuck units are, and whether networks that have them can still learn: what is counted, drawn and distilled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cells, census, distillation_report, distilling, protocol, shares
from knife_jax.config import Config
from tests.made_up_runs import LAYERS, cell_of, made_up, small_config

TINY = {
    "preset": "matrix_drift",
    "env": {"options": {"num_tasks": 2}},
    "agent": {"hidden_size": 4},
    "qmix": {"embed_size": 4, "hypernet_size": 4},
    "replay": {"batch_size": 8},
    "train": {"env_steps_per_task": 320},
    "evaluation": {"per_task": 1},
    "optimizer": {"learning_rate": 1e-2},
}


def _loaded(root, seeds=4):
    cell = cell_of(small_config(), seeds)
    result = made_up(cell.config, seeds)
    cells.save(cell, result, root / cell.file)
    return result, cells.load([root / cell.file])


def test_the_census_takes_each_layer_at_each_tasks_end(tmp_path):
    """Of the layers that the files know; their units are the networks'."""
    result, loaded = _loaded(tmp_path)
    found = census.share_by_layer(loaded, "dormant")
    assert set(found) == set(LAYERS)
    for layer, values in found.items():
        np.testing.assert_allclose(values, result.metrics[f"plasticity/{layer}/dormant"][:, [2, 5, 8]], rtol=0.001)
    assert census.units(loaded)["agent/hidden_1"] == 4
    path = census.write_report("?", {census.Place("matrix_drift", "small", "qmix"): loaded}, tmp_path / "out")
    line = next(line for line in path.read_text().split("\n") if line.startswith("| agent/hidden_1"))
    change = found["agent/hidden_1"]
    assert line.split("|")[2].strip() == "4" and f"{change[:, -1].mean():.2f} [" in line


def test_replay_ratios_count_gradient_steps_for_256_environment_steps():
    """8 slots a round here: one step for each is 32; three for each are 96."""
    config = small_config()
    assert shares.replay_ratio(made_up(config, 1)) == 32
    assert shares.replay_ratio(made_up(Config.from_dict({"train": {"updates_per_round": 3}}, config), 1)) == 96
    described = protocol.read("stationary")
    ratios = {
        cell.setting: shares.replay_ratio(made_up(cell.config, 1))
        for cell in protocol.cells(described, "standard")
        if cell.setting[:2] == "3m"
    }
    assert ratios == {"3m": 4, "3m_ratio_1": 1, "3m_ratio_16": 16}


def test_shares_are_drawn_for_all_settings_together(tmp_path):
    """A table with one line for each run, a figure over training, one against the ratio where there are several."""
    config = small_config()
    twice = Config.from_dict({"train": {"updates_per_round": 2}}, config)
    groups = {("one", "qmix"): {"none": made_up(config, 2)}, ("two", "qmix"): {"none": made_up(twice, 2)}}
    text = "\n".join(shares.sections(groups, tmp_path))
    assert "| one | qmix | none | 2 | 32 |" in text and "| two | qmix | none | 2 | 64 |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"over_training-none.png", "replay_ratio-none.png"}


def test_teachers_say_things_of_the_same_mean_and_spread():
    """The second is scaled; padding counts for nothing, and what is constant stays finite."""
    rng = np.random.default_rng(0)
    first, second = jnp.asarray(rng.normal(5, 3, (4, 6, 1))), jnp.asarray(rng.normal(0, 0.1, (4, 6, 1)))
    counts = jnp.asarray(rng.random((4, 6, 1)) < 0.7)
    both = distilling._alike(first, second, counts)
    np.testing.assert_array_equal(both[0], first)
    kept = np.asarray(both[1])[np.asarray(counts)]
    np.testing.assert_allclose([kept.mean(), kept.std()], [first.mean(where=counts), first.std(where=counts)], rtol=1e-4)
    assert np.corrcoef(kept, np.asarray(second)[np.asarray(counts)])[0, 1] > 0.9999
    assert jnp.isfinite(distilling._alike(first, jnp.zeros_like(first), counts)).all()


def test_a_sequence_must_come_back_to_its_first_task():
    """Otherwise there is no first teacher."""
    with pytest.raises(ValueError, match=r"env\.scenario: a sequence of tasks that ends with its first"):
        distilling.make_lesson(Config.from_dict({**TINY, "env": {"name": "matrix", "scenario": "paper"}}))


@pytest.mark.slow
def test_distilling_starts_where_the_sequence_ended_and_learns():
    """Before the first step `none` and KNIFE, which changes no output, leave the same error; fresh weights another; all get better."""
    config = Config.from_dict(TINY)
    keys = jax.random.split(jax.random.key(0), 2)
    lessons = jax.jit(jax.vmap(distilling.make_lesson(config)))(keys)
    assert lessons.targets.shape == (2, 2, 1, distilling.SEQUENCES, 1)
    curves = {}
    for name, options in {"none": {}, "knife": {"threshold": 0.9}, "reset": {"which": "all"}}.items():
        own = Config.from_dict({"plasticity": {"name": name, **options}}, config)
        curves[name] = np.asarray(jax.jit(jax.vmap(distilling.make_student(own, 400)))(keys, lessons))
        assert curves[name].shape == (2, 2, distilling.RECORDS + 1)
        assert (curves[name][..., -1] < 0.5 * curves[name][..., 0]).all()
    np.testing.assert_allclose(curves["knife"][..., 0], curves["none"][..., 0], rtol=1e-3)
    assert (abs(curves["reset"][..., 0] / curves["none"][..., 0] - 1) > 1e-3).all()
    assert (abs(curves["knife"][..., -1] / curves["none"][..., -1] - 1) > 1e-3).any()


def test_distilled_files_are_read_as_logarithms_and_paired(tmp_path):
    """Errors of 0.01 and 0.1 are a decade apart for every seed; smaller ones than 1e-6 are as good as that."""
    described = protocol.read("distillation").model_copy(update={"settings": {"small": {}}})
    for method, options, error in (("none", {"name": "none"}, 0.1), ("fresh", {"name": "reset", "which": "all"}, 0.01)):
        cell = cell_of(small_config(**options), method=method)
        unexplained = np.full((3, 2, 5), error) * np.array([1.0, 2.0, 3.0])[:, None, None]
        unexplained[:, 1, -1] = 1e-12
        arrays = {"unexplained": unexplained, "steps": np.arange(5), "shares/agent/dormant": np.full((3, 3), 0.25)}
        cells.write(cell, arrays, {"seeds": 3}, tmp_path / cell.file)
    pupils = distillation_report.load_group(described, tmp_path, "small", "qmix")
    assert set(pupils) == {"none", "fresh"}
    assert pupils["none"].errors[0, 0, 0] == pytest.approx(-1) and pupils["none"].errors[0, 1, -1] == -6
    assert str(distillation_report._against_fresh(pupils, "none", 0)) == "1.00 [1.00, 1.00]"
    assert distillation_report._against_fresh(pupils, "fresh", 0) is None
    report = distillation_report.write_report(described, "standard", tmp_path).read_text()
    assert report.index("| fresh |") < report.index("| none |") and "agent dormant 0.25" in report

"""Result files: whole or absent, trained once, refused where they are not what their name says."""

import json

import numpy as np
import pytest

from experiments import cells
from tests.made_up_runs import cell_of, made_up, small_config


def _filed(root, cell, **numbers):
    """Writes a made-up result of a cell."""
    result = made_up(cell.config, cell.seeds, cell.first_seed, **numbers)
    cells.save(cell, result, root / cell.file)
    return result


def test_files_give_back_what_was_written(tmp_path):
    """Performance and reports bit for bit, diagnoses of networks to a part in 1,000, those of layers at the tasks' ends alone."""
    cell = cell_of(small_config())
    result = _filed(tmp_path, cell)
    loaded = cells.load([tmp_path / cell.file])
    assert loaded.config == result.config and loaded.task_order == (0, 1, 0) and loaded.provenance["seeds"] == 3
    for name in ("eval/won", "all_tasks/return", "env_steps", "updates"):
        np.testing.assert_array_equal(loaded.metrics[name], result.metrics[name])
    np.testing.assert_array_equal(loaded.report["agent/hidden_1/treated"], [0.0, 1.0, 2.0])
    np.testing.assert_allclose(loaded.metrics["plasticity/mixer/dormant"], result.metrics["plasticity/mixer/dormant"], rtol=0.001)
    ends = result.metrics["plasticity/mixer/w1_hidden/dormant"][:, [2, 5, 8]]
    np.testing.assert_allclose(loaded.metrics["at_end/plasticity/mixer/w1_hidden/dormant"], ends, rtol=0.001)
    assert "plasticity/mixer/w1_hidden/dormant" not in loaded.metrics and "eval/length" not in loaded.metrics


def test_numbers_without_a_mantissa_stay_what_they_are(tmp_path):
    """Zeros, infinities and what was never measured."""
    cell = cell_of(small_config())
    result = made_up(cell.config, cell.seeds)
    result.metrics["plasticity/agent/stagnant"][0, :4] = [0.0, np.nan, np.inf, 1.0]
    cells.save(cell, result, tmp_path / "file.npz")
    loaded = cells.load([tmp_path / "file.npz"])
    np.testing.assert_array_equal(loaded.metrics["plasticity/agent/stagnant"][0, :4], [0.0, np.nan, np.inf, 1.0])


def test_several_files_are_one_run(tmp_path):
    """Seeds follow one another in the order of the files; what all seeds share is there once."""
    batches = [cell_of(small_config(), seeds, first) for first, seeds in ((0, 3), (3, 2))]
    parts = [_filed(tmp_path, cell) for cell in batches]
    loaded = cells.load(sorted((tmp_path / "small/qmix/none").glob("*.npz")))
    np.testing.assert_array_equal(loaded.metrics["eval/won"], np.concatenate([part.metrics["eval/won"] for part in parts]))
    assert loaded.metrics["env_steps"].shape == (9,) and loaded.provenance["seeds"] == 5


def test_a_cell_is_trained_once(tmp_path, monkeypatch):
    """The second time there is nothing to do; the seeds asked for are the cell's."""
    asked = []

    def run(config, *, seeds, first_seed):
        asked.append((seeds, first_seed))
        return made_up(config, seeds, first_seed)

    monkeypatch.setattr(cells, "run", run)
    cell = cell_of(small_config(), seeds=2, first_seed=4)
    assert cells.train(cell, tmp_path) and not cells.train(cell, tmp_path)
    assert asked == [(2, 4)]
    assert cell.file.name == "seeds-0004-0005.npz"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    """Neither a file of that name nor an unfinished one."""

    def half(file, **arrays):
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", half)
    cell = cell_of(small_config())
    with pytest.raises(KeyboardInterrupt):
        _filed(tmp_path, cell)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_another_configuration_is_refused_by_field(tmp_path):
    """What differs is named, with both values; the file stays."""
    there, here = (cell_of(small_config(name="redo", tau=tau)) for tau in (0.1, 0.2))
    _filed(tmp_path, there)
    with pytest.raises(cells.DamagedError, match=r"plasticity\.options: \{'tau': 0\.1\} there, \{'tau': 0\.2\} now"):
        cells.train(here, tmp_path)
    assert (tmp_path / there.file).exists()


def test_seeds_of_different_configurations_are_not_joined(tmp_path):
    """The file that differs is named."""
    first, second = cell_of(small_config()), cell_of(small_config(name="redo"), first_seed=3)
    _filed(tmp_path, first)
    _filed(tmp_path, second)
    with pytest.raises(cells.DamagedError, match=r"seeds-0003-0005\.npz: has another configuration"):
        cells.load(sorted(tmp_path.rglob("*.npz")))


@pytest.mark.parametrize("damage", ["cut", "empty", "not_an_archive", "without_about"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    """With one line that says what to do."""
    cell = cell_of(small_config())
    _filed(tmp_path, cell)
    path = tmp_path / cell.file
    if damage == "without_about":
        np.savez(path, numbers=np.zeros(3))
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "not_an_archive": b"nothing"}[damage])
    with pytest.raises(cells.DamagedError, match=r"seeds-0000-0002\.npz: not a whole result .* delete it") as error:
        cells.train(cell, tmp_path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_noticed(tmp_path):
    """Archives carry checksums."""
    cell = cell_of(small_config())
    _filed(tmp_path, cell)
    path = tmp_path / cell.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(cells.DamagedError, match="not a whole result"):
        cells.load([path])


def test_files_say_where_they_come_from(tmp_path):
    """Setting, learner, method, configuration and provenance stand in the file itself."""
    cell = cell_of(small_config(name="redo"), method="redo")
    _filed(tmp_path, cell)
    with np.load(tmp_path / cell.file) as file:
        about = json.loads(str(file["about"]))
    assert (about["setting"], about["mixer"], about["method"]) == ("small", "qmix", "redo")
    assert about["config"]["plasticity"]["name"] == "redo" and about["provenance"]["first_seed"] == 0

"""The command of an experiment: refusals in one line, lists, parts, and the quick scale from end to end."""

import json

import pytest

from experiments import cells, command, neuron_census, protocol, report, tuning
from tests.made_up_runs import made_up


@pytest.fixture
def trained(monkeypatch):
    """Runs are made up; what was asked for is recorded."""
    asked = []

    def run(config, *, seeds, first_seed=0):
        asked.append((config, seeds, first_seed))
        return made_up(config, seeds, first_seed)

    monkeypatch.setattr(cells, "run", run)
    monkeypatch.setattr(tuning, "run", run)
    return asked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds: at least 1, got 0"),
        (["--part", "3/2"], "--part: expected I/N with I from 1 to N, got '3/2'"),
        (["--part", "0/2"], "--part: expected I/N"),
        (["--part", "half"], "--part: expected I/N"),
        (["--only", "*/qmix/knive"], "--only: nothing is called SETTING/MIXER/METHOD as in */qmix/knive"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, capsys, trained, flags, message):
    """One line and 1; nothing is tuned, trained or written, at a scale that would be tuned too."""
    scale = "quick" if flags[0] == "--only" else "standard"
    assert command.main("matrix_drift", [*flags, "--scale", scale, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert trained == [] and not (tmp_path / "out").exists()


def test_unknown_scales_are_refused(capsys):
    """With those that there are, and 2."""
    with pytest.raises(SystemExit) as error:
        command.main("matrix_drift", ["--scale", "standart"])
    assert error.value.code == 2 and "'quick', 'standard'" in capsys.readouterr().err


def test_lists_and_parts(tmp_path, capsys, trained):
    """A list trains nothing and says what is there; parts are disjoint and together everything."""
    out = ["--out", str(tmp_path)]
    assert command.main("matrix_drift", ["--list", *out]) == 0
    everything = capsys.readouterr().out.split("\n")[:-1]
    assert trained == [] and all(line.startswith("missing ") for line in everything) and len(everything) == 3
    parts = []
    for part in ("1/2", "2/2"):
        command.main("matrix_drift", ["--list", "--part", part, *out])
        parts += capsys.readouterr().out.split("\n")[:-1]
    assert sorted(parts) == sorted(everything)
    assert cells.train(next(protocol.cells(protocol.read("matrix_drift"), "quick")), tmp_path)
    command.main("matrix_drift", ["--list", *out])
    assert [line.split()[0] for line in capsys.readouterr().out.split("\n")[:-1]].count("done") == 1


def test_what_is_there_is_not_trained_again_and_reported(tmp_path, trained):
    """The second time only the report is written, by the same files to the same words."""
    out = ["--out", str(tmp_path / "matrix_drift/quick")]
    for cell in protocol.cells(protocol.read("matrix_drift"), "quick"):
        assert cells.train(cell, tmp_path / "matrix_drift/quick")
    assert command.main("matrix_drift", out) == 0
    first = (tmp_path / "matrix_drift/quick/report.md").read_text()
    assert len(trained) == 3 and {seeds for _, seeds, _ in trained} == {2}
    assert report.main([str(tmp_path / "matrix_drift/quick")]) == 0
    assert (tmp_path / "matrix_drift/quick/report.md").read_text() == first
    for picture in first.split("](")[1:]:
        assert (tmp_path / "matrix_drift/quick" / picture.split(")")[0]).stat().st_size > 5000


def test_a_damaged_file_stops_the_command_with_its_name(tmp_path, capsys, trained):
    """One line; the other results stay."""
    out = ["--out", str(tmp_path)]
    for cell in protocol.cells(protocol.read("matrix_drift"), "quick"):
        cells.train(cell, tmp_path)
    path = next(tmp_path.rglob("knife/*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert command.main("matrix_drift", out) == 1
    assert "knife/seeds-0000-0001.npz: not a whole result" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("none/*.npz"))) == 1


def test_reports_of_nothing_are_refused(tmp_path, capsys):
    """With the directory; an unknown experiment with the nearest name."""
    (tmp_path / "matrix_drift/quick").mkdir(parents=True)
    assert report.main([str(tmp_path / "matrix_drift/quick")]) == 1
    assert "there are no results in" in capsys.readouterr().err
    assert report.main([str(tmp_path / "matrix_drif/quick")]) == 1
    assert "did you mean 'matrix_drift'" in capsys.readouterr().err


def test_tuning_takes_the_best_candidate_on_seeds_held_apart(tmp_path, monkeypatch):
    """The candidate with the highest mean; seeds from 100,000 on; what was tried is not tried again."""
    described = protocol.read("matrix_drift")
    methods = {"none": [{"name": "none"}], "reset": [{"name": "reset", "which": "last"}, {"name": "reset", "which": "all"}]}
    described = described.model_copy(update={"methods": methods})
    asked = []

    def run(config, *, seeds, first_seed):
        asked.append(first_seed)
        result = made_up(config, seeds)
        result.metrics["eval/won"][:] = 0.9 if config.plasticity.options["which"] == "all" else 0.1
        return result

    monkeypatch.setattr(tuning, "run", run)
    for _ in range(2):
        tuning.tune(described, "standard", tmp_path, ["none", "reset"], lambda line: None)
    assert asked == [100_000, 100_000]
    assert tuning.chosen(described, "standard", tmp_path)["reset"] == {"name": "reset", "which": "all"}
    assert json.loads((tmp_path / tuning.FILE).read_text())["seeds"] == described.tuning.seeds


def test_the_census_reads_what_others_trained(tmp_path, capsys, trained):
    """It trains the missing runs without a cure, once, where their own experiment finds them; and counts without training if told so."""
    flags = ["--experiments", "matrix_drift", "--results", str(tmp_path)]
    assert neuron_census.main([*flags, "--no-train"]) == 1
    assert "nothing to count" in capsys.readouterr().err
    assert neuron_census.main(flags) == 0 and len(trained) == 1
    own = [cells.train(cell, tmp_path / "matrix_drift/quick") for cell in protocol.cells(protocol.read("matrix_drift"), "quick")]
    assert own == [False, True, True]
    assert neuron_census.main([*flags, "--experiments", "matrix_drit"]) == 1
    assert "did you mean 'matrix_drift'" in capsys.readouterr().err

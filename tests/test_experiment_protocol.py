"""What the files in `experiments/configs` say: every configuration can be run, and the methods of a setting differ in the cure alone."""

import itertools
from collections import defaultdict

import pytest
import yaml

from envs.base import some_of
from experiments import protocol
from experiments.neuron_census import Census
from knife_jax import make_program

NAMES = sorted(path.stem for path in protocol.DIRECTORY.glob("*.yaml"))
COUNTING = ("neuron_census",)
TRAINING = [name for name in NAMES if name not in COUNTING]


def _scales(name):
    return [(name, scale) for scale in protocol.read(name).scales]


@pytest.mark.parametrize(("name", "scale"), [pair for name in TRAINING for pair in _scales(name)])
def test_methods_of_a_setting_differ_in_the_cure_alone(name, scale):
    """Same tasks, budget, evaluation, networks, exploration and seeds for all of them."""
    shared, seeds = defaultdict(set), defaultdict(set)
    for cell in protocol.cells(protocol.read(name), scale):
        place = cell.setting, cell.mixer
        shared[place].add(protocol.shared_part(cell.config).to_yaml())
        seeds[place, cell.method].update(range(cell.first_seed, cell.first_seed + cell.seeds))
    assert all(len(configs) == 1 for configs in shared.values())
    assert all(own == set(range(protocol.read(name).scales[scale].seeds)) for own in seeds.values())


@pytest.mark.parametrize("name", TRAINING)
def test_what_quick_trains_fits_the_networks(name):
    """Programs are made, not compiled."""
    described = protocol.read(name)
    for cell in protocol.cells(described, "quick") if "quick" in described.scales else ():
        assert make_program(cell.config).config == cell.config


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_every_candidate_of_every_method_fits_the_networks(name):
    """Programs are made, not compiled, for each setting and learner."""
    described = protocol.read(name)
    for setting, mixer in itertools.product(described.settings, described.mixers):
        fitting = (method for method in described.methods if mixer in described.only_with.get(method, described.mixers))
        for candidate in itertools.chain.from_iterable(described.methods[method] for method in fitting):
            config = protocol.configuration(described, described.scales["standard"], setting, mixer, candidate)
            assert make_program(config).config == config


def test_methods_are_trained_with_the_mixers_they_are_for():
    """QPLEX has no mixing layer to put composites on."""
    places = {(cell.mixer, cell.method) for cell in protocol.cells(protocol.read("matrix_drift"), "standard")}
    assert ("qmix", "knife_mixing") in places and ("qplex", "knife_mixing") not in places and ("qplex", "knife") in places


@pytest.mark.parametrize("name", TRAINING)
def test_tuning_seeds_are_held_apart(name):
    """No seed that options are chosen on is ever shown."""
    described = protocol.read(name)
    assert described.tuning.first_seed >= max(scale.seeds for scale in described.scales.values())


@pytest.mark.parametrize("name", TRAINING)
def test_quick_is_at_most_ten_small_programs(name):
    """For CI; few seeds."""
    described = protocol.read(name)
    if "quick" in described.scales:
        cells = list(protocol.cells(described, "quick"))
        assert 1 <= len(cells) <= 10 and all(cell.seeds <= 4 for cell in cells)


@pytest.mark.parametrize("name", COUNTING)
def test_what_is_counted_exists(name):
    """The experiments whose runs are counted have the method that is counted."""
    described = protocol.read_as(Census, name)
    known = [experiment for experiment in described.experiments if experiment in NAMES]
    assert known
    assert all(described.method in protocol.read(experiment).methods for experiment in known)


def test_seeds_are_cut_into_files():
    """The last file holds what is left over."""
    described = protocol.read("matrix_drift").model_copy(
        update={"scales": {"s": protocol.Scale(seeds=7, seeds_per_file=3, methods=["none"])}}
    )
    batches = [
        (cell.first_seed, cell.seeds) for cell in protocol.cells(described, "s") if (cell.setting, cell.mixer) == ("rewards_1", "qmix")
    ]
    assert batches == [(0, 3), (3, 3), (6, 1)]
    fewer = {(cell.first_seed, cell.seeds) for cell in protocol.cells(described, "s", seeds=2)}
    assert fewer == {(0, 2)}


def test_chosen_options_replace_the_first_candidate():
    """Of the method that they were chosen for, and of no other."""
    described = protocol.read("matrix_drift")
    chosen = {"redo": {"name": "redo", "tau": 0.5}}
    options = {cell.method: cell.config.plasticity.options for cell in protocol.cells(described, "standard", chosen=chosen)}
    assert options["redo"] == {"tau": 0.5} and options["reborn"] == {"tau": 0.1}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("methods", ["nome"], "unknown method 'nome'; did you mean 'none'"),
        ("mixers", ["qplx"], "unknown mixer 'qplx'; did you mean 'qplex'"),
        ("settings", ["rewards_01"], "unknown setting 'rewards_01'; did you mean 'rewards_0.1'"),
    ],
)
def test_a_scale_cannot_name_what_is_not_there(field, value, message):
    """The nearest name is suggested."""
    described = protocol.read("matrix_drift")
    wrong = described.scales["standard"].model_copy(update={field: value})
    with pytest.raises(ValueError, match=message):
        list(protocol.cells(described.model_copy(update={"scales": {"standard": wrong}}), "standard"))


def test_unknown_experiments_and_scales():
    """The nearest name is suggested."""
    with pytest.raises(ValueError, match="unknown experiment 'matrix_drit'; did you mean 'matrix_drift'"):
        protocol.read("matrix_drit")
    with pytest.raises(ValueError, match="unknown scale 'standart'; did you mean 'standard'"):
        next(protocol.cells(protocol.read("matrix_drift"), "standart"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": "won"}, "measures"),
        ({"measure": "wins"}, "measure"),
        ({"scales": {"quick": {"seeds": 0}}}, r"scales\.quick\.seeds"),
        ({"scales": {"quick": {"seeds": 2, "tunde": True}}}, r"scales\.quick\.tunde"),
    ],
)
def test_files_with_mistakes_are_refused(tmp_path, monkeypatch, change, message):
    """With the file and the field."""
    content = yaml.safe_load((protocol.DIRECTORY / "matrix_drift.yaml").read_text())
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**content, **change}))
    monkeypatch.setattr(protocol, "DIRECTORY", tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)configs/wrong\.yaml.*{message}"):
        protocol.read("wrong")


def test_some_tasks_of_a_drift_in_the_order_asked_for():
    """All of them if nothing is asked for; unknown, repeated or no names are refused."""
    tasks = {"base": 1, "rest": 2, "walls": 3}
    assert list(some_of(tasks, ["walls", "base"]).items()) == [("walls", 3), ("base", 1)]
    assert some_of(tasks, None) == tasks and some_of(tasks, None) is not tasks
    with pytest.raises(ValueError, match="unknown task 'wals'; did you mean 'walls'"):
        some_of(tasks, ["wals"])
    for wrong in ([], ["base", "base"]):
        with pytest.raises(ValueError, match="only: names of tasks that differ"):
            some_of(tasks, wrong)

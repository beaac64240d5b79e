"""Measures, intervals and verdicts of the experiments, against brute force, scipy and numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments import cells, measures, tables
from knife_jax.statistics import continuous_estimate, mean_estimate, probability_of_improvement
from tests.made_up_runs import cell_of, made_up, small_config

CURVES = np.array([[[0.0, 0.5, 1.0], [0.0, 0.0, 0.8], [0.2, 0.3, 0.4]], [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]])
"""Two seeds, three positions."""


def _run(won, **plasticity):
    return made_up(small_config(**plasticity), len(won), won=np.asarray(won))


def _flat(final):
    """Curves of the same height throughout, `[S, P, 3]`."""
    return np.repeat(np.asarray(final, float)[..., None], 3, axis=-1)


def test_a_sequence_in_numbers():
    """Ends, heights by the trapezoidal rule, means over the tasks after the first."""
    found = measures.sequence(_run(CURVES), "won")
    np.testing.assert_allclose(found.final, [[1.0, 0.8, 0.4], [1.0, 0.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(found.area, [[0.5, 0.2, 0.3], [1.0, 0.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(found.later, [0.6, 0.25], rtol=1e-6)
    np.testing.assert_allclose(found.later_area, [0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(found.plasticity, [0.4, 0.0], rtol=1e-6)


def test_what_tuning_maximises():
    """The mean height of the curves after the first task, of other measures too."""
    run = _run(CURVES)
    np.testing.assert_allclose(measures.later_performance(run.metrics, run.config, "won"), [0.25, 0.25], rtol=1e-6)
    expected = measures.sequence(run, "return").later_area
    np.testing.assert_allclose(measures.later_performance(run.metrics, run.config, "return"), expected)


def test_forward_transfer_is_relative_to_fresh_networks():
    """Half as much again, nothing, and the first task counts for nothing; where fresh networks learn nothing, the divisor is 0.01."""
    fresh = np.array([[0.1, 0.5, 0.6], [0.1, 0.5, 0.0]])
    area = np.array([[0.9, 0.75, 0.6], [0.0, 0.25, 0.02]])
    np.testing.assert_allclose(measures.forward_transfer(area, fresh), [0.25, (-0.5 + 2.0) / 2])
    np.testing.assert_allclose(measures.forward_transfer(area, area), [0.0, 0.0])


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_area_under_roc_is_a_share_of_pairs(cases):
    """Of a failure and a success, the failure has the higher score; ties count half."""
    score, failed = np.array([case[0] for case in cases], float), np.array([case[1] for case in cases])
    pairs = [1.0 if bad > good else 0.5 if bad == good else 0.0 for bad in score[failed] for good in score[~failed]]
    area = measures.area_under_roc(score, failed)
    assert np.isnan(area) if not pairs else area == pytest.approx(np.mean(pairs))


def test_foretelling_finds_the_score_that_knows():
    """One score is the failure itself a task ahead, the others are noise; where nothing failed there is nothing to foretell."""
    won = _flat(np.random.default_rng(3).integers(0, 2, (40, 3)))
    run = _run(won)
    dormant = run.metrics["plasticity/agent/dormant"].reshape(40, 3, 3)
    dormant[:, :-1, -1] = 1 - won[:, 1:, -1]
    found = tables.foretelling(run, "won")
    assert found["agent: dormant"] == (1.0, 1.0, 1.0)
    assert 0.25 < found["mixer: inactive"].value < 0.75 and found["mixer: inactive"].low < 0.5 < found["mixer: inactive"].high
    assert tables.foretelling(_run(np.ones((4, 3, 3))), "won") == {}


@pytest.mark.parametrize(
    ("plasticity", "knows"),
    [
        ({"name": "none"}, False),
        ({"name": "layer_norm", "when": "task_switch"}, False),
        ({"name": "reset", "when": "task_switch"}, True),
        ({"name": "redo"}, True),
        ({"name": "redo", "interval_updates": 100}, True),
        ({"name": "redo", "interval_updates": 200}, True),
        ({"name": "redo", "interval_updates": 50}, False),
        ({"name": "redo", "when": "once", "interval_updates": 100}, False),
    ],
)
def test_methods_that_know_the_boundaries_are_marked(plasticity, knows):
    """Tasks are 100 gradient steps long here; whoever acts at all multiples of that, and only there, acts as if told."""
    assert tables.knows_boundaries(_run(CURVES, **plasticity)) is knows


def test_verdicts_follow_from_paired_intervals():
    """Better, worse, neither, too few seeds; what is not there is not judged."""
    rng = np.random.default_rng(0)
    base = rng.random((20, 3)) / 4
    finals = {
        "none": base,
        "knife": base + 0.2,
        "redo": base + 0.2 + 0.2 * (-1.0) ** np.arange(20)[:, None],
        "reset": base + 0.6,
        "fresh": base + 0.5,
    }
    runs = {method: _run(_flat(final)) for method, final in finals.items()}
    claims = {claim.sentence: claim for claim in tables.claims(runs, "won")}
    verdicts = {sentence.split(" (")[0]: claim.verdict for sentence, claim in claims.items()}
    assert verdicts == {
        "Learning on one network is worse than on fresh ones": "supported",
        "KNIFE is better than no cure": "supported",
        "KNIFE is better than every rival that keeps what was learned": "undecided",
        "KNIFE has higher learning curves than every such rival": "undecided",
        "KNIFE reaches what fresh networks do": "contradicted",
    }
    assert "knife - none = 0.20 [0.20, 0.20]" in claims["KNIFE is better than no cure"].evidence
    few = {method: _run(_flat(final[:3])) for method, final in finals.items()}
    assert {claim.verdict for claim in tables.claims(few, "won")} == {"undecided"}


def test_methods_that_differ_in_more_than_the_cure_are_not_compared(tmp_path):
    """The one that differs is named."""
    other = cell_of(small_config(name="redo"), method="redo")
    longer = other._replace(config=type(other.config).from_dict({"train": {"env_steps_per_task": 1600}}, other.config))
    for cell in (cell_of(small_config()), longer):
        cells.save(cell, made_up(cell.config, cell.seeds), tmp_path / cell.file)
    with pytest.raises(cells.DamagedError, match="redo was not trained as none was"):
        tables.load_group(tmp_path, "small", "qmix", ["none", "redo"])


@pytest.mark.parametrize(("seeds", "least"), [(32, 0.88), (10, 0.82), (5, 0.72)])
def test_intervals_of_continuous_measures_cover_less_with_few_seeds(seeds, least):
    """Of skewed and of bounded numbers, 100 samples each: a percentile bootstrap of 5 seeds is no 95 % interval."""
    rng = np.random.default_rng(1)
    beta = [continuous_estimate(rng.beta(2, 1, seeds)) for _ in range(100)]
    uniform = [continuous_estimate(rng.random(seeds) - 0.5) for _ in range(100)]
    for estimates, truth in ((beta, 2 / 3), (uniform, 0.0)):
        covered = np.mean([low <= truth <= high for _, low, high in estimates])
        assert least <= covered <= 0.99


def test_intervals_against_scipy():
    """Wilson's for coins, the normal one for many numbers, Mann and Whitney's U for the chance of improvement."""
    coins = np.repeat([0.0, 1.0], [12, 20])
    centre, root = (20 + 1.92) / (32 + 3.84), 1.96 * np.sqrt(32 * 0.625 * 0.375 + 0.96) / (32 + 3.84)
    np.testing.assert_allclose(mean_estimate(coins)[1:], [centre - root, centre + root], atol=1e-3)
    many = np.random.default_rng(0).random(2000)
    np.testing.assert_allclose(mean_estimate(many)[1:], stats.norm.interval(0.95, many.mean(), stats.sem(many)), atol=1e-3)
    first, second = np.array([1.0, 2, 2, 5]), np.array([0.0, 2, 3])
    expected = stats.mannwhitneyu(first, second).statistic / 12
    assert probability_of_improvement(first, second).value == pytest.approx(expected)


def test_differences_are_no_coins():
    """Equal methods differ by nothing for sure; a mean of zeros and ones that are differences has a bootstrap's interval."""
    assert continuous_estimate(np.zeros(32)) == (0.0, 0.0, 0.0)
    assert mean_estimate(np.zeros(32)).high > 0.05

"""Statistics of parts are those of the whole, in memory and on disk."""

import itertools

import numpy as np
import pytest
from etils import epath

from dmf.errors import InputError
from dmf.evaluation import metrics
from dmf.evaluation.feature_statistics import Statistics, read_part_numbers, read_statistics

RANDOM = np.random.default_rng(0)
COUNT = 70
FEATURES = {
    "pool3": RANDOM.normal(size=(COUNT, 5)).astype("f"),
    "spatial": RANDOM.normal(size=(COUNT, 3)).astype("f") + 100,
    "probabilities": RANDOM.dirichlet(np.ones(4), COUNT).astype("f"),
}


def of(first: int, last: int, **options) -> Statistics:
    statistics = Statistics({"pool3": 2}, **options)
    indices = np.arange(first, last)
    statistics.add(indices, {kind: values[first:last] for kind, values in FEATURES.items()})
    return statistics


def check_whole(statistics: Statistics) -> None:
    """They are those of all features."""
    for kind in ("pool3", "spatial"):
        moments = statistics.moments[kind]
        assert moments.count == COUNT
        exact = FEATURES[kind].astype(float)
        np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(exact.T), rtol=1e-9)
    assert statistics.inception_score.score == pytest.approx(
        metrics.inception_score(FEATURES["probabilities"]), rel=1e-12
    )
    np.testing.assert_array_equal(statistics.features("pool3"), FEATURES["pool3"][::2])
    assert statistics.feature_parts.keys() == {"pool3"}


@pytest.mark.parametrize("cuts", [[], [1], [20, 21, 69]])
def test_parts_merge_to_the_whole(tmp_path, cuts):
    total = Statistics({"pool3": 2})
    bounds = [0, *cuts, COUNT]
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        path = epath.Path(tmp_path / f"{number}.npz")
        of(first, last, part_numbers=[number]).write(path)
        assert read_part_numbers(path) == [number]
        total.merge(read_statistics(path, {"pool3": 2}))
    check_whole(total)
    assert total.part_numbers == list(range(len(cuts) + 1))


def test_merging_leaves_the_part_as_it_was():
    part, total = of(0, 30), Statistics({"pool3": 2})
    before = part.moments["pool3"].scatter.copy()
    total.merge(part)
    total.merge(of(30, COUNT))
    check_whole(total)
    np.testing.assert_array_equal(part.moments["pool3"].scatter, before)


def test_splits_of_the_inception_score_are_told_by_the_index():
    whole = metrics.RunningInceptionScore(split=20)
    parts = [metrics.RunningInceptionScore(split=20) for _ in range(2)]
    p = FEATURES["probabilities"]
    whole.add(np.arange(COUNT), p)
    # One part holds the odd samples and the other the even ones.
    for start, part in enumerate(parts):
        part.add(np.arange(start, COUNT, 2), p[start::2])
    parts[0].merge(parts[1])
    assert parts[0].score == pytest.approx(whole.score, rel=1e-12)
    expected = np.mean([metrics.inception_score(p[i : i + 20]) for i in range(0, COUNT, 20)])
    assert whole.score == pytest.approx(expected, rel=1e-12)


def test_features_that_are_not_finite_are_refused():
    bad = FEATURES["pool3"].copy()
    bad[3, 1] = np.nan
    with pytest.raises(InputError, match="1 of 70 samples hold NaN or infinity"):
        Statistics().add(np.arange(COUNT), {"pool3": bad})

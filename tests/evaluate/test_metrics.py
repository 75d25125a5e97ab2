"""AUROC, average precision and their intervals, against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_curve

from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.metrics import (
    auroc,
    average_precision,
    bootstrap_areas,
    interval,
    roc_curve,
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=60))
def test_areas_with_ties_equal_scikit_learns(pairs):
    scores, labels = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    if len(set(labels)) < 2:
        assert np.isnan(auroc(scores, labels))
        assert np.isnan(average_precision(scores, labels))
        return
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = average_precision_score(labels, scores)
    assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand():
    """Positives at the ranks 1, 3 and 4, the last tied with a negative: 1, 2/3, 3/5."""
    scores, labels = np.array([9.0, 8, 7, 6, 6]), np.array([1.0, 0, 1, 1, 0])
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-15)


def test_missing_labels_are_left_out():
    scores, labels = np.array([0.1, 9.0, 0.4, 0.3]), np.array([0, np.nan, 1, 0.0])
    assert auroc(scores, labels) == 1
    assert average_precision(scores, labels) == 1


def test_a_score_that_is_no_number_is_an_error():
    with pytest.raises(DataError, match="not a number"):
        auroc(np.array([0.1, np.nan]), np.array([0.0, 1.0]))


def test_the_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 20, 200).astype(float), rng.integers(0, 2, 200).astype(float)
    false, true = roc_curve(scores, labels)
    expected_false, expected_true, _ = sklearn_curve(labels, scores, drop_intermediate=False)
    assert np.allclose(false, expected_false)
    assert np.allclose(true, expected_true)


def test_a_draw_is_the_area_of_the_repeated_rows():
    """Each draw resamples patients: the same as repeating all of their rows."""
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(30), 2)
    scores = np.stack([rng.normal(size=60), rng.integers(0, 4, 60)], 1)
    labels = rng.integers(0, 2, (60, 2)).astype(float)
    labels[5, 1] = np.nan
    drawn = bootstrap_areas(scores, labels, patients, draws=100, seed=3)
    times = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=64)
    for draw in range(5):
        rows = np.repeat(np.arange(60), times[draw][patients])
        for k in range(2):
            known = rows[~np.isnan(labels[rows, k])]
            for areas, expected in zip(
                drawn, (roc_auc_score, average_precision_score), strict=True
            ):
                area = expected(labels[known, k], scores[known, k])
                assert areas[draw, k] == pytest.approx(area, abs=1e-12)


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 80).astype(float)
    scores = labels + rng.normal(size=80)
    many = {"scores": np.repeat(scores, 6)[:, None], "labels": np.repeat(labels, 6)[:, None]}
    apart = bootstrap_areas(**many, patients=np.arange(480), draws=400, seed=0)
    together = bootstrap_areas(**many, patients=np.repeat(np.arange(80), 6), draws=400, seed=0)
    for narrow, wide in zip(apart, together, strict=True):
        (low1, high1), (low2, high2) = (interval(x, 0.95) for x in (narrow, wide))
        assert high2 - low2 > 1.8 * (high1 - low1)


def test_intervals_cover():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(60):
        labels = rng.integers(0, 2, 120).astype(float)
        scores = labels + rng.normal(size=120)
        drawn = bootstrap_areas(
            scores[:, None], labels[:, None], np.arange(120), draws=300, seed=seed
        )
        low, high = interval(drawn.auroc, 0.95)
        covered += low <= 0.7602 <= high  # Phi(1 / sqrt 2)
    assert covered >= 51

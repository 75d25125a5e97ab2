"""DeLong's test against its definition, and against the bootstrap where each image is a patient."""

import numpy as np
import pytest
from scipy.stats import norm

from mlvicx_dist.evaluate.delong import delong
from mlvicx_dist.evaluate.metrics import bootstrap_areas


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 150).astype(float)
    first = np.round(labels + rng.normal(size=150), 1)
    second = np.round(0.7 * labels + 0.5 * first + rng.normal(size=150), 1)
    labels[:7] = np.nan
    return first, second, labels


def test_delong_is_its_definition(data):
    """Every positive against every negative, ties half; covariances of the placements."""
    first, second, labels = data
    by_positive, by_negative = [], []
    for scores in (first, second):
        x, y = scores[labels == 1][:, None], scores[labels == 0][None]
        wins = (x > y) + (x == y) / 2
        by_positive.append(wins.mean(1))
        by_negative.append(wins.mean(0))
    m, n = len(by_positive[0]), len(by_negative[0])
    covariance = np.cov(by_positive) / m + np.cov(by_negative) / n
    apart = np.array([1, -1])
    z = (by_positive[0].mean() - by_positive[1].mean()) / np.sqrt(apart @ covariance @ apart)
    assert delong(*data) == pytest.approx(2 * norm.sf(abs(z)), rel=1e-9)


def test_delong_agrees_with_the_bootstrap_where_each_image_is_a_patient(data):
    first, second, labels = data
    drawn = [
        bootstrap_areas(s[:, None], labels[:, None], np.arange(150), draws=2000, seed=0).auroc[:, 0]
        for s in (first, second)
    ]
    observed = [np.mean(d) for d in drawn]
    z = (observed[0] - observed[1]) / np.std(drawn[0] - drawn[1])
    assert delong(first, second, labels) == pytest.approx(2 * norm.sf(abs(z)), rel=0.15)


def test_the_same_ranking_is_no_difference(data):
    first, _, labels = data
    assert delong(first, 2 * first + 1, labels) == 1
    assert delong(first[:8], first[:8], labels[:8]) is None

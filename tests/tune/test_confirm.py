"""The interval of the last word: what it covers, and that seeds and patients both count."""

import math

import numpy as np
import pytest
from scipy import stats

from mlvicx_dist.config import Bootstrap
from mlvicx_dist.tune.confirm import Confirmed, interval


def sides(best, default):
    return {"best": best, "default": default}


def test_seeds_alone_give_students_interval():
    best, default = [0.80, 0.84, 0.82], [0.79, 0.77, 0.81]
    low, high = interval(sides(best, default), None, Bootstrap())
    reference = stats.ttest_ind(best, default).confidence_interval(0.95)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_patients_widen_it_by_their_paired_spread():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.05, 400)
    # What both sides owe to the same patients cancels.
    draws = np.stack([0.8 + shared] * 2 + [0.78 + shared] * 2)
    alone = interval(sides([0.80, 0.81], [0.78, 0.77]), None, Bootstrap())
    same = interval(sides([0.80, 0.81], [0.78, 0.77]), draws, Bootstrap())
    assert same == pytest.approx(alone)
    draws[:2] += rng.normal(0, 0.02, 400)
    wider = interval(sides([0.80, 0.81], [0.78, 0.77]), draws, Bootstrap())
    reach = [(high - low) / 2 for low, high in (alone, wider)]
    quantile = stats.t.ppf(0.975, 2)
    expected = math.sqrt((reach[0] / quantile) ** 2 + np.var(draws[0] - draws[2], ddof=1))
    assert reach[1] == pytest.approx(quantile * expected)


def test_it_covers_what_it_says():
    """3 seeds a side, no true difference: the interval holds 0 in 95 of 100 cases."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        low, high = interval(
            sides(rng.normal(0.8, 0.02, 3), rng.normal(0.8, 0.02, 3)), None, Bootstrap()
        )
        held += low <= 0 <= high
    assert held / 1000 == pytest.approx(0.95, abs=0.02)


def test_one_seed_has_no_interval():
    assert interval(sides([0.8], [0.7]), None, Bootstrap()) == (None, None)
    said = Confirmed("probe", 3, [1], sides([0.8], [0.7]), 0.1, None, None, 0.95, 50, 40)
    assert "no interval" in said.line() and "0.8000 against 0.7000" in said.line()

"""Calibration by hand, and against scikit-learn."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from mlvicx_dist.evaluate.calibration import brier_score, calibration_error


def test_the_calibration_error_by_hand():
    """Two bins of two: |0.15 - 0| and |0.7 - 0.5|; an unknown label is in none."""
    probabilities, labels = np.array([0.1, 0.2, 0.6, 0.8, 0.99]), np.array([0, 0, 1, 0, np.nan])
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx((0.15 + 0.2) / 2)


def test_the_calibration_error_and_the_brier_score_are_scikit_learns():
    rng = np.random.default_rng(0)
    probabilities = rng.random(1500)
    labels = (rng.random(1500) < probabilities**2).astype(float)
    share, mean = calibration_curve(labels, probabilities, n_bins=15, strategy="quantile")
    expected = np.abs(share - mean).mean()
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)
    expected = brier_score_loss(labels, probabilities)
    assert brier_score(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_frequencies_are_calibrated_and_equal_probabilities_are_not_torn():
    labels = np.array([1.0] * 3 + [0.0] * 7)
    assert calibration_error(np.full(10, 0.3), labels) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.full(10, 0.9), labels) == pytest.approx(0.6)
    # Three equal ones share the bin of the middle one, the second, and not that of the first.
    probabilities, labels = np.array([0.1, 0.5, 0.5, 0.5]), np.array([1.0, 0, 0, 0])
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx((0.9 + 1.5) / 4)

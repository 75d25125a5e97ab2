"""Whether a probe's probabilities are frequencies: expected calibration error and Brier score."""

from __future__ import annotations

import numpy as np

BINS = 15


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean squared error of probabilities [n] for labels [n], 0, 1 or NaN (left out)."""
    known = ~np.isnan(labels)
    return float(np.square(probabilities[known] - labels[known]).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error with bins of equal mass.

    The images, ordered by probability, are cut into bins of equal size; the error is the mean over
    images of |mean probability - share of positives| of their bin. Bins of equal mass have the
    smaller bias (Roelofs et al., AISTATS 2022). Equal probabilities are never torn: they share the
    bin of their middle.

    Args:
        probabilities: [n].
        labels: [n], 0, 1 or NaN (left out).
        bins: At most so many.
    """
    known = ~np.isnan(labels)
    _, value, counts = np.unique(probabilities[known], return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    bin_of = (middle * bins // counts.sum()).astype(int)[value]
    gaps = np.bincount(bin_of, probabilities[known] - labels[known], minlength=bins)
    return float(np.abs(gaps).sum() / counts.sum())

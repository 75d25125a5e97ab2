"""DeLong's test of two AUROCs on the same images: a check of the bootstrap.

It takes every image for a patient of its own: of patients with several, its p-value is too small.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr
from scipy.stats import rankdata


def delong(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, folds: np.ndarray | None = None
) -> float | None:
    """The two-sided p-value for equal AUROCs of two scores of the same images.

    DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), by the mid-ranks of Sun and Xu, IEEE
    Signal Processing Letters 21 (2014).

    Args:
        first: Scores, [n]; or of several runs, [n, S]: their mean AUROC is compared, the runs
            being given.
        second: Other scores, [n] or [n, S].
        labels: [n], 0, 1 or NaN (left out).
        folds: The fold of each image, [n]; None: all are compared.

    Returns:
        The p-value; 1 where the scores rank alike; None where a label has fewer than two images,
        and of folds, for whose AUROC it is not made.
    """
    if folds is not None:
        return None
    positive, negative = labels == 1, labels == 0
    m, n = int(positive.sum()), int(negative.sum())
    if min(m, n) < 2:
        return None
    over_negatives, under_positives = np.empty((2, m)), np.empty((2, n))
    for k, scores in enumerate((first, second)):
        columns = scores.reshape(len(labels), -1)
        x, y = columns[positive], columns[negative]
        ranks = rankdata(np.concatenate([x, y]), axis=0)
        # The share of negatives below each positive, and of positives above each negative.
        over_negatives[k] = ((ranks[:m] - rankdata(x, axis=0)) / n).mean(1)
        under_positives[k] = (1 - (ranks[m:] - rankdata(y, axis=0)) / m).mean(1)
    difference = over_negatives[0].mean() - over_negatives[1].mean()
    variance = (
        np.var(over_negatives[0] - over_negatives[1], ddof=1) / m
        + np.var(under_positives[0] - under_positives[1], ddof=1) / n
    )
    if variance == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * ndtr(-abs(difference) / np.sqrt(variance)))

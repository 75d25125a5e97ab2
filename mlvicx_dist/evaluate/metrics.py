"""AUROC and average precision, the ROC curve, and intervals that resample whole patients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.special import stdtrit

from mlvicx_dist.errors import DataError


class Areas(NamedTuple):
    """Areas under the ROC and the precision-recall curve, of one shape; NaN where undefined."""

    auroc: np.ndarray
    auprc: np.ndarray


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; ties count half.

    Args:
        scores: [n], finite.
        labels: [n], 0, 1 or NaN (left out).

    Returns:
        The area; NaN where a class of labels is empty.

    Raises:
        DataError: a score is NaN or infinite.
    """
    return float(_areas(scores, labels).auroc[0])


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the precision-recall curve: precision at each threshold times the recall gained.

    Step-wise, as scikit-learn's `average_precision_score`; tied scores are one threshold.

    Args:
        scores: [n], finite.
        labels: [n], 0, 1 or NaN (left out).

    Returns:
        The area; NaN where a class of labels is empty.

    Raises:
        DataError: a score is NaN or infinite.
    """
    return float(_areas(scores, labels).auprc[0])


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
    known = ~np.isnan(labels)
    order = np.argsort(-scores[known], kind="stable")
    sorted_scores, positive = scores[known][order], labels[known][order]
    last = np.append(np.diff(sorted_scores) != 0, True)
    true, false = np.cumsum(positive)[last], np.cumsum(1 - positive)[last]
    return np.append(0, false / max(false[-1], 1)), np.append(0, true / max(true[-1], 1))


def bootstrap_areas(
    scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, *, draws: int, seed: int
) -> Areas:
    """The areas of every class under resampling of patients with replacement.

    Two encoders on the same images, draws and seed see the same patients: their differences are
    paired.

    Args:
        scores: [n, K].
        labels: [n, K], 0, 1 or NaN.
        patients: [n], any hashable values.
        draws: Resamplings.
        seed: Of the resampling.

    Returns:
        float64 [draws, K] each; NaN where a draw holds one label value only.

    Raises:
        DataError: a score is NaN or infinite.
    """
    names, owner = np.unique(patients, return_inverse=True)
    ranked = []
    for k in range(scores.shape[1]):
        known = ~np.isnan(labels[:, k])
        ranked.append(_Ranked(scores[known, k], labels[known, k], owner[known], len(names)))
    areas = Areas(np.empty((draws, len(ranked))), np.empty((draws, len(ranked))))
    for part, times in _resampled(len(names), draws, seed):
        for k, one in enumerate(ranked):
            areas.auroc[part, k], areas.auprc[part, k] = one.areas(times)
    return areas


def bootstrap_means(
    values: np.ndarray, patients: np.ndarray, *, draws: int, seed: int
) -> np.ndarray:
    """The mean over images under the same resampling of patients.

    Args:
        values: One an image, [n], n > 0.
        patients: [n], any hashable values.
        draws: Resamplings.
        seed: Of the resampling.

    Returns:
        float64 [draws].
    """
    names, owner = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    means = np.empty(draws)
    for part, times in _resampled(len(names), draws, seed):
        means[part] = (sums @ times) / (counts @ times)
    return means


def _resampled(count: int, draws: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Some draws at a time, and how often each of `count` patients comes in them, [count, d]."""
    rng = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    for start in range(0, draws, _CHUNK):
        part = slice(start, min(start + _CHUNK, draws))
        drawn = rng.multinomial(count, even, size=part.stop - part.start)
        yield part, np.ascontiguousarray(drawn.T, dtype=np.float64)


_CHUNK = 16
"""Draws computed together: what they need stays in a core's cache."""


def _areas(scores: np.ndarray, labels: np.ndarray) -> Areas:
    """The areas of one class, [1] each."""
    known = ~np.isnan(labels)
    count = int(known.sum())
    ranked = _Ranked(scores[known], labels[known], np.arange(count), count)
    return ranked.areas(np.ones((count, 1)))


class _Ranked:
    """Scores sorted once, for areas under many weightings of the patients.

    Both areas need counts only at thresholds where a positive lies. Sparse matrices hold how many
    images of each patient come at each of them, the highest first: a weighting costs a product with
    these and sums over the thresholds.
    """

    def __init__(
        self, scores: np.ndarray, labels: np.ndarray, owner: np.ndarray, patients: int
    ) -> None:
        if not np.isfinite(scores).all():
            raise DataError(
                "a score is not a number: the encoder or the probe diverged; "
                "evaluate another checkpoint."
            )
        positive = labels == 1
        thresholds = np.unique(-scores[positive])
        # The first threshold at or below each score: an image counts from there on.
        place = np.searchsorted(thresholds, -scores)
        counted = place < len(thresholds)
        tied = counted & ~positive
        tied[tied] = thresholds[place[tied]] == -scores[tied]

        def matrix(chosen: np.ndarray) -> csr_array:
            where = (place[chosen], owner[chosen])
            return csr_array((np.ones(chosen.sum()), where), shape=(len(thresholds), patients))

        self._positive, self._negative = matrix(positive), matrix(counted & ~positive)
        self._tied = matrix(tied) if tied.any() else None
        self._negatives = np.bincount(owner[~positive], minlength=patients).astype(np.float64)

    def areas(self, weights: np.ndarray) -> Areas:
        """The areas for weights [patients, draws], [draws] each."""
        gained = self._positive @ weights
        true, false = np.cumsum(gained, axis=0), np.cumsum(self._negative @ weights, axis=0)
        positives, negatives = gained.sum(0), self._negatives @ weights
        below = negatives - false
        if self._tied is not None:
            below += (self._tied @ weights) / 2
        ranks = np.einsum("td,td->d", gained, below)
        # Before the first image that a draw holds both are 0, and nothing is gained.
        precision = true / np.maximum(true + false, 1)
        precisions = np.einsum("td,td->d", gained, precision)
        defined = (positives > 0) & (negatives > 0)
        some, others = np.where(defined, positives, 1), np.where(defined, negatives, 1)
        return Areas(
            np.where(defined, ranks / (some * others), np.nan),
            np.where(defined, precisions / some, np.nan),
        )


def over_classes(areas: np.ndarray) -> np.ndarray:
    """The mean over the classes that are defined, [draws, K] -> [draws]; NaN where none is."""
    defined = ~np.isnan(areas)
    counts = defined.sum(1)
    sums = np.where(defined, areas, 0.0).sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrap values, NaN left out."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def half_width(
    values: np.ndarray, resampled: np.ndarray, patients: int, confidence: float
) -> float:
    """Half an interval for a mean that counts the spread of draws or seeds and of patients.

    The variance is that of the mean over each crossed factor, such as seeds and draws of labels,
    plus that, over resampled test patients, of the same mean; Student's quantile with the degrees
    of freedom of Welch and Satterthwaite. A factor with one value has no spread that could count.

    Args:
        values: One a draw, [D], or a seed and a draw, [S, D].
        resampled: The same under resampled patients, [..., R].
        patients: In the test split.
        confidence: Of the interval.
    """
    axes = tuple(range(values.ndim))
    parts = [(float(np.nanvar(resampled.mean(axes), ddof=1)), max(patients - 1, 1))]
    for axis in axes:
        count = values.shape[axis]
        if count > 1:
            means = values.mean(tuple(other for other in axes if other != axis))
            parts.append((float(np.var(means, ddof=1)) / count, count - 1))
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(variance**2 / free for variance, free in parts)
    return float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(total)

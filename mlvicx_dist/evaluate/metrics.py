"""AUROC and average precision, the ROC curve, and intervals that resample whole patients.

Where images are judged in folds, each by another probe, only images of one fold are compared: the
AUROC is the part of all pairs of a positive and a negative of one fold that are in order, the
average precision the mean over the positives of that in their fold.
"""

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


def auroc(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray | None = None) -> float:
    """Area under the ROC curve; ties count half.

    Args:
        scores: [n], finite.
        labels: [n], 0, 1 or NaN (left out).
        folds: The fold of each, [n]; None: all are compared.

    Returns:
        The area; NaN where a class of labels is empty.

    Raises:
        DataError: a score is NaN or infinite.
    """
    return float(_areas(scores, labels, folds).auroc[0])


def average_precision(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray | None = None
) -> float:
    """Area under the precision-recall curve: precision at each threshold times the recall gained.

    Step-wise, as scikit-learn's `average_precision_score`; tied scores are one threshold.

    Args:
        scores: [n], finite.
        labels: [n], 0, 1 or NaN (left out).
        folds: The fold of each, [n]; None: all are compared.

    Returns:
        The area; NaN where a class of labels is empty.

    Raises:
        DataError: a score is NaN or infinite.
    """
    return float(_areas(scores, labels, folds).auprc[0])


def comparable(labels: np.ndarray, folds: np.ndarray | None) -> np.ndarray:
    """Labels, [n, K], NaN where the fold of an image has no other label of the class to compare.

    Args:
        labels: [n, K], 0, 1 or NaN.
        folds: The fold of each, [n]; None: all are compared, as they are.
    """
    if folds is None:
        return labels
    values = labels.copy()
    for fold in np.unique(folds):
        own = labels[folds == fold]
        values[np.ix_(folds == fold, ~((own == 0).any(0) & (own == 1).any(0)))] = np.nan
    return values


def roc_curve(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Of folds the mean of their curves, each with the weight of its pairs; (0, 0) alone where no fold
    has a pair.
    """
    if folds is not None:
        labels = comparable(labels[:, None], folds)[:, 0]
        curves, pairs = [], []
        for fold in np.unique(folds[~np.isnan(labels)]):
            own = folds == fold
            curves.append(roc_curve(scores[own], labels[own]))
            pairs.append((labels[own] == 1).sum() * (labels[own] == 0).sum())
        if not curves:
            return np.zeros(1), np.zeros(1)
        rates = np.unique(np.concatenate([false for false, _ in curves]))
        curve = np.average([np.interp(rates, *one) for one in curves], axis=0, weights=pairs)
        return np.append(0, rates), np.append(0, curve)
    known = ~np.isnan(labels)
    order = np.argsort(-scores[known], kind="stable")
    sorted_scores, positive = scores[known][order], labels[known][order]
    last = np.append(np.diff(sorted_scores) != 0, True)
    true, false = np.cumsum(positive)[last], np.cumsum(1 - positive)[last]
    return np.append(0, false / max(false[-1], 1)), np.append(0, true / max(true[-1], 1))


def bootstrap_areas(
    scores: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    folds: np.ndarray | None = None,
    *,
    draws: int,
    seed: int,
) -> Areas:
    """The areas of every class under resampling of patients with replacement.

    Two encoders on the same images, draws and seed see the same patients: their differences are
    paired.

    Args:
        scores: [n, K].
        labels: [n, K], 0, 1 or NaN.
        patients: [n], any hashable values.
        folds: The fold of each, [n]; None: all are compared.
        draws: Resamplings.
        seed: Of the resampling.

    Returns:
        float64 [draws, K] each; NaN where a draw holds one label value only.

    Raises:
        DataError: a score is NaN or infinite.
    """
    names, owner = np.unique(patients, return_inverse=True)
    count = scores.shape[1]
    ranked = [_by_fold(scores[:, k], labels[:, k], owner, len(names), folds) for k in range(count)]
    areas = Areas(np.empty((draws, count)), np.empty((draws, count)))
    for part, times in _resampled(len(names), draws, seed):
        for k, one in enumerate(ranked):
            areas.auroc[part, k], areas.auprc[part, k] = _areas_of(one, times)
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


def _areas(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray | None) -> Areas:
    """The areas of one class, [1] each."""
    count = len(labels)
    ranked = _by_fold(scores, labels, np.arange(count), count, folds)
    return _areas_of(ranked, np.ones((count, 1)))


def _by_fold(
    scores: np.ndarray,
    labels: np.ndarray,
    owner: np.ndarray,
    patients: int,
    folds: np.ndarray | None,
) -> list[_Ranked]:
    """The known images of one class, those of each fold by themselves."""
    known = ~np.isnan(labels)
    parts = [known] if folds is None else [known & (folds == fold) for fold in np.unique(folds)]
    return [_Ranked(scores[part], labels[part], owner[part], patients) for part in parts]


def _areas_of(ranked: list[_Ranked], weights: np.ndarray) -> Areas:
    """The areas for weights [patients, draws], [draws] each."""
    sums = np.array([one.sums(weights) for one in ranked])
    ranks, precisions, positives, negatives = np.moveaxis(sums, 1, 0)
    both = (positives > 0) & (negatives > 0)
    pairs = (positives * negatives).sum(0)
    judged = (positives * both).sum(0)
    defined = pairs > 0
    return Areas(
        np.where(defined, ranks.sum(0) / np.where(defined, pairs, 1), np.nan),
        np.where(defined, (precisions * both).sum(0) / np.where(defined, judged, 1), np.nan),
    )


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

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, ...]:
        """For weights [patients, draws] the sums that the areas are made of, [draws] each.

        Pairs in order, precisions at the positives, positives and negatives.
        """
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
        return ranks, precisions, positives, negatives


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

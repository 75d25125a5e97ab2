"""AUROC, its curve, and intervals that resample whole patients."""

from __future__ import annotations

import numpy as np

from mlvicx_dist.errors import DataError


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
    known = ~np.isnan(labels)
    return float(_Ranked(scores[known], labels[known]).areas(np.ones((1, known.sum())))[0])


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
    known = ~np.isnan(labels)
    order = np.argsort(-scores[known], kind="stable")
    sorted_scores, positive = scores[known][order], labels[known][order]
    last = np.append(np.diff(sorted_scores) != 0, True)
    true, false = np.cumsum(positive)[last], np.cumsum(1 - positive)[last]
    return np.append(0, false / max(false[-1], 1)), np.append(0, true / max(true[-1], 1))


def bootstrap_auroc(
    scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, *, draws: int, seed: int
) -> np.ndarray:
    """AUROC of every class under resampling of patients with replacement.

    Two encoders on the same images, draws and seed see the same patients: their differences are
    paired.

    Args:
        scores: [n, K].
        labels: [n, K], 0, 1 or NaN.
        patients: [n], any hashable values.
        draws: Resamplings.
        seed: Of the resampling.

    Returns:
        float64 [draws, K]; NaN where a draw holds one label value only.
    """
    names, owner = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    even = np.full(len(names), 1 / len(names))
    areas = np.empty((draws, scores.shape[1]))
    ranked = []
    for k in range(scores.shape[1]):
        known = ~np.isnan(labels[:, k])
        ranked.append((known, _Ranked(scores[known, k], labels[known, k])))
    for start in range(0, draws, _CHUNK):
        stop = min(start + _CHUNK, draws)
        times = rng.multinomial(len(names), even, size=stop - start)[:, owner]
        for k, (known, one) in enumerate(ranked):
            areas[start:stop, k] = one.areas(times[:, known])
    return areas


_CHUNK = 64
"""Draws computed together: bounds the memory to a few hundred megabytes at 10^5 images."""


class _Ranked:
    """Scores sorted once, for areas under many weightings of the rows."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        if not np.isfinite(scores).all():
            raise DataError(
                "a score is not a number: the encoder or the probe diverged; "
                "evaluate another checkpoint."
            )
        self.order = np.argsort(scores, kind="stable")
        ordered = scores[self.order]
        self.positive = labels[self.order].astype(np.float64)
        self.ends = np.flatnonzero(np.append(np.diff(ordered) != 0, True))

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """Areas for weights [draws, n] of the rows, [draws]."""
        weights = weights[:, self.order].astype(np.float64)
        if not weights.shape[1]:
            return np.full(len(weights), np.nan)
        positive = np.cumsum(weights * self.positive, axis=1)[:, self.ends]
        negative = np.cumsum(weights * (1 - self.positive), axis=1)[:, self.ends]
        gained = np.diff(positive, axis=1, prepend=0)
        below = np.concatenate([np.zeros((len(weights), 1)), negative[:, :-1]], axis=1)
        ranks = (gained * (below + negative) / 2).sum(1)
        pairs = positive[:, -1] * negative[:, -1]
        return np.where(pairs > 0, ranks / np.where(pairs > 0, pairs, 1), np.nan)


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

"""What a probe learns from and what it is judged on: the splits, or every image in its fold.

Where few images have labels, three splits leave too few to learn from or too few to judge by. Dealt
into folds by patient, each image is judged by a probe that learned from other patients, and all of
them count (cross-validation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlvicx_dist.config import EvaluateConfig
from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.embed import Embeddings
from mlvicx_dist.evaluate.parts import Part, Parts, named_labels, parts_of, usable_classes
from mlvicx_dist.evaluate.pixels import fit_for
from mlvicx_dist.evaluate.probe import Fitted

SEED = 0
"""Of the deal: the same folds for every encoder."""


def folds_of(embeddings: Embeddings, settings: EvaluateConfig) -> list[Parts]:
    """The splits, or one Parts a fold: it is judged, the next one tunes, the others are learned.

    Raises:
        DataError: see `parts_of`; or there are fewer patients than folds, or no class has both
            labels in each training part.
        ConfigError: a class does not exist.
    """
    count = settings.folds
    if not count:
        return [parts_of(embeddings, settings)]
    names, labels = named_labels(embeddings, settings)
    patients = embeddings.patients()
    unique, owner = np.unique(patients, return_inverse=True)
    shards = ", ".join(settings.data.shards)
    if len(unique) < count:
        raise DataError(
            f"{shards}: {len(unique)} patients cannot be dealt into {count} folds; lower folds."
        )
    fold = np.random.default_rng(SEED).permutation(len(unique))[owner] % count

    def rows(k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        test, val = fold == k, fold == (k + 1) % count
        return ~(test | val), val, test

    learned = {f"fold {k + 1}": labels[rows(k)[0]] for k in range(count)}
    classes, left_out = usable_classes(names, learned, within="training part of")
    if not classes:
        raise DataError(
            f"{shards}: no class has both labels in the training part of each of {count} folds "
            f"({'; '.join(left_out.values())}); evaluate on labelled shards."
        )
    labels = labels[:, [names.index(name) for name in classes]]
    splits = (settings.data.train, settings.data.val, settings.data.test)
    found = []
    for k in range(count):
        train, val, test = (
            Part(split, chosen, labels[chosen], patients[chosen])
            for split, chosen in zip(splits, rows(k), strict=True)
        )
        found.append(Parts(train, val, test, classes, left_out))
    return found


def all_judged(folds: Sequence[Parts]) -> Part:
    """The test parts of all folds as one, in the order of the embeddings."""
    rows = np.logical_or.reduce([parts.test.rows for parts in folds])
    labels, patients = (
        joined(folds, [getattr(parts.test, name) for parts in folds])
        for name in ("labels", "patients")
    )
    return Part(folds[0].test.split, rows, labels, patients)


def joined(folds: Sequence[Parts], values: Sequence[np.ndarray]) -> np.ndarray:
    """What each fold has of its test images, in the order of the embeddings."""
    rows = np.concatenate([np.flatnonzero(parts.test.rows) for parts in folds])
    return np.concatenate(list(values))[np.argsort(rows)]


def probed(
    name: str, features: np.ndarray, folds: Sequence[Parts], settings: EvaluateConfig
) -> tuple[np.ndarray, list[Fitted]]:
    """What the probes of one encoder say of the images that are judged.

    Args:
        name: Of the encoder, see `fit_for`.
        features: Of all images, [all, F].
        folds: The splits, or the folds.
        settings: The probe.

    Returns:
        Scores, [n, K], and the probe of each fold.
    """
    fits = [
        fit_for(
            name,
            features[parts.train.rows],
            parts.train.labels,
            validation=(features[parts.val.rows], parts.val.labels),
            settings=settings.probe,
        )
        for parts in folds
    ]
    scores = [
        fitted.scores(features[parts.test.rows]) for fitted, parts in zip(fits, folds, strict=True)
    ]
    return joined(folds, scores), fits


def counted(folds: Sequence[Parts]) -> dict[str, Any]:
    """Images and patients that a probe learns from and is tuned on, and that are judged in all."""
    first = folds[0]
    return {
        part.split: {"images": len(part.labels), "patients": len(np.unique(part.patients))}
        for part in (first.train, first.val, all_judged(folds))
    }

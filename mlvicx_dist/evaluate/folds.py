"""What a probe learns from and what it is judged on: the splits, or every image in its fold.

Where few images have labels, three splits leave too few to learn from or too few to judge by. Dealt
into folds by patient, each image is judged by a probe that learned from all other folds, and all of
them count. The probe's penalty is chosen by those other folds alone, each left out in its turn
(nested cross-validation).

Logits of two probes are on two scales, and where a fold has more positives its probe, which learned
from the others, expects fewer: pooled as they are, they would rank the images of an encoder that
knows nothing below chance; and by their ranks in their folds, those of a perfect one below
positives of other folds. So only images of one fold are compared (`metrics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlvicx_dist.config import EvaluateConfig, Probe
from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.embed import Embeddings
from mlvicx_dist.evaluate.metrics import comparable
from mlvicx_dist.evaluate.parts import Part, Parts, named_labels, parts_of, usable_classes
from mlvicx_dist.evaluate.pixels import solver_of
from mlvicx_dist.evaluate.probe import Fitted, best_in_turns, best_on

SEED = 0
"""Of the deal: the same folds for every encoder."""


def folds_of(embeddings: Embeddings, settings: EvaluateConfig) -> list[Parts]:
    """The splits, or one Parts a fold: it is judged, from the others is learned.

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

    learned = {f"fold {k + 1}": labels[fold != k] for k in range(count)}
    classes, left_out = usable_classes(names, learned, within="training part of")
    judged, alone = usable_classes(
        names, {str(count): comparable(labels, fold)}, within="folds with both labels, of"
    )
    classes = [name for name in classes if name in judged]
    left_out = alone | left_out
    if not classes:
        raise DataError(
            f"{shards}: no class has both labels in the training part of each of {count} folds "
            f"and in one of them ({'; '.join(left_out.values())}); evaluate on labelled shards."
        )
    labels = labels[:, [names.index(name) for name in classes]]

    def part(split: str, rows: np.ndarray) -> Part:
        return Part(split, rows, labels[rows], patients[rows])

    data = settings.data
    found = []
    for k in range(count):
        train = part(data.train, fold != k)
        turns = tuple(fold[train.rows] == j for j in range(count) if j != k)
        if not any(usable_classes(classes, {"": train.labels[turn]})[0] for turn in turns):
            raise DataError(
                f"{shards}: none of {', '.join(classes)} has both labels in any of the folds that "
                f"the probe of fold {k + 1} of {count} is tuned on; lower folds."
            )
        test = part(data.test, fold == k)
        found.append(Parts(train, replace(train, split=data.val), test, classes, left_out, turns))
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


def fold_of(folds: Sequence[Parts]) -> np.ndarray | None:
    """Which fold judges each image, [n], in the order of the embeddings; None without folds."""
    if len(folds) == 1:
        return None
    return joined(folds, [np.full(len(one.test.labels), k) for k, one in enumerate(folds)])


@dataclass(frozen=True)
class Probed:
    """What the probes of one encoder say of the images that are judged.

    Attributes:
        logits: [n, K]; those of two folds are not to be compared.
        fits: The probe of each fold.
    """

    logits: np.ndarray
    fits: list[Fitted]

    @property
    def validation_auroc(self) -> float:
        """Mean over the classes and folds."""
        return float(np.mean([fitted.validation_auroc for fitted in self.fits]))


def probed(
    name: str, features: np.ndarray, folds: Sequence[Parts], settings: EvaluateConfig
) -> Probed:
    """Fit the probes of one encoder and ask them.

    Args:
        name: Of the encoder, see `solver_of`.
        features: Of all images, [all, F].
        folds: The splits, or the folds.
        settings: The probe.
    """
    fits = [_fit(name, features, parts, settings.probe) for parts in folds]
    said = [
        fitted.scores(features[parts.test.rows]) for fitted, parts in zip(fits, folds, strict=True)
    ]
    return Probed(joined(folds, said), fits)


def _fit(name: str, features: np.ndarray, parts: Parts, settings: Probe) -> Fitted:
    solve = solver_of(name, settings)
    train, val = ((features[part.rows], part.labels) for part in (parts.train, parts.val))
    if parts.turns:
        return best_in_turns(parts.turns, solve, train)
    return best_on(val, solve, train)


def counted(folds: Sequence[Parts]) -> dict[str, Any]:
    """Images and patients that a probe learns from and is tuned on, and that are judged in all."""
    first = folds[0]
    return {
        part.split: {"images": len(part.labels), "patients": len(np.unique(part.patients))}
        for part in (first.train, first.val, all_judged(folds))
    }

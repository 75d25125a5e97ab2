"""The patient-clustered bootstrap at the size of NIH's test list.

python benchmarks/bootstrap.py [--json]

2,000 draws of 2,797 patients on 25,596 images and 14 classes of NIH's prevalence, random scores:
AUROC and average precision together. First against 10 s, the longest that it may take; then against
scikit-learn on the repeated rows of a draw, 2 draws measured and scaled.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from table import Row, main

from mlvicx_dist.evaluate.metrics import bootstrap_areas

IMAGES, PATIENTS, DRAWS, THEIR_DRAWS, LONGEST_S = 25_596, 2_797, 2_000, 2, 10.0
POSITIVES = (6112, 4658, 3279, 2665, 1815, 1748, 1623, 1143, 1093, 1069, 925, 555, 435, 86)


def scikit_learn(scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, draws: int) -> None:
    """The same areas of the same kind of draws, each by itself."""
    rng = np.random.default_rng(0)
    even = np.full(PATIENTS, 1 / PATIENTS)
    for times in rng.multinomial(PATIENTS, even, size=draws):
        rows = np.repeat(np.arange(IMAGES), times[patients])
        for k in range(len(POSITIVES)):
            for area in (roc_auc_score, average_precision_score):
                area(labels[rows, k], scores[rows, k])


def measure() -> list[Row]:
    """Both rows."""
    rng = np.random.default_rng(0)
    labels = (rng.random((IMAGES, len(POSITIVES))) < np.array(POSITIVES) / IMAGES).astype(float)
    scores = labels + rng.normal(size=labels.shape)
    patients = np.sort(np.append(np.arange(PATIENTS), rng.integers(0, PATIENTS, IMAGES - PATIENTS)))
    bootstrap_areas(scores, labels, patients, draws=20, seed=0)
    begin = time.perf_counter()
    bootstrap_areas(scores, labels, patients, draws=DRAWS, seed=0)
    middle = time.perf_counter()
    scikit_learn(scores, labels, patients, THEIR_DRAWS)
    theirs = (time.perf_counter() - middle) * DRAWS / THEIR_DRAWS
    ours = middle - begin
    name = f"bootstrap, {DRAWS:,} draws on {IMAGES:,} x {len(POSITIVES)}"
    return [
        Row(f"{name}, against the limit", ours, LONGEST_S, "s", 1.0),
        Row(f"{name}, against scikit-learn (from {THEIR_DRAWS} draws)", ours, theirs, "s"),
    ]


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))

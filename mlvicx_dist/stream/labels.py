"""The labels of samples, by the names of their classes, from what a shard tells of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlvicx_dist.stream.shardset import ShardSet


def labels_of(about: Sequence[dict[str, Any]], classes: Sequence[str]) -> np.ndarray:
    """The labels of images by class, float64 [n, K]: 0, 1 or NaN (unknown)."""
    rows = [[one["labels"].get(name) for name in classes] for one in about]
    return np.array(rows, dtype=np.float64).reshape(len(about), len(classes))


@dataclass(frozen=True)
class Labels:
    """What a training on labels reads of them.

    Attributes:
        classes: Their names, in the order of the columns.
        splits: Of images of another split every label is unknown.
    """

    classes: tuple[str, ...]
    splits: tuple[str, ...]

    def read(self, shards: ShardSet, samples: Iterable[int]) -> np.ndarray:
        """The labels of samples, float64 [n, K]: 0, 1 or NaN (unknown).

        Raises:
            DataError: a shard cannot be read.
        """
        about = [shards.about(sample) for sample in samples]
        labels = labels_of(about, self.classes)
        labels[[one["split"] not in self.splits for one in about]] = np.nan
        return labels

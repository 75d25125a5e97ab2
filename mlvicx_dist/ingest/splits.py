"""Splits by patient: no patient is in two, by construction.

A patient's split is a pure function of the patient's key. Images that carry an official split keep
it; the official `train_val` (NIH) is cut by patient into train and val.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.ingest.record import Record, patient_key

TRAIN_VAL = "train_val"


@dataclass(frozen=True)
class Fractions:
    """Parts of the patients; they sum to one."""

    train: float = 0.7
    val: float = 0.1
    test: float = 0.2

    def __post_init__(self) -> None:
        parts = (self.train, self.val, self.test)
        # So that it holds for what is no number too.
        if not (min(parts) >= 0 and abs(sum(parts) - 1) <= 1e-9 and self.train > 0):
            raise ConfigError(
                f"--fractions {parts}: give train, val and test parts that sum to 1, "
                "as in 0.7,0.1,0.2."
            )


def assign(
    records: Sequence[Record], *, salt: bytes, fractions: Fractions, official: bool = True
) -> list[str]:
    """The split of each record.

    Args:
        records: The images.
        salt: The owner's salt.
        fractions: Parts of the patients that carry no official split.
        official: Whether a record's own split is kept.

    Raises:
        DataError: a patient has images in two official splits.
    """
    keys = [patient_key(salt, record.source, record.patient_id) for record in records]
    given = defaultdict(set)
    if official:
        for key, record in zip(keys, records, strict=True):
            if record.split:
                given[key].add(_official(record.split))
    torn = sum(len(splits) > 1 for splits in given.values())
    if torn:
        raise DataError(
            f"{torn} patients have images in two of the given splits; correct the split column, "
            "or leave it out with --no-official-splits: then whole patients are drawn."
        )
    # A patient with one given split is in it whole, images without one too.
    return [_split(key, next(iter(given[key]), None), fractions) for key in keys]


def _official(split: str) -> str:
    """A given split as shards name it: a part of file names.

    Raises:
        DataError: it is no word.
    """
    name = split.strip().lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(
            f"the split '{split}' cannot be part of a file's name; use words such as train, val "
            "and test, or --no-official-splits."
        )
    return name


def _split(key: str, official: str | None, fractions: Fractions) -> str:
    if official and official != TRAIN_VAL:
        return official
    place = int(key[:13], 16) / 16**13
    if official == TRAIN_VAL:
        return "train" if place * (fractions.train + fractions.val) < fractions.train else "val"
    if place < fractions.train:
        return "train"
    return "val" if place < fractions.train + fractions.val else "test"

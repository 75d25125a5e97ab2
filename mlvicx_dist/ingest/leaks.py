"""Copies of one image in different splits: found by perceptual hash, reported pair by pair."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.phash import as_words, near_pairs
from mlvicx_dist.ingest.shards import Manifest, read_index
from mlvicx_dist.storage import reaching

HEADER = tuple(
    ["bits", *(f"{one}_{of}" for one in ("first", "second") for of in ("split", "key", "where"))]
)
ORDER = ("train", "val", "test")
"""Splits that must not be learned from, the one that counts most last."""


@dataclass(frozen=True, slots=True)
class Hashed:
    """An image that was packed; `where` is its file, or its shard folder where that is unknown."""

    key: str
    split: str
    phash: str
    where: str = ""
    patient: str = ""


@dataclass(frozen=True, slots=True)
class Leak:
    """Two images of different splits that are copies of one; `first` is learned from before."""

    first: Hashed
    second: Hashed
    bits: int


def find_leaks(images: Sequence[Hashed]) -> list[Leak]:
    """Pairs of images that lie in different splits and are copies of one another."""
    if not images:
        return []
    splits = {split: k for k, split in enumerate(sorted({image.split for image in images}))}
    groups = np.array([splits[image.split] for image in images])
    pairs, distances = near_pairs(as_words([image.phash for image in images]), groups)
    found = []
    for (a, b), bits in zip(pairs.tolist(), distances.tolist(), strict=True):
        first, second = sorted((images[a], images[b]), key=lambda one: (_lateness(one), one.key))
        found.append(Leak(first, second, bits))
    return found


def torn_patients(images: Iterable[Hashed]) -> int:
    """How many patients have images in more than one split; their keys must share a salt."""
    splits: dict[str, set[str]] = defaultdict(set)
    for image in images:
        splits[image.patient].add(image.split)
    return sum(len(found) > 1 for found in splits.values())


def apart(one: Manifest, other: Manifest) -> str:
    """Why the patients of two folders have no keys in common; empty if they may have."""
    if one.salt_digest != other.salt_digest:
        return "with another salt"
    if one.sources.keys().isdisjoint(other.sources):
        return f"under another --name ({', '.join(sorted(other.sources))})"
    return ""


def hashed(manifest: Manifest) -> Iterator[Hashed]:
    """The images of a shard folder; the hashes stand in their JSON.

    Raises:
        DataError: a shard cannot be read.
    """
    for shard in manifest.shards:
        path = manifest.folder / shard.name
        try:
            with reaching(path), path.open("rb") as file:
                for row in read_index(manifest.folder, shard):
                    file.seek(int(row["json_offset"]))
                    known = json.loads(file.read(int(row["json_size"])))
                    yield Hashed(
                        key=row["key"].decode(),
                        split=shard.split,
                        phash=known["phash"],
                        where=str(manifest.folder),
                        patient=f"{known['source']}/{known['patient']}",
                    )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"{path}: the shard cannot be read; run 'mlvicx verify {manifest.folder}' for the "
                "damage and its repair."
            ) from None


def as_csv(leaks: Iterable[Leak]) -> bytes:
    """The report; it may hold paths, so it is for the owner alone."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(_row(leak) for leak in leaks)
    return buffer.getvalue().encode("utf-8", "surrogateescape")


def words(leaks: Sequence[Leak]) -> str:
    """How many pairs lie in which splits: `3 in train and test`."""
    counts: dict[tuple[str, str], int] = {}
    for leak in leaks:
        pair = (leak.first.split, leak.second.split)
        counts[pair] = counts.get(pair, 0) + 1
    return ", ".join(f"{n} in {a} and {b}" for (a, b), n in sorted(counts.items()))


def _row(leak: Leak) -> tuple[Any, ...]:
    a, b = leak.first, leak.second
    return (leak.bits, a.split, a.key, a.where, b.split, b.key, b.where)


def _lateness(image: Hashed) -> int:
    """What is held out comes later; a split of another name than these may be."""
    return ORDER.index(image.split) if image.split in ORDER else ORDER.index("val")

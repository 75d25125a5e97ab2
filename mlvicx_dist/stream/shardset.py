"""Several shard folders as one numbered set of samples.

The global index of a sample counts through the folders in the order given, their shards by name
and the offsets inside each; `order` says which index is read when.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.shards import Manifest, decode_image, read_index, read_manifest
from mlvicx_dist.storage import is_local

OPEN_SHARDS = 256
"""Shards that a process keeps open."""


@dataclass(frozen=True)
class ShardSet:
    """The shards of chosen splits in several folders.

    Attributes:
        manifests: One a folder.
        shards: (folder, shard name) of every shard, in the order of the global index.
        sizes: Samples of each shard.
        weights: The weight of each shard, which is its folder's.
    """

    manifests: tuple[Manifest, ...]
    shards: tuple[tuple[Path, str], ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    starts: np.ndarray = field(repr=False, compare=False)

    @classmethod
    def open(
        cls,
        folders: Sequence[str | Path],
        *,
        splits: Sequence[str],
        weights: Sequence[float] | None = None,
    ) -> ShardSet:
        """Read the manifests of `folders`.

        Raises:
            DataError: a folder holds no whole set of shards, or none of the splits.
        """
        manifests = tuple(read_manifest(folder) for folder in folders)
        for manifest in manifests:
            if not is_local(manifest.folder):
                raise DataError(
                    f"{manifest.folder}: images are read from local folders only; copy it to one."
                )
        shards, sizes, shard_weights = [], [], []
        for manifest, weight in zip(manifests, weights or [1.0] * len(manifests), strict=True):
            chosen = [s for s in manifest.shards if s.split in splits and s.samples]
            if not chosen:
                there = ", ".join(sorted(manifest.splits)) or "none"
                raise DataError(
                    f"{manifest.folder}: no images of the split {' or '.join(splits)} there; "
                    f"it has the splits {there}."
                )
            for shard in chosen:
                shards.append((Path(manifest.folder), shard.name))
                sizes.append(shard.samples)
                shard_weights.append(weight)
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return cls(manifests, tuple(shards), tuple(sizes), tuple(shard_weights), starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def digests(self) -> list[str]:
        """The digest of each manifest, in the order of the folders."""
        return [manifest.digest for manifest in self.manifests]

    def image(self, sample: int) -> np.ndarray:
        """The stored grey image of a sample, [H, W] uint8 or uint16."""
        folder, name, row = self._row(sample)
        return self._decoded(folder, name, row, "image")

    def mask(self, sample: int) -> np.ndarray | None:
        """The mask of a sample, uint8 [H, W] of 0 and 255; None where it has none."""
        folder, name, row = self._row(sample)
        return self._decoded(folder, name, row, "mask") if row["mask_size"] else None

    def json(self, sample: int) -> bytes:
        """The JSON member of a sample."""
        folder, name, row = self._row(sample)
        return self._read(folder, name, row["json_offset"], row["json_size"])

    def key(self, sample: int) -> str:
        """The key of a sample."""
        return str(self._row(sample)[2]["key"].decode())

    def _decoded(self, folder: Path, name: str, row: np.void, kind: str) -> np.ndarray:
        data = self._read(folder, name, row[f"{kind}_offset"], row[f"{kind}_size"])
        try:
            return decode_image(data)
        except DataError as error:
            raise DataError(
                f"{folder / name}: the {kind} {row['key'].decode()} cannot be decoded ({error}); "
                f"run 'mlvicx verify {folder}' for the damage and its repair."
            ) from None

    def _row(self, sample: int) -> tuple[Path, str, np.void]:
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        folder, name = self.shards[shard]
        return folder, name, _index(folder, name)[sample - int(self.starts[shard])]

    @staticmethod
    def _read(folder: Path, name: str, offset: int, size: int) -> bytes:
        """Bytes of a shard: the seam where remote stores come in."""
        data = os.pread(_descriptor(folder, name), int(size), int(offset))
        if len(data) != size:
            raise DataError(
                f"{folder / name}: the shard is cut short; run 'mlvicx verify {folder}' "
                "and pack it again."
            )
        return data


@lru_cache(maxsize=OPEN_SHARDS)
def _index(folder: Path, name: str) -> np.ndarray:
    return read_index(folder, name)


class _Descriptor:
    """A file descriptor that closes when it leaves the cache."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(path: Path) -> _Descriptor:
    return _Descriptor(path)


def _descriptor(folder: Path, name: str) -> int:
    try:
        # Reading by position shares nothing between processes: a descriptor survives a fork.
        return _open(folder / name).number
    except OSError as error:
        raise DataError(
            f"{folder / name}: the shard cannot be read ({error.strerror}); "
            f"run 'mlvicx verify {folder}' to see what is missing."
        ) from None

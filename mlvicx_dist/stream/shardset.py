"""Several shard folders as one numbered set of samples.

The global index of a sample counts through the folders in the order given, their shards by name
and the offsets inside each; `order` says which index is read when. A local shard is read where it
is, a remote one through the cache of its node.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mlvicx_dist.errors import DataError, nearest
from mlvicx_dist.ingest.record import ALLOWED_KEYS
from mlvicx_dist.ingest.shards import Manifest, ShardInfo, decode_image, read_index, read_manifest
from mlvicx_dist.storage import is_local, told
from mlvicx_dist.stream.cache import OPEN_SHARDS, Cache, RemoteShard
from mlvicx_dist.stream.part import kept_bytes


@dataclass(frozen=True)
class ShardSet:
    """The shards of chosen splits in several folders.

    Attributes:
        manifests: One a folder.
        shards: The tar or the remote shard, in the order of the global index.
        infos: What the manifests say of each shard.
        sizes: Samples of each shard.
        weights: The weight of each shard, which is its folder's.
    """

    manifests: tuple[Manifest, ...]
    shards: tuple[Path | RemoteShard, ...]
    infos: tuple[ShardInfo, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    starts: np.ndarray = field(repr=False, compare=False)

    @classmethod
    def open(
        cls,
        folders: Sequence[str | Path],
        *,
        splits: Sequence[str] | None,
        weights: Sequence[float] | None = None,
        cache: Cache | None = None,
        patience_s: float | None = None,
    ) -> ShardSet:
        """Read the manifests of `folders`.

        Args:
            folders: Paths and URLs.
            splits: Whose shards are taken; None: of all splits.
            weights: One a folder; None: all the same.
            cache: Where the shards of URLs are kept; None: the default place and size.
            patience_s: How long a store that fails is asked for a manifest; None: three times.

        Raises:
            DataError: a folder holds no whole set of shards, or none of the splits, or no folder
                has one of them.
        """
        manifests = tuple(read_manifest(f, patience_s=patience_s) for f in folders)
        named = sorted({name for manifest in manifests for name in manifest.splits})
        if splits is None:
            splits = list(dict.fromkeys(name for m in manifests for name in m.splits))
        # Of one split alone each folder that lacks it is named below.
        for split in splits:
            if split not in named and len(splits) > 1:
                raise DataError(
                    f"{', '.join(str(m.folder) for m in manifests)}: there is no split "
                    f"'{split}'{nearest(split, named)}; the splits there are {', '.join(named)}."
                )
        wanted = [
            kept_bytes(info)
            for manifest in manifests
            for info in manifest.shards
            if not is_local(manifest.folder) and info.split in splits
        ]
        cache = replace(cache or Cache(), wanted_bytes=sum(wanted))
        shards: list[Path | RemoteShard] = []
        infos, shard_weights = [], []
        for manifest, weight in zip(manifests, weights or [1.0] * len(manifests), strict=True):
            chosen = [s for s in manifest.shards if s.split in splits and s.samples]
            if not chosen:
                there = ", ".join(sorted(manifest.splits)) or "none"
                raise DataError(
                    f"{manifest.folder}: no images of the split {' or '.join(splits)} there; "
                    f"it has the splits {there}."
                )
            for info in chosen:
                if is_local(manifest.folder):
                    shards.append(manifest.folder / info.name)
                else:
                    shards.append(RemoteShard(str(manifest.folder), info, cache))
                infos.append(info)
                shard_weights.append(weight)
        sizes = tuple(info.samples for info in infos)
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return cls(manifests, tuple(shards), tuple(infos), sizes, tuple(shard_weights), starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of all folders by name, each once, in the order of the folders."""
        return tuple(dict.fromkeys(name for m in self.manifests for name in m.classes))

    def digests(self) -> list[str]:
        """The digest of each manifest, in the order of the folders."""
        return [manifest.digest for manifest in self.manifests]

    def image(self, sample: int) -> np.ndarray:
        """The stored grey image of a sample, [H, W] uint8 or uint16."""
        shard, row = self._row(sample)
        return _decoded(shard, row, "image")

    def mask(self, sample: int) -> np.ndarray | None:
        """The mask of a sample, uint8 [H, W] of 0 and 255; None where it has none."""
        shard, row = self._row(sample)
        return _decoded(shard, row, "mask") if row["mask_size"] else None

    def masked(self) -> np.ndarray:
        """The samples that have a mask, an empty one or not, ascending, int64."""
        indices = map(_index, self.shards, self.infos)
        return np.flatnonzero(np.concatenate([index["mask_size"] > 0 for index in indices]))

    def about(self, sample: int) -> dict[str, Any]:
        """What a shard tells of a sample, by `ALLOWED_KEYS`, and its `key`.

        Raises:
            DataError: it is damaged, or the shard cannot be read.
        """
        shard, row = self._row(sample)
        key = row["key"].decode()
        try:
            known = json.loads(_member(shard, row, "json"))
            return {"key": key, **{name: known[name] for name in ALLOWED_KEYS}}
        except (ValueError, LookupError, TypeError):
            raise DataError(
                f"{shard}: what it tells of {key} is damaged; "
                f"run 'mlvicx verify {_folder(shard)}' for the damage and its repair."
            ) from None

    def key(self, sample: int) -> str:
        """The key of a sample."""
        return str(self._row(sample)[1]["key"].decode())

    def _row(self, sample: int) -> tuple[Path | RemoteShard, np.void]:
        number = int(np.searchsorted(self.starts, sample, side="right")) - 1
        shard = self.shards[number]
        return shard, _index(shard, self.infos[number])[sample - int(self.starts[number])]


def _decoded(shard: Path | RemoteShard, row: np.void, kind: str) -> np.ndarray:
    data = _member(shard, row, kind)
    try:
        return decode_image(data)
    except DataError as error:
        # Bytes that went wrong on the way are found when the shard is whole, and fetched again.
        if isinstance(shard, RemoteShard) and shard.fill() and data != _member(shard, row, kind):
            return _decoded(shard, row, kind)
        raise DataError(
            f"{shard}: the {kind} {row['key'].decode()} cannot be decoded ({error}); "
            f"run 'mlvicx verify {_folder(shard)}' for the damage and its repair."
        ) from None


def _member(shard: Path | RemoteShard, row: np.void, kind: str) -> bytes:
    offset, size = int(row[f"{kind}_offset"]), int(row[f"{kind}_size"])
    if isinstance(shard, RemoteShard):
        return shard.read(offset, size)
    try:
        data = os.pread(_descriptor(shard), size, offset)
    except OSError as error:
        raise DataError(
            f"{shard}: the shard cannot be read ({told(error)}); "
            f"run 'mlvicx verify {_folder(shard)}' for the damage and its repair."
        ) from None
    if len(data) != size:
        raise DataError(
            f"{shard}: the shard is cut short; run 'mlvicx verify {_folder(shard)}' "
            "and pack it again."
        )
    return data


def _folder(shard: Path | RemoteShard) -> Path | str:
    return shard.parent if isinstance(shard, Path) else shard.folder


@lru_cache(maxsize=OPEN_SHARDS)
def _index(shard: Path | RemoteShard, info: ShardInfo) -> np.ndarray:
    if isinstance(shard, RemoteShard):
        return shard.index()
    return read_index(shard.parent, info)


class _Descriptor:
    """A file descriptor that closes when it leaves the cache."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        # There is none where the file could not be opened.
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(path: Path) -> _Descriptor:
    return _Descriptor(path)


def _descriptor(path: Path) -> int:
    try:
        # Reading by position shares nothing between processes: a descriptor survives a fork.
        return _open(path).number
    except OSError as error:
        raise DataError(
            f"{path}: the shard cannot be read ({error.strerror}); "
            f"run 'mlvicx verify {path.parent}' to see what is missing."
        ) from None

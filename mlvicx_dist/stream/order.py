"""The order of samples as a pure function (DESIGN 3.1).

A sample is named by its global index: shards one after the other, offsets inside each. Step t of
an epoch trains on column t of `epoch_order`; rank r reads the lanes `rank_lanes` gives it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import becoming
from mlvicx_dist.stream import keyed

IN_MEMORY_BYTES = 64 * 2**20
"""A larger order is kept in one file a node and memory-mapped."""
KEPT_S = 7 * 86400.0
"""How long an order that nobody asks for is kept: that of a run that ended."""


def epoch_order(
    shard_sizes: Sequence[int],
    batch: int,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Which sample every lane trains on at every step of one epoch.

    Shuffles the shards, shuffles inside each, concatenates and cuts into `batch` equal lanes;
    the remainder waits for another epoch, so each sample comes at most once.

    Args:
        shard_sizes: Samples of each shard.
        batch: The global batch, which is the number of lanes.
        seed: The run's seed.
        epoch: The epoch, from 0.
        weights: A weight for each shard. A shard of the largest weight is used whole, another in
            proportion: a fresh random part of it each epoch. None: every shard whole.

    Returns:
        Global sample indices, int64 [batch, steps].

    Raises:
        DataError: the batch is larger than the data.
    """
    steps = steps_per_epoch(shard_sizes, batch, weights)
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = keyed.permutation(len(shard_sizes), seed=seed, epoch=epoch, purpose=keyed.SHARDS)
    counts = _counts(np.asarray(shard_sizes)[shards], _shares(shard_sizes, weights)[shards])
    lanes = np.empty(batch * steps, dtype=np.int64)
    filled = 0
    for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
        inside = keyed.permutation(
            shard_sizes[shard], seed=seed, epoch=epoch, purpose=keyed.SAMPLES, item=shard
        )
        taken = inside[: min(count, len(lanes) - filled)]
        lanes[filled : filled + len(taken)] = taken + starts[shard]
        filled += len(taken)
    return lanes.reshape(batch, steps)


def steps_per_epoch(
    shard_sizes: Sequence[int], batch: int, weights: Sequence[float] | None = None
) -> int:
    """Optimizer steps an epoch: floor(samples used / batch), the same in every epoch.

    Raises:
        DataError: the batch is larger than the data.
    """
    samples = _total(shard_sizes, _shares(shard_sizes, weights))
    if batch > samples:
        raise DataError(
            f"the batch of {batch} is larger than the {samples} images of an epoch; "
            "set train.batch_size to at most that, or add shards."
        )
    return samples // batch


def rank_lanes(batch: int, rank: int, world_size: int) -> slice:
    """The contiguous run of lanes that a rank trains on, as `np.array_split` cuts them."""
    base, extra = divmod(batch, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def rank_shares(batch: int, world_size: int) -> tuple[int, ...]:
    """How many lanes, that is rows of a batch, each rank has."""
    lanes = (rank_lanes(batch, rank, world_size) for rank in range(world_size))
    return tuple(part.stop - part.start for part in lanes)


def epoch_lanes(
    shard_sizes: Sequence[int],
    batch: int,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
    *,
    lanes: slice,
    folder: Path,
) -> np.ndarray:
    """The rows `lanes` of `epoch_order`, int64 [lanes, steps].

    An order beyond `IN_MEMORY_BYTES` is computed once a node, kept in `folder` and memory-mapped
    by everyone else there; the file of the epoch before the last is removed, and what nobody has
    asked for in `KEPT_S`. Where nothing can be kept each process computes it.
    """
    steps = steps_per_epoch(shard_sizes, batch, weights)
    if 8 * batch * steps <= IN_MEMORY_BYTES:
        return epoch_order(shard_sizes, batch, seed, epoch, weights)[lanes].copy()
    name = hashlib.sha256(repr((list(shard_sizes), batch, seed, weights)).encode()).hexdigest()[:16]
    path = folder / f"order-{name}-{epoch}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"order-{name}.lock"):
            if not path.exists():
                _remove_old(folder)
                with becoming(path) as partial, partial.open("wb") as file:
                    np.save(file, epoch_order(shard_sizes, batch, seed, epoch, weights))
                (folder / f"order-{name}-{epoch - 2}.npy").unlink(missing_ok=True)
            path.touch()
            # Who has it open keeps it when it is removed.
            return np.load(path, mmap_mode="r")[lanes]
    except OSError:
        return epoch_order(shard_sizes, batch, seed, epoch, weights)[lanes].copy()


def _remove_old(folder: Path) -> None:
    for path in folder.glob("order-*.npy"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


def _shares(shard_sizes: Sequence[int], weights: Sequence[float] | None) -> np.ndarray:
    """The part of each shard that an epoch uses, float64 in (0, 1]."""
    if weights is None:
        return np.ones(len(shard_sizes))
    return np.asarray(weights, dtype=np.float64) / max(weights)


def _total(sizes: Sequence[int] | np.ndarray, shares: np.ndarray) -> int:
    return math.floor(math.fsum(np.asarray(sizes) * shares) + 1e-6)


def _counts(sizes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How many samples each shard gives: rounded so that the sum is the same in every epoch."""
    ends = np.floor(np.cumsum(sizes * shares) + 1e-6).astype(np.int64)
    if len(ends):
        ends[-1] = _total(sizes, shares)
    return np.minimum(np.diff(ends, prepend=0), sizes)

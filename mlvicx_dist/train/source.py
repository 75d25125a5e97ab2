"""What a run reads: its shards, and the part of each step that is a worker's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.loader import Batch, Steps, batches
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.step import Member


def open_shards(config: PretrainConfig) -> ShardSet:
    """The shards that a run trains on.

    Raises:
        DataError: a folder holds no whole set of shards, or none of the splits.
    """
    return ShardSet.open(
        [folder.path for folder in config.data.shards],
        splits=config.data.splits,
        weights=[folder.weight for folder in config.data.shards],
        cache=cache_of(config.data),
    )


def data_of(config: PretrainConfig, shards: ShardSet) -> list[dict[str, Any]]:
    """What a checkpoint remembers of its data, a dict a shard folder.

    Returns:
        `manifest`, its digest; `images`, those of the splits that are trained on; `sources`, the
        images of each source in all splits; `weight`.
    """
    return [
        {
            "manifest": manifest.digest,
            "images": sum(s.samples for s in manifest.shards if s.split in config.data.splits),
            "sources": dict(manifest.sources),
            "weight": folder.weight,
        }
        for manifest, folder in zip(shards.manifests, config.data.shards, strict=True)
    ]


def steps_of(config: PretrainConfig, shards: ShardSet, member: Member) -> Steps:
    """A worker's part of each step."""
    return Steps(
        shards,
        config.views,
        batch=config.train.batch_size,
        seed=config.train.seed,
        rank=member.rank,
        world_size=member.world_size,
    )


def stream_of(
    config: PretrainConfig, steps: Steps, member: Member, *, start: int, stop: int
) -> Iterator[Batch]:
    """The batches of the steps `start` … `stop` - 1, loaded ahead as the settings say.

    Raises:
        UserError: a shard cannot be read, or loader processes die again and again.
    """
    return batches(
        steps,
        start=start,
        stop=stop,
        workers=config.data.loader_workers,
        pin_memory=member.device.type == "cuda",
    )

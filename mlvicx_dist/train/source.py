"""What a run reads: its shards, their labels, and the part of each step that is a worker's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlvicx_dist.config import SUPERVISED, PretrainConfig
from mlvicx_dist.errors import ConfigError, DataError, nearest
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.progress import say
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.labels import Labels
from mlvicx_dist.stream.loader import Batch, Steps, batches
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.step import Member


def open_shards(config: PretrainConfig, *, patience_s: float | None = None) -> ShardSet:
    """The shards that a run trains on.

    Args:
        config: The settings.
        patience_s: How long a store that fails is asked again; None: three times in all.

    Raises:
        DataError: a folder holds no whole set of shards, or none of the splits.
    """
    return ShardSet.open(
        [folder.path for folder in config.data.shards],
        splits=config.data.splits,
        weights=[folder.weight for folder in config.data.shards],
        cache=cache_of(config.data),
        patience_s=patience_s,
    )


def with_classes(config: PretrainConfig, shards: ShardSet) -> PretrainConfig:
    """The settings with the classes that a training on labels learns; else as they are.

    Where they name none, these are the classes of all shard folders, joined by name. A folder
    without a label is told: its images train nothing.

    Raises:
        ConfigError: no folder has one of the classes.
        DataError: no image has a label.
    """
    if config.method != SUPERVISED:
        return config
    for name in config.model.classes or ():
        if name not in shards.classes:
            raise ConfigError(
                f"model.classes names '{name}', which the shards do not have"
                f"{nearest(name, shards.classes)}; they have {', '.join(shards.classes) or 'none'}."
            )
    classes = config.model.classes or list(shards.classes)
    labels = Labels(tuple(classes), tuple(config.loss.label_splits))
    bare = [one.path for one in config.data.shards if not _has_labels(one.path, labels, config)]
    splits = " or ".join(labels.splits)
    if len(bare) == len(config.data.shards):
        raise DataError(
            f"{', '.join(bare)}: no image of the split {splits} has a label of "
            f"{', '.join(classes) or 'any class'}, so supervised training has nothing to learn; "
            "pack them with labels, or name other splits with loss.label_splits."
        )
    for folder in bare:
        say(f"{folder}: no image of the split {splits} has a label, so none trains anything.")
    model = config.model.model_copy(update={"classes": classes})
    return config.model_copy(update={"model": model})


def _has_labels(folder: str, labels: Labels, config: PretrainConfig) -> bool:
    """Whether an image of a folder has a label; looks no further than to the first that has."""
    there = read_manifest(folder).splits
    splits = [split for split in labels.splits if there.get(split)]
    if not splits or not labels.classes:
        return False
    shards = ShardSet.open([folder], splits=splits, cache=cache_of(config.data))
    known = (~np.isnan(labels.read(shards, [sample])).all() for sample in range(len(shards)))
    return any(known)


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
        labels=_labels(config),
    )


def _labels(config: PretrainConfig) -> Labels | None:
    """What the method reads of the labels."""
    if config.method != SUPERVISED:
        return None
    return Labels(tuple(config.model.classes or ()), tuple(config.loss.label_splits))


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

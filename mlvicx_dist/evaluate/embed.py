"""Embeddings of shards by a frozen encoder: eval mode, whole images, each exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mlvicx_dist.errors import DataError, ResourceError, UserError
from mlvicx_dist.evaluate.made import Made, made_by
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.progress import progress
from mlvicx_dist.session import connected, in_parallel, ray_session
from mlvicx_dist.storage import becoming, told
from mlvicx_dist.stream.cache import Cache
from mlvicx_dist.stream.labels import labels_of
from mlvicx_dist.stream.loader import as_bytes, lists_of
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.stream.whole import squared
from mlvicx_dist.train.weights import load_encoder

TASK_IMAGES = 512
"""A Ray task takes shards until it has so many."""


@dataclass(frozen=True)
class Embeddings:
    """Embedded images and what is known of them.

    Attributes:
        features: One array for each encoder, float32 [n, F].
        labels: [n, K], 0, 1 or NaN (unknown), by `classes`.
        about: The allow-listed JSON of each image, with its `key`.
    """

    features: tuple[np.ndarray, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    about: tuple[dict[str, Any], ...]

    def rows(self, split: str) -> np.ndarray:
        """Which images are in a split, bool [n]."""
        return np.array([one["split"] == split for one in self.about], dtype=bool)

    def about_of(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """What is known of the images of chosen rows, bool [n]."""
        return [self.about[place] for place in np.flatnonzero(rows)]

    def patients(self) -> np.ndarray:
        """The patient of each image: source and key, since two sources may share keys."""
        return np.array([f"{one['source']}/{one['patient']}" for one in self.about])


class WholeImages(Dataset[np.ndarray | UserError]):
    """Every image of a shard set, whole: aspect kept, padded to a square; no crop, no flip."""

    def __init__(self, shards: ShardSet, size_px: int) -> None:
        self.shards, self.size_px = shards, size_px

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: int) -> np.ndarray | UserError:
        try:
            return squared(as_bytes(self.shards.image(sample)), self.size_px)
        except UserError as error:
            return error


@dataclass(frozen=True)
class Show:
    """How images are shown to an encoder.

    Attributes:
        size_px: The side of the squares.
        batch_size: Images a batch.
        loader_workers: Loader processes; 0 decodes in this one.
        use_gpu: Whether the encoder runs on the GPU.
    """

    size_px: int
    batch_size: int = 64
    loader_workers: int = 1
    use_gpu: bool = False


def embed_shards(
    encoders: Sequence[nn.Module],
    folders: Sequence[str | Path],
    *,
    splits: Sequence[str] | None = None,
    size_px: int | None = None,
    batch_size: int = 64,
    loader_workers: int = 1,
    use_gpu: bool = False,
    cache: Cache | None = None,
) -> Embeddings:
    """Embed the images of several shard folders, decoded once for all encoders.

    Connected to a cluster, as Ray tasks of some shards each; else in this process. No batch holds
    images of two shards, so that neither who makes them nor how many do changes a bit.

    Args:
        encoders: From uint8 [B, 1, H, W] to [B, F], an `Encoder` among them; they are put into
            eval mode.
        folders: Shard folders; their classes are joined by name.
        splits: Only these; None: all.
        size_px: The size that images are shown at; None: that of the pretraining.
        batch_size: Images a batch.
        loader_workers: Loader processes.
        use_gpu: Whether the encoders run on the GPU.
        cache: Where embeddings are kept for the next time; None: nowhere.

    Raises:
        DataError: a folder has no such split, or an image cannot be read.
        ResourceError: there is no GPU, or a worker died three times.
    """
    shards = ShardSet.open(folders, splits=splits, cache=cache)
    size_px = size_px or next(e.image_size_px for e in encoders if isinstance(e, Encoder))
    show = Show(size_px, batch_size, loader_workers, use_gpu)
    about = _about(shards)
    return Embeddings(
        _features(encoders, shards, show, cache),
        labels_of(about, shards.classes),
        shards.classes,
        tuple(about),
    )


def about_shards(
    folders: Sequence[str | Path], *, splits: Sequence[str], cache: Cache | None = None
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """What `embed_shards` would know of each image, in its order, and the classes.

    Raises:
        DataError: a folder has no such split, or a shard cannot be read.
    """
    shards = ShardSet.open(folders, splits=splits, cache=cache)
    return _about(shards), shards.classes


def _about(shards: ShardSet) -> list[dict[str, Any]]:
    return [shards.about(k) for k in range(len(shards))]


def _features(
    encoders: Sequence[nn.Module], shards: ShardSet, show: Show, cache: Cache | None
) -> tuple[np.ndarray, ...]:
    """The embeddings of all images by each encoder; those that are not kept are made."""
    kept = [Made(made_by(encoder.eval(), show.size_px), cache) for encoder in encoders]
    numbers = range(len(shards.shards))
    found = [[made.read(shards.infos[n]) for n in numbers] for made in kept]
    lacking = [k for k, parts in enumerate(found) if any(part is None for part in parts)]
    todo = [n for n in numbers if any(found[k][n] is None for k in lacking)]
    if todo:
        total = sum(shards.sizes[n] for n in todo)
        with progress("embedding", total, "images") as bar:
            for number, features in _made([encoders[k] for k in lacking], shards, todo, show):
                for k, one in zip(lacking, features, strict=True):
                    found[k][number] = one
                    kept[k].write(shards.infos[number], one)
                bar.advance(shards.sizes[number])
    return tuple(np.concatenate([part for part in parts if part is not None]) for parts in found)


Part = tuple[int, list[np.ndarray]]
"""The number of a shard, and its embeddings by each encoder."""


def _made(
    encoders: Sequence[nn.Module], shards: ShardSet, numbers: Sequence[int], show: Show
) -> Iterator[Part]:
    """The embeddings of some shards, in any order: by Ray tasks on a cluster, or here."""
    groups = list(_groups(shards, numbers))
    if not connected() or (len(groups) < 2 and not show.use_gpu):
        yield from embed_some(encoders, shards, numbers, show)
        return
    import ray

    gpus = 1 if show.use_gpu else 0
    with ray_session(
        {"GPU": gpus} if gpus else {"CPU": 1},
        asked="embedding (embedding.use_gpu)" if gpus else "embedding",
        remedy="set embedding.use_gpu=false" if gpus else "add a node",
    ):
        there = ray.put([encoder.cpu() for encoder in encoders])
        tasks = [_Task(there, shards, group, show) for group in groups]
        for _, parts in in_parallel(
            _embed_task, tasks, workers=None, gpus=gpus, remedy="lower embedding.batch_size"
        ):
            yield from parts


def _groups(shards: ShardSet, numbers: Sequence[int]) -> Iterator[list[int]]:
    """Shards that a task takes: one after the other, until they have `TASK_IMAGES`."""
    group: list[int] = []
    for number in numbers:
        group.append(number)
        if sum(shards.sizes[n] for n in group) >= TASK_IMAGES:
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True)
class _Task:
    """Some shards for one task, and Ray's reference to the encoders."""

    encoders: Any
    shards: ShardSet
    numbers: list[int]
    show: Show


def _embed_task(task: _Task) -> list[Part]:
    import ray

    # It has one core: what decodes beside it would only wait for that.
    show = replace(task.show, loader_workers=0)
    return list(embed_some(ray.get(task.encoders), task.shards, task.numbers, show))


def embed_some(
    encoders: Sequence[nn.Module], shards: ShardSet, numbers: Sequence[int], show: Show
) -> Iterator[Part]:
    """The embeddings of some shards in this process, shard by shard.

    Raises:
        DataError: an image cannot be read.
    """
    batches = [
        range(start, min(start + show.batch_size, int(shards.starts[n + 1])))
        for n in numbers
        for start in range(int(shards.starts[n]), int(shards.starts[n + 1]), show.batch_size)
    ]
    made = embed_batches(encoders, shards, batches, show)
    for number in numbers:
        count = -(-shards.sizes[number] // show.batch_size)
        parts = [next(made) for _ in range(count)]
        yield number, [np.concatenate(features) for features in zip(*parts, strict=True)]


def embed_samples(
    encoders: Sequence[nn.Module], shards: ShardSet, samples: Sequence[int], show: Show
) -> list[np.ndarray]:
    """The embeddings of chosen samples by each encoder, float32 [n, F] each.

    Args:
        encoders: See `embed_shards`.
        shards: Open shards.
        samples: Global indices.
        show: How images are shown.

    Raises:
        DataError: an image cannot be read.
    """
    size = show.batch_size
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    with progress("embedding", len(samples), "images") as bar:
        parts = []
        for part in embed_batches(encoders, shards, batches, show):
            parts.append(part)
            bar.advance(len(part[0]))
    return [np.concatenate(features) for features in zip(*parts, strict=True)]


def embed_batches(
    encoders: Sequence[nn.Module],
    shards: ShardSet,
    batches: Sequence[Sequence[int]],
    show: Show,
) -> Iterator[list[np.ndarray]]:
    """The embeddings of batches of samples by each encoder, float32 [b, F] each.

    Raises:
        DataError: an image cannot be read.
        ResourceError: there is no GPU, or a loader process died.
    """
    device = device_of(show.use_gpu)
    encoders = [encoder.to(device).eval() for encoder in encoders]
    loader: DataLoader[Any] = DataLoader(
        WholeImages(shards, show.size_px),
        batch_sampler=[list(batch) for batch in batches],
        num_workers=show.loader_workers,
        collate_fn=list,
    )
    for items in lists_of(loader):
        with torch.inference_mode():
            images = torch.from_numpy(np.stack(items))[:, None].to(device)
            features = [encoder(images).float().cpu().numpy() for encoder in encoders]
        yield features


def embed_to_parquet(
    checkpoint: str | Path,
    folders: Sequence[str],
    out: str | Path,
    *,
    splits: Sequence[str] | None,
    batch_size: int,
    loader_workers: int,
    use_gpu: bool,
) -> tuple[int, int]:
    """Embed shards with one encoder and write them; how many images and how many numbers each.

    Raises:
        DataError: there is no folder for `out`, which is looked at first, or it cannot be written.
    """
    if not Path(out).parent.is_dir():
        raise DataError(_unwritten(Path(out), "its folder does not exist"))
    embeddings = embed_shards(
        [load_encoder(checkpoint)],
        folders,
        splits=splits,
        batch_size=batch_size,
        loader_workers=loader_workers,
        use_gpu=use_gpu,
        cache=Cache(),
    )
    write_parquet(embeddings, Path(out))
    count, width = embeddings.features[0].shape
    return count, width


def write_parquet(embeddings: Embeddings, path: Path) -> None:
    """Write keys, what is known of each image, its labels and its embedding, whole or not at all.

    Columns: key, patient, source, split, view, sex, age, `label_<class>`, embedding.
    """
    features = embeddings.features[0]
    flat = pa.array(np.ascontiguousarray(features).reshape(-1))
    columns: dict[str, Any] = {
        name: [one[name] for one in embeddings.about]
        for name in ("key", "patient", "source", "split", "view", "sex", "age")
    }
    for k, name in enumerate(embeddings.classes):
        columns[f"label_{name}"] = pa.array(
            embeddings.labels[:, k], mask=np.isnan(embeddings.labels[:, k]), type=pa.float32()
        )
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    try:
        with becoming(path) as partial:
            pq.write_table(pa.table(columns), partial)
    except OSError as error:
        raise DataError(_unwritten(path, told(error))) from None


def _unwritten(path: Path, reason: str) -> str:
    return (
        f"{path}: the embeddings cannot be written ({reason}); give a path in a folder that exists "
        "and has room."
    )


def device_of(use_gpu: bool) -> torch.device:
    """The GPU or the CPU.

    Raises:
        ResourceError: there is no GPU.
    """
    if use_gpu and not torch.cuda.is_available():
        raise ResourceError("use_gpu is set, but this machine has no GPU that PyTorch can use.")
    return torch.device("cuda" if use_gpu else "cpu")

"""Embeddings of shards by a frozen encoder: eval mode, whole images, each exactly once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from mlvicx_dist.errors import DataError, ResourceError, UserError
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import becoming, told
from mlvicx_dist.stream.loader import as_bytes
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.stream.whole import squared
from mlvicx_dist.train.checkpoint import load_encoder


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


class WholeImages(Dataset[tuple[np.ndarray, dict[str, Any]] | UserError]):
    """Every image of a shard set, whole: aspect kept, padded to a square; no crop, no flip."""

    def __init__(self, shards: ShardSet, size_px: int) -> None:
        self.shards, self.size_px = shards, size_px

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: int) -> tuple[np.ndarray, dict[str, Any]] | UserError:
        try:
            image = squared(as_bytes(self.shards.image(sample)), self.size_px)
            return image, {"key": self.shards.key(sample), **json.loads(self.shards.json(sample))}
        except UserError as error:
            return error


def embed_shards(
    encoders: Sequence[nn.Module],
    folders: Sequence[str | Path],
    *,
    splits: Sequence[str] | None = None,
    size_px: int | None = None,
    batch_size: int = 64,
    loader_workers: int = 1,
    use_gpu: bool = False,
) -> Embeddings:
    """Embed the images of several shard folders, decoded once for all encoders.

    Args:
        encoders: From uint8 [B, 1, H, W] to [B, F], an `Encoder` among them; they are put into
            eval mode.
        folders: Shard folders; their classes are joined by name.
        splits: Only these; None: all.
        size_px: The size that images are shown at; None: that of the pretraining.
        batch_size: Images a batch.
        loader_workers: Loader processes.
        use_gpu: Whether the encoders run on the GPU.

    Raises:
        DataError: a folder has no such split, or an image cannot be read.
    """
    shards = _open(folders, splits)
    return embed_samples(
        encoders,
        shards,
        range(len(shards)),
        size_px=size_px or next(e.image_size_px for e in encoders if isinstance(e, Encoder)),
        batch_size=batch_size,
        loader_workers=loader_workers,
        use_gpu=use_gpu,
    )


def about_shards(
    folders: Sequence[str | Path], *, splits: Sequence[str]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """What `embed_shards` would know of each image, in its order, and the classes.

    Raises:
        DataError: a folder has no such split, or a shard cannot be read.
    """
    shards = _open(folders, splits)
    about = [{"key": shards.key(k), **json.loads(shards.json(k))} for k in range(len(shards))]
    return about, _classes(shards)


def _classes(shards: ShardSet) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for m in shards.manifests for name in m.classes))


@torch.inference_mode()
def embed_samples(
    encoders: Sequence[nn.Module],
    shards: ShardSet,
    samples: Sequence[int],
    *,
    size_px: int,
    batch_size: int,
    loader_workers: int,
    use_gpu: bool,
) -> Embeddings:
    """Embed chosen samples of open shards, see `embed_shards`; `samples` are global indices."""
    device = device_of(use_gpu)
    encoders = [encoder.to(device).eval() for encoder in encoders]
    classes = _classes(shards)
    loader: DataLoader[Any] = DataLoader(
        Subset(WholeImages(shards, size_px), samples),
        batch_size=batch_size,
        num_workers=loader_workers,
        collate_fn=list,
    )
    features: list[list[np.ndarray]] = [[] for _ in encoders]
    about: list[dict[str, Any]] = []
    with progress("embedding", len(samples), "images") as bar:
        for items in loader:
            for item in items:
                if isinstance(item, UserError):
                    raise item
            images = torch.from_numpy(np.stack([image for image, _ in items]))[:, None].to(device)
            for kept, encoder in zip(features, encoders, strict=True):
                kept.append(encoder(images).float().cpu().numpy())
            about += [one for _, one in items]
            bar.advance(len(items))
    return Embeddings(
        tuple(np.concatenate(kept) for kept in features),
        labels_of(about, classes),
        classes,
        tuple(about),
    )


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


def _open(folders: Sequence[str | Path], splits: Sequence[str] | None) -> ShardSet:
    if splits is None:
        from mlvicx_dist.ingest.shards import read_manifest

        splits = list(dict.fromkeys(s for folder in folders for s in read_manifest(folder).splits))
    return ShardSet.open(folders, splits=splits)


def device_of(use_gpu: bool) -> torch.device:
    """The GPU or the CPU.

    Raises:
        ResourceError: there is no GPU.
    """
    if use_gpu and not torch.cuda.is_available():
        raise ResourceError("use_gpu is set, but this machine has no GPU that PyTorch can use.")
    return torch.device("cuda" if use_gpu else "cpu")


def labels_of(about: Sequence[dict[str, Any]], classes: Sequence[str]) -> np.ndarray:
    """The labels of images by class, float64 [n, K]: 0, 1 or NaN (unknown)."""
    rows = [[one["labels"].get(name) for name in classes] for one in about]
    return np.array(rows, dtype=np.float64).reshape(len(about), len(classes))

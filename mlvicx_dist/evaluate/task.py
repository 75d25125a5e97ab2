"""A task of a comparison: its test images, and what the probe of one encoder says of them.

Both are files of arrays, written whole: the comparison's only memory, from which its tables are
made anew.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from mlvicx_dist.config import EvaluateConfig, PretrainConfig
from mlvicx_dist.errors import DataError, DivergenceError, UserError
from mlvicx_dist.evaluate.embed import Embeddings, about_shards, embed_shards
from mlvicx_dist.evaluate.few import share_areas, shares_of
from mlvicx_dist.evaluate.folds import all_judged, counted, fold_of, folds_of, probed
from mlvicx_dist.evaluate.overlap import check_copies, overlap, pretraining_images
from mlvicx_dist.evaluate.parts import Parts, splits_of
from mlvicx_dist.evaluate.subgroups import members
from mlvicx_dist.ingest.shards import NO_ARRAY
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import Place, make_folder, read_bytes, told, write_whole
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.labels import labels_of

T = TypeVar("T")


@dataclass(frozen=True)
class Images:
    """The test images of a task.

    Attributes:
        labels: [n, K], 0, 1 or NaN.
        patients: Whose image it is, as a number, [n].
        keys: Of the samples, [n].
        groups: Which images are in each subgroup, bool [n].
        about: JSON values: `classes`, `left_out`, `splits`, `shares` of the training patients,
            `overlap` with the pretraining.
        folds: Which fold judges each, [n]; None without folds.
    """

    labels: np.ndarray
    patients: np.ndarray
    keys: np.ndarray
    groups: dict[str, np.ndarray]
    about: dict[str, Any]
    folds: np.ndarray | None = None

    @property
    def classes(self) -> list[str]:
        """Those that are judged."""
        return list(self.about["classes"])


@dataclass(frozen=True)
class Scores:
    """What one encoder's probe says of the test images.

    Attributes:
        probe: Logits, [n, K]; those of two folds are not to be compared.
        validation_auroc: The probe's on the validation images, mean over the classes and folds.
        few: For each share of the training patients the mean AUROC of each draw, [D], and the same
            under resampled patients, [D, R]; None where no class can be judged.
        plane: The two principal components of the test images' embeddings, [n, 2].
    """

    probe: np.ndarray
    validation_auroc: float
    few: list[tuple[np.ndarray, np.ndarray] | None]
    plane: np.ndarray


def images_of(task: EvaluateConfig, pretraining: PretrainConfig) -> Images:
    """The test images of a task, from what the shards tell of them; no image is decoded.

    Raises:
        DataError: a split is empty or no class can be judged.
        ConfigError: a class does not exist.
    """
    about, classes = about_shards(
        task.data.shards, splits=splits_of(task), cache=cache_of(task.data)
    )
    known = Embeddings((), labels_of(about, classes), classes, tuple(about))
    folds = folds_of(known, task)
    check_copies(about, folds, ", ".join(task.data.shards))
    parts, test = folds[0], all_judged(folds)
    about_test = known.about_of(test.rows)
    shares = shares_of(parts, task.few_labels) if task.few_labels else []
    return Images(
        test.labels,
        np.unique(test.patients, return_inverse=True)[1],
        np.array([one["key"] for one in about_test]),
        dict(members(about_test, task.age_bands)) if task.subgroups else {},
        {
            "classes": parts.classes,
            "left_out": parts.left_out,
            "splits": counted(folds),
            "shares": [share.about(parts) for share in shares],
            "overlap": _overlap(task, pretraining, about_test),
        },
        fold_of(folds),
    )


def score(
    name: str, encoder: nn.Module, task: EvaluateConfig, images: Images, *, size_px: int
) -> Scores:
    """Embed a task's images with a frozen encoder and judge it by its probes.

    Args:
        name: `pixels` has ridge regression in place of a probe.
        encoder: From uint8 [B, 1, H, W] to [B, F].
        task: The task.
        images: What is known of its test images.
        size_px: What images are shown at where the task does not say it.

    Raises:
        DivergenceError: an embedding is not finite.
        DataError: the shards are not those that the comparison began with.
    """
    embeddings = embed_shards(
        [encoder],
        task.data.shards,
        splits=splits_of(task),
        size_px=task.embedding.image_size_px or size_px,
        batch_size=task.embedding.batch_size,
        loader_workers=task.data.loader_workers,
        use_gpu=task.embedding.use_gpu,
        cache=cache_of(task.data),
    )
    features = embeddings.features[0]
    if not np.isfinite(features).all():
        raise DivergenceError("the embeddings are not finite: the weights diverged.")
    folds = folds_of(embeddings, task)
    test = all_judged(folds)
    keys = [one["key"] for one in embeddings.about_of(test.rows)]
    if keys != images.keys.tolist():
        raise DataError(
            f"{', '.join(task.data.shards)}: the test images are no longer those that the "
            "comparison began with; restore the shards, or give the comparison another name."
        )
    found = probed(name, features, folds, task)
    return Scores(
        found.logits,
        found.validation_auroc,
        _few(name, features, folds[0], task),
        plane(features[test.rows]),
    )


def _few(
    name: str, features: np.ndarray, parts: Parts, task: EvaluateConfig
) -> list[tuple[np.ndarray, np.ndarray] | None]:
    if not task.few_labels:
        return []
    shares = shares_of(parts, task.few_labels)
    with progress("few labels", sum(len(share.draws) for share in shares), "probes") as bar:
        return [
            share_areas(name, features, share, parts, task, bar) if share.kept else None
            for share in shares
        ]


def plane(features: np.ndarray) -> np.ndarray:
    """The two principal components of features [n, F] with the most variance, float32 [n, 2].

    Of the two directions of a component it is the one in which the largest score is positive.
    """
    x = torch.from_numpy(features).double()
    _, _, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    found = np.zeros((len(features), 2), np.float32)
    placed = ((x - x.mean(0)) @ axes[:2].T).numpy()
    largest = placed[np.abs(placed).argmax(0), np.arange(placed.shape[1])]
    found[:, : placed.shape[1]] = placed * np.where(largest < 0, -1, 1)
    return found


def _overlap(
    task: EvaluateConfig, pretraining: PretrainConfig, tested: list[dict[str, Any]]
) -> dict[str, Any]:
    if not task.overlap:
        return {"unknown": "overlap is off"}
    try:
        return overlap(tested, task.data.shards, pretraining, pretraining_images(pretraining))
    except UserError as error:
        return {"unknown": str(error).rstrip(".")}


def write_images(path: Place, images: Images) -> None:
    """Write what is known of a task's images, whole or not at all."""
    groups = np.array([*images.groups.values()], bool).reshape(-1, len(images.labels))
    arrays = {"labels": images.labels, "patients": images.patients, "keys": images.keys}
    if images.folds is not None:
        arrays["folds"] = images.folds
    _write(path, {**images.about, "groups": list(images.groups)}, {**arrays, "in": groups})


def read_images(path: Place) -> Images | None:
    """What `write_images` wrote; None where it did not."""

    def taken(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Images:
        groups = dict(zip(about.pop("groups"), arrays["in"], strict=True))
        labels, patients, keys = (arrays[name] for name in ("labels", "patients", "keys"))
        return Images(labels, patients, keys, groups, about, arrays.get("folds"))

    return _read(path, taken)


def write_scores(path: Place, scores: Scores) -> None:
    """Write an encoder's scores, whole or not at all."""
    arrays: dict[str, Any] = {"probe": scores.probe, "plane": scores.plane}
    for k, one in enumerate(scores.few):
        if one:
            arrays |= {f"few{k}": one[0], f"resampled{k}": one[1]}
    about = {"validation_auroc": scores.validation_auroc, "shares": len(scores.few)}
    _write(path, about, arrays)


def read_scores(path: Place) -> Scores | None:
    """What `write_scores` wrote; None where it did not."""

    def taken(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Scores:
        few = [
            (arrays[f"few{k}"], arrays[f"resampled{k}"]) if f"few{k}" in arrays else None
            for k in range(about["shares"])
        ]
        return Scores(arrays["probe"], about["validation_auroc"], few, arrays["plane"])

    return _read(path, taken)


def _write(path: Place, about: dict[str, Any], arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), **arrays)
    make_folder(path.parent)
    write_whole(path, buffer.getvalue())


def _read(path: Place, taken: Callable[[dict[str, Any], dict[str, np.ndarray]], T]) -> T | None:
    """What is `taken` from the values and arrays of a file; None where there is none."""
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return taken(json.loads(str(arrays.pop("about"))), arrays)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{path}: it cannot be read ({told(error)}); mend your access to it."
        ) from None
    except (*NO_ARRAY, AttributeError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
        # RuntimeError of an entry that seems to be encrypted or packed in another way.
        raise DataError(
            f"{path}: the file is damaged; remove it and run the comparison's command again."
        ) from None

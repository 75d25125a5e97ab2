"""How many of the images that an encoder is judged on were in its pretraining.

Pretraining reads no labels, so what it may have seen of a test image is the image. Supervised
training reads them: a test patient among those that it learned from is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import DataError, UserError
from mlvicx_dist.ingest.leaks import Hashed, hashed
from mlvicx_dist.ingest.phash import as_words, near_pairs
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import Place
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.left import left_settings


def overlap_with_run(about: Sequence[dict[str, Any]], run_dir: Place) -> dict[str, Any]:
    """The test images that are in the pretraining shards of a run.

    Args:
        about: The JSON of each test image, with its `key`.
        run_dir: Where `config.yaml` is.

    Returns:
        `tested`, the images looked for; `seen`, the images of the pretraining; `images`, how many
        of the tested ones are among them, `same_key` and `near_duplicates` of these by sample key
        and by perceptual hash; `patients`, how many tested patients have an image there;
        `init_from`, whether it began with other weights, whose images are not looked for. Or
        `unknown`, why this cannot be told.
    """
    try:
        config = run_config(run_dir)
        began = config.train.init_from is not None
        return {**overlap(about, list(pretraining_images(config))), "init_from": began}
    except UserError as error:
        return {"unknown": str(error).rstrip(".")}


def run_config(run_dir: Place) -> PretrainConfig:
    """The settings of a run's folder.

    Raises:
        UserError: they cannot be read.
    """
    path = run_dir / "config.yaml"
    try:
        return left_settings(PretrainConfig, path)
    except FileNotFoundError:
        raise DataError(f"there is no {path}, which names them.") from None


def label_overlap(
    unseen: Sequence[dict[str, Any]],
    learned: Sequence[dict[str, Any]],
    config: PretrainConfig,
    *,
    where: str,
) -> dict[str, Any]:
    """What a training on labels knows of the labels of an evaluation.

    Args:
        unseen: The JSON of each image, with its `key`, whose patient it must not have learned from.
        learned: The same of the other images.
        config: The settings of the training.
        where: What is judged, for the sentence that refuses.

    Returns:
        `splits`, those whose labels it read; `images`, how many of `learned` it learned from;
        `of`, how many these are.

    Raises:
        DataError: it learned from an image of `unseen`, a copy of one, or another of its patient.
        UserError: the shards cannot be read.
    """
    seen = list(labelled_images(config))
    found = overlap(unseen, seen)
    splits = config.loss.label_splits
    if found["images"] or found["patients"]:
        raise DataError(
            f"{where}: the encoder learned the labels of {found['images']} of these "
            f"{found['tested']} images and of {found['patients']} of their patients (the split "
            f"{' or '.join(splits)} of its shards), so it cannot be judged on them; "
            "train it without them, or judge it on other patients."
        )
    among = overlap(learned, seen)["images"]
    return {"splits": list(splits), "images": among, "of": len(learned)}


def overlap(about: Sequence[dict[str, Any]], seen: Sequence[Hashed]) -> dict[str, Any]:
    """The same for images of known hash; keys and patients agree where the salt does."""
    keys, patients = {one.key for one in seen}, {one.patient for one in seen}
    count = len(about)
    same = np.array([one["key"] in keys for one in about], dtype=bool)
    words = as_words([one["phash"] for one in about] + [one.phash for one in seen])
    pairs, _ = near_pairs(words, (np.arange(len(words)) >= count).astype(np.int64))
    near = np.zeros(count, dtype=bool)
    near[pairs[:, 0]] = True
    return {
        "tested": count,
        "seen": len(seen),
        "images": int((same | near).sum()),
        "same_key": int(same.sum()),
        "near_duplicates": int(near.sum()),
        "patients": len({f"{one['source']}/{one['patient']}" for one in about} & patients),
    }


def overlap_words(found: Mapping[str, Any]) -> str:
    """The overlap as a sentence."""
    if "unknown" in found:
        words = f"Overlap with the pretraining shards: unknown ({found['unknown']})."
    else:
        words = (
            "Overlap with the pretraining shards: {images} of {tested} test images are among their "
            "{seen} ({same_key} by key, {near_duplicates} by near-duplicate hash), and images of "
            "{patients} test patients"
        ).format(**found)
        if "labels" in found:
            words += "."
        elif found.get("init_from"):
            words += (
                "; labels were not read, and of the weights that it began with "
                "(train.init_from) nothing is known."
            )
        else:
            words += "; labels were not read."
    if "labels" not in found:
        return words
    labels = found["labels"]
    splits = " and ".join(labels["splits"])
    words += f" This encoder learned the labels of the split {splits} of its shards"
    if "unknown" in labels:
        return f"{words}; whether test patients are among them is unknown ({labels['unknown']})."
    return (
        f"{words}: {labels['images']} of the {labels['of']} images that the probe learns from or "
        "is tuned on are among them, and no test patient."
    )


def labelled_images(config: PretrainConfig) -> Iterator[Hashed]:
    """The images that a training on labels learns from: those with a label of its classes.

    Raises:
        UserError: the shards cannot be read.
    """
    for folder in config.data.shards:
        there = read_manifest(folder.path)
        splits = [split for split in config.loss.label_splits if there.splits.get(split)]
        if not splits:
            continue
        shards = ShardSet.open([folder.path], splits=splits, cache=cache_of(config.data))
        classes = config.model.classes or list(there.classes)
        with progress("looking at the labels that were learned", len(shards), "images") as bar:
            for sample in range(len(shards)):
                known = shards.about(sample)
                bar.advance()
                if any(known["labels"].get(name) is not None for name in classes):
                    yield Hashed(
                        key=known["key"],
                        split=known["split"],
                        phash=known["phash"],
                        where=folder.path,
                        patient=f"{known['source']}/{known['patient']}",
                    )


def pretraining_images(config: PretrainConfig) -> Iterator[Hashed]:
    """The images that a run is trained on.

    Raises:
        UserError: the shards cannot be read.
    """
    manifests = []
    for folder in config.data.shards:
        manifest = read_manifest(folder.path)
        chosen = tuple(s for s in manifest.shards if s.split in config.data.splits)
        manifests.append(replace(manifest, shards=chosen))
    total = sum(shard.samples for manifest in manifests for shard in manifest.shards)
    with progress("looking for test images in the pretraining shards", total, "images") as bar:
        for manifest in manifests:
            for one in hashed(manifest):
                bar.advance()
                yield one

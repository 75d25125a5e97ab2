"""How many of the images that an encoder is judged on were in its pretraining.

Pretraining reads no labels, so what it may have seen of a test image is the image. Supervised
training reads them: a test patient among those that it learned from is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import DataError, UserError
from mlvicx_dist.evaluate.parts import Parts
from mlvicx_dist.ingest.leaks import Hashed, apart, hashed
from mlvicx_dist.ingest.phash import as_words, near_pairs
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import Place
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.left import left_settings


def overlap_with_run(
    about: Sequence[dict[str, Any]], folders: Sequence[str], run_dir: Place
) -> dict[str, Any]:
    """The test images that are in the pretraining shards of a run.

    Args:
        about: The JSON of each test image, with its `key`.
        folders: The shard folders that they are of.
        run_dir: Where `config.yaml` is.

    Returns:
        `tested`, the images looked for; `seen`, the images of the pretraining; `images`, how many
        of the tested ones are among them, `same_key` and `near_duplicates` of these by sample key
        and by perceptual hash; `patients`, how many tested patients have an image there, as far as
        is known; `patients_known`, whether all of them would be; `init_from`, whether it began with
        other weights, whose images are not looked for. Or `unknown`, why this cannot be told.
    """
    try:
        config = run_config(run_dir)
        began = config.train.init_from is not None
        return {**overlap(about, folders, config, pretraining_images(config)), "init_from": began}
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
    folders: Sequence[str],
    config: PretrainConfig,
    *,
    where: str,
) -> dict[str, Any]:
    """What a training on labels knows of the labels of an evaluation.

    Args:
        unseen: The JSON of each image, with its `key`, whose patient it must not have learned from.
        learned: The same of the other images.
        folders: The shard folders that both are of.
        config: The settings of the training.
        where: What is judged, for the sentence that refuses.

    Returns:
        `splits`, those whose labels it read; `images`, how many of `learned` it learned from;
        `of`, how many these are; `patients_known` as in `overlap_with_run`.

    Raises:
        DataError: it learned from an image of `unseen`, a copy of one, or another of its patient.
        UserError: the shards cannot be read.
    """
    seen = list(labelled_images(config))
    found = overlap(unseen, folders, config, seen)
    splits = config.loss.label_splits
    if found["images"] or found["patients"]:
        raise DataError(
            f"{where}: the encoder learned the labels of {found['images']} of these "
            f"{found['tested']} images and of {found['patients']} of their patients (the split "
            f"{' or '.join(splits)} of its shards), so it cannot be judged on them; "
            "train it without them, or judge it on other patients."
        )
    among = overlap(learned, folders, config, seen)["images"]
    known = found["patients_known"]
    return {"splits": list(splits), "images": among, "of": len(learned), "patients_known": known}


def overlap(
    about: Sequence[dict[str, Any]],
    folders: Sequence[str],
    config: PretrainConfig,
    images: Iterable[Hashed],
) -> dict[str, Any]:
    """The same for the images of a training, of known hash."""
    seen = list(images)
    keys, patients = {one.key for one in seen}, {one.patient for one in seen}
    own = [f"{one['source']}/{one['patient']}" for one in about]
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
        # By key, or as those of the copies.
        "patients": len(
            {o for o, hit in zip(own, same | near, strict=True) if hit or o in patients}
        ),
        "patients_known": _patients_known(folders, [one.path for one in config.data.shards]),
    }


def _patients_known(judged: Sequence[str], learned: Sequence[str]) -> bool:
    """Whether a patient of each folder that is judged would have the same key in the training."""
    here, there = ([read_manifest(folder) for folder in each] for each in (judged, learned))
    return all(any(not apart(one, other) for other in there) for one in here)


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
        if not found.get("patients_known", True):
            words += " at least (salt or --name are others, so that patients cannot be compared)"
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
        "is tuned on are among them, "
        + (
            "and no test patient."
            if labels.get("patients_known", True)
            else "and no copy of a test image; patients cannot be compared (other salt or --name)."
        )
    )


def check_copies(about: Sequence[dict[str, Any]], folds: Sequence[Parts], shards: str) -> None:
    """See that no probe is judged on a copy of an image that it learns from or is tuned on.

    Patients hold apart the splits of one source; of two sources, one may have images of the other.

    Args:
        about: The JSON of each image.
        folds: The splits, or the folds.
        shards: Their folders, for the sentence that refuses.

    Raises:
        DataError: one is.
    """
    groups = np.full(len(about), -1)
    for number, parts in enumerate(folds, 1):
        if not parts.turns:
            groups[parts.train.rows | parts.val.rows] = 0
        groups[parts.test.rows] = number
    chosen = groups >= 0
    words = as_words([one["phash"] for one, kept in zip(about, chosen, strict=True) if kept])
    pairs, _ = near_pairs(words, groups[chosen])
    if len(pairs):
        raise DataError(
            f"{shards}: {len(pairs)} pairs of an image that is judged and one that the probe "
            "learns from or is tuned on are copies (by perceptual hash); pack with "
            "--near-duplicates drop, or leave one of the folders out ('mlvicx verify FOLDER "
            "--against OTHER' lists them)."
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

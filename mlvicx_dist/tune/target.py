"""What trials are compared by: a look at the frozen encoder in the middle of its training.

Every rank embeds its share of the same images, whole and without augmentation; rank 0 fits the
probe on the training split and scores it on the validation split. A share of the validation
patients is held back from every look, and the test split is not even opened.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlvicx_dist.config import PretrainConfig, Target, to_tree
from mlvicx_dist.errors import DataError, DivergenceError
from mlvicx_dist.evaluate.embed import WholeImages
from mlvicx_dist.evaluate.parts import class_names, usable_classes
from mlvicx_dist.evaluate.probe import fit_probe, knn_scores, mean_auroc
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.mlvicx import MLVICX
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.labels import labels_of
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.metrics import effective_rank
from mlvicx_dist.train.step import Member


class Judge:
    """A worker's part of the looks at its encoder; a `train.loop.Judge`."""

    def __init__(self, settings: Target, config: PretrainConfig, member: Member) -> None:
        """Choose the images; they are decoded once, at the first look.

        Raises:
            DataError: a split is not there or has too few images, or no class can be judged.
        """
        began_s = time.monotonic()
        self._settings, self._member = settings, member
        self._size_px = config.views.image_size_px
        self._images: torch.Tensor | None = None
        parts = chosen_parts(settings, config, held_back=False)
        self._chosen = [
            (WholeImages(shards, self._size_px), sample)
            for shards, chosen in parts.values()
            for sample, _ in chosen
        ]
        self._cut = len(next(iter(parts.values()))[1])
        self._labels = common_labels(settings, parts) if settings.kind != "effective_rank" else []
        self._began_s, self._looked_s = began_s, time.monotonic() - began_s

    def due(self, done: int) -> bool:
        """Every so many steps."""
        return done % self._settings.every_steps == 0

    def __call__(self, model: MLVICX) -> dict[str, float]:
        """The target, and seconds of this worker: in all, and those that were looks.

        Raises:
            DivergenceError: the embeddings are not finite.
        """
        began_s = time.monotonic()
        features = self._gathered(self._embed(model))
        if not np.isfinite(features).all():
            raise DivergenceError(
                "the embeddings are not finite: the weights diverged; try a lower "
                "train.learning_rate_per_256 or more train.warmup_epochs."
            )
        target = self._target(features) if self._member.rank == 0 else 0.0
        now = time.monotonic()
        self._looked_s += now - began_s
        return {
            "target": target,
            "target/looked_s": self._looked_s,
            "target/trained_s": now - self._began_s,
        }

    def _target(self, features: np.ndarray) -> float:
        settings = self._settings
        if settings.kind == "effective_rank":
            return effective_rank(torch.from_numpy(features))
        train, val = features[: self._cut], features[self._cut :]
        train_labels, val_labels = self._labels
        if settings.kind == "knn":
            scores = knn_scores(train, train_labels, val, settings=settings.knn)
            return mean_auroc(scores, val_labels)
        return fit_probe(
            train, train_labels, validation=(val, val_labels), settings=settings.probe
        ).validation_auroc

    @torch.no_grad()
    def _embed(self, model: MLVICX) -> np.ndarray:
        """The embeddings of this rank's share, float32 [n, F]; no statistic of the model moves."""
        if self._images is None:
            self._images = self._decode()
        encoder = Encoder.from_model(model, self._size_px).eval()
        try:
            parts = [
                encoder(part.to(self._member.device)).float().cpu()
                for part in self._images.split(self._settings.batch_size)
            ]
        finally:
            model.train()
        return torch.cat(parts).numpy() if parts else np.empty((0, encoder.features), np.float32)

    def _decode(self) -> torch.Tensor:
        """This rank's share of the images, uint8 [n, 1, S, S]."""
        share = np.array_split(np.arange(len(self._chosen)), self._member.world_size)
        images = []
        for place in share[self._member.rank]:
            dataset, sample = self._chosen[place]
            item = dataset[sample]
            if isinstance(item, Exception):
                raise item
            images.append(item)
        if not images:
            return torch.empty(0, 1, self._size_px, self._size_px, dtype=torch.uint8)
        return torch.from_numpy(np.stack(images))[:, None]

    def _gathered(self, own: np.ndarray) -> np.ndarray:
        if self._member.world_size == 1:
            return own
        parts: list[Any] = [None] * self._member.world_size
        dist.all_gather_object(parts, own)
        return np.concatenate(parts)


def make_judge(tree: dict[str, Any], config: PretrainConfig, member: Member) -> Judge:
    """The judge of a worker, from settings as a tree: what a trial hands to `pretrain`."""
    return Judge(Target.model_validate(tree), config, member)


def judged_by(settings: Target) -> Any:
    """`make_judge` for these settings."""
    return partial(make_judge, to_tree(settings))


def judged_shards(settings: Target, config: PretrainConfig, split: str) -> ShardSet:
    """The shards of one split of the judged images."""
    folders = settings.shards or [folder.path for folder in config.data.shards]
    return ShardSet.open(folders, splits=[split], cache=cache_of(config.data))


def choose(
    shards: ShardSet, settings: Target, *, held_back: bool | None, most: int | None
) -> list[tuple[int, dict[str, Any]]]:
    """Samples of a split in an order that the shards alone decide, with what is known of each.

    Args:
        shards: Of one split.
        settings: Says which share of the patients is held back.
        held_back: Only patients that are, or are not; None: all.
        most: How many samples at most; None: all.

    Raises:
        DataError: there are fewer than two.
    """
    order = np.random.default_rng(0).permutation(len(shards))
    chosen: list[tuple[int, dict[str, Any]]] = []
    for sample in order.tolist():
        if most is not None and len(chosen) == most:
            break
        one = shards.about(sample)
        if held_back is None or is_held_back(one, settings.held_back) == held_back:
            chosen.append((sample, one))
    if len(chosen) < 2:
        side = "held back" if held_back else "judged"
        raise DataError(
            f"{', '.join(str(m.folder) for m in shards.manifests)}: {len(chosen)} of "
            f"{len(shards)} images of the split would be {side}, where two are needed; name "
            "larger shards with target.shards, or change target.held_back."
        )
    return chosen


def is_held_back(one: dict[str, Any], share: float) -> bool:
    """Whether an image's patient is kept for the last word; the same answer for all its images."""
    patient = f"{one['source']}/{one['patient']}".encode()
    digest = hashlib.blake2b(patient, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


Chosen = tuple[ShardSet, list[tuple[int, dict[str, Any]]]]
"""Open shards, and samples of them with what is known of each."""


def chosen_parts(settings: Target, config: PretrainConfig, *, held_back: bool) -> dict[str, Chosen]:
    """The images that teach the probe, that look at it, and that have the last word.

    Args:
        settings: Of the target; one without labels has no probe to teach.
        config: The settings of a trial.
        held_back: Whether the last word is asked for; a look does not see its images.

    Returns:
        In this order, as far as they are needed, `training`, `judged` and `held back`.

    Raises:
        DataError: a part is too small.
    """
    labelled = settings.kind != "effective_rank"
    wanted: dict[str, tuple[str, bool | None]] = {}
    if labelled:
        wanted["training"] = settings.train, None
    if labelled or not held_back:
        wanted["judged"] = settings.val, False
    if held_back:
        wanted["held back"] = settings.val, True
    parts: dict[str, Chosen] = {}
    for name, (split, side) in wanted.items():
        shards = judged_shards(settings, config, split)
        parts[name] = shards, choose(shards, settings, held_back=side, most=settings.images)
    return parts


def common_labels(settings: Target, parts: Mapping[str, Chosen]) -> list[np.ndarray]:
    """The labels of each part's images, by the classes that can be judged in all of them.

    Returns:
        For each part float64 [n, K], 0, 1 or NaN.

    Raises:
        DataError: there is no such class.
        ConfigError: a class of the settings does not exist.
    """
    about = {name: [one for _, one in chosen] for name, (_, chosen) in parts.items()}
    there = dict.fromkeys(n for part in about.values() for one in part for n in one["labels"])
    names = class_names(settings.classes, tuple(there))
    labels = {name: labels_of(part, names) for name, part in about.items()}
    kept, left_out = usable_classes(names, labels)
    if not kept:
        reason = next(iter(left_out.values()), "they have no labels")
        raise DataError(
            f"no class has both labels among the images of each of {', '.join(about)} ({reason}); "
            "name larger or labelled shards with target.shards, or judge without labels by "
            "target.kind: effective_rank."
        )
    columns = [names.index(name) for name in kept]
    return [values[:, columns] for values in labels.values()]

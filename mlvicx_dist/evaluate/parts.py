"""Which images and classes an evaluation is about: its three splits, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlvicx_dist.config import EvaluateConfig
from mlvicx_dist.errors import ConfigError, DataError, nearest
from mlvicx_dist.evaluate.embed import Embeddings
from mlvicx_dist.evaluate.metrics import comparable

NO_FINDING = "No Finding"


@dataclass(frozen=True)
class Part:
    """The images of a split.

    Attributes:
        split: Its name.
        rows: Which of all embedded images they are, bool [all].
        labels: [n, K], 0, 1 or NaN, of the classes that are judged.
        patients: [n].
    """

    split: str
    rows: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


@dataclass(frozen=True)
class Parts:
    """The images that the probe learns on, is tuned on and is judged on.

    Attributes:
        val: Of folds the images of `train`.
        classes: Those with both labels in each split.
        left_out: The others, and why.
        turns: Where the probe is tuned on the images that it learns on: which of them are left out
            and judged by, in each turn, bool [n].
    """

    train: Part
    val: Part
    test: Part
    classes: list[str]
    left_out: dict[str, str]
    turns: tuple[np.ndarray, ...] = ()


def splits_of(settings: EvaluateConfig) -> list[str]:
    """The splits that an evaluation reads, each once."""
    data = settings.data
    return list(dict.fromkeys([data.train, data.val, data.test]))


def parts_of(embeddings: Embeddings, settings: EvaluateConfig) -> Parts:
    """The splits and classes of the settings.

    Raises:
        DataError: a split is empty, no class has both labels in each, or a patient is in two.
        ConfigError: a class does not exist.
    """
    names, all_labels = named_labels(embeddings, settings)
    splits = (settings.data.train, settings.data.val, settings.data.test)
    shards = ", ".join(settings.data.shards)
    rows = [embeddings.rows(split) for split in splits]
    for split, chosen in zip(splits, rows, strict=True):
        if not chosen.any():
            raise DataError(
                f"the split '{split}' is empty in {shards}; name another "
                "with data.train, data.val or data.test."
            )
    labels = [all_labels[chosen] for chosen in rows]
    classes, left_out = usable_classes(names, dict(zip(splits, labels, strict=True)))
    if not classes:
        raise DataError(
            f"no class has both labels in each split of {shards} "
            f"({'; '.join(left_out.values())}); evaluate on labelled shards."
        )
    kept = [names.index(name) for name in classes]
    patients = embeddings.patients()
    train, val, test = (
        Part(split, chosen, values[:, kept], patients[chosen])
        for split, chosen, values in zip(splits, rows, labels, strict=True)
    )
    learned, tuned, judged = (set(part.patients.tolist()) for part in (train, val, test))
    if torn := len((learned | tuned) & judged):
        raise DataError(
            f"{torn} patients of the split '{test.split}' of {shards} are in '{train.split}' or "
            f"'{val.split}' too, so the probe would be judged on patients it knows; pack these "
            "folders together, or leave one out."
        )
    if torn := len(learned & tuned):
        raise DataError(
            f"{torn} patients of the split '{val.split}' of {shards} are in '{train.split}' too, "
            "so the probe would be tuned on patients it knows; pack these folders together, or "
            "leave one out."
        )
    return Parts(train, val, test, classes, left_out)


def named_labels(embeddings: Embeddings, settings: EvaluateConfig) -> tuple[list[str], np.ndarray]:
    """The classes that are asked for, and the labels of all images, [all, K]."""
    if settings.no_finding:
        embeddings = with_no_finding(embeddings)
    names = class_names(settings.classes, embeddings.classes)
    if settings.no_finding and NO_FINDING not in names:
        names.append(NO_FINDING)
    return names, embeddings.labels[:, [embeddings.classes.index(name) for name in names]]


def with_no_finding(embeddings: Embeddings) -> Embeddings:
    """The same with the class `No Finding`: 1 where every class is 0, 0 where one is 1.

    Where no class is 1 and one is unknown, so is this.

    Raises:
        ConfigError: the shards have a class of this name.
    """
    if NO_FINDING in embeddings.classes:
        raise ConfigError(
            f"no_finding: the shards have a class '{NO_FINDING}' already; leave no_finding out."
        )
    # The greatest label, which is NaN where one is unknown and none is 1.
    found = (embeddings.labels == 1).any(1)
    none = np.where(found, 0.0, 1 - embeddings.labels.max(1, initial=0.0))
    labels = np.column_stack([embeddings.labels, none])
    return replace(embeddings, labels=labels, classes=(*embeddings.classes, NO_FINDING))


def class_names(wanted: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """The classes that are asked for, or all.

    Raises:
        ConfigError: the shards do not have one of them.
    """
    for name in wanted or ():
        if name not in there:
            raise ConfigError(
                f"classes names '{name}', which the shards do not have"
                f"{nearest(name, there)}; they have {', '.join(there)}."
            )
    return list(wanted or there)


def usable_classes(
    names: Sequence[str], labels: Mapping[str, np.ndarray], *, within: str = "split"
) -> tuple[list[str], dict[str, str]]:
    """The classes with both labels in every split, and why the others are left out.

    Args:
        names: The classes.
        labels: By split, [n, K], 0, 1 or NaN.
        within: What the parts are called.
    """
    left_out = {}
    for k, name in enumerate(names):
        for split, values in labels.items():
            known = values[:, k][~np.isnan(values[:, k])]
            if len(np.unique(known)) < 2:
                found = f"only {known[0]:g}" if len(known) else "no label"
                left_out[name] = f"{found} for {name} in the {within} {split}"
                break
    return [name for name in names if name not in left_out], left_out


def usable_in_subgroup(
    name: str, classes: Sequence[str], labels: np.ndarray, folds: np.ndarray | None
) -> tuple[list[str], dict[str, str]]:
    """The classes that a subgroup can judge, and why it cannot judge the others.

    Args:
        name: Of the subgroup.
        classes: Names.
        labels: Of its images, [n, K], 0, 1 or NaN.
        folds: The fold of each, [n], in which alone images are compared; None: all are.
    """
    within = "subgroup" if folds is None else "folds with both labels, of the subgroup"
    return usable_classes(classes, {name: comparable(labels, folds)}, within=within)

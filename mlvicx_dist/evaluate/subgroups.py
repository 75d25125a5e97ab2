"""Encoders compared within sexes, age bands and views.

A subgroup's figures resample its own patients. Its mean is over the classes that it can judge:
where one is left out, means of subgroups are not about the same classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlvicx_dist.config import EvaluateConfig
from mlvicx_dist.evaluate.paired import Scores, compare
from mlvicx_dist.evaluate.parts import usable_in_subgroup

SEXES = ("F", "M")
VIEWS = ("AP", "PA")


def subgroups(
    scores: Scores,
    labels: np.ndarray,
    patients: np.ndarray,
    about: Sequence[dict[str, Any]],
    classes: Sequence[str],
    settings: EvaluateConfig,
    folds: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """The comparison of the encoders in each subgroup.

    Args:
        scores: By encoder, [n, K].
        labels: [n, K], 0, 1 or NaN.
        patients: [n].
        about: What is known of each image.
        classes: Names.
        settings: Resampling and age bands.
        folds: The fold of each image, [n]; None: all are compared.

    Returns:
        By name, such as `age 40-64`: `images`, `patients`, `positives` and `left_out` by class, and
        the AUROC of each encoder and the `difference` as `compare` has it, where a class can be
        judged.
    """
    result = {}
    for name, chosen in members(about, settings.age_bands):
        values = labels[chosen]
        fold = None if folds is None else folds[chosen]
        kept, left_out = usable_in_subgroup(name, classes, values, fold)
        columns = [classes.index(one) for one in kept]
        result[name] = {
            "images": int(chosen.sum()),
            "patients": len(np.unique(patients[chosen])),
            "positives": {c: int(np.nansum(values[:, k])) for k, c in enumerate(classes)},
            "left_out": left_out,
        }
        if kept:
            part = {encoder: one[chosen][:, columns] for encoder, one in scores.items()}
            judged = compare(
                part,
                values[:, columns],
                patients[chosen],
                kept,
                settings.bootstrap,
                fold,
            )
            result[name] |= judged["auroc"] | {"undefined_draws": judged["undefined_draws"]}
    return result


def members(
    about: Sequence[dict[str, Any]], age_bands: Sequence[int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each subgroup and which images are in it, bool [n]; what is unknown is in none."""
    for key, values in (("sex", SEXES), ("view", VIEWS)):
        found = np.array([one.get(key) for one in about], dtype=object)
        for value in values:
            yield f"{key} {value}", found == value
    ages = np.array([np.nan if one.get("age") is None else one["age"] for one in about], float)
    starts = [0, *age_bands]
    for low, high in zip(starts, [*age_bands, None], strict=True):
        name = f"age {low}+" if high is None else f"age {low}-{high - 1}"
        yield name, (ages >= low) & (ages < (np.inf if high is None else high))

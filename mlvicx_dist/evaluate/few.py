"""Few labels: the probe on a small share of the training patients, several times.

A draw is an order of the training patients that the seed alone decides, and a share is its
beginning: the same patients for every encoder, those of a small share among those of a larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlvicx_dist.config import EvaluateConfig, FewLabels
from mlvicx_dist.evaluate.metrics import bootstrap_areas, half_width, over_classes
from mlvicx_dist.evaluate.parts import Part, Parts
from mlvicx_dist.evaluate.pixels import fit_for
from mlvicx_dist.evaluate.probe import mean_auroc
from mlvicx_dist.progress import Progress, progress


def few_labels(
    features: Mapping[str, np.ndarray], parts: Parts, settings: EvaluateConfig, few: FewLabels
) -> list[dict[str, Any]]:
    """The mean AUROC of each encoder at each share of the training patients.

    A class that lacks a positive or a negative in any draw of a share is left out of that share.

    Args:
        features: By encoder, of all images, [all, F].
        parts: The images and classes.
        settings: Probe and bootstrap.
        few: Shares and draws.

    Returns:
        A share each: `fraction`, `patients`, `images` of each draw, `classes`, `left_out`; for each
        encoder and `difference` (the first minus the second) `value`, the mean over the draws,
        `low`, `high` and `draws`.
    """
    shares = shares_of(parts, few)
    fits = len(features) * sum(len(share.draws) for share in shares)
    with progress("few labels", fits, "probes") as bar:
        return [_share(features, parts, settings, share, bar) for share in shares]


@dataclass(frozen=True)
class Share:
    """A share of the training patients.

    Attributes:
        fraction: Of the patients.
        draws: Which training images each draw holds, bool [n].
        kept: Places of the classes that every draw holds with both labels.
        left_out: The other classes, and why.
    """

    fraction: float
    draws: list[np.ndarray]
    kept: list[int]
    left_out: dict[str, str]

    def about(self, parts: Parts) -> dict[str, Any]:
        """What is known of it before a probe is fitted, as JSON values."""
        return {
            "fraction": self.fraction,
            "patients": len(np.unique(parts.train.patients[self.draws[0]])),
            "images": [int(chosen.sum()) for chosen in self.draws],
            "classes": [parts.classes[k] for k in self.kept],
            "left_out": self.left_out,
        }


def shares_of(parts: Parts, few: FewLabels) -> list[Share]:
    """Every share with its draws and classes."""
    shares = []
    for fraction in few.fractions:
        draws = drawn_rows(parts.train, fraction, few)
        shares.append(Share(fraction, draws, *_judged(parts, draws)))
    return shares


def drawn_rows(train: Part, fraction: float, few: FewLabels) -> list[np.ndarray]:
    """Which training images each draw holds, bool [n]; one draw where it holds all of them."""
    names, owner = np.unique(train.patients, return_inverse=True)
    count = max(round(fraction * len(names)), 1)
    if count == len(names):
        return [np.ones(len(owner), dtype=bool)]
    draws = []
    for draw in range(few.draws):
        place = np.random.default_rng([few.seed, draw]).permutation(len(names))
        draws.append((place < count)[owner])
    return draws


def share_areas(
    name: str,
    features: np.ndarray,
    share: Share,
    parts: Parts,
    settings: EvaluateConfig,
    bar: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """The mean AUROC of a share's classes for one encoder.

    Args:
        name: Of the encoder.
        features: Of all images, [all, F].
        share: It has a class that can be judged.
        parts: The images and classes.
        settings: Probe and bootstrap.
        bar: Hears of each probe.

    Returns:
        One a draw, [D], and the same under resampled test patients, [D, R].
    """
    train, test, bootstrap = parts.train, parts.test, settings.bootstrap
    kept, labels = share.kept, test.labels[:, share.kept]
    x, y, z = (features[part.rows] for part in (train, parts.val, test))
    areas, drawn = [], []
    for chosen in share.draws:
        probe = fit_for(
            name,
            x[chosen],
            train.labels[chosen][:, kept],
            validation=(y, parts.val.labels[:, kept]),
            settings=settings.probe,
        )
        scores = probe.scores(z)
        areas.append(mean_auroc(scores, labels))
        of_patients = bootstrap_areas(
            scores, labels, test.patients, draws=bootstrap.draws, seed=bootstrap.seed
        )
        drawn.append(over_classes(of_patients.auroc))
        bar.advance()
    return np.array(areas), np.array(drawn)


def _share(
    features: Mapping[str, np.ndarray],
    parts: Parts,
    settings: EvaluateConfig,
    share: Share,
    bar: Progress,
) -> dict[str, Any]:
    result = share.about(parts)
    if not share.kept:
        bar.advance(len(features) * len(share.draws))
        return result
    found = {
        name: share_areas(name, one, share, parts, settings, bar) for name, one in features.items()
    }
    first, second, *_ = (found[name] for name in features)
    found["difference"] = first[0] - second[0], first[1] - second[1]
    patients = len(np.unique(parts.test.patients))
    for name, (values, resampled) in found.items():
        reach = half_width(values, resampled, patients, settings.bootstrap.confidence)
        mean = float(values.mean())
        result[name] = {
            "value": mean,
            "low": max(mean - reach, -1.0 if name == "difference" else 0.0),
            "high": min(mean + reach, 1.0),
            "draws": values.tolist(),
        }
    return result


def _judged(parts: Parts, draws: list[np.ndarray]) -> tuple[list[int], dict[str, str]]:
    """The classes with both labels in every draw, and why the others are left out."""
    kept, left_out = [], {}
    for k, name in enumerate(parts.classes):
        labels = parts.train.labels[:, k]
        held = [{0.0, 1.0} <= set(labels[chosen].tolist()) for chosen in draws]
        if all(held):
            kept.append(k)
        else:
            missing = f"{len(held) - sum(held)} of {len(held)} draws"
            left_out[name] = f"{missing} have no positive or no negative of {name}"
    return kept, left_out

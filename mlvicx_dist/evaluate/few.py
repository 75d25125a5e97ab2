"""Few labels: the probe on a small share of the training patients, several times.

A draw is an order of the training patients that the seed alone decides, and a share is its
beginning: the same patients for every encoder, those of a small share among those of a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mlvicx_dist.config import EvaluateConfig, FewLabels
from mlvicx_dist.evaluate.metrics import bootstrap_areas, over_classes
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
    shares = [(fraction, drawn_rows(parts.train, fraction, few)) for fraction in few.fractions]
    fits = len(features) * sum(len(draws) for _, draws in shares)
    with progress("few labels", fits, "probes") as bar:
        return [_share(features, parts, settings, one, draws, bar) for one, draws in shares]


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


def _share(
    features: Mapping[str, np.ndarray],
    parts: Parts,
    settings: EvaluateConfig,
    fraction: float,
    draws: list[np.ndarray],
    bar: Progress,
) -> dict[str, Any]:
    train, test, bootstrap = parts.train, parts.test, settings.bootstrap
    kept, left_out = _judged(parts, draws)
    result: dict[str, Any] = {
        "fraction": fraction,
        "patients": len(np.unique(train.patients[draws[0]])),
        "images": [int(chosen.sum()) for chosen in draws],
        "classes": [parts.classes[k] for k in kept],
        "left_out": left_out,
    }
    if not kept:
        bar.advance(len(features) * len(draws))
        return result
    values: dict[str, np.ndarray] = {}
    resampled: dict[str, np.ndarray] = {}
    for name, all_features in features.items():
        x, y, z = (all_features[part.rows] for part in (train, parts.val, test))
        areas, drawn = [], []
        for chosen in draws:
            probe = fit_for(
                name,
                x[chosen],
                train.labels[chosen][:, kept],
                validation=(y, parts.val.labels[:, kept]),
                settings=settings.probe,
            )
            scores = probe.scores(z)
            areas.append(mean_auroc(scores, test.labels[:, kept]))
            of_patients = bootstrap_areas(
                scores,
                test.labels[:, kept],
                test.patients,
                draws=bootstrap.draws,
                seed=bootstrap.seed,
            )
            drawn.append(over_classes(of_patients.auroc))
            bar.advance()
        values[name], resampled[name] = np.array(areas), np.array(drawn)
    first, second, *_ = features
    values["difference"] = values[first] - values[second]
    resampled["difference"] = resampled[first] - resampled[second]
    patients = len(np.unique(test.patients))
    for name in values:
        reach = half_width(values[name], resampled[name], patients, bootstrap.confidence)
        mean = float(values[name].mean())
        result[name] = {
            "value": mean,
            "low": mean - reach,
            "high": mean + reach,
            "draws": values[name].tolist(),
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


def half_width(
    values: np.ndarray, resampled: np.ndarray, patients: int, confidence: float
) -> float:
    """Half an interval for the mean over draws that counts the spread of draws and of patients.

    The variance is that of the mean of the draws plus that, over resampled test patients, of the
    same mean; Student's quantile with the degrees of freedom of Welch and Satterthwaite.

    Args:
        values: One a draw, [D].
        resampled: The same under resampled patients, [D, R].
        patients: In the test split.
        confidence: Of the interval.
    """
    count = len(values)
    of_draws = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    of_patients = float(np.nanvar(resampled.mean(0), ddof=1))
    total = of_draws + of_patients
    if total == 0:
        return 0.0
    freedom = total**2 / (of_draws**2 / max(count - 1, 1) + of_patients**2 / max(patients - 1, 1))
    return float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(total)

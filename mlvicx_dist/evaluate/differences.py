"""What a comparison finds: means over seeds, and differences paired by seed and by patient.

A mean is over the seeds; its interval counts their spread and that of the test patients. Two
methods see the same patients in each draw, and seed for seed the same order of the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlvicx_dist.config import Bootstrap, EvaluateConfig
from mlvicx_dist.evaluate.delong import delong
from mlvicx_dist.evaluate.metrics import (
    Areas,
    auroc,
    average_precision,
    bootstrap_areas,
    half_width,
    over_classes,
    roc_curve,
)
from mlvicx_dist.evaluate.parts import usable_in_subgroup
from mlvicx_dist.evaluate.task import Images, Scores

BySeed = Mapping[int, Scores]
ROC_POINTS = 101
MEAN = "mean"


class Drawn(NamedTuple):
    """A figure of each seed, [...], and the same under resampled patients, [..., R]."""

    value: np.ndarray
    resampled: np.ndarray


Figures = dict[int, Drawn]
"""By seed."""


def judged(
    methods: Mapping[str, BySeed],
    images: Images,
    settings: EvaluateConfig,
    *,
    reference: str,
    baselines: Sequence[str],
) -> dict[str, Any]:
    """A task's result, as JSON values.

    Args:
        methods: By name and seed, what the probes say; a method without a seed is not there.
        images: The test images.
        settings: Of the task.
        reference: The method that the others are compared with.
        baselines: Of the methods those among which the best is looked for.

    Returns:
        `auroc` and `auprc`: {method: {class or "mean": {"value", "low", "high", "seeds"}}};
        `difference`: {metric: {method: the same}}, the method minus the reference; `over_best`: the
        reference minus the baseline that is best on the validation images; `delong`: {method:
        {class: p}}; `few_labels`, a share each with its own `over_best`, `subgroups` by name, and
        `roc`.
    """
    bootstrap = settings.bootstrap
    figures = {
        name: areas_of(
            by_seed, images.labels, images.patients, images.classes, bootstrap, images.folds
        )
        for name, by_seed in methods.items()
    }
    patients = len(np.unique(images.patients))
    compared = _Compared(reference, patients, bootstrap.confidence)
    best = best_on_validation({name: methods[name] for name in baselines if name in methods})
    names = [*images.classes, MEAN]
    result: dict[str, Any] = {
        "images": len(images.labels),
        "patients": patients,
        "classes": images.classes,
        "positives": {c: int(np.nansum(images.labels[:, k])) for k, c in enumerate(images.classes)},
        "splits": images.about["splits"],
        "folds": settings.folds,
        "left_out": images.about["left_out"],
        "overlap": images.about["overlap"],
        "undefined_draws": _undefined(figures, images.classes),
        "validation_auroc": {name: validation(by_seed) for name, by_seed in methods.items()},
        "difference": {},
    }
    for metric in Areas._fields:
        by_name = {name: one[metric] for name, one in figures.items()}
        result[metric] = {m: compared.cells(one, names) for m, one in by_name.items()}
        result["difference"][metric] = compared.differences(by_name, names)
    result["over_best"] = None
    if best and reference in figures:
        result["over_best"] = {"baseline": best} | {
            metric: compared.minus(figures[reference][metric], figures[best][metric], names)
            for metric in Areas._fields
        }
    return result | {
        "delong": _delong(methods, images, reference),
        "few_labels": [
            _share(k, about, methods, compared, best)
            for k, about in enumerate(images.about["shares"])
        ],
        "subgroups": {
            name: _subgroup(name, chosen, methods, images, bootstrap, reference)
            for name, chosen in images.groups.items()
        },
        "roc": {name: _roc(by_seed, images) for name, by_seed in methods.items()},
    }


def areas_of(
    by_seed: BySeed,
    labels: np.ndarray,
    patients: np.ndarray,
    classes: Sequence[str],
    settings: Bootstrap,
    folds: np.ndarray | None = None,
) -> dict[str, dict[str, Figures]]:
    """The areas of a method by metric, by class and `mean`, and by seed."""
    found: dict[str, dict[str, Figures]] = {m: {c: {} for c in [*classes, MEAN]} for m in METRICS}
    drawn: dict[int, Areas] = {}
    for seed, scores in by_seed.items():
        # Raw pixels are the same scores for every seed.
        same = next((s for s in drawn if by_seed[s] is scores), None)
        drawn[seed] = (
            drawn[same]
            if same is not None
            else bootstrap_areas(
                scores.probe, labels, patients, folds, draws=settings.draws, seed=settings.seed
            )
        )
        for metric, area in METRICS.items():
            resampled = getattr(drawn[seed], metric)
            values = np.array(
                [area(scores.probe[:, k], labels[:, k], folds) for k in range(len(classes))]
            )
            for k, name in enumerate(classes):
                found[metric][name][seed] = Drawn(values[k], resampled[:, k])
            found[metric][MEAN][seed] = Drawn(values.mean(), over_classes(resampled))
    return found


METRICS = {"auroc": auroc, "auprc": average_precision}


class _Compared:
    """Means and differences with their intervals."""

    def __init__(self, reference: str, patients: int, confidence: float) -> None:
        self.reference, self._patients, self._confidence = reference, patients, confidence

    def cell(self, figures: Figures, *, least: float = 0.0) -> dict[str, Any]:
        """The mean over the seeds with its interval, from `least` to 1, and each seed's own."""
        value = np.array([one.value for one in figures.values()])
        resampled = np.array([one.resampled for one in figures.values()])
        reach = half_width(value, resampled, self._patients, self._confidence)
        mean = float(value.mean())
        seeds = {str(seed): float(np.mean(figure.value)) for seed, figure in figures.items()}
        low, high = max(mean - reach, least), min(mean + reach, 1.0)
        return {"value": mean, "low": low, "high": high, "seeds": seeds}

    def cells(
        self, figures: Mapping[str, Figures], names: Sequence[str], *, least: float = 0.0
    ) -> dict[str, Any]:
        """A cell for each class and the mean."""
        return {name: self.cell(figures[name], least=least) for name in names}

    def minus(
        self, first: Mapping[str, Figures], second: Mapping[str, Figures], names: Sequence[str]
    ) -> dict[str, Any] | None:
        """The first minus the second over the seeds that both have; None where there is none."""
        apart = {name: difference(first[name], second[name]) for name in names}
        return self.cells(apart, names, least=-1.0) if all(apart.values()) else None

    def differences(
        self, by_name: Mapping[str, Mapping[str, Figures]], names: Sequence[str]
    ) -> dict[str, Any]:
        """Every other method minus the reference."""
        if self.reference not in by_name:
            return {}
        found = {
            name: self.minus(figures, by_name[self.reference], names)
            for name, figures in by_name.items()
            if name != self.reference
        }
        return {name: cells for name, cells in found.items() if cells}


def difference(first: Figures, second: Figures) -> Figures:
    """The first minus the second, seed by seed, for the seeds that both have."""
    return {
        seed: Drawn(
            one.value - second[seed].value,
            one.resampled - second[seed].resampled,
        )
        for seed, one in first.items()
        if seed in second
    }


def validation(by_seed: BySeed) -> float:
    """The mean AUROC on the validation images, mean over the seeds."""
    return float(np.mean([scores.validation_auroc for scores in by_seed.values()]))


def best_on_validation(methods: Mapping[str, BySeed]) -> str | None:
    """The method whose probe is best on the validation images: the test images choose nothing."""
    return max(methods, key=lambda name: validation(methods[name]), default=None)


def _undefined(
    figures: Mapping[str, dict[str, dict[str, Figures]]], classes: Sequence[str]
) -> dict[str, int]:
    """Draws that held one label value of a class only; they are the same for every method."""
    first = next(iter(figures.values()))["auroc"]
    counts = {c: int(np.isnan(next(iter(first[c].values())).resampled).sum()) for c in classes}
    return {name: count for name, count in counts.items() if count}


def _delong(
    methods: Mapping[str, BySeed], images: Images, reference: str
) -> dict[str, dict[str, float | None]]:
    """A class's p-value of equal mean AUROC over the common seeds, the runs being given."""
    found: dict[str, dict[str, float | None]] = {}
    for name, by_seed in methods.items():
        seeds = [seed for seed in by_seed if seed in methods.get(reference, {})]
        if name == reference or not seeds:
            continue
        first, second = (
            np.stack([methods[one][seed].probe for seed in seeds], 2) for one in (name, reference)
        )
        found[name] = {
            c: delong(first[:, k], second[:, k], images.labels[:, k], images.folds)
            for k, c in enumerate(images.classes)
        }
    return found


def _share(
    place: int,
    about: Mapping[str, Any],
    methods: Mapping[str, BySeed],
    compared: _Compared,
    best: str | None,
) -> dict[str, Any]:
    """The mean AUROC of the methods at a share of the training patients.

    The best baseline is that of all training patients' probes, the same at every share.
    """
    result = dict(about)
    if not about["classes"]:
        return result
    figures = {
        name: {MEAN: {seed: Drawn(*scores.few[place]) for seed, scores in by_seed.items()}}  # type: ignore[misc]
        for name, by_seed in methods.items()
    }
    over = None
    if best and compared.reference in figures:
        over = compared.minus(figures[compared.reference], figures[best], [MEAN])
    return result | {
        "methods": {name: compared.cell(one[MEAN]) for name, one in figures.items()},
        "difference": {
            name: cells[MEAN] for name, cells in compared.differences(figures, [MEAN]).items()
        },
        "over_best": {"baseline": best, **over[MEAN]} if over else None,
    }


def _subgroup(
    name: str,
    chosen: np.ndarray,
    methods: Mapping[str, BySeed],
    images: Images,
    bootstrap: Bootstrap,
    reference: str,
) -> dict[str, Any]:
    """The mean AUROC of the methods on the images of a subgroup."""
    labels, patients = images.labels[chosen], images.patients[chosen]
    folds = None if images.folds is None else images.folds[chosen]
    kept, left_out = usable_in_subgroup(name, images.classes, labels, folds)
    columns = [images.classes.index(one) for one in kept]
    result: dict[str, Any] = {
        "images": int(chosen.sum()),
        "patients": len(np.unique(patients)),
        "positives": {c: int(np.nansum(labels[:, k])) for k, c in enumerate(images.classes)},
        "left_out": left_out,
    }
    if not kept:
        return result
    figures = {}
    for method, by_seed in methods.items():
        part = {seed: _part(scores, chosen, columns) for seed, scores in by_seed.items()}
        areas = areas_of(part, labels[:, columns], patients, kept, bootstrap, folds)
        figures[method] = areas["auroc"]
    compared = _Compared(reference, result["patients"], bootstrap.confidence)
    return result | {
        "methods": {method: compared.cell(one[MEAN]) for method, one in figures.items()},
        "difference": {
            method: cells[MEAN] for method, cells in compared.differences(figures, [MEAN]).items()
        },
    }


def _part(scores: Scores, chosen: np.ndarray, columns: list[int]) -> Scores:
    return Scores(scores.probe[chosen][:, columns], scores.validation_auroc, [], scores.plane)


def _roc(by_seed: BySeed, images: Images) -> dict[str, list[float]]:
    """True positive rates averaged over classes and seeds at the same false positive rates."""
    false = np.linspace(0, 1, ROC_POINTS)
    true = np.mean(
        [
            np.interp(false, *roc_curve(scores.probe[:, k], images.labels[:, k], images.folds))
            for scores in by_seed.values()
            for k in range(images.labels.shape[1])
        ],
        axis=0,
    )
    return {
        "false": [round(float(v), 4) for v in false],
        "true": [round(float(v), 4) for v in true],
    }

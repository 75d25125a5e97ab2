"""A frozen encoder beside the same encoder untrained, on patients that neither probe has seen.

The probe learns on the training split, its penalty is chosen on the validation split, and the test
split is looked at once. Intervals resample patients; the difference of the two encoders is paired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlvicx_dist.config import Bootstrap, EvaluateConfig, to_tree
from mlvicx_dist.errors import ConfigError, DataError, nearest
from mlvicx_dist.evaluate.embed import Embeddings, embed_shards
from mlvicx_dist.evaluate.metrics import auroc, bootstrap_auroc, interval, over_classes, roc_curve
from mlvicx_dist.evaluate.probe import fit_probe, knn_scores
from mlvicx_dist.model.encoder import untrained
from mlvicx_dist.storage import write_whole
from mlvicx_dist.train.checkpoint import find_weights, load_encoder, training_seed

ENCODERS = ("pretrained", "untrained")
CURVE_POINTS = 200

Scores = Mapping[str, np.ndarray]


def evaluate_checkpoint(
    checkpoint: str | Path, settings: EvaluateConfig, *, out: str | Path | None = None
) -> tuple[dict[str, Any], Path]:
    """Evaluate a run, checkpoint or export and write the result beside it.

    Args:
        checkpoint: What `load_encoder` takes.
        settings: Shards, splits, probe and bootstrap.
        out: Folder of the result; None is `evaluations/` of the checkpoint's run.

    Returns:
        The result and the path of its JSON file.
    """
    weights = find_weights(checkpoint)
    run_dir = weights.parent.parent
    folder = Path(out) if out else run_dir / "evaluations"
    encoder = load_encoder(weights)
    pair = [encoder, untrained(encoder, training_seed(weights))]
    embeddings = embed_shards(
        pair,
        settings.data.shards,
        splits=list(dict.fromkeys([settings.data.train, settings.data.val, settings.data.test])),
        size_px=settings.embedding.image_size_px,
        batch_size=settings.embedding.batch_size,
        loader_workers=settings.data.loader_workers,
        use_gpu=settings.embedding.use_gpu,
    )
    result = {"checkpoint": weights.name, **evaluate(embeddings, settings)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{settings.name}.json"
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise DataError(
            f"{folder}: the result cannot be written ({error.strerror}); give a folder with --out."
        ) from None
    return result, path


def evaluate(embeddings: Embeddings, settings: EvaluateConfig) -> dict[str, Any]:
    """Probe and nearest neighbours on the embeddings of two encoders, as JSON values.

    Raises:
        DataError: a split is empty, or no class has both labels where it must.
        ConfigError: a class does not exist.
    """
    names = class_names(settings.classes, embeddings.classes)
    columns = [embeddings.classes.index(name) for name in names]
    data = settings.data
    rows = {split: embeddings.rows(split) for split in (data.train, data.val, data.test)}
    for split, chosen in rows.items():
        if not chosen.any():
            raise DataError(
                f"the split '{split}' is empty in {', '.join(settings.data.shards)}; name another "
                "with data.train, data.val or data.test."
            )
    labels = {split: embeddings.labels[chosen][:, columns] for split, chosen in rows.items()}
    kept, left_out = usable_classes(names, labels)
    if not kept:
        raise DataError(
            f"no class has both labels in each split of {', '.join(settings.data.shards)} "
            f"({'; '.join(left_out.values())}); evaluate on labelled shards."
        )
    chosen_columns = [names.index(name) for name in kept]
    labels = {split: values[:, chosen_columns] for split, values in labels.items()}
    patients = embeddings.patients()[rows[data.test]]
    scores: dict[str, dict[str, np.ndarray]] = {"probe": {}, "knn": {}}
    penalties = {}
    for name, features in zip(ENCODERS, embeddings.features, strict=True):
        train, val, test = (features[rows[s]] for s in (data.train, data.val, data.test))
        probe = fit_probe(
            train, labels[data.train], validation=(val, labels[data.val]), settings=settings.probe
        )
        penalties[name] = {"l2": probe.l2, "validation_auroc": probe.validation_auroc}
        scores["probe"][name] = probe.scores(test)
        scores["knn"][name] = knn_scores(train, labels[data.train], test, settings=settings.knn)
    test_labels = labels[data.test]
    return {
        "name": settings.name,
        "settings": to_tree(settings),
        "splits": {
            split: {
                "images": int(chosen.sum()),
                "patients": len(np.unique(embeddings.patients()[chosen])),
            }
            for split, chosen in rows.items()
        },
        "classes": kept,
        "positives": {n: int(np.nansum(test_labels[:, k])) for k, n in enumerate(kept)},
        "left_out": left_out,
        "penalty": penalties,
        **{
            task: compare(by_encoder, test_labels, patients, kept, settings.bootstrap)
            for task, by_encoder in scores.items()
        },
        "roc": {
            name: {c: _curve(s[:, k], test_labels[:, k]) for k, c in enumerate(kept)}
            for name, s in scores["probe"].items()
        },
    }


def compare(
    scores: Scores,
    labels: np.ndarray,
    patients: np.ndarray,
    classes: Sequence[str],
    settings: Bootstrap,
) -> dict[str, Any]:
    """AUROC of each encoder and their difference, a class and mean, with intervals.

    Returns:
        For each encoder and `difference`: {class or "mean": {"value", "low", "high"}}.
    """
    values, draws = {}, {}
    for name, one in scores.items():
        values[name] = np.array([auroc(one[:, k], labels[:, k]) for k in range(len(classes))])
        draws[name] = bootstrap_auroc(
            one, labels, patients, draws=settings.draws, seed=settings.seed
        )
    first, second = scores
    values["difference"] = values[first] - values[second]
    draws["difference"] = draws[first] - draws[second]
    result = {}
    for name, areas in values.items():
        columns = {c: (areas[k], draws[name][:, k]) for k, c in enumerate(classes)}
        columns["mean"] = (areas.mean(), over_classes(draws[name]))
        result[name] = {
            column: {
                "value": float(value),
                **dict(zip(("low", "high"), interval(drawn, settings.confidence), strict=True)),
            }
            for column, (value, drawn) in columns.items()
        }
    return result


def summary(result: Mapping[str, Any]) -> list[str]:
    """The result as a table in lines of text."""
    confidence = result["settings"]["bootstrap"]["confidence"]
    test = result["splits"][result["settings"]["data"]["test"]]
    lines = [
        f"Linear probe, AUROC on {test['images']} images of {test['patients']} patients; "
        f"{confidence:.0%} intervals over patients.",
        f"{'class':24} {'positives':>9}  {'pretrained':>22}  {'untrained':>22}  {'difference':>24}",
    ]
    for name in [*result["classes"], "mean"]:
        cells = [result["probe"][kind][name] for kind in (*ENCODERS, "difference")]
        words = [f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells[:2]]
        words.append("{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**cells[2]))
        count = result["positives"].get(name, "")
        lines.append(f"{name:24} {count:>9}  {words[0]:>22}  {words[1]:>22}  {words[2]:>24}")
    knn = [result["knn"][kind]["mean"]["value"] for kind in ENCODERS]
    lines.append(
        f"Nearest neighbours, mean AUROC: {knn[0]:.3f} pretrained, {knn[1]:.3f} untrained."
    )
    lines += [f"Left out: {name} ({why})." for name, why in result["left_out"].items()]
    return lines


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
    names: Sequence[str], labels: Mapping[str, np.ndarray]
) -> tuple[list[str], dict[str, str]]:
    """The classes with both labels in every split, and why the others are left out."""
    left_out = {}
    for k, name in enumerate(names):
        for split, values in labels.items():
            known = values[:, k][~np.isnan(values[:, k])]
            if len(np.unique(known)) < 2:
                found = f"only {known[0]:g}" if len(known) else "no label"
                left_out[name] = f"{found} for {name} in the split {split}"
                break
    return [name for name in names if name not in left_out], left_out


def _curve(scores: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """A ROC curve of at most `CURVE_POINTS` points."""
    false, true = roc_curve(scores, labels)
    places = np.unique(np.linspace(0, len(false) - 1, CURVE_POINTS).round().astype(int))
    return {
        "false": [round(float(v), 4) for v in false[places]],
        "true": [round(float(v), 4) for v in true[places]],
    }

"""An encoder beside the same encoder untrained and raw pixels, on patients no probe has seen.

The probe learns on the training split, its penalty is chosen on the validation split, and the test
split is looked at once. Intervals resample patients; the difference of the two encoders is paired.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from mlvicx_dist.config import PIXELS, SUPERVISED, EvaluateConfig, to_tree
from mlvicx_dist.errors import DataError, UserError
from mlvicx_dist.evaluate.calibration import brier_score, calibration_error
from mlvicx_dist.evaluate.delong import delong
from mlvicx_dist.evaluate.embed import Embeddings, about_shards, device_of, embed_shards
from mlvicx_dist.evaluate.few import few_labels
from mlvicx_dist.evaluate.finetune import check_fine_tune, fine_tune
from mlvicx_dist.evaluate.folds import all_judged, counted, fold_of, folds_of, joined, probed
from mlvicx_dist.evaluate.localise import check_context, localise
from mlvicx_dist.evaluate.marked import Kind, MarkedImages
from mlvicx_dist.evaluate.metrics import roc_curve
from mlvicx_dist.evaluate.overlap import check_copies, label_overlap, overlap_with_run, run_config
from mlvicx_dist.evaluate.paired import compare
from mlvicx_dist.evaluate.parts import parts_of, splits_of
from mlvicx_dist.evaluate.pixels import Pixels
from mlvicx_dist.evaluate.probe import knn_scores
from mlvicx_dist.evaluate.segment import segment
from mlvicx_dist.evaluate.subgroups import subgroups
from mlvicx_dist.model.encoder import Encoder, encoder_digest, untrained
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import Place, make_folder, place, reaching, told, write_whole
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.train.weights import find_weights, load_encoder, trained_settings

ENCODERS = ("pretrained", "untrained")
CURVE_POINTS = 200


def evaluate_checkpoint(
    checkpoint: str | Path, settings: EvaluateConfig, *, out: str | Path | None = None
) -> tuple[dict[str, Any], Path]:
    """Evaluate a run, checkpoint or export and write the result beside it.

    Args:
        checkpoint: What `load_encoder` takes.
        settings: Shards, splits, probe and bootstrap.
        out: Folder of the result; None is `evaluations/` of the checkpoint's run.

    Returns:
        The result and the path of its JSON file. `checkpoint` and `encoder` are name and digest of
        what was judged. Of the untrained encoder it has `untrained`:
        `seed`, and whether that is `assumed` since an export does not tell it. The file is written
        after each part; until the last one `missing` names those that are asked for and not there.

    Raises:
        UserError: of what can be known of folder, shards and workers at the start, before the work.
    """
    weights = find_weights(checkpoint)
    run_dir = weights.parent.parent
    folder = place(out) if out else _own_folder(weights, run_dir)
    _check_folder(folder)
    encoder = load_encoder(weights)
    trained = trained_settings(weights)
    told_seed = trained.get("train", {}).get("seed")
    seed = told_seed or 0
    bare = untrained(encoder, seed)
    size_px = settings.embedding.image_size_px or encoder.image_size_px
    if settings.segment or settings.localise:
        # Embeddings look for a GPU on any node, these two run here.
        device_of(settings.embedding.use_gpu)
    masks, boxes = _marked(encoder, settings, size_px)
    if settings.fine_tune:
        check_fine_tune(settings, settings.fine_tune)
    labels = _labels(trained, run_dir, settings)
    embeddings = embed_shards(
        [encoder, bare, Pixels()],
        settings.data.shards,
        splits=splits_of(settings),
        size_px=size_px,
        batch_size=settings.embedding.batch_size,
        loader_workers=settings.data.loader_workers,
        use_gpu=settings.embedding.use_gpu,
        cache=cache_of(settings.data),
    )
    folds = folds_of(embeddings, settings)
    check_copies(embeddings.about, folds, ", ".join(settings.data.shards))
    result = {
        "checkpoint": weights.name,
        "encoder": encoder_digest(encoder),
        "untrained": {"seed": seed, "assumed": told_seed is None},
        **evaluate(embeddings, settings),
    }
    about_test = embeddings.about_of(all_judged(folds).rows)
    off = {"unknown": "overlap is off"}
    result["overlap"] = (
        overlap_with_run(about_test, settings.data.shards, run_dir) if settings.overlap else off
    )
    if labels:
        result["overlap"]["labels"] = labels
    both = dict(zip(ENCODERS, (encoder, bare), strict=True))
    parts: dict[str, Callable[[], Any]] = {}
    if settings.localise:
        parts["localise"] = lambda: localise(both, boxes, settings)
    if chosen := settings.segment:
        parts["segment"] = lambda: segment(both, masks, settings, chosen)
    if tune := settings.fine_tune:
        learned = parts_of(embeddings, settings)
        parts["fine_tune"] = lambda: fine_tune(
            weights, learned, settings, tune, seed=seed, size_px=size_px
        )
    path = folder / f"{settings.name}.json"
    for done, name in enumerate(parts):
        _write(path, {**result, "missing": list(parts)[done:]})
        result[name] = parts[name]()
    _write(path, result)
    return result, path


def _labels(
    trained: Mapping[str, Any], run_dir: Place, settings: EvaluateConfig
) -> dict[str, Any] | None:
    """What a training on labels knows of the labels of this evaluation; None of another method's.

    Raises:
        DataError: it learned from test patients.
    """
    if trained.get("method") != SUPERVISED:
        return None
    data = settings.data
    try:
        config = run_config(run_dir)
    except UserError as error:
        return {"splits": trained["loss"]["label_splits"], "unknown": str(error).rstrip(".")}
    others, cache = list(dict.fromkeys([data.train, data.val])), cache_of(data)
    splits = splits_of(settings) if settings.folds else [data.test]
    unseen, _ = about_shards(data.shards, splits=splits, cache=cache)
    learned, _ = about_shards(data.shards, splits=others, cache=cache)
    where = f"the split '{data.test}'"
    if settings.folds:
        where = f"{', '.join(data.shards)}, all of which folds judge"
    return label_overlap(unseen, learned, data.shards, config, where=where)


def _own_folder(weights: Place, run_dir: Place) -> Place:
    """`evaluations/` of a run.

    Raises:
        DataError: the weights lie in no run: what is two folders above them may be anything.
    """
    with _writing(run_dir):
        if (run_dir / "config.yaml").is_file():
            return run_dir / "evaluations"
    raise DataError(
        f"{weights}: these weights lie in no run, which would take the result; give a folder for "
        "it with --out."
    )


def _check_folder(folder: Place) -> None:
    """Make the result's folder and see that it can be written.

    Raises:
        DataError: it cannot.
    """
    probe = folder / f".probe-{os.getpid()}"
    with _writing(folder):
        make_folder(folder)
        write_whole(probe, b"")
        probe.unlink()


def _write(path: Place, result: dict[str, Any]) -> None:
    with _writing(path.parent):
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


@contextmanager
def _writing(folder: Place) -> Iterator[None]:
    try:
        with reaching(folder):
            yield
    except OSError as error:
        raise DataError(
            f"{folder}: the result cannot be written ({told(error)}); give a folder with --out."
        ) from None


def _marked(
    encoder: Encoder, settings: EvaluateConfig, size_px: int
) -> tuple[dict[str, MarkedImages], dict[str, MarkedImages]]:
    """The images with masks and with boxes that are asked for, by the part they play.

    Raises:
        UserError: there are none in a split, or the encoder has no context to hold against boxes.
    """
    splits = {"train": settings.data.train, "val": settings.data.val, "test": settings.data.test}
    if settings.localise:
        check_context(encoder)

    def found(kind: Kind, *names: str) -> dict[str, MarkedImages]:
        return {name: MarkedImages(settings, splits[name], kind, size_px) for name in names}

    masks = found("masks", "train", "val", "test") if settings.segment else {}
    return masks, found("boxes", "val", "test") if settings.localise else {}


def evaluate(embeddings: Embeddings, settings: EvaluateConfig) -> dict[str, Any]:
    """Probe and nearest neighbours on embeddings of both encoders and pixels, as JSON values.

    Raises:
        DataError: a split is empty, an embedding is not finite, or no class has both labels where
            it must.
        ConfigError: a class does not exist.
    """
    by_encoder = dict(zip((*ENCODERS, PIXELS), embeddings.features, strict=True))
    for name, features in by_encoder.items():
        if broken := int((~np.isfinite(features)).any(1).sum()):
            raise DataError(
                f"the {name} encoder's embeddings of {broken} of {len(features)} images are not "
                "finite: its weights diverged; evaluate an earlier checkpoint."
            )
    folds = folds_of(embeddings, settings)
    parts, test, fold = folds[0], all_judged(folds), fold_of(folds)
    probe: dict[str, np.ndarray] = {}
    knn: dict[str, np.ndarray] = {}
    penalties = {}
    with progress("probing", len(by_encoder), "encoders") as bar:
        for name, features in by_encoder.items():
            found = probed(name, features, folds, settings)
            probe[name] = found.logits
            penalties[name] = {
                # One number as ever, or one a fold.
                "l2": [fitted.l2 for fitted in found.fits] if settings.folds else found.fits[0].l2,
                "validation_auroc": found.validation_auroc,
            }
            knn[name] = joined(
                folds,
                [
                    knn_scores(
                        features[one.train.rows],
                        one.train.labels,
                        features[one.test.rows],
                        settings=settings.knn,
                    )
                    for one in folds
                ],
            )
            bar.advance()
    kept, patients, test_labels = parts.classes, test.patients, test.labels
    first, second = ENCODERS
    compared = compare(probe, test_labels, patients, kept, settings.bootstrap, fold)
    return {
        "name": settings.name,
        "settings": to_tree(settings),
        "splits": counted(folds),
        "classes": kept,
        "positives": {n: int(np.nansum(test_labels[:, k])) for k, n in enumerate(kept)},
        "shares": {n: float(np.nanmean(test_labels[:, k])) for k, n in enumerate(kept)},
        "left_out": parts.left_out,
        "penalty": penalties,
        "probe": compared["auroc"],
        "auprc": compared["auprc"],
        "undefined_draws": compared["undefined_draws"],
        "knn": compare(knn, test_labels, patients, kept, settings.bootstrap, fold)["auroc"],
        "subgroups": subgroups(
            probe, test_labels, patients, embeddings.about_of(test.rows), kept, settings, fold
        )
        if settings.subgroups
        else {},
        "few_labels": few_labels(by_encoder, parts, settings, settings.few_labels)
        if settings.few_labels
        else [],
        "delong": {
            c: delong(probe[first][:, k], probe[second][:, k], test_labels[:, k], fold)
            for k, c in enumerate(kept)
        },
        "calibration": {name: _calibration(probe[name], test_labels, kept) for name in ENCODERS},
        "roc": {
            name: {
                c: _curve(probe[name][:, k], test_labels[:, k], fold) for k, c in enumerate(kept)
            }
            for name in ENCODERS
        },
    }


def _calibration(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Calibration error and Brier score of a probe's probabilities, a class and mean."""
    errors = (("ece", calibration_error), ("brier", brier_score))
    result = {
        c: {name: error(expit(logits[:, k]), labels[:, k]) for name, error in errors}
        for k, c in enumerate(classes)
    }
    mean = {name: float(np.mean([one[name] for one in result.values()])) for name, _ in errors}
    return {**result, "mean": mean}


def _curve(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray | None
) -> dict[str, list[float]]:
    """A ROC curve of at most `CURVE_POINTS` points."""
    false, true = roc_curve(scores, labels, folds)
    places = np.unique(np.linspace(0, len(false) - 1, CURVE_POINTS).round().astype(int))
    return {
        "false": [round(float(v), 4) for v in false[places]],
        "true": [round(float(v), 4) for v in true[places]],
    }

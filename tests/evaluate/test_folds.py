"""Folds in place of splits: every image judged once, by what learned from other patients."""

from dataclasses import replace

import numpy as np
import pytest

from mlvicx_dist.config import EvaluateConfig, parse_config
from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.evaluate.embed import Embeddings
from mlvicx_dist.evaluate.evaluation import evaluate
from mlvicx_dist.evaluate.folds import all_judged, counted, fold_of, folds_of, probed
from mlvicx_dist.evaluate.metrics import auroc, average_precision, bootstrap_areas, roc_curve
from mlvicx_dist.evaluate.summary import summary


def settings(**changes):
    tree = {"kind": "evaluate", "name": "t", "data": {"shards": ["x"]}, "bootstrap": {"draws": 100}}
    config = parse_config({**tree, "folds": 5, **changes}, "t")
    assert isinstance(config, EvaluateConfig)
    return config


@pytest.fixture
def embeddings():
    """200 images of 90 patients, each in one split; features tell class a, c is rare."""
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 90, 200)
    labels = np.stack([rng.integers(0, 2, 200), rng.integers(0, 2, 200), np.arange(200) == 7], 1)
    features = rng.normal(size=(200, 5)).astype(np.float32)
    features[:, 0] += 2 * labels[:, 0]
    about = tuple(
        {
            "split": ("train", "val", "test")[patient % 3],
            "patient": str(patient),
            "source": "s",
            "key": str(k),
        }
        for k, patient in enumerate(patients)
    )
    blind = rng.normal(size=(200, 5)).astype(np.float32)
    return Embeddings((features, blind, blind), labels.astype(float), ("a", "b", "c"), about)


def test_every_image_is_judged_once_by_what_learned_from_other_patients(embeddings):
    folds = folds_of(embeddings, settings())
    assert len(folds) == 5
    judged = np.sum([parts.test.rows for parts in folds], 0)
    assert (judged == 1).all()
    for parts in folds:
        train, test = (set(p.patients) for p in (parts.train, parts.test))
        assert not train & test
        assert train | test == set(embeddings.patients())
        # Each of the other folds is left out once, with all of its patients.
        assert (np.sum(parts.turns, 0) == 1).all()
        assert len(parts.turns) == 4
        for turn in parts.turns:
            assert not set(parts.train.patients[turn]) & set(parts.train.patients[~turn])
    # The same again: encoders are compared on the same folds.
    again = folds_of(embeddings, settings())
    assert all((a.test.rows == b.test.rows).all() for a, b in zip(folds, again, strict=True))
    assert folds[0].classes == ["a", "b"]
    assert "only 0 for c in the training part of fold" in folds[0].left_out["c"]


def test_a_class_that_most_folds_do_not_know_is_judged_by_those_that_do(embeddings):
    folds = folds_of(embeddings, settings())
    fold = fold_of(folds)
    # Of the third class some images of two folds are known.
    labels = embeddings.labels.copy()
    labels[:, 2] = np.where(np.isin(fold, (1, 3)), labels[:, 0], np.nan)
    known = replace(embeddings, labels=labels)
    folds = folds_of(known, settings())
    assert folds[0].classes == ["a", "b", "c"]
    for name in ("pixels", "pretrained"):
        logits = probed(name, known.features[0], folds, settings()).logits
        assert np.isfinite(logits).all()
        false, true = roc_curve(logits[:, 2], labels[:, 2], fold)
        assert (true[-1], false[-1]) == (1, 1)
        assert np.isfinite(auroc(logits[:, 2], labels[:, 2], fold))


def test_a_class_that_no_fold_has_both_labels_of_is_left_out(embeddings):
    fold = fold_of(folds_of(embeddings, settings()))
    labels = embeddings.labels.copy()
    labels[:, 2] = np.where(fold < 2, 1, 0)
    folds = folds_of(replace(embeddings, labels=labels), settings())
    assert folds[0].classes == ["a", "b"]
    assert folds[0].left_out["c"] == "no label for c in the folds with both labels, of 5"
    curve = roc_curve(np.arange(200.0), labels[:, 2], fold)
    assert [rates.tolist() for rates in curve] == [[0], [0]]


def test_what_is_judged_is_in_the_order_of_the_images(embeddings):
    folds = folds_of(embeddings, settings())
    test = all_judged(folds)
    assert test.labels.tolist() == embeddings.labels[:, :2].tolist()
    assert test.patients.tolist() == embeddings.patients().tolist()
    found = probed("pretrained", embeddings.features[0], folds, settings())
    for parts, fitted in zip(folds, found.fits, strict=True):
        own = fitted.scores(embeddings.features[0][parts.test.rows])
        assert np.array_equal(found.logits[parts.test.rows], own)
    fold = fold_of(folds)
    assert all((fold[parts.test.rows] == k).all() for k, parts in enumerate(folds))
    assert 0.5 < found.validation_auroc < 1


def test_an_encoder_that_knows_nothing_is_at_chance():
    """A fold with more positives has a probe that expects fewer: pooled logits rank below."""
    apart, pooled = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(200, 4)).astype(np.float32)
        labels = (rng.random((200, 1)) < 0.2).astype(float)
        about = tuple(
            {"split": "train", "patient": str(k), "source": "s", "key": str(k)} for k in range(200)
        )
        found = Embeddings((features,), labels, ("a",), about)
        strong = settings(probe={"l2": [1e3]})
        folds = folds_of(found, strong)
        said = probed("pretrained", features, folds, strong)
        apart.append(auroc(said.logits[:, 0], labels[:, 0], fold_of(folds)))
        pooled.append(auroc(said.logits[:, 0], labels[:, 0]))
    assert np.mean(pooled) < 0.46
    assert abs(np.mean(apart) - 0.5) < 0.04


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_scores_that_are_right_in_each_fold_are_right(share):
    """Wherever the folds lie, whatever their shares of positives, and where labels are missing."""
    rng = np.random.default_rng(0)
    folds = rng.integers(0, 5, 150)
    labels = (rng.random(150) < share * (1 + (folds == 0))).astype(float)
    labels[(folds == 1) & (rng.random(150) < 0.5)] = np.nan
    scores = np.nan_to_num(labels, nan=0.5) + 0.1 * rng.random(150) + rng.normal(size=5)[folds]
    assert auroc(scores, labels, folds) == average_precision(scores, labels, folds) == 1
    assert auroc(scores, labels) < 0.9
    false, true = roc_curve(scores, labels, folds)
    assert (true[false > 0] == 1).all()
    drawn = bootstrap_areas(
        scores[:, None], labels[:, None], np.arange(150), folds, draws=50, seed=0
    )
    assert (drawn.auroc == 1).all() and (drawn.auprc == 1).all()


def test_areas_of_folds_are_those_of_their_pairs():
    rng = np.random.default_rng(1)
    folds, labels = rng.integers(0, 3, 60), rng.integers(0, 2, 60).astype(float)
    scores = np.round(rng.normal(size=60) + labels, 1)
    pairs = [
        (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
        for i in np.flatnonzero(labels == 1)
        for j in np.flatnonzero(labels == 0)
        if folds[i] == folds[j]
    ]
    assert auroc(scores, labels, folds) == pytest.approx(np.mean(pairs), abs=1e-12)
    precisions = [average_precision(scores[folds == k], labels[folds == k]) for k in range(3)]
    positives = [labels[folds == k].sum() for k in range(3)]
    expected = np.average(precisions, weights=positives)
    assert average_precision(scores, labels, folds) == pytest.approx(expected, abs=1e-12)
    assert auroc(scores, labels, np.zeros(60)) == auroc(scores, labels)
    false, true = roc_curve(scores, labels, folds)
    assert abs(np.trapezoid(true, false) - np.mean(pairs)) < 0.03


def test_the_judged_labels_choose_nothing(embeddings):
    """Neither the penalty nor the weights of a fold's probe know the labels of that fold."""
    some = settings(probe={"l2": [1e-4, 1.0, 100.0]})
    features = embeddings.features[0]
    before = probed("pretrained", features, folds_of(embeddings, some), some)
    first = folds_of(embeddings, some)[0].test.rows
    labels = embeddings.labels.copy()
    labels[first, :2] = 1 - labels[first, :2]
    other = replace(embeddings, labels=labels)
    after = probed("pretrained", features, folds_of(other, some), some)
    assert after.fits[0].l2 == before.fits[0].l2
    assert np.array_equal(after.logits[first], before.logits[first])
    # The probes of the other folds learned from them.
    assert not np.array_equal(after.logits[~first], before.logits[~first])


def test_an_evaluation_by_folds(embeddings):
    result = evaluate(embeddings, settings(subgroups=False))
    assert result["probe"]["pretrained"]["a"]["value"] > 0.85
    assert abs(result["probe"]["pretrained"]["b"]["value"] - 0.5) < 0.15
    assert result["knn"]["pretrained"]["a"]["value"] > 0.8
    assert result["splits"]["test"] == {"images": 200, "patients": 84}
    assert result["splits"]["train"]["patients"] == result["splits"]["val"]["patients"] == 67
    assert len(result["penalty"]["pretrained"]["l2"]) == 5
    result["overlap"] = {"unknown": "no run"}
    assert "on 200 images of 84 patients, in 5 folds;" in summary(result)[0]


def test_without_folds_the_splits_count(embeddings):
    (parts,) = folds_of(embeddings, settings(folds=None))
    assert all_judged([parts]).rows.tolist() == embeddings.rows("test").tolist()
    assert counted([parts])["test"]["images"] == embeddings.rows("test").sum()


def test_what_cannot_be_is_said(embeddings):
    with pytest.raises(DataError, match=r"^x: 84 patients cannot be dealt into 99 folds; lower"):
        folds_of(embeddings, settings(folds=99))
    with pytest.raises(DataError, match=r"^x: no class has both labels in the training part of"):
        folds_of(embeddings, settings(classes=["c"]))
    for key, value in {"few_labels": {}, "fine_tune": {}, "segment": {}, "localise": True}.items():
        with pytest.raises(ConfigError, match=f"{key} needs the splits, which folds do away with"):
            settings(**{key: value})
    with pytest.raises(ConfigError, match="val must be a split of its own"):
        settings(data={"shards": ["x"], "val": "train"})


def test_a_fold_that_has_nothing_to_tune_on_is_refused(embeddings):
    # Each patient has one label, and is a fold: none has both.
    patients = embeddings.patients()
    labels = np.array([[float(p.endswith("1"))] for p in patients])
    alike = replace(embeddings, labels=labels, classes=("a",))
    with pytest.raises(DataError, match=r"^x: no class has both labels in .* and in one of them"):
        folds_of(alike, settings(folds=84))
    # But for one, whose own probe is tuned on the others.
    names, counts = np.unique(patients, return_counts=True)
    labels[np.flatnonzero(patients == names[counts > 1][0])[:2], 0] = (0, 1)
    with pytest.raises(DataError, match=r"^x: none of a has both labels in any of .* of 84 is tun"):
        folds_of(alike, settings(folds=84))

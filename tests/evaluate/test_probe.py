"""The probes against scikit-learn, and that the test images decide nothing."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mlvicx_dist.config import Knn, Probe
from mlvicx_dist.evaluate.metrics import auroc
from mlvicx_dist.evaluate.probe import best_in_turns, fit_probe, knn_scores, logistic


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    features = rng.normal(2, 3, (300, 8)).astype(np.float32)
    labels = (features[:, :2] + rng.normal(0, 3, (300, 2)) > 2).astype(float)
    labels[:40, 1] = np.nan
    return features, labels


def test_the_probe_is_logistic_regression_with_missing_labels_masked(data):
    features, labels = data
    settings = Probe(l2=[0.05], max_iterations=500)
    fitted = fit_probe(features, labels, validation=data, settings=settings)
    x = features.astype(float)
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    for k, rows in ((0, slice(None)), (1, slice(40, None))):
        theirs = LogisticRegression(C=1 / (0.05 * len(x[rows])), tol=1e-10, max_iter=1000)
        theirs.fit(x[rows], labels[rows, k])
        expected = theirs.decision_function(x)
        assert np.abs(fitted.scores(features)[:, k] - expected).max() < 2e-6


def test_of_fewer_images_than_features_it_is_the_same(data):
    features = np.random.default_rng(1).normal(size=(40, 64)).astype(np.float32)
    labels = data[1][60:100]
    fitted = fit_probe(
        features,
        labels,
        validation=(features, labels),
        settings=Probe(l2=[0.05], max_iterations=500),
    )
    x = features.astype(float)
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    for k in range(2):
        theirs = LogisticRegression(C=1 / (0.05 * len(x)), solver="newton-cholesky", tol=1e-10)
        theirs.fit(x, labels[:, k])
        assert np.abs(fitted.scores(features)[:, k] - theirs.decision_function(x)).max() < 2e-5


def test_the_penalty_is_the_best_one_on_the_validation_images(data):
    features, labels = data
    settings = Probe(l2=[1e-4, 1e-2, 1.0])
    validation = features[200:], labels[200:]
    best = fit_probe(features[:200], labels[:200], validation=validation, settings=settings)
    alone = [
        fit_probe(
            features[:200], labels[:200], validation=validation, settings=Probe(l2=[l2])
        ).validation_auroc
        for l2 in settings.l2
    ]
    assert best.validation_auroc == pytest.approx(max(alone), abs=1e-3)


def test_in_turns_the_penalty_is_the_best_one_on_what_each_turn_left_out(data):
    features, labels = data
    settings = Probe(l2=[1e-4, 1e-2, 1.0, 10.0])
    turns = [np.arange(300) % 3 == k for k in range(3)]
    # The last turn holds one label of each class: nothing can be said by it.
    labels = labels.copy()
    labels[turns[2]] = 1.0
    found = best_in_turns(turns, logistic(settings), (features, labels))
    mean = {
        l2: np.mean(
            [
                fit_probe(
                    features[~t],
                    labels[~t],
                    validation=(features[t], labels[t]),
                    settings=Probe(l2=[l2]),
                ).validation_auroc
                for t in turns[:2]
            ]
        )
        for l2 in settings.l2
    }
    assert found.validation_auroc == pytest.approx(max(mean.values()), abs=1e-3)
    assert mean[found.l2] == pytest.approx(max(mean.values()), abs=1e-3)
    # What is judged learned from all of them.
    whole = fit_probe(features, labels, validation=data, settings=Probe(l2=[found.l2]))
    assert np.abs(found.scores(features) - whole.scores(features)).max() < 1e-4


def test_neighbours_vote():
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(2, 8)) * 5
    kinds = rng.integers(0, 2, 200)
    points = (centres[kinds] + rng.normal(size=(200, 8))).astype(np.float32)
    y = kinds[:, None].astype(float)
    scores = knn_scores(points[:150], y[:150], points[150:], settings=Knn(neighbours=5))
    assert auroc(scores[:, 0], y[150:, 0]) == 1
    centred = points.astype(float) - points[:150].mean(0, dtype=float)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = centred[150:] @ centred[:150].T
    near = np.argsort(-cosines, axis=1)[:, :5]
    weights = 1 + np.take_along_axis(cosines, near, 1)
    assert np.allclose(scores[:, 0], (weights * y[near, 0]).sum(1) / weights.sum(1))
    y[:149] = np.nan
    one_vote = knn_scores(points[:150], y[:150], points[150:], settings=Knn(neighbours=150))
    assert np.allclose(one_vote, y[149])

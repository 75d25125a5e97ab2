"""The floor of raw pixels, against scikit-learn's ridge regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from mlvicx_dist.config import Probe
from mlvicx_dist.evaluate import pixels
from mlvicx_dist.evaluate.metrics import auroc
from mlvicx_dist.evaluate.pixels import PIXELS, Pixels, fit_for, ridge
from mlvicx_dist.evaluate.probe import best_on


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    features = rng.normal(0.5, 0.2, (300, 12)).astype(np.float32)
    features[:, 3] = 0
    labels = (features[:, :3] + rng.normal(0, 0.2, (300, 3)) > 0.5).astype(float)
    labels[:40, 1] = np.nan
    return features, labels


@pytest.mark.parametrize("l2", [1e-3, 10.0])
def test_it_is_ridge_regression_with_missing_labels_masked(data, monkeypatch, l2):
    features, labels = data
    monkeypatch.setattr(pixels, "PENALTIES", (l2,))
    fitted = best_on(data, ridge, data)
    x = features.astype(float)
    x = (x - x.mean(0)) / np.maximum(x.std(0, ddof=1), 1e-9)
    for k, rows in ((0, slice(None)), (1, slice(40, None)), (2, slice(None))):
        theirs = Ridge(alpha=l2 * len(x[rows])).fit(x[rows], labels[rows, k])
        assert np.abs(fitted.scores(features)[:, k] - theirs.predict(x)).max() < 1e-9


def test_the_penalty_is_the_best_one_on_the_validation_images(data, monkeypatch):
    features, labels = data[0], data[1][:, ::2]
    validation = features[250:], labels[250:]
    train = features[:30], labels[:30]
    best = best_on(validation, ridge, train)
    alone = []
    for l2 in pixels.PENALTIES:
        monkeypatch.setattr(pixels, "PENALTIES", (l2,))
        alone.append(best_on(validation, ridge, train).validation_auroc)
    assert best.validation_auroc == max(alone) > min(alone)


def test_pixels_are_means_of_the_image():
    image = torch.zeros(2, 1, 48, 96, dtype=torch.uint8)
    image[1, 0, :2, 4:8] = 255
    features = Pixels()(image)
    assert features.shape == (2, 576)
    assert torch.equal(features[1].nonzero().flatten(), torch.tensor([1]))
    assert features[1, 1] == 1


def test_other_names_get_the_probe(data):
    features, labels = data
    settings = Probe(l2=[0.1])
    probe = fit_for("pretrained", features, labels, validation=data, settings=settings)
    floor = fit_for(PIXELS, features, labels, validation=data, settings=settings)
    assert probe.l2 == 0.1
    assert not np.allclose(probe.scores(features), floor.scores(features))
    assert auroc(floor.scores(features)[:, 0], labels[:, 0]) > 0.75

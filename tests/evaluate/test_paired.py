"""Encoders on the same images: their differences are over the same patients."""

import numpy as np
import pytest

from mlvicx_dist.config import Bootstrap
from mlvicx_dist.evaluate.paired import compare


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (120, 2)).astype(float)
    return labels + rng.normal(size=(120, 2)), labels, np.arange(120) // 2


def test_both_see_the_same_patients_in_each_draw(data):
    """An encoder that ranks alike differs by nothing in any draw; one that is near, by little."""
    scores, labels, patients = data
    noise = 0.1 * np.random.default_rng(1).normal(size=scores.shape)
    by_encoder = {"one": scores, "alike": 3 * scores + 1, "near": scores + noise}
    for areas in (
        compare(by_encoder, labels, patients, ["a", "b"], Bootstrap(draws=200))[metric]
        for metric in ("auroc", "auprc")
    ):
        assert areas["difference"]["mean"] == {"value": 0, "low": 0, "high": 0}
        near, alone = areas["over_near"]["mean"], areas["one"]["mean"]
        assert 0 < near["high"] - near["low"] < 0.4 * (alone["high"] - alone["low"])


def test_the_mean_is_over_classes_and_lies_in_its_interval(data):
    scores, labels, patients = data
    noise = np.random.default_rng(1).normal(size=scores.shape)
    result = compare(
        {"one": scores, "other": noise}, labels, patients, ["a", "b"], Bootstrap(draws=200)
    )["auroc"]
    for name in ("one", "other", "difference"):
        mean = result[name]["mean"]
        assert mean["value"] == pytest.approx(
            (result[name]["a"]["value"] + result[name]["b"]["value"]) / 2
        )
        assert mean["low"] < mean["value"] < mean["high"]

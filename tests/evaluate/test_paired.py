"""Encoders on the same images: their differences are over the same patients."""

import numpy as np
import pytest

from mlvicx_dist.config import Bootstrap
from mlvicx_dist.evaluate.metrics import bootstrap_means, interval
from mlvicx_dist.evaluate.paired import compare, compare_means


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


def test_a_drawn_mean_is_that_of_the_repeated_images():
    """Draws of whole patients: 2,000 of them have the mean and the spread of a plain bootstrap."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    values = rng.random(len(patients)) + (patients % 2)
    drawn = bootstrap_means(values, patients, draws=2000, seed=0)
    plain = []
    for _ in range(2000):
        rows = [np.flatnonzero(patients == one) for one in rng.integers(0, 40, 40)]
        plain.append(values[np.concatenate(rows)].mean())
    assert drawn.mean() == pytest.approx(np.mean(plain), abs=0.01)
    assert drawn.std() == pytest.approx(np.std(plain), rel=0.08)
    # Several images of a patient do not count as several patients.
    alone = bootstrap_means(values, np.arange(len(values)), draws=2000, seed=0)
    assert drawn.std() > 1.3 * alone.std()


def test_differences_of_means_are_paired():
    rng = np.random.default_rng(0)
    values, patients = rng.random(60), np.arange(60) // 2
    by_name = {"one": values, "alike": values - 0.25, "chance": np.full(60, 0.5)}
    found = compare_means(by_name, patients, Bootstrap(draws=200))
    assert found["difference"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    drawn = bootstrap_means(values, patients, draws=200, seed=0)
    low, high = interval(drawn - 0.5, 0.95)
    assert found["over_chance"] == pytest.approx(
        {"value": values.mean() - 0.5, "low": low, "high": high}
    )

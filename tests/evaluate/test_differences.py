"""What a comparison says of hand-made scores: means, pairs, intervals, and who is the best."""

import math

import numpy as np
import pytest
from scipy import stats

from mlvicx_dist.config import Task
from mlvicx_dist.evaluate.compare_table import tables
from mlvicx_dist.evaluate.delong import delong
from mlvicx_dist.evaluate.differences import areas_of, best_on_validation, judged
from mlvicx_dist.evaluate.metrics import auroc, bootstrap_areas, half_width, over_classes
from mlvicx_dist.evaluate.task import Images, Scores

PATIENTS, EACH = 80, 2


@pytest.fixture(scope="module")
def images():
    """160 images of 80 patients with two classes; half of the patients are AP."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(PATIENTS), EACH)
    labels = np.repeat(rng.integers(0, 2, (PATIENTS, 2)), EACH, axis=0).astype(float)
    labels[3, 1] = np.nan
    few = {"fraction": 0.1, "patients": 4, "images": [8, 8], "classes": ["a"], "left_out": {}}
    about = {
        "classes": ["a", "b"],
        "left_out": {},
        "splits": {"test": {"images": 160, "patients": 80}},
        "shares": [few],
        "overlap": {"unknown": "overlap is off"},
    }
    groups = {"view AP": patients < 40, "view PA": patients >= 40}
    return Images(labels, patients, np.arange(160).astype(str), groups, about)


def scores(images, *, signal, seed, validation=0.7, few=0.6):
    rng = np.random.default_rng(seed)
    probe = signal * np.nan_to_num(images.labels) + rng.normal(size=images.labels.shape)
    draws = np.array([few, few + 0.02])
    resampled = draws[:, None] + rng.normal(0, 0.01, (2, 200))
    return Scores(probe, validation, [(draws, resampled)], np.zeros((160, 2), np.float32))


def task(**changes):
    tree = {"name": "t", "data": {"shards": ["x"]}, "bootstrap": {"draws": 200}}
    return Task.model_validate(tree | changes)


@pytest.fixture(scope="module")
def methods(images):
    return {
        "good": {s: scores(images, signal=2.0, seed=s, validation=0.8) for s in (0, 1, 2)},
        "bad": {s: scores(images, signal=0.3, seed=10 + s, validation=0.7) for s in (0, 1)},
        # Better on the test images than on the validation images.
        "lucky": {0: scores(images, signal=1.5, seed=20, validation=0.6)},
    }


@pytest.fixture(scope="module")
def result(methods, images):
    return judged(methods, images, task(), reference="good", baselines=["bad", "lucky"])


def by_hand(one, images):
    return np.mean([auroc(one.probe[:, k], images.labels[:, k]) for k in range(2)])


def test_a_mean_is_over_classes_and_seeds(result, methods, images):
    values = [by_hand(methods["good"][seed], images) for seed in (0, 1, 2)]
    cell = result["auroc"]["good"]["mean"]
    assert cell["value"] == pytest.approx(np.mean(values))
    assert list(cell["seeds"].values()) == pytest.approx(values)
    assert cell["low"] < cell["value"] < cell["high"]
    assert result["auroc"]["good"]["a"]["value"] == pytest.approx(
        np.mean([auroc(methods["good"][s].probe[:, 0], images.labels[:, 0]) for s in (0, 1, 2)])
    )


def test_a_difference_is_the_mean_over_the_seeds_that_both_have(result, methods, images):
    """`bad` has no seed 2, so that the reference's seed 2 has no part in it."""
    apart = result["difference"]["auroc"]["bad"]["mean"]
    pairs = [
        by_hand(methods["bad"][s], images) - by_hand(methods["good"][s], images) for s in (0, 1)
    ]
    assert list(apart["seeds"].values()) == pytest.approx(pairs)
    assert apart["value"] == pytest.approx(np.mean(pairs))
    assert apart["high"] < 0


def test_an_interval_counts_the_spread_of_pairs_and_the_same_patients(result, methods, images):
    """The variance of the pairs' mean plus that of its bootstrap; Student's quantile."""
    pairs, drawn = [], []
    for s in (0, 1):
        first, second = (
            over_classes(
                bootstrap_areas(
                    methods[m][s].probe, images.labels, images.patients, draws=200, seed=0
                ).auroc
            )
            for m in ("bad", "good")
        )
        drawn.append(first - second)
        pairs.append(by_hand(methods["bad"][s], images) - by_hand(methods["good"][s], images))
    of_seeds, of_patients = np.var(pairs, ddof=1) / 2, np.var(np.mean(drawn, 0), ddof=1)
    total = of_seeds + of_patients
    freedom = total**2 / (of_seeds**2 / 1 + of_patients**2 / (PATIENTS - 1))
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(total)
    apart = result["difference"]["auroc"]["bad"]["mean"]
    assert apart["high"] - apart["value"] == pytest.approx(reach)


def test_what_two_methods_share_cancels(images):
    """The same scores are no difference, with no doubt of it, whatever seeds and patients do."""
    one = {s: scores(images, signal=1.0, seed=s) for s in (0, 1, 2)}
    twin = {s: Scores(2 * x.probe + 1, 0.7, x.few, x.plane) for s, x in one.items()}
    found = judged({"one": one, "twin": twin}, images, task(), reference="one", baselines=[])
    cell = found["difference"]["auroc"]["twin"]["mean"]
    assert (cell["low"], cell["value"], cell["high"]) == (0, 0, 0)
    assert found["auroc"]["one"]["mean"]["high"] - found["auroc"]["one"]["mean"]["low"] > 0.02


def test_intervals_of_crossed_seeds_and_patients_cover():
    """No true difference: three pairs and 60 patients hold 0 in at least 95 of 100 cases."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        of_patient, of_seed = rng.normal(0, 0.08, 60), rng.normal(0, 0.01, 3)
        each = of_seed[:, None] + of_patient + rng.normal(0, 0.05, (3, 60))
        times = rng.multinomial(60, np.full(60, 1 / 60), size=200)
        values, resampled = each.mean(1), each @ times.T / 60
        held += abs(values.mean()) <= half_width(values, resampled, 60, 0.95)
    assert 0.93 <= held / 1000 <= 0.99


def test_each_crossed_factor_counts_once():
    """Seeds and draws of labels: the variance of each one's means, as in a two-way table."""
    values = np.array([[0.70, 0.74, 0.72], [0.76, 0.80, 0.81]])
    still = np.repeat(values[..., None], 9, 2)
    parts = [np.var(values.mean(1), ddof=1) / 2, np.var(values.mean(0), ddof=1) / 3]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 1 + parts[1] ** 2 / 2)
    expected = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert half_width(values, still, 50, 0.95) == pytest.approx(expected)
    # One seed leaves the draws alone.
    alone = half_width(values[:1], still[:1], 50, 0.95)
    assert alone == pytest.approx(half_width(values[0], still[0], 50, 0.95))


def test_the_best_baseline_is_chosen_on_the_validation_images(result, methods, images):
    over = result["over_best"]
    assert over["baseline"] == "bad"
    assert by_hand(methods["lucky"][0], images) > by_hand(methods["bad"][0], images)
    assert over["auroc"]["mean"]["value"] == pytest.approx(
        -result["difference"]["auroc"]["bad"]["mean"]["value"]
    )
    assert best_on_validation({}) is None


def test_a_subgroup_is_judged_by_its_own_images(result, methods, images):
    chosen = images.groups["view AP"]
    one = result["subgroups"]["view AP"]
    assert (one["images"], one["patients"]) == (80, 40)
    value = np.mean(
        [auroc(methods["lucky"][0].probe[chosen, k], images.labels[chosen, k]) for k in range(2)]
    )
    assert one["methods"]["lucky"]["value"] == pytest.approx(value)
    apart = value - np.mean(
        [auroc(methods["good"][0].probe[chosen, k], images.labels[chosen, k]) for k in range(2)]
    )
    assert one["difference"]["lucky"]["value"] == pytest.approx(apart)


def test_few_labels_are_means_over_seeds_and_draws(result, methods):
    share = result["few_labels"][0]
    assert share["methods"]["good"]["value"] == pytest.approx(0.61)
    assert share["difference"]["bad"]["value"] == pytest.approx(0.0)
    assert share["classes"] == ["a"]


def test_a_share_says_what_is_gained_over_the_best_baseline(images):
    """The one that is best on the validation images, not at the share."""
    few = {"good": 0.70, "bad": 0.67, "lucky": 0.69}
    validated = {"good": 0.8, "bad": 0.7, "lucky": 0.6}
    methods = {
        name: {
            s: scores(images, signal=1.0, seed=s, validation=validated[name], few=value)
            for s in (0, 1)
        }
        for name, value in few.items()
    }
    found = judged(methods, images, task(), reference="good", baselines=["bad", "lucky"])
    over = found["few_labels"][0]["over_best"]
    assert over["baseline"] == "bad" and over["value"] == pytest.approx(0.03)
    assert over["low"] < over["value"] < over["high"]
    result = {
        "reference": "good",
        "confidence": {"t": 0.95},
        "budget": "images",
        "methods": {name: {"floor": None, "runs": {}} for name in methods},
        "tasks": {"t": found},
        "missing": {},
    }
    (share,) = (table for table in tables(result) if "few labels" in table.title)
    assert share.notes[0].startswith("good minus bad, of the others the best on the validation")
    assert f"AUROC +0.030 [{over['low']:+.3f}" in share.notes[0]
    alone = judged(methods, images, task(), reference="good", baselines=[])
    assert alone["few_labels"][0]["over_best"] is None


def test_raw_pixels_are_the_same_for_every_seed(methods, images):
    """Their scores count once: no spread of seeds, as if there were one."""
    pixels = methods["lucky"][0]
    thrice, once = (
        areas_of(by_seed, images.labels, images.patients, ["a", "b"], task().bootstrap)
        for by_seed in ({0: pixels, 1: pixels, 2: pixels}, {0: pixels})
    )
    reach = []
    for figures in (thrice, once):
        drawn = figures["auroc"]["mean"].values()
        values = np.array([one.value for one in drawn])
        reach.append(half_width(values, np.array([one.resampled for one in drawn]), 80, 0.95))
    assert reach[0] == pytest.approx(reach[1])


def test_delong_of_several_runs_is_that_of_their_mean_auroc(result, methods, images):
    labels = images.labels[:, 0]
    first, second = (
        np.stack([methods[m][s].probe[:, 0] for s in (0, 1)], 1) for m in ("bad", "good")
    )
    assert result["delong"]["bad"]["a"] == delong(first, second, labels)
    # Twice the same run is that run.
    twice = np.stack([first[:, 0]] * 2, 1)
    assert delong(twice, second[:, 0], labels) == pytest.approx(
        delong(first[:, 0], second[:, 0], labels)
    )
    # Each image a patient of its own: the bootstrap's variance of the mean over the runs.
    drawn = np.zeros(1000)
    for sign, columns in ((1, first), (-1, second)):
        for column in columns.T:
            area = bootstrap_areas(
                column[:, None], labels[:, None], np.arange(160), draws=1000, seed=1
            )
            drawn += sign * area.auroc[:, 0] / 2
    z = drawn.mean() / drawn.std()
    assert delong(first, second, labels) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=0.6)


def test_an_interval_ends_where_areas_do(images):
    """Of one encoder at 1, of a difference at -1 and 1."""
    perfect = {0: scores(images, signal=1e3, seed=0)}
    near = {0: scores(images, signal=3.5, seed=1)}
    found = judged({"a": perfect, "b": near}, images, task(), reference="a", baselines=[])
    assert found["auroc"]["a"]["mean"]["high"] == 1 and found["auroc"]["b"]["mean"]["high"] <= 1
    assert -1 <= found["difference"]["auroc"]["b"]["mean"]["low"] < 0


def test_draws_without_a_positive_are_counted(methods, images):
    rare = images.labels.copy()
    rare[:, 1] = 0
    rare[0, 1] = 1
    changed = Images(rare, images.patients, images.keys, {}, images.about | {"shares": []})
    found = judged(methods, changed, task(), reference="good", baselines=[])
    # No draw of 80 patients holds this one: 0.9875 ** 80 = 0.366.
    assert 45 < found["undefined_draws"]["b"] < 105
    assert found["over_best"] is None

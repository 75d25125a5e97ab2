"""Few labels: who is drawn, what a share cannot judge, and what the intervals cover."""

import numpy as np
import pytest
from scipy.stats import t

from mlvicx_dist.config import EvaluateConfig, FewLabels
from mlvicx_dist.evaluate.few import drawn_rows, few_labels
from mlvicx_dist.evaluate.metrics import auroc, half_width
from mlvicx_dist.evaluate.parts import Part, Parts
from mlvicx_dist.evaluate.probe import fit_probe


def part(split, rows, labels, patients):
    return Part(split, rows, labels[rows], patients[rows])


@pytest.fixture(scope="module")
def data():
    """200 patients of two images; the class `b` is rare among the training ones."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (400, 2)).astype(float)
    labels[:200, 1] = 0
    labels[:4, 1] = 1
    patients = np.array([f"p{i // 2:03}" for i in range(400)])
    seeing = rng.normal(size=(400, 5)).astype(np.float32)
    seeing[:, 0] += 2 * labels[:, 0]
    blind = rng.normal(size=(400, 5)).astype(np.float32)
    place = np.arange(400)
    parts = Parts(
        part("train", place < 200, labels, patients),
        part("val", (place >= 200) & (place < 280), labels, patients),
        part("test", place >= 280, labels, patients),
        ["a", "b"],
        {},
    )
    return {"pretrained": seeing, "untrained": blind}, parts


def settings():
    tree = {"kind": "evaluate", "name": "t", "data": {"shards": ["x"]}, "bootstrap": {"draws": 100}}
    return EvaluateConfig.model_validate(tree)


def test_whole_patients_are_drawn_and_shares_are_nested(data):
    train = data[1].train
    few = FewLabels(seed=3)
    small, large = (drawn_rows(train, fraction, few) for fraction in (0.1, 0.3))
    for less, more in zip(small, large, strict=True):
        assert not (less & ~more).any()
        assert (len(set(train.patients[less])), less.sum()) == (10, 20)
        assert (len(set(train.patients[more])), more.sum()) == (30, 60)
    assert len({less.tobytes() for less in small}) == 5
    assert len(drawn_rows(train, 1.0, few)) == 1
    assert drawn_rows(train, 1.0, few)[0].all()


def test_the_seed_alone_decides_the_draws(data):
    """Not the order of the images, and not what else is asked."""
    train = data[1].train
    order = np.random.default_rng(0).permutation(200)
    turned = Part("train", train.rows, train.labels[order], train.patients[order])
    few, more = FewLabels(seed=3), FewLabels(seed=3, draws=7, fractions=[0.1])
    for one, other in zip(drawn_rows(train, 0.1, few), drawn_rows(turned, 0.1, more), strict=False):
        assert set(train.patients[one]) == set(turned.patients[other])
    others = drawn_rows(train, 0.1, FewLabels(seed=4))
    assert not np.array_equal(others[0], drawn_rows(train, 0.1, few)[0])


def test_each_share_is_a_probe_on_its_patients(data):
    features, parts = data
    few = FewLabels(fractions=[0.1, 1.0])
    tenth, whole = few_labels(features, parts, settings(), few)
    chosen = drawn_rows(parts.train, 0.1, few)[2]
    x = features["pretrained"]
    probe = fit_probe(
        x[parts.train.rows][chosen],
        parts.train.labels[chosen][:, :1],
        validation=(x[parts.val.rows], parts.val.labels[:, :1]),
        settings=settings().probe,
    )
    area = auroc(probe.scores(x[parts.test.rows])[:, 0], parts.test.labels[:, 0])
    assert tenth["pretrained"]["draws"][2] == pytest.approx(area)
    assert tenth["difference"]["value"] == pytest.approx(
        tenth["pretrained"]["value"] - tenth["untrained"]["value"]
    )
    assert (whole["patients"], whole["images"], whole["classes"]) == (100, [200], ["a", "b"])
    assert tenth["difference"]["low"] > 0
    assert tenth["images"] == [20] * 5


def test_a_class_that_a_share_cannot_hold_is_left_out_by_name(data):
    features, parts = data
    tenth, hundredth = few_labels(features, parts, settings(), FewLabels(fractions=[0.1, 0.01]))
    assert tenth["classes"] == ["a"]
    assert "of 5 draws have no positive or no negative of b" in tenth["left_out"]["b"]
    # One patient has two images: some draw holds one label value of either class.
    assert hundredth["patients"] == 1
    assert hundredth["left_out"].keys() == {"a", "b"}
    assert "difference" not in hundredth


def test_the_interval_counts_draws_and_patients():
    rng = np.random.default_rng(0)
    values, patients = np.array([0.7, 0.8, 0.9, 0.75, 0.85]), rng.normal(0.8, 0.03, 4000)
    still = np.tile(patients, (5, 1))
    # No spread of draws: the interval over patients; none of patients: Student's over draws.
    alone = half_width(np.full(5, 0.8), still, 500, 0.95)
    assert alone == pytest.approx(1.965 * 0.03, rel=0.03)
    of_draws = half_width(values, np.full((5, 9), 0.8), 500, 0.95)
    assert of_draws == pytest.approx(t.ppf(0.975, 4) * values.std(ddof=1) / np.sqrt(5))
    both = half_width(values, still, 500, 0.95)
    assert both > max(alone, of_draws) * 0.95
    assert both > np.hypot(1.96 * values.std(ddof=1) / np.sqrt(5), 1.96 * 0.03)

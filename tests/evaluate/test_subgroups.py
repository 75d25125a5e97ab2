"""Subgroups: who is in which, and what each can judge."""

import numpy as np
import pytest

from mlvicx_dist.config import EvaluateConfig
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.evaluate.metrics import auroc
from mlvicx_dist.evaluate.paired import compare
from mlvicx_dist.evaluate.subgroups import members, subgroups


def settings(**changes):
    tree = {"kind": "evaluate", "name": "t", "data": {"shards": ["x"]}, "bootstrap": {"draws": 100}}
    return EvaluateConfig.model_validate({**tree, **changes})


ABOUT = [
    {"sex": "F", "view": "PA", "age": 0},
    {"sex": "M", "view": "AP", "age": 17},
    {"sex": None, "view": "LL", "age": None},
    {"sex": "F", "view": None, "age": 18},
    {"sex": "M", "view": "PA", "age": 89},
]


def test_who_is_in_which():
    found = {name: np.flatnonzero(chosen).tolist() for name, chosen in members(ABOUT, [18, 65])}
    assert found == {
        "sex F": [0, 3],
        "sex M": [1, 4],
        "view AP": [1],
        "view PA": [0, 4],
        "age 0-17": [0, 1],
        "age 18-64": [3],
        "age 65+": [4],
    }


def test_a_subgroup_is_judged_by_its_own_images_and_says_what_it_cannot_judge():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (200, 2)).astype(float)
    about = [{"sex": "FM"[i % 2], "view": "PA", "age": 50} for i in range(200)]
    women = np.arange(200) % 2 == 0
    labels[women, 1] = 0
    scores = {name: rng.normal(size=(200, 2)) for name in ("pretrained", "untrained")}
    # The encoder is good for women and blind for men, and the other way round.
    scores["pretrained"][women, 0] += 3 * labels[women, 0]
    scores["untrained"][~women, 0] += 3 * labels[~women, 0]
    patients = np.arange(200) // 4
    found = subgroups(scores, labels, patients, about, ["a", "b"], settings())
    one = found["sex F"]
    area = auroc(scores["pretrained"][women, 0], labels[women, 0])
    assert one["pretrained"]["a"]["value"] == pytest.approx(area)
    assert one["difference"]["a"]["low"] > 0.2
    assert found["sex M"]["difference"]["a"]["high"] < -0.2
    assert one["left_out"] == {"b": "only 0 for b in the subgroup sex F"}
    assert one["pretrained"]["mean"] == one["pretrained"]["a"]
    assert (one["images"], one["patients"]) == (100, 50)
    assert found["age 0-17"] == {
        "images": 0,
        "patients": 0,
        "positives": {"a": 0, "b": 0},
        "left_out": {c: f"no label for {c} in the subgroup age 0-17" for c in "ab"},
    }
    whole = compare(scores, labels, patients, ["a", "b"], settings().bootstrap)
    assert found["view PA"]["difference"] == whole["auroc"]["difference"]


def test_with_folds_a_subgroup_judges_what_one_of_its_folds_can_compare():
    about = [{"sex": "F", "age": 70 if i < 3 else 30} for i in range(12)]
    labels = np.array([[1, 0, 0] + [0, 1] * 4 + [0]]).T.astype(float)
    scores = {name: np.arange(12.0)[:, None] for name in ("pretrained", "untrained")}
    folds = np.array([0, 1, 2, 0, 0, 1, 1, 2, 2, 0, 1, 2])
    found = subgroups(scores, labels, np.arange(12), about, ["a"], settings(), folds)
    assert found["age 65+"]["left_out"] == {
        "a": "no label for a in the folds with both labels, of the subgroup age 65+"
    }
    assert "pretrained" not in found["age 65+"]
    assert found["age 65+"]["positives"] == {"a": 1}
    assert found["age 18-39"]["left_out"] == {}
    assert found["age 18-39"]["pretrained"]["a"]["value"] == auroc(
        scores["pretrained"][3:, 0], labels[3:, 0], folds[3:]
    )


def test_bands_must_rise():
    from mlvicx_dist.config import parse_config

    tree = {"kind": "evaluate", "name": "t", "data": {"shards": ["x"]}, "age_bands": [40, 18]}
    with pytest.raises(ConfigError, match="age_bands must rise"):
        parse_config(tree, "t")

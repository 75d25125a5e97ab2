"""Splits: by patient, by construction."""

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.splits import Fractions, assign

SALT = b"\x03" * 32


def record(image, patient, split=None):
    return Record(
        source="s",
        image_id=str(image),
        path="x",
        patient_id=str(patient),
        labels={},
        split=split,
    )


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(0, 5))
def test_no_patient_is_in_two_splits_and_nobody_moves(patients, dropped):
    records = [record(i, p) for i, p in enumerate(patients)]
    splits = assign(records, salt=SALT, fractions=Fractions())
    found = defaultdict(set)
    for r, split in zip(records, splits, strict=True):
        found[r.patient_id].add(split)
    assert all(len(s) == 1 for s in found.values())
    fewer = assign(records[dropped:], salt=SALT, fractions=Fractions())
    assert fewer == splits[dropped:]


def test_fractions_are_met():
    splits = assign([record(i, i) for i in range(5000)], salt=SALT, fractions=Fractions())
    counts = Counter(splits)
    assert abs(counts["train"] / 5000 - 0.7) < 0.03
    assert abs(counts["val"] / 5000 - 0.1) < 0.02


def test_official_splits_stay_and_train_val_is_cut_by_patient():
    records = [record(i, i // 2, "test" if i % 20 < 2 else "train_val") for i in range(2000)]
    splits = assign(records, salt=SALT, fractions=Fractions())
    assert all((s == "test") == (r.split == "test") for r, s in zip(records, splits, strict=True))
    counts = Counter(splits)
    assert abs(counts["val"] / (counts["val"] + counts["train"]) - 0.125) < 0.03


def test_a_patient_in_two_official_splits_is_an_error():
    with pytest.raises(DataError, match=r"1 patients .* --no-official-splits"):
        assign([record(1, 1, "train"), record(2, 1, "test")], salt=SALT, fractions=Fractions())


@pytest.mark.parametrize("parts", [(0.5, 0.1, 0.1), (math.nan,) * 3, (0.0, 0.5, 0.5)])
def test_fractions_that_do_not_sum_to_one_are_refused(parts):
    with pytest.raises(ConfigError, match="sum to 1"):
        Fractions(*parts)

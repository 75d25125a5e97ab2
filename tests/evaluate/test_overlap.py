"""Test images in the pretraining shards are found, by key and by hash."""

from dataclasses import replace

import pytest
import yaml

from mlvicx_dist.config import PretrainConfig, parse_config, to_tree
from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.overlap import label_overlap, overlap_with_run, overlap_words
from mlvicx_dist.evaluate.task import images_of
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.stream.shardset import ShardSet


@pytest.fixture(scope="module")
def tested(phantom_shards):
    """What is known of the images of the test split."""
    shards = ShardSet.open([phantom_shards], splits=["test"])
    return [shards.about(k) for k in range(len(shards))]


def run_on(folder, splits, run_dir):
    """A run's folder as far as it is looked at."""
    tree = {
        "kind": "pretrain",
        "run": {"name": "r"},
        "data": {"shards": [{"path": str(folder)}], "splits": splits},
    }
    config = to_tree(PretrainConfig.model_validate(tree))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


def test_other_splits_of_the_same_folder_do_not_overlap(tested, phantom_shards, tmp_path):
    found = overlap_with_run(
        tested, [phantom_shards], run_on(phantom_shards, ["train", "val"], tmp_path)
    )
    assert (found["images"], found["patients"]) == (0, 0)
    assert (found["tested"], found["seen"]) == (len(tested), 60 - len(tested))


def test_images_that_pretraining_read_are_counted_by_key(tested, phantom_shards, tmp_path):
    found = overlap_with_run(
        tested[:5], [phantom_shards], run_on(phantom_shards, ["train", "test"], tmp_path)
    )
    assert (found["images"], found["same_key"], found["near_duplicates"]) == (5, 5, 5)
    assert found["patients"] == len({one["patient"] for one in tested[:5]})
    assert "5 of 5 test images" in overlap_words(found)


def test_images_under_another_salt_are_found_by_their_hash(
    tested, phantom_shards, phantom_records, tmp_path
):
    settings = PackSettings(short_side_px=48, fractions=Fractions(1.0, 0.0, 0.0))
    pack(phantom_records, tmp_path / "shards", settings=settings, salt=b"\x02" * 32)
    found = overlap_with_run(
        tested, [phantom_shards], run_on(tmp_path / "shards", ["train"], tmp_path)
    )
    assert (found["same_key"], found["near_duplicates"]) == (0, len(tested))
    assert found["images"] == len(tested)
    # Copies are of the same patients, whatever they are called.
    assert found["patients"] == len({one["patient"] for one in tested})
    assert not found["patients_known"]
    assert "so that patients cannot be compared" in overlap_words(found)


def test_patients_under_another_name_cannot_be_compared(
    tested, phantom_shards, phantom_records, tmp_path
):
    renamed = [replace(record, source="other") for record in phantom_records]
    settings = PackSettings(short_side_px=48, fractions=Fractions(1.0, 0.0, 0.0))
    pack(renamed, tmp_path / "shards", settings=settings, salt=b"\x01" * 32)
    config = learned(tmp_path / "shards", ["train"], tmp_path)
    # Other images, of whomever: no copy is among them.
    others = [{**one, "key": f"{k:032x}", "phash": f"{k:064x}"} for k, one in enumerate(tested)]
    found = label_overlap(others, [], [phantom_shards], config, where="here")
    assert not found["patients_known"]
    words = overlap_words({"unknown": "overlap is off", "labels": found})
    assert "no test patient" not in words and "patients cannot be compared" in words


def test_what_cannot_be_told_is_said(tested, phantom_shards, tmp_path):
    found = overlap_with_run(tested, [phantom_shards], tmp_path)
    assert "there is no" in overlap_words(found)
    found = overlap_with_run(
        tested, [phantom_shards], run_on(tmp_path / "gone", ["train"], tmp_path)
    )
    assert "unknown" in overlap_words(found)
    assert str(tmp_path / "gone") in overlap_words(found)


def learned(folder, splits, run_dir, **changes):
    """A run that learned labels, as far as it is looked at; its settings."""
    tree = {
        "kind": "pretrain",
        "method": "supervised",
        "run": {"name": "r"},
        "data": {"shards": [{"path": str(folder)}], "splits": splits},
        "loss": {"label_splits": splits},
    }
    config = PretrainConfig.model_validate(tree | changes)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    return config


def known_of(folder, *splits):
    shards = ShardSet.open([folder], splits=splits)
    return [shards.about(k) for k in range(len(shards))]


def test_images_whose_labels_were_learned_are_counted(tested, phantom_shards, tmp_path):
    config = learned(phantom_shards, ["train"], tmp_path)
    train, val = known_of(phantom_shards, "train"), known_of(phantom_shards, "val")
    found = label_overlap(tested, train + val, [phantom_shards], config, where="here")
    count = len(train) + len(val)
    known = {"patients_known": True}
    assert found == {"splits": ["train"], "images": len(train), "of": count, **known}
    words = overlap_words({"unknown": "overlap is off", "labels": found})
    assert "learned the labels of the split train" in words
    assert f"{len(train)} of the {len(train) + len(val)} images that the probe" in words
    whole = overlap_words({**overlap_with_run(tested, [phantom_shards], tmp_path), "labels": found})
    assert "labels were not read" not in whole and f"0 of {len(tested)} test" in whole
    unknown = overlap_words({"unknown": "x", "labels": {"splits": ["train"], "unknown": "gone"}})
    assert "whether test patients are among them is unknown (gone)" in unknown


def test_test_patients_whose_labels_were_learned_are_refused(
    tested, phantom_shards, phantom_records, tmp_path
):
    config = learned(phantom_shards, ["train", "test"], tmp_path)
    with pytest.raises(DataError, match=rf"^here: .* of {len(tested)} of these {len(tested)}"):
        label_overlap(tested, [], [phantom_shards], config, where="here")
    # Another image of a patient is enough.
    other = [{**tested[0], "key": "0" * 32, "phash": "0" * 64}]
    with pytest.raises(DataError, match="of 0 of these 1 images and of 1 of their patients"):
        label_overlap(other, [], [phantom_shards], config, where="here")
    # What was seen without a label was not learned.
    bare = [replace(one, labels=dict.fromkeys(one.labels)) for one in phantom_records]
    settings = PackSettings(short_side_px=48, fractions=Fractions(1.0, 0.0, 0.0))
    pack(bare, tmp_path / "bare", settings=settings, salt=b"\x01" * 32)
    config = learned(tmp_path / "bare", ["train"], tmp_path)
    assert label_overlap(tested, tested, [phantom_shards], config, where="here")["images"] == 0


def test_weights_that_a_run_began_with_are_not_vouched_for(tested, phantom_shards, tmp_path):
    found = overlap_with_run(tested, [phantom_shards], run_on(phantom_shards, ["train"], tmp_path))
    assert overlap_words(found).endswith("labels were not read.")
    learned(phantom_shards, ["train"], tmp_path, method="mlvicx", loss={}, train={"init_from": "x"})
    words = overlap_words(overlap_with_run(tested, [phantom_shards], tmp_path))
    assert words.endswith("(train.init_from) nothing is known.")


def test_copies_of_judged_images_under_another_name_are_refused(
    phantom_shards, phantom_records, tmp_path
):
    """One source has images of the other, under other names: its splits are other ones."""
    renamed = [replace(record, source="other") for record in phantom_records]
    pack(renamed, tmp_path / "s", settings=PackSettings(short_side_px=48), salt=b"\x01" * 32)
    shards = [str(phantom_shards), str(tmp_path / "s")]

    def look(*folders, **changes):
        tree = {"kind": "evaluate", "name": "t", "data": {"shards": folders}, "overlap": False}
        images_of(parse_config(tree | changes, "t"), None)

    look(shards[0])
    look(shards[1])
    for changes in ({}, {"folds": 3}):
        with pytest.raises(DataError, match=r"pairs of an image that is judged and one .* copies"):
            look(*shards, **changes)

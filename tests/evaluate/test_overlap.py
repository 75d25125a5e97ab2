"""Test images in the pretraining shards are found, by key and by hash."""

import json

import pytest
import yaml

from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.evaluate.overlap import overlap_with_run, overlap_words
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.stream.shardset import ShardSet


@pytest.fixture(scope="module")
def tested(phantom_shards):
    """What is known of the images of the test split."""
    shards = ShardSet.open([phantom_shards], splits=["test"])
    return [{"key": shards.key(k), **json.loads(shards.json(k))} for k in range(len(shards))]


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
    found = overlap_with_run(tested, run_on(phantom_shards, ["train", "val"], tmp_path))
    assert (found["images"], found["patients"]) == (0, 0)
    assert (found["tested"], found["seen"]) == (len(tested), 60 - len(tested))


def test_images_that_pretraining_read_are_counted_by_key(tested, phantom_shards, tmp_path):
    found = overlap_with_run(tested[:5], run_on(phantom_shards, ["train", "test"], tmp_path))
    assert (found["images"], found["same_key"], found["near_duplicates"]) == (5, 5, 5)
    assert found["patients"] == len({one["patient"] for one in tested[:5]})
    assert "5 of 5 test images" in overlap_words(found)


def test_images_under_another_salt_are_found_by_their_hash(tested, phantom_records, tmp_path):
    settings = PackSettings(short_side_px=48, fractions=Fractions(1.0, 0.0, 0.0))
    pack(phantom_records, tmp_path / "shards", settings=settings, salt=b"\x02" * 32)
    found = overlap_with_run(tested, run_on(tmp_path / "shards", ["train"], tmp_path))
    assert (found["same_key"], found["near_duplicates"]) == (0, len(tested))
    assert found["images"] == len(tested)
    assert found["patients"] == 0


def test_what_cannot_be_told_is_said(tested, tmp_path):
    found = overlap_with_run(tested, tmp_path)
    assert "there is no" in overlap_words(found)
    found = overlap_with_run(tested, run_on(tmp_path / "gone", ["train"], tmp_path))
    assert "unknown" in overlap_words(found)
    assert str(tmp_path / "gone") in overlap_words(found)

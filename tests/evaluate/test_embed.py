"""Embeddings: frozen, whole, each image once, labels by name."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mlvicx_dist.config import LocalHead, Model, Projector
from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.embed import embed_shards, embed_to_parquet, write_parquet
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.stream.whole import squared

SETTINGS = Model(local=LocalHead(resize_px=8, channels=4, pool=2), projector=Projector(width=8))


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_model(build_model(SETTINGS, 0), 32)


def test_each_image_once_and_nothing_of_the_encoder_moves(encoder, phantom_shards):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.train()
    first = embed_shards([encoder], [phantom_shards], batch_size=7)
    assert not encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    keys = [one["key"] for one in first.about]
    assert len(set(keys)) == 60
    again = embed_shards([encoder], [phantom_shards], batch_size=64, loader_workers=0)
    assert [one["key"] for one in again.about] == keys
    assert np.allclose(first.features[0], again.features[0], atol=1e-5)


def test_labels_stand_under_their_names(encoder, phantom_shards):
    embeddings = embed_shards([encoder], [phantom_shards], splits=["test"], loader_workers=0)
    shards = ShardSet.open([phantom_shards], splits=["test"])
    for sample in range(len(shards)):
        labels = shards.about(sample)["labels"]
        row = embeddings.labels[sample]
        assert {c: int(v) for c, v in zip(embeddings.classes, row, strict=True)} == labels


def test_the_aspect_is_kept_and_the_rest_is_black():
    image = np.full((40, 20), 200, np.uint8)
    square = squared(image, 32)
    assert (square[:, 8:24] == 200).all()
    assert not square[:, :8].any()
    assert not square[:, 24:].any()


def test_parquet_holds_what_is_known_and_no_more(encoder, phantom_shards, tmp_path):
    embeddings = embed_shards([encoder], [phantom_shards], loader_workers=0)
    write_parquet(embeddings, tmp_path / "e.parquet")
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.num_rows == 60
    names = [f"label_{name}" for name in embeddings.classes]
    assert table.column_names == [
        "key",
        "patient",
        "source",
        "split",
        "view",
        "sex",
        "age",
        *names,
        "embedding",
    ]
    stored = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    assert np.array_equal(stored, embeddings.features[0])


def test_a_place_that_cannot_be_is_told_before_the_work(tmp_path):
    out = tmp_path / "gone" / "e.parquet"
    with pytest.raises(DataError, match=r"e\.parquet: .* \(its folder does not exist\)"):
        # There is no such run either.
        embed_to_parquet(
            "/nowhere", [], out, splits=None, batch_size=1, loader_workers=0, use_gpu=False
        )


@pytest.mark.parametrize("small_disk", ["size=8k"], indirect=True)
def test_a_full_disk_leaves_no_part_of_a_file(encoder, phantom_shards, small_disk):
    embeddings = embed_shards([encoder], [phantom_shards], loader_workers=0)
    with pytest.raises(DataError, match=r"cannot be written .*No space left"):
        write_parquet(embeddings, small_disk / "e.parquet")
    assert list(small_disk.iterdir()) == []

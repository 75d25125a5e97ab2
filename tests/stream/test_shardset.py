"""A set of shards on a disk that fails is one sentence."""

import errno
import os

import pytest

from mlvicx_dist.errors import DataError
from mlvicx_dist.stream import shardset
from mlvicx_dist.stream.shardset import ShardSet


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_under_an_open_shard_is_one_sentence(phantom_shards, monkeypatch, number):
    shards = ShardSet.open([phantom_shards], splits=["train"])
    shards.image(0)

    def fail(descriptor, size, offset):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shardset.os, "pread", fail)
    words = rf"train-000000\.tar: the shard cannot be read \({os.strerror(number)}\); run 'mlvicx"
    for read in (shards.image, shards.about):
        with pytest.raises(DataError, match=words):
            read(0)

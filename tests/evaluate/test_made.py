"""Embeddings that are kept: found again, of what they are of, bounded, whole; the same from Ray."""

import json
import logging
import os
import signal
import time

import numpy as np
import pytest
import torch
from processes import run_processes

from mlvicx_dist.config import LocalHead, Model, Projector
from mlvicx_dist.evaluate import embed
from mlvicx_dist.evaluate.embed import Show, embed_shards, embed_some
from mlvicx_dist.evaluate.made import Made, made_by
from mlvicx_dist.evaluate.pixels import Pixels
from mlvicx_dist.model.encoder import Encoder, encoder_digest
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.session import ray_session
from mlvicx_dist.stream import room as rooms
from mlvicx_dist.stream.cache import Cache
from mlvicx_dist.stream.shardset import ShardSet

SETTINGS = Model(
    backbone="test_resnet",
    local=LocalHead(resize_px=8, channels=4, pool=2),
    projector=Projector(width=8),
)


def encoder_of(seed=0):
    return Encoder.from_model(build_model(SETTINGS, seed), 32).eval()


@pytest.fixture
def encoder():
    return encoder_of()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def shown(monkeypatch):
    """How many images each encoder was shown since the last time."""
    seen = []

    def counted(encoders, shards, numbers, show):
        seen.append((len(encoders), sum(shards.sizes[n] for n in numbers)))
        return embed_some(encoders, shards, numbers, show)

    monkeypatch.setattr(embed, "embed_some", counted)

    def since():
        taken, seen[:] = list(seen), []
        return taken

    return since


def made(encoders, folder, cache, **options):
    options = {"loader_workers": 0, "size_px": 32} | options
    return embed_shards(encoders, [folder], cache=cache, **options)


def test_what_was_made_is_not_made_again(encoder, phantom_shards, cache, shown):
    first = made([encoder, Pixels()], phantom_shards, cache)
    assert shown() == [(2, 60)]
    again = made([encoder, Pixels()], phantom_shards, cache)
    assert shown() == []
    assert all(map(np.array_equal, first.features, again.features))
    assert again.about == first.about
    assert np.array_equal(again.labels, first.labels)
    # Of one split, of another order of the encoders.
    test = made([Pixels(), encoder], phantom_shards, cache, splits=["test"])
    assert shown() == []
    rows = first.rows("test")
    assert np.array_equal(test.features[1], first.features[0][rows])
    # One more encoder: that one alone. Another size: all.
    made([encoder, encoder_of(1)], phantom_shards, cache)
    assert shown() == [(1, 60)]
    made([encoder], phantom_shards, cache, size_px=24)
    assert shown() == [(1, 60)]
    # One shard less: that one alone.
    shards = ShardSet.open([phantom_shards], splits=["test"])
    path = cache.path() / f"{Made(made_by(encoder, 32), cache)._name(shards.infos[0])}.npy"
    for change in (path.unlink, lambda: path.write_bytes(path.read_bytes()[:-9])):
        change()
        mended = made([encoder], phantom_shards, cache)
        assert shown() == [(1, shards.sizes[0])]
        assert np.array_equal(mended.features[0], first.features[0])
    assert path.stat().st_mode & 0o777 == 0o600


def test_other_weights_or_other_code_make_other_embeddings(encoder, monkeypatch):
    known = made_by(encoder, 32)
    assert made_by(encoder_of(), 32) == known
    with torch.no_grad():
        next(encoder.parameters()).flatten()[0] += 1e-6
    assert made_by(encoder, 32) != known
    encoder = encoder_of()
    next(b for n, b in encoder.named_buffers() if n.endswith("running_var")).mul_(2)
    assert encoder_digest(encoder) != encoder_digest(encoder_of())
    whole = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: 1.01 * whole(self, images))
    assert made_by(encoder_of(), 32) != known


def test_the_folder_holds_no_more_than_it_may(phantom_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "IN_USE_S", 0.0)
    shards = ShardSet.open([phantom_shards], splits=["train"])
    one = shards.sizes[0] * encoder_of().features * 4 + 128
    cache = Cache(tmp_path / "cache", limit_bytes=3 * one)
    for seed in range(3):
        made([encoder_of(seed)], phantom_shards, cache, splits=["train"])
        time.sleep(0.01)
        held = [path.stat().st_size for path in cache.path().glob("*.npy")]
        assert held and sum(held) <= cache.limit_bytes


def test_where_nothing_can_be_kept_the_embeddings_are_made(
    encoder, phantom_shards, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = made([encoder], phantom_shards, Cache(tmp_path / "file" / "cache"))
    assert len(found.features[0]) == 60
    assert "embeddings are not kept for the next time" in caplog.text


def killed(rank, folder, path):
    """Makes embeddings and dies in the middle of writing the third file."""
    torch.set_num_threads(1)
    count = 0

    def dying(path, data, *, mode):
        nonlocal count
        count += 1
        if count == 3:
            path.with_name(f".{path.name}.{os.getpid()}.partial").write_bytes(data[:99])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, data, mode=mode)

    from mlvicx_dist.evaluate import made as module

    whole, module.write_whole = module.write_whole, dying
    made([encoder_of()], folder, Cache(path))


def test_a_process_that_is_killed_leaves_whole_files(encoder, phantom_shards, cache, shown):
    with pytest.raises(Exception, match="SIGKILL"):
        run_processes(killed, (phantom_shards, cache.path()), 1)
    found = made([encoder], phantom_shards, cache)
    sizes = ShardSet.open([phantom_shards], splits=["train", "val", "test"]).sizes
    ((_, left),) = shown()
    assert left < 60 and 60 - left in {a + b for a in sizes for b in sizes}
    assert np.array_equal(found.features[0], made([encoder], phantom_shards, None).features[0])
    assert len(list(cache.path().glob("*.npy"))) == len(sizes)


def test_batches_and_groups_change_no_bit(encoder, phantom_shards, monkeypatch):
    shards = ShardSet.open([phantom_shards], splits=["train", "val", "test"])
    show = Show(32, batch_size=5, loader_workers=0)
    numbers = range(len(shards.shards))
    together = dict(embed_some([encoder], shards, numbers, show))
    for number in numbers:
        ((_, (alone,)),) = embed_some([encoder], shards, [number], show)
        assert np.array_equal(alone, together[number][0])
    # Another size of the batch is a rounding.
    other = dict(embed_some([encoder], shards, numbers, Show(32, 64, loader_workers=0)))
    scale = max(np.abs(features).max() for (features,) in together.values())
    for number in numbers:
        assert np.abs(other[number][0] - together[number][0]).max() <= 1e-6 * scale
    monkeypatch.setattr(embed, "TASK_IMAGES", 10)
    groups = list(embed._groups(shards, list(numbers)))
    assert [n for group in groups for n in group] == list(numbers)
    assert len(groups) > 2
    assert all(sum(shards.sizes[n] for n in group) >= 10 for group in groups[:-1])


@pytest.mark.slow
def test_ray_tasks_make_what_one_process_makes(encoder, phantom_shards, cache, monkeypatch):
    here = made([encoder, Pixels()], phantom_shards, None)
    monkeypatch.setattr(embed, "connected", lambda: True)
    for images in (1, 25):
        monkeypatch.setattr(embed, "TASK_IMAGES", images)
        with ray_session({"CPU": 1}, asked="this test", remedy="none"):
            there = made([encoder, Pixels()], phantom_shards, cache if images == 1 else None)
        assert all(map(np.array_equal, here.features, there.features))
        assert json.dumps(here.about) == json.dumps(there.about)
    assert list(cache.path().glob("*.npy"))

"""Segmentation: Dice by its definition, what is found on discs, what a test image cannot change."""

import dataclasses

import numpy as np
import pytest
import torch
from discs import MODEL, draw, pack_discs, settings
from runs import encode_runs

from mlvicx_dist.config import Segment
from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.marked import MarkedImages
from mlvicx_dist.evaluate.segment import (
    THRESHOLDS,
    Segmenter,
    dice_of,
    dice_score,
    mask_loss,
    segment,
    train_segmenter,
)
from mlvicx_dist.ingest.masks import RunLengths
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.progress import Progress

SIZE_PX = 32


@pytest.fixture
def encoder():
    return Encoder.from_model(build_model(MODEL, 0), SIZE_PX).eval()


def marked(config, *splits):
    return {split: MarkedImages(config, split, "masks", SIZE_PX) for split in splits}


@pytest.mark.parametrize("seed", range(4))
def test_dice_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    predicted, true = rng.random((2, 7, 9)) < 0.4
    a = {tuple(place) for place in np.argwhere(predicted)}
    b = {tuple(place) for place in np.argwhere(true)}
    assert dice_score(predicted, true) == pytest.approx(2 * len(a & b) / (len(a) + len(b)))


def test_nothing_where_nothing_is_counts_one_and_anything_there_counts_zero():
    nothing, one = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert dice_score(nothing, nothing) == 1
    assert dice_score(one, nothing) == dice_score(nothing, one) == 0
    assert dice_score(one, one) == 1


def test_the_loss_falls_to_zero_at_the_mask():
    masks = (torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    assert mask_loss(40 * (2 * masks - 1), masks) < 1e-6
    assert mask_loss(-40 * (2 * masks - 1), masks) > 20


def test_a_disc_is_found_better_than_by_any_constant(encoder, disc_shards):
    """Half of the images are without one: nothing everywhere has 0.5 over all, 0 over positives."""
    config = settings(disc_shards)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    chosen = Segment(epochs=4, batch_size=8, learning_rate=5e-3, width=8)
    images = marked(config, "train", "val", "test")
    result = segment({"pretrained": encoder, "untrained": encoder}, images, config, chosen)
    assert (result["images"], result["positives"], result["unmarked"]) == (24, 12, 0)
    everything = 2 * np.mean([image_area(images["test"], k) for k in range(0, 24, 2)])
    assert result["dice"]["positive"]["pretrained"]["low"] > max(0.6, 2 * everything)
    over_all = result["dice"]["all"]
    assert over_all["nothing"]["value"] == 0.5
    assert over_all["over_nothing"]["low"] > 0.1
    # The same encoder twice: what is trained is a function of the seed.
    assert over_all["difference"] == {"value": 0, "low": 0, "high": 0}
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def image_area(images, place):
    """The share of an image that its mask takes, at most about the Dice of all pixels / 2."""
    return images[place].finding.mean()


def test_epoch_and_threshold_are_the_best_on_the_validation_images(encoder, disc_shards):
    config = settings(disc_shards)
    images = marked(config, "train", "val")
    chosen = Segment(epochs=3, batch_size=8, learning_rate=5e-3, width=8)
    bar = Progress("t", 3, "epochs")
    trained = train_segmenter(
        Segmenter(encoder, chosen), images["train"], images["val"], config, chosen, bar
    )
    means = dice_of(trained.model, images["val"], THRESHOLDS, config, chosen)[0].mean(0)
    assert means.max() == pytest.approx(max(trained.validation_dice))
    assert THRESHOLDS[int(means.argmax())] == trained.threshold
    assert bar.done == len(trained.validation_dice)


def test_it_ends_when_the_validation_dice_rises_no_more(encoder, disc_shards, monkeypatch):
    """Dice of epochs 0.2, 0.4, 0.3, 0.4: with two of patience the fourth is the last."""
    from mlvicx_dist.evaluate import segment as module

    told = iter([0.2, 0.4, 0.3, 0.4, 0.9])
    monkeypatch.setattr(module, "dice_of", lambda *a: (np.full((1, 19), next(told)), None, None))
    config = settings(disc_shards)
    images = marked(config, "val")
    chosen = Segment(epochs=9, patience_epochs=2, batch_size=24, width=8)
    bar = Progress("t", 9, "epochs")
    trained = train_segmenter(
        Segmenter(encoder, chosen), images["val"], images["val"], config, chosen, bar
    )
    assert (trained.best, trained.validation_dice) == (2, [0.2, 0.4, 0.3, 0.4])


def test_the_encoder_learns_only_where_that_is_asked(encoder, disc_shards):
    config = settings(disc_shards)
    images = marked(config, "val")["val"]
    for asked in (False, True):
        chosen = Segment(epochs=1, batch_size=8, width=8, train_encoder=asked)
        model = Segmenter(encoder, chosen)
        train_segmenter(model, images, images, config, chosen, Progress("t", 1, "epochs"))
        weights = model.encoder.state_dict()
        moved = {k for k, v in encoder.state_dict().items() if not torch.equal(v, weights[k])}
        assert bool(moved) == asked
        assert not any("running" in key for key in moved)


def test_masks_go_the_way_of_their_image(salt, tmp_path):
    """A tall image stands in the middle of a square; so does its mask."""
    shards = pack_discs(tmp_path, salt, height_px=96, counts={"test": 4})
    images = MarkedImages(settings(shards), "test", "masks", SIZE_PX)
    for place in range(len(images)):
        one = images[place]
        assert one.inside == (slice(0, 32), slice(5, 26))
        if one.finding.any():
            disc, rest = one.image[one.finding], one.image[one.inside][~one.finding[one.inside]]
            # Its rim is where the disc only touches a pixel; nothing bright is left outside.
            assert disc.mean() > rest.mean() + 40
            assert rest.max() < disc.mean()
            assert not one.finding[:, :5].any()


@pytest.mark.parametrize("height_px", [64, 96])
def test_no_pixel_of_a_thin_mask_is_lost(height_px, salt, tmp_path):
    """Lines of one pixel, and one pixel alone, at a third of the stored size."""
    records = draw(tmp_path / "pictures", height_px=height_px, counts={"test": 3})
    masks = np.zeros((3, height_px, 64), bool)
    masks[0, 5:60, 17] = masks[1, 31, 8:50] = masks[2, 40, 40] = True
    lines = [
        dataclasses.replace(one, mask=RunLengths((encode_runs(mask),), height_px, 64))
        for one, mask in zip(records, masks, strict=True)
    ]
    pack(lines, tmp_path / "s", salt=salt, settings=PackSettings(short_side_px=64))
    size_px = 21
    images = MarkedImages(settings(tmp_path / "s"), "test", "masks", size_px)
    found = []
    for place, sample in enumerate(images.samples.tolist()):
        stored, one = images.shards.mask(sample) > 0, images[place]
        expected = np.zeros((size_px, size_px), bool)
        rows, columns = one.inside
        down, across = (
            (s.stop - s.start) / n for s, n in zip(one.inside, stored.shape, strict=True)
        )
        for y, x in np.argwhere(stored):
            top, left = int(y * down + 1e-9), int(x * across + 1e-9)
            bottom, right = (int(np.ceil(v - 1e-9)) for v in ((y + 1) * down, (x + 1) * across))
            expected[rows.start :, columns.start :][top:bottom, left:right] = True
        assert np.array_equal(one.finding, expected)
        found.append(one.finding.any())
    assert found == [True] * 3


def test_what_has_no_mask_is_named(phantom_shards, salt, tmp_path):
    with pytest.raises(DataError, match="there are no masks of the split 'test', which segment"):
        MarkedImages(settings(phantom_shards), "test", "masks", SIZE_PX)
    records = draw(tmp_path / "pictures", counts={"train": 4})
    empty = [dataclasses.replace(one, mask=RunLengths((), 64, 64)) for one in records]
    pack(
        [*empty[:3], dataclasses.replace(empty[3], mask=None)],
        tmp_path / "s",
        salt=salt,
        settings=PackSettings(short_side_px=48),
    )
    with pytest.raises(
        DataError, match="all 3 masks of the split 'train' are empty, which segment"
    ):
        MarkedImages(settings(tmp_path / "s"), "train", "masks", SIZE_PX)

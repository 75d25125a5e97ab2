"""The context's maps against boxes: hand-made maps, chance, and what cannot be judged."""

import numpy as np
import pytest
import torch
from discs import MODEL, settings
from torch.nn import functional

from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.evaluate.localise import (
    THRESHOLDS,
    check_context,
    localise,
    peak_hits,
    region_overlap,
)
from mlvicx_dist.evaluate.marked import MarkedImages
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.mlvicx import build_model

SIZE_PX = 32


def encoder(**changes):
    model = MODEL.model_copy(update=changes)
    return Encoder.from_model(build_model(model, 0), SIZE_PX).eval()


def seen_by(function):
    """An encoder whose gates are those of a function of the image; its last level is blind."""
    one = encoder()
    levels = sorted(map(int, one.backbone.gates))

    def maps(images):
        seen = function(images.float() / 255)
        blind = torch.zeros_like(seen)
        return {level: blind if level == levels[-1] else seen for level in levels}

    one.context_maps = maps
    return one


def test_a_peak_counts_where_it_is_in_a_box():
    level = np.zeros((5, 7))
    level[3, 4] = 1
    boxes = np.zeros((5, 7), bool)
    boxes[2:4, 4:6] = True
    assert peak_hits(level, boxes)
    boxes[3, 4] = False
    assert not peak_hits(level, boxes)


def test_the_region_is_the_rectangle_around_all_above_the_threshold():
    level = np.zeros((6, 6))
    level[1, 1], level[3, 4], level[5, 5] = 10, 6, 4
    boxes = np.zeros((6, 6), bool)
    boxes[1:4, 1:3] = True
    # At half of the height rows 1 to 3, columns 1 to 4: 12 pixels, 6 of them in the box.
    assert region_overlap(level, boxes, 0.5) == pytest.approx(6 / 12)
    assert region_overlap(level, boxes, 0.9) == pytest.approx(1 / 6)
    assert region_overlap(level, boxes, 0.0) == boxes.mean()
    assert region_overlap(7 + 3 * level, boxes, 0.5) == pytest.approx(6 / 12)
    assert region_overlap(np.ones((6, 6)), boxes, 0.5) == boxes.mean()


def test_the_maps_are_what_the_gates_multiply_by():
    one = encoder()
    images = torch.randint(0, 256, (2, 1, SIZE_PX, SIZE_PX), dtype=torch.uint8)
    maps = one.context_maps(images)
    levels = one.levels(images)
    seen = []
    for gate in one.backbone.gates.values():
        gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    one.levels(images)
    for (level, gate), x in zip(one.backbone.gates.items(), seen, strict=True):
        hidden = [
            gate.squeeze(pool(x, 1)).relu()
            for pool in (functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d)
        ]
        y = x * gate.excite(hidden[0] + hidden[1]).sigmoid()
        assert torch.allclose(levels[int(level)], y * maps[int(level)], atol=1e-5)
    assert not [hook for gate in one.backbone.gates.values() for hook in gate._forward_hooks]


def test_a_map_that_looks_at_the_disc_beats_chance_and_a_blind_one_does_not(disc_shards):
    config = settings(disc_shards)
    marked = {split: MarkedImages(config, split, "boxes", SIZE_PX) for split in ("val", "test")}
    smooth = seen_by(lambda images: functional.avg_pool2d(images, 5, 1, 2))
    result = localise({"pretrained": smooth, "untrained": encoder()}, marked, config)
    assert result["images"] == 12
    peak, overlap = result["peak"], result["overlap"]
    assert peak["pretrained"]["low"] > 0.8
    assert peak["over_random"]["low"] > 0.5
    assert peak["over_centre"]["low"] > 0.2
    area = np.mean([marked["test"][k].finding.mean() for k in range(12)])
    assert peak["random"]["value"] == pytest.approx(area)
    centre = np.mean([marked["test"][k].finding[16, 16] for k in range(12)])
    assert peak["centre"]["value"] == centre
    assert overlap["whole"]["value"] == pytest.approx(area)
    assert overlap["over_whole"]["low"] > 0.2
    chosen = result["pretrained"]
    assert chosen["peak_level"] != max(map(int, chosen["validation_peak"]))
    assert chosen["threshold"] in THRESHOLDS[3:]


def test_a_blind_map_does_not_hit(disc_shards):
    config = settings(disc_shards)
    marked = {split: MarkedImages(config, split, "boxes", SIZE_PX) for split in ("val", "test")}
    blind = seen_by(lambda images: torch.zeros_like(images))
    result = localise({"pretrained": blind, "untrained": blind}, marked, config)
    assert result["peak"]["over_random"]["high"] < 0
    assert result["overlap"]["over_whole"] == {"value": 0, "low": 0, "high": 0}
    assert result["peak"]["difference"] == {"value": 0, "low": 0, "high": 0}


def test_the_test_images_choose_nothing(disc_shards):
    """Maps that are good on other images than those of the test split: chosen as before."""
    config = settings(disc_shards)
    val = MarkedImages(config, "val", "boxes", SIZE_PX)
    smooth = seen_by(lambda images: functional.avg_pool2d(images, 5, 1, 2))
    found = [
        localise(
            {"pretrained": smooth, "untrained": smooth},
            {"val": val, "test": MarkedImages(config, split, "boxes", SIZE_PX)},
            config,
        )["pretrained"]
        for split in ("test", "train")
    ]
    assert found[0] == found[1]
    seen = found[0]["validation_peak"]
    assert str(found[0]["peak_level"]) == max(seen, key=seen.get)


def test_boxes_stand_where_their_masks_are(disc_shards):
    boxes, masks = (
        MarkedImages(settings(disc_shards), "test", kind, SIZE_PX) for kind in ("boxes", "masks")
    )
    assert len(boxes) == 12
    for place, sample in enumerate(boxes.samples.tolist()):
        box, mask = boxes[place], masks[masks.samples.tolist().index(sample)]
        for axis in (0, 1):
            near, far = (np.flatnonzero(one.finding.any(axis)) for one in (mask, box))
            # The stored pixels that a mask is made of are coarser than a box.
            assert abs(near[0] - far[0]) <= 1
            assert abs(far[-1] - near[-1]) <= 1


def test_what_has_no_box_or_no_context_is_named(phantom_shards, disc_shards):
    with pytest.raises(DataError, match="there are no boxes of the split 'val', which localise"):
        MarkedImages(settings(phantom_shards), "val", "boxes", SIZE_PX)
    other = settings(disc_shards, classes=["square"])
    with pytest.raises(DataError, match="there are no boxes"):
        MarkedImages(other, "val", "boxes", SIZE_PX)
    with pytest.raises(ConfigError, match="this encoder has no context"):
        check_context(encoder(context=False))
    check_context(encoder())

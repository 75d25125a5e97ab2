"""Whether the context looks where the finding is: its maps against boxes, without any training.

The map is the places' gate of a level, which the method itself weighs the image by. Which level
speaks, and the threshold of its region, are the best ones on the validation images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mlvicx_dist.config import EvaluateConfig
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.evaluate.embed import device_of
from mlvicx_dist.evaluate.marked import MarkedImages
from mlvicx_dist.evaluate.paired import compare_means
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.progress import progress

THRESHOLDS = tuple(k / 10 for k in range(10))
"""Of a map that reaches from 0 to 1 in its image; 0 is the whole image."""


@dataclass(frozen=True)
class Looks:
    """What the maps of an encoder are worth, for n images and L levels.

    Attributes:
        levels: L of them.
        hits: Whether the map's peak is in a box, [n, L].
        overlaps: IoU of the region above each threshold with the boxes, [n, L, T].
        area: The share of the image that is in boxes, [n]: the chance of a random point, and the
            IoU of the whole image.
        centre: Whether the middle of the image is in a box, 0 or 1, [n].
        patients: [n].
    """

    levels: list[int]
    hits: np.ndarray
    overlaps: np.ndarray
    area: np.ndarray
    centre: np.ndarray
    patients: np.ndarray


def check_context(encoder: Encoder) -> None:
    """See that there are maps to look at.

    Raises:
        ConfigError: the encoder has no context.
    """
    if not encoder.backbone.gates:
        raise ConfigError(
            "localise: this encoder has no context (model.context is false or model.levels is "
            "empty), so it has no maps to hold against boxes; leave localise out."
        )


def localise(
    encoders: Mapping[str, Encoder], marked: Mapping[str, MarkedImages], settings: EvaluateConfig
) -> dict[str, Any]:
    """Peaks and regions of the context's maps against the boxes of the test images.

    Args:
        encoders: By name, the pretrained one first.
        marked: The images with boxes of `val` and `test`.
        settings: Loader, device and bootstrap.

    Returns:
        `peak` and `overlap`, each as `compare_means` has it, beside chance: of a peak a `random`
        point and the `centre`, of an overlap the `whole` image. `images`; by encoder `peak_level`,
        `overlap_level`, `threshold` and `validation_peak` by level.

    Raises:
        DataError: an image cannot be read.
    """
    peaks, overlaps, chosen = {}, {}, {}
    count = len(encoders) * sum(len(images) for images in marked.values())
    with progress("looking at the context", count, "images") as bar:
        for name, encoder in encoders.items():
            looks = {}
            for split, images in marked.items():
                looks[split] = look(encoder, images, settings)
                bar.advance(len(images))
            val, test = looks["val"], looks["test"]
            level = int(val.hits.mean(0).argmax())
            of_region = val.overlaps.mean(0)
            place, threshold = np.unravel_index(of_region.argmax(), of_region.shape)
            peaks[name] = test.hits[:, level].astype(float)
            overlaps[name] = test.overlaps[:, place, threshold]
            chosen[name] = {
                "peak_level": val.levels[level],
                "overlap_level": val.levels[int(place)],
                "threshold": THRESHOLDS[int(threshold)],
                "validation_peak": dict(
                    zip(map(str, val.levels), val.hits.mean(0).tolist(), strict=True)
                ),
            }
    points = {"random": test.area, "centre": test.centre}
    return {
        "images": len(test.area),
        "peak": compare_means(peaks | points, test.patients, settings.bootstrap),
        "overlap": compare_means(
            overlaps | {"whole": test.area}, test.patients, settings.bootstrap
        ),
        **chosen,
    }


@torch.inference_mode()
def look(encoder: Encoder, marked: MarkedImages, settings: EvaluateConfig) -> Looks:
    """What the maps of all levels are worth on each image.

    Raises:
        DataError: an image cannot be read.
    """
    device = device_of(settings.embedding.use_gpu)
    encoder.to(device).eval()
    levels = sorted(int(level) for level in encoder.backbone.gates)
    size = (marked.size_px, marked.size_px)
    hits, overlaps, area, centre, patients = [], [], [], [], []
    for images, items in marked.batches(
        range(len(marked)), settings.embedding.batch_size, settings.data.loader_workers
    ):
        maps = encoder.context_maps(images.to(device))
        shown = torch.cat(
            [functional.interpolate(maps[level], size=size, mode="bilinear") for level in levels], 1
        )
        for one, item in zip(shown.cpu().numpy(), items, strict=True):
            finding = item.finding[item.inside]
            inside = [level[item.inside] for level in one]
            hits.append([peak_hits(level, finding) for level in inside])
            overlaps.append(
                [[region_overlap(level, finding, t) for t in THRESHOLDS] for level in inside]
            )
            area.append(finding.mean())
            centre.append(finding[finding.shape[0] // 2, finding.shape[1] // 2])
            patients.append(item.patient)
    return Looks(
        levels,
        np.array(hits),
        np.array(overlaps),
        np.array(area),
        np.array(centre, dtype=float),
        np.array(patients),
    )


def peak_hits(level: np.ndarray, finding: np.ndarray) -> bool:
    """The pointing game (Zhang et al. 2016) without a margin: whether the peak is in a box.

    Args:
        level: A map, [H, W].
        finding: Pixels in boxes, bool [H, W].
    """
    return bool(finding.flat[int(level.argmax())])


def region_overlap(level: np.ndarray, finding: np.ndarray, threshold: float) -> float:
    """IoU of the smallest rectangle around all that is at or above a threshold with the boxes.

    Args:
        level: A map, [H, W]; it is spread to reach from 0 to 1.
        finding: Pixels in boxes, bool [H, W]; not empty.
        threshold: In [0, 1].
    """
    low, high = float(level.min()), float(level.max())
    # The peak stays, whatever rounding does.
    above = (level >= low + threshold * (high - low)) | (level == high)
    rows, columns = np.flatnonzero(above.any(1)), np.flatnonzero(above.any(0))
    region = finding[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    both = int(region.sum())
    return both / (region.size + int(finding.sum()) - both)

"""Images whose findings have a place: masks (SIIM-ACR) or boxes (RSNA, NIH, VinBigData)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mlvicx_dist.config import EvaluateConfig
from mlvicx_dist.errors import DataError, UserError
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.loader import as_bytes, lists_of
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.stream.whole import place_in_square, squared

Kind = Literal["masks", "boxes"]


@dataclass(frozen=True)
class Marked:
    """An image as the encoder sees it, and where its finding is.

    Attributes:
        image: uint8 [S, S], as `squared` makes it.
        finding: bool [S, S]: every pixel that one of the boxes, or a pixel of the stored mask,
            touches. It is empty only where the stored mask is.
        inside: Rows and columns of the square that the image takes.
        patient: Source and key.
    """

    image: np.ndarray
    finding: np.ndarray
    inside: tuple[slice, slice]
    patient: str


class MarkedImages(Dataset[Marked | UserError]):
    """The marked images of a split.

    Attributes:
        split: Its name.
        shards: Those of the split.
        samples: Which of them are marked, int64: those that have a mask, be it an empty one, or
            those that have a box.
        size_px: S, the side of the squares.
    """

    def __init__(self, settings: EvaluateConfig, split: str, kind: Kind, size_px: int) -> None:
        """Find them; where `classes` are chosen, boxes of another label are none.

        Raises:
            DataError: none is marked, or all masks are empty.
        """
        self.split, self.size_px, self._kind = split, size_px, kind
        self._classes = settings.classes
        self.shards = ShardSet.open(
            settings.data.shards, splits=[split], cache=cache_of(settings.data)
        )
        if kind == "masks":
            self.samples = self.shards.masked()
            found = any(self._mask(sample).any() for sample in self.samples.tolist())
        else:
            every = range(len(self.shards))
            self.samples = np.array([s for s in every if self._boxes(s)], dtype=np.int64)
            found = len(self.samples) > 0
        if not found:
            empty = kind == "masks" and len(self.samples) > 0
            asked = "segment" if kind == "masks" else "localise"
            raise DataError(
                f"{', '.join(settings.data.shards)}: "
                + (f"all {len(self.samples)} masks" if empty else f"there are no {kind}")
                + f" of the split '{split}'"
                + (" are empty" if empty else "")
                + f", which {asked} needs; give shards that have them, or leave {asked} out."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Marked | UserError:
        # An error travels as a value: PyTorch would turn it into a traceback.
        try:
            return self._marked(int(self.samples[place]))
        except UserError as error:
            return error

    def batches(
        self, order: Sequence[int], batch_size: int, loader_workers: int
    ) -> Iterator[tuple[torch.Tensor, list[Marked]]]:
        """Images, uint8 [b, 1, S, S], and all that is known of them, in an order of places.

        Raises:
            DataError: an image or a mask cannot be read.
            ResourceError: a loader process died.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=batch_size,
            sampler=order,
            num_workers=loader_workers,
            collate_fn=list,
        )
        for items in lists_of(loader):
            yield torch.from_numpy(np.stack([item.image for item in items]))[:, None], items

    def _marked(self, sample: int) -> Marked:
        image, known = as_bytes(self.shards.image(sample)), self.shards.about(sample)
        inside = place_in_square(image.shape, self.size_px)
        if self._kind == "masks":
            finding = _mask_touched(self._mask(sample) > 0, self.size_px, inside)
        else:
            finding = np.zeros((self.size_px, self.size_px), bool)
            scale = self.size_px / max(image.shape)
            for box in self._boxes(sample):
                finding[_touched(box, scale, inside)] = True
        return Marked(
            squared(image, self.size_px), finding, inside, f"{known['source']}/{known['patient']}"
        )

    def _mask(self, sample: int) -> np.ndarray:
        mask = self.shards.mask(sample)
        assert mask is not None
        return mask

    def _boxes(self, sample: int) -> list[dict[str, Any]]:
        boxes = self.shards.about(sample)["boxes"]
        return [box for box in boxes if self._classes is None or box["label"] in self._classes]


def _mask_touched(mask: np.ndarray, size_px: int, inside: tuple[slice, slice]) -> np.ndarray:
    """The pixels of the square that a set pixel of the stored mask, bool [H, W], touches."""
    for axis, place in enumerate(inside):
        stored, shown = mask.shape[axis], place.stop - place.start
        edges = np.arange(shown + 1) * stored
        first, last = edges[:-1] // shown, -(-edges[1:] // shown)
        count = np.insert(mask.cumsum(axis, dtype=np.int64), 0, 0, axis)
        mask = count.take(last, axis) > count.take(first, axis)
    square = np.zeros((size_px, size_px), bool)
    square[inside] = mask
    return square


def _touched(box: dict[str, Any], scale: float, inside: tuple[slice, slice]) -> tuple[slice, slice]:
    """The pixels of the square that a box of the stored image touches."""
    touched = []
    for place, (low, high) in zip(inside, (("top", "bottom"), ("left", "right")), strict=True):
        start = place.start + int(np.floor(box[low] * scale))
        stop = place.start + int(np.ceil(box[high] * scale))
        start = min(max(start, place.start), place.stop - 1)
        touched.append(slice(start, max(min(stop, place.stop), start + 1)))
    return touched[0], touched[1]

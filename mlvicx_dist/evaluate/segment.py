"""Segmentation by a small U-Net decoder on the encoder's levels, for shards with masks.

Epoch and threshold are the best ones on the validation images. Dice is that of whole images at the
size that the encoder sees; a prediction of nothing where nothing is counts 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mlvicx_dist.config import EvaluateConfig, Segment
from mlvicx_dist.errors import DivergenceError
from mlvicx_dist.evaluate.embed import device_of
from mlvicx_dist.evaluate.marked import MarkedImages
from mlvicx_dist.evaluate.paired import compare_means
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.progress import Progress, progress

THRESHOLDS = tuple(k / 20 for k in range(1, 20))
GROUPS = 8


class Decoder(nn.Module):
    """From the maps of all levels to one logit a pixel, after U-Net (arXiv 1505.04597)."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        """For maps of so many channels a level, with `width` channels of its own."""
        super().__init__()
        self.narrow = nn.ModuleList(_block(count, width, 1) for count in channels)
        self.join = nn.ModuleList(_block(2 * width, width, 3) for _ in channels[1:])
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, maps: Sequence[torch.Tensor], size_px: int) -> torch.Tensor:
        """Maps [B, C_l, H_l, W_l] to logits [B, size_px, size_px]."""
        *skipped, x = [narrow(level) for narrow, level in zip(self.narrow, maps, strict=True)]
        for join, skip in zip(self.join, reversed(skipped), strict=True):
            x = join(torch.cat([_resized(x, skip.shape[2:]), skip], 1))
        logits: torch.Tensor = _resized(self.last(x), (size_px, size_px))[:, 0]
        return logits


def _block(channels: int, width: int, kernel: int) -> nn.Module:
    # A norm of each image by itself: what is judged does not depend on who is in its batch.
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
        nn.GroupNorm(GROUPS, width),
        nn.ReLU(),
    )


def _resized(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return functional.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """An encoder, frozen by default, and a decoder on its levels."""

    def __init__(self, encoder: Encoder, settings: Segment) -> None:
        """Of a copy of the encoder, in eval mode: its batch norm's statistics stay."""
        super().__init__()
        self.trained = settings.train_encoder
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(self.trained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.decoder = Decoder(encoder.backbone.channels, settings.width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 1, S, S], uint8, to logits [B, S, S]."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            maps = self.encoder.levels(images)
        logits: torch.Tensor = self.decoder(maps, images.shape[-1])
        return logits


@dataclass(frozen=True)
class Trained:
    """A model with the weights of its best epoch, and what was chosen on the validation images."""

    model: Segmenter
    threshold: float
    validation_dice: list[float]

    @property
    def best(self) -> int:
        """The epoch whose weights these are, from 1."""
        return int(np.argmax(self.validation_dice)) + 1


def segment(
    encoders: dict[str, Encoder],
    marked: dict[str, MarkedImages],
    settings: EvaluateConfig,
    chosen: Segment,
) -> dict[str, Any]:
    """Train a decoder on each encoder alike and compare their Dice.

    Args:
        encoders: By name, the pretrained one first.
        marked: The images with masks of `train`, `val` and `test`.
        settings: Loader, device and bootstrap.
        chosen: The decoder and its training.

    Returns:
        `dice` {"all" | "positive": as `compare_means` has it}: over all images, with
        `over_nothing` the difference to predicting nothing, and over those with a mask that is not
        empty. `images`, `positives`, `size_px`, and by encoder `threshold`, `best` epoch and
        `validation_dice` of each.

    Raises:
        UserError: an image or mask cannot be read, or the training diverges.
    """
    dice: dict[str, np.ndarray] = {}
    found: dict[str, Any] = {}
    positive, patients = np.empty(0, bool), np.empty(0, str)
    count = len(encoders) * chosen.epochs
    with progress("segmenting", count, "epochs") as bar:
        for name, encoder in encoders.items():
            trained = train_segmenter(
                Segmenter(encoder, chosen), marked["train"], marked["val"], settings, chosen, bar
            )
            scores, positive, patients = dice_of(
                trained.model, marked["test"], (trained.threshold,), settings, chosen
            )
            dice[name] = scores[:, 0]
            found[name] = {
                "threshold": trained.threshold,
                "best": trained.best,
                "validation_dice": trained.validation_dice,
            }
    nothing = {"nothing": (~positive).astype(float)}
    some = {name: values[positive] for name, values in dice.items()}
    return {
        "images": len(positive),
        "positives": int(positive.sum()),
        "unmarked": len(marked["test"].shards) - len(positive),
        "size_px": marked["test"].size_px,
        "dice": {
            "all": compare_means(dice | nothing, patients, settings.bootstrap),
            "positive": compare_means(some, patients[positive], settings.bootstrap),
        },
        **found,
    }


def train_segmenter(
    model: Segmenter,
    train: MarkedImages,
    val: MarkedImages,
    settings: EvaluateConfig,
    chosen: Segment,
    bar: Progress,
) -> Trained:
    """Train until the validation Dice has not risen for `patience_epochs`; the best epoch stays.

    Raises:
        DivergenceError: the outputs are not finite.
    """
    device = device_of(settings.embedding.use_gpu)
    model.to(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=chosen.learning_rate)
    dice: list[float] = []
    best: dict[str, torch.Tensor] = {}
    threshold = 0.0
    for epoch in range(chosen.epochs):
        order = np.random.default_rng([chosen.seed, epoch]).permutation(len(train)).tolist()
        for images, items in train.batches(order, chosen.batch_size, settings.data.loader_workers):
            masks = torch.from_numpy(np.stack([item.finding for item in items])).to(device)
            loss = mask_loss(model(images.to(device)), masks.float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        means = dice_of(model, val, THRESHOLDS, settings, chosen)[0].mean(0)
        dice.append(float(means.max()))
        if dice[-1] > max(dice[:-1], default=-1.0):
            threshold = THRESHOLDS[int(means.argmax())]
            best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        bar.advance(1, f"validation Dice {dice[-1]:.3f}")
        if epoch - int(np.argmax(dice)) >= chosen.patience_epochs:
            break
    model.load_state_dict(best)
    return Trained(model, threshold, dice)


def mask_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, plus one minus the soft Dice of all pixels of the batch.

    Args:
        logits: [B, S, S].
        masks: 0 or 1, [B, S, S].
    """
    share = logits.sigmoid()
    overlap = 2 * (share * masks).sum() / (share.sum() + masks.sum()).clamp_min(1e-6)
    return functional.binary_cross_entropy_with_logits(logits, masks) + 1 - overlap


@torch.inference_mode()
def dice_of(
    model: Segmenter,
    marked: MarkedImages,
    thresholds: Sequence[float],
    settings: EvaluateConfig,
    chosen: Segment,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Dice of every image at every threshold, each image once.

    Returns:
        Dice [n, T]; whether the mask is not empty, bool [n]; patients [n].

    Raises:
        DivergenceError: the outputs are not finite.
    """
    device = device_of(settings.embedding.use_gpu)
    values, positive, patients = [], [], []
    for images, items in marked.batches(
        range(len(marked)), chosen.batch_size, settings.data.loader_workers
    ):
        shares = model(images.to(device)).sigmoid().cpu().numpy()
        if not np.isfinite(shares).all():
            raise DivergenceError(
                "segment: the outputs are not finite; lower segment.learning_rate."
            )
        for share, item in zip(shares, items, strict=True):
            values.append([dice_score(share >= t, item.finding) for t in thresholds])
            positive.append(bool(item.finding.any()))
            patients.append(item.patient)
    return np.array(values), np.array(positive), np.array(patients)


def dice_score(predicted: np.ndarray, true: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two masks, bool [H, W]; 1 where both are empty."""
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 1.0

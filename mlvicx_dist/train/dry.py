"""A training step on tensors without data: its shapes, and neither its memory nor its time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import ConfigError, first_line
from mlvicx_dist.model.heads import fold_matrix
from mlvicx_dist.model.mlvicx import MLVICX, build_model
from mlvicx_dist.train.step import TwoViews, random_model

UNFIT = (RuntimeError, ValueError, LookupError, AssertionError, AttributeError, TypeError)
"""How backbones of timm say that they cannot take an image, each in its own way."""


def shapes_of(config: PretrainConfig) -> MLVICX:
    """The model of the settings without its weights.

    Raises:
        ConfigError: the backbone or a level does not exist, or `train.recompute` cannot be had.
    """
    with torch.device("meta"):
        model = build_model(random_model(config), 0)
    if config.train.recompute:
        model.encoder.recompute()
    return model


@contextmanager
def without_data(model: MLVICX, config: PretrainConfig) -> Iterator[None]:
    """Inside, tensors have no data, those of the model neither.

    Raises:
        ConfigError: what runs inside does not run with these settings.
    """
    # Torch logs what fails on such tensors with its whole stack; here it becomes a sentence.
    faults = logging.getLogger("torch._subclasses.fake_tensor")
    level = faults.level
    faults.setLevel(logging.CRITICAL)
    # A matrix without data must not be kept for whoever comes next, nor one with data used here.
    fold_matrix.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            yield
    except UNFIT as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"model.backbone {config.model.backbone}: it does not run with these settings "
            f"({reason}); choose a convolutional backbone such as resnet18, or "
            "larger views.image_size_px."
        ) from None
    finally:
        fold_matrix.cache_clear()
        faults.setLevel(level)


def views_of(config: PretrainConfig, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a step holds of its images: both views uint8 [2, rows, 1, S, S], and normalised."""
    # Batch norm refuses a batch of one; the group's own takes it.
    rows, side = max(rows, 2), config.views.image_size_px
    images = torch.empty(2, rows, 1, side, side, dtype=torch.uint8)
    return images, [torch.empty(rows, config.model.channels, side, side) for _ in images]


def embed(
    model: MLVICX, config: PretrainConfig, views: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The forward of both views: embeddings [rows, D] of each head, those of view 1 first."""
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        first, second, _ = TwoViews(model)(*views)
    return [*first.values(), *second.values()]


def back(embeddings: Sequence[torch.Tensor]) -> None:
    """The backward, from gradients of the embeddings."""
    torch.autograd.backward(embeddings, [torch.empty_like(x) for x in embeddings])

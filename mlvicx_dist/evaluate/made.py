"""Embeddings that were made before, in the folder in which a node keeps remote shards.

A file has those of one shard by one encoder at one image size, and is called by the digest of the
three: nothing in it can be out of date. It is there whole or not at all, and goes when others need
its room, the least recently used first.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.shards import NO_ARRAY, ShardInfo
from mlvicx_dist.model.encoder import encoder_digest
from mlvicx_dist.storage import told, write_whole
from mlvicx_dist.stream.cache import Cache
from mlvicx_dist.stream.room import ACCOUNTS, room_at

log = logging.getLogger(__name__)


@torch.inference_mode()
def made_by(encoder: nn.Module, size_px: int) -> str:
    """What decides the embeddings of an image but for their last bits, as one word.

    The weights, and since the code that runs them may change too, the length of what it makes of
    one fixed image, in four digits.

    Args:
        encoder: From uint8 [B, 1, H, W] to [B, F], in eval mode.
        size_px: The size that images are shown at.
    """
    ramp = torch.arange(size_px**2, dtype=torch.int64) * 2654435761 // 2**16 % 256
    image = ramp.to(torch.uint8).reshape(1, 1, size_px, size_px)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    length = encoder(image.to(device)).double().norm().item()
    return f"{encoder_digest(encoder)} {size_px} {length:.3e}"


@dataclass(frozen=True)
class Made:
    """The embeddings of an encoder that are kept.

    Attributes:
        by: What `made_by` says.
        cache: Where and how much; None: nothing is kept.
    """

    by: str
    cache: Cache | None

    def read(self, shard: ShardInfo) -> np.ndarray | None:
        """The embeddings of a shard, float32 [samples, F]; None where they are not there."""
        if self.cache is None:
            return None
        try:
            # Not of a folder of another user.
            path = room_at(self.cache.path()).path / f"{self._name(shard)}.npy"
            # As an index is read: `np.load` takes other formats too.
            data = io.BytesIO(path.read_bytes())
            features: np.ndarray = np.lib.format.read_array(data, allow_pickle=False)
            # What is used stays.
            os.utime(path)
        except (OSError, DataError, *NO_ARRAY):
            return None
        right = features.dtype == np.float32 and features.ndim == 2
        return features if right and len(features) == shard.samples else None

    def write(self, shard: ShardInfo, features: np.ndarray) -> None:
        """Keep the embeddings of a shard; where that cannot be it is said and no more."""
        if self.cache is None:
            return
        buffer, name = io.BytesIO(), self._name(shard)
        np.save(buffer, features)
        data = buffer.getvalue()
        try:
            room = room_at(self.cache.path())
            with room.locks.hold(ACCOUNTS):
                room.make_folder()
                if not room.make(name, len(data), self.cache.limit_bytes):
                    write_whole(room.path / f"{name}.npy", data, mode=0o600)
        except (OSError, DataError) as error:
            why = told(error) if isinstance(error, OSError) else str(error).rstrip(".")
            log.warning("embeddings are not kept for the next time (%s)", why)

    def _name(self, shard: ShardInfo) -> str:
        return hashlib.sha256(f"{self.by} {shard.sha256}".encode()).hexdigest()

"""The cross-entropy of labels over the global batch, the same on one process and on many."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional

from mlvicx_dist.objective.global_batch import world_size


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean binary cross-entropy over the known labels of the global batch; 0 without any.

    At least float32, whatever autocast says. Each rank computes its own rows; one all-reduce of two
    numbers makes the value that of all.

    Args:
        logits: This rank's rows, [n_r, K].
        labels: Theirs, [n_r, K], 0, 1 or NaN (masked).

    Returns:
        L, equal on all ranks, whose backward is dL/dz_r.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits)
        known = ~labels.isnan()
        each = functional.binary_cross_entropy_with_logits(
            logits, labels.nan_to_num(), reduction="none"
        )
        own = (each * known).sum()
        if world_size() == 1:
            return own / known.sum().clamp_min(1)
        whole = torch.stack([own.detach(), known.sum().to(own)])
        dist.all_reduce(whole)
        total, count = whole[0], whole[1].clamp_min(1)
        return (own + (total - own.detach())) / count

"""The baselines' losses, lightly's, over the global batch: the same on one process and on many.

Called on a rank's own rows, as lightly's default has it, a loss that compares the images of a batch
is another loss for each number of GPUs: statistics and negatives are per GPU, a bug that the field
knows well. Its `gather_distributed` needs equal shares for SimCLR, and for Barlow Twins keeps the
mean and variance of each GPU. Here every rank gathers the embeddings and computes the loss L of the
whole batch, with gradient through its own rows alone: as in `global_batch`, dL/dz_r, whose sum over
ranks is the gradient of L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
import torch.distributed as dist

from mlvicx_dist.config import Loss, Method
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.objective.global_batch import gathered, world_size

LIBRARY = "lightly"
FROM_LIBRARY: tuple[Method, ...] = ("barlow_twins", "simclr", "simsiam")


def check_library(method: Method) -> None:
    """Refuse a method whose loss is not installed.

    Raises:
        ConfigError: lightly is missing.
    """
    if method in FROM_LIBRARY and find_spec(LIBRARY) is None:
        raise ConfigError(
            f"method {method}: its loss is lightly's, which is not installed here; "
            "install it with pip install 'mlvicx_dist[baselines]' on every node."
        )


def baseline_loss(
    method: Method,
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    settings: Loss,
    *,
    shares: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a baseline over the global batch, at least float32 whatever autocast says.

    Args:
        method: One of `FROM_LIBRARY`: Barlow Twins (Zbontar et al. 2021, eq. 1), SimCLR (Chen et
            al. 2020, eq. 1) or SimSiam (Chen and He 2021, eq. 2).
        first: View 1's `global` embedding, [n_r, D], and for SimSiam its `prediction`.
        second: The same of view 2.
        settings: `redundancy` and `temperature`.
        shares: Rows of each rank.

    Returns:
        L, equal on all ranks, whose backward is dL/dz_r; and without gradient the mean standard
        deviation of view 1's embeddings.

    Raises:
        ConfigError: lightly is missing.
    """
    check_library(method)
    with torch.autocast(first["global"].device.type, enabled=False):
        a, b = (_whole(view["global"], shares) for view in (first, second))
        if method == "simsiam":
            from lightly.loss import NegativeCosineSimilarity

            p, q = (_whole(view["prediction"], shares) for view in (first, second))
            cosine = NegativeCosineSimilarity()
            loss = (cosine(p, b.detach()) + cosine(q, a.detach())) / 2
        elif method == "simclr":
            from lightly.loss import NTXentLoss

            loss = NTXentLoss(temperature=settings.temperature)(a, b)
        else:
            from lightly.loss import BarlowTwinsLoss

            loss = BarlowTwinsLoss(lambda_param=settings.redundancy)(a, b)
        return loss, a.detach().std(0).mean()


def _whole(own: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
    """The rows of all ranks, [N, D], of which a rank's own carry their gradient."""
    own = own if own.dtype == torch.float64 else own.float()
    if world_size() == 1:
        return own
    parts = gathered(own.detach(), shares)
    parts[dist.get_rank()] = own
    return torch.cat(parts)

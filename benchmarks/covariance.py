"""The terms of the loss at N = 256, D = 4096: the N x N form against the published D x D form.

python benchmarks/covariance.py [--json]

Forward and backward of the covariance penalty of two views, float32, two threads; and the peak
memory of one such step above what stood before it, as the system counts it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from published import covariance_penalty
from table import Row, interleaved, main, peak_mb, seconds

from mlvicx_dist.objective.global_batch import global_terms

COUNT, WIDTH, ROUNDS = 256, 4096, 7


def theirs(a: torch.Tensor, b: torch.Tensor) -> None:
    """Forward and backward through D x D."""
    (covariance_penalty(a) + covariance_penalty(b)).backward()


def ours(a: torch.Tensor, b: torch.Tensor) -> None:
    """Forward and backward of all three terms; only the covariance carries gradient."""
    terms, _ = global_terms({"global": a}, {"global": b})
    terms["global"].covariance.backward()


def peak(step: Callable[[torch.Tensor, torch.Tensor], None]) -> float:
    """Peak memory of a step, in MB."""
    a, b = views()
    return peak_mb(lambda: step(a, b))


def views() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of two views."""
    a, b = torch.randn(2, COUNT, WIDTH)
    return a.requires_grad_(), b.requires_grad_()


def measure() -> list[Row]:
    """Time and memory."""
    torch.set_num_threads(2)
    a, b = views()
    time = interleaved(
        lambda: seconds(lambda: ours(a, b)), lambda: seconds(lambda: theirs(a, b)), rounds=ROUNDS
    )
    memory = interleaved(lambda: peak(ours), lambda: peak(theirs), rounds=3)
    size = f"N = {COUNT}, D = {WIDTH}"
    return [
        Row(f"covariance, {size}, against published", *(1e3 * t for t in time), "ms", 16),
        Row("peak memory of the same, against published", *memory, "MB", 10),
    ]


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))

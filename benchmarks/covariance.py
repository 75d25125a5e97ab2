"""The terms of the loss at N = 256, D = 4096: the N x N form against the published D x D form.

python benchmarks/covariance.py [--json]

Forward and backward of the covariance penalty of two views, float32, two threads; and the peak
memory of one such step above what stood before it, as the system counts it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from table import Row, interleaved, main, seconds

from mlvicx_dist.objective.global_batch import global_terms

COUNT, WIDTH, ROUNDS = 256, 4096, 7


def published(z: torch.Tensor) -> torch.Tensor:
    """The penalty of one view as DESIGN 4.1 writes it, through the D x D covariance."""
    z = z - z.mean(0)
    covariance = z.T @ z / (len(z) - 1)
    off = covariance - torch.diag(torch.diag(covariance))
    return off.square().sum() / z.shape[1]


def theirs(a: torch.Tensor, b: torch.Tensor) -> None:
    """Forward and backward through D x D."""
    (published(a) + published(b)).backward()


def ours(a: torch.Tensor, b: torch.Tensor) -> None:
    """Forward and backward of all three terms; only the covariance carries gradient."""
    terms, _ = global_terms({"global": a}, {"global": b})
    terms["global"].covariance.backward()


def peak_mb(step: Callable[[torch.Tensor, torch.Tensor], None]) -> float:
    """Peak resident memory of a step above what stood before it, in MB (Linux)."""
    a, b = views()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmHWM")
    step(a, b)
    return max(status("VmHWM") - before, 1e-3)


def status(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1e3
    raise KeyError(name)


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
    memory = interleaved(lambda: peak_mb(ours), lambda: peak_mb(theirs), rounds=3)
    size = f"N = {COUNT}, D = {WIDTH}"
    return [
        Row(f"covariance, {size}, against published", *(1e3 * t for t in time), "ms", 16),
        Row("peak memory of the same, against published", *memory, "MB", 10),
    ]


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))

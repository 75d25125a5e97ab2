"""One rank's part of the covariance term: how its work falls with the size W of the group.

python benchmarks/covariance_shares.py [--json]

Forward and backward of the real `global_terms` on rank 0 of a group of W, float32, D = 4096, both
views of one head, two threads. The group is fake: its collectives do nothing, so nothing of them
is in the times. Ours is a rank's figure at W, theirs the figure of one process divided by W.

The floating-point operations of the matrix products have a limit: they must fall as 1/W. The times
have none, since not all falls: where N < D every rank puts all N rows together after they are
gathered, where N >= D every rank scales and squares the whole D x D product, and a product of few
rows reads as large a matrix as one of many.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from table import Row, main, seconds
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from mlvicx_dist.objective.global_batch import global_terms
from mlvicx_dist.stream.order import rank_shares

WIDTH = 4096
GROUPS = (1, 2, 4, 16, 64, 256)
COUNTS = (256, 1024, 4096, 8192)
ROUNDS, LONGEST_S = 7, 4.0
"""A time is the median of so many, fewer once they have taken so long."""


@contextmanager
def group(world_size: int) -> Iterator[None]:
    """This process as rank 0 of a group whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def part(count: int, world_size: int) -> tuple[float, float]:
    """Operations of the matrix products, in GFLOP, and seconds of one rank's part."""
    shares = rank_shares(count, world_size)
    a, b = torch.randn(2, shares[0], WIDTH)
    a.requires_grad_()
    b.requires_grad_()

    def step() -> None:
        terms, _ = global_terms({"global": a}, {"global": b}, shares=shares)
        terms["global"].covariance.backward()

    # The first run, which does not count as a time, counts the operations.
    with FlopCounterMode(display=False) as counter:
        step()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < ROUNDS and (not times or time.perf_counter() - begin < LONGEST_S):
        times.append(seconds(step))
    return counter.get_total_flops() / 1e9, statistics.median(times)


def measure() -> list[Row]:
    """Operations, then times, of every N and W."""
    torch.set_num_threads(2)
    work, times = [], []
    for count in COUNTS:
        alone = (0.0, 0.0)
        for world_size in GROUPS:
            with group(world_size):
                found = part(count, world_size)
            if world_size == 1:
                alone = found
            size = f"N = {count}, W = {world_size}"
            work.append(
                Row(f"matrix products, {size}", found[0], alone[0] / world_size, "GFLOP", 0.99)
            )
            times.append(Row(f"time, {size}", found[1], alone[1] / world_size, "s"))
    return work + times


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))

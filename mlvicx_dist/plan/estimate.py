"""From counted work, a device and a group to the seconds of a step: pure functions.

A step is forward, backward, terms of the loss and optimizer, one after the other; beside the
backward the gradients are all-reduced, and beside the whole step the next batch is loaded. Those of
the projectors are whole when the backward begins with the encoder; of the encoder's the first half
of both views' backward makes none ready, since both views add to each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlvicx_dist.plan.rates import Rates
from mlvicx_dist.plan.work import NORM, REST_OPS, Exchange, Op, Work

ENCODER_BEGINS = 0.5
"""What of a backward has passed when the first gradient of the encoder is whole."""
NORM_OPS = 8
"""Operations that a batch norm of the group has more than one of a single worker."""


@dataclass(frozen=True)
class Group:
    """Workers on equal machines.

    Attributes:
        workers: How many in all.
        per_node: How many a machine.
        link_bytes_per_s: What an exchange inside a machine reaches.
        network_bytes_per_s: What a machine's share of an exchange between them reaches.
        link_hop_s: From one worker to the next inside a machine, however little is sent.
        network_hop_s: The same between two machines.
    """

    workers: int
    per_node: int
    link_bytes_per_s: float
    network_bytes_per_s: float
    link_hop_s: float
    network_hop_s: float
    beside: bool = True
    """Whether gradients pass beside the backward: on a CPU the cores that compute exchange."""

    @property
    def nodes(self) -> int:
        """Machines."""
        return math.ceil(self.workers / self.per_node)

    @property
    def bytes_per_s(self) -> float:
        """What a ring through all workers reaches: its slowest link's rate."""
        if self.nodes == 1:
            return self.link_bytes_per_s
        return min(self.link_bytes_per_s, self.network_bytes_per_s)

    def all_reduce_s(self, count: float) -> float:
        """A ring's time for so many bytes: each passes a link 2 (W-1) / W times."""
        return 2 * (self.workers - 1) / self.workers * count / self.bytes_per_s

    def gather_s(self, count: float) -> float:
        """A ring's time to bring so many bytes, W parts, to every worker."""
        return (self.workers - 1) / self.workers * count / self.bytes_per_s

    @property
    def gather_hops_s(self) -> float:
        """The way of a small part once around the ring."""
        if self.workers == 1:
            return 0.0
        between = min(self.nodes, self.workers - 1) if self.nodes > 1 else 0
        return between * self.network_hop_s + (self.workers - 1 - between) * self.link_hop_s

    @property
    def reduce_hops_s(self) -> float:
        """The way of a small sum up a tree of machines and down again."""
        if self.workers == 1:
            return 0.0
        inside = (min(self.per_node, self.workers) - 1) * self.link_hop_s
        return 2 * (math.ceil(math.log2(self.nodes)) * self.network_hop_s + inside)


@dataclass(frozen=True)
class Seconds:
    """What each resource takes of a step, in seconds; all but `loader` come one after another.

    Attributes:
        arithmetic: Operations that wait for their products.
        memory: Operations that wait for the device's memory.
        launches: What the host needs to start all operations, beyond what they take.
        gradients: Their all-reduce, and wide layers' rows, beyond what passes beside the backward.
        embeddings: Sums, gathered rows and products of the loss's exchange.
        statistics: The way of small exchanges, nearly all of them batch norm's statistics.
        loader: What the loader's processes need for a batch, beside all that.
    """

    arithmetic: float
    memory: float
    launches: float
    gradients: float
    embeddings: float
    statistics: float
    loader: float

    @property
    def computing(self) -> float:
        """A step whose batch is there."""
        return sum(self.parts().values()) - self.loader

    @property
    def step(self) -> float:
        """A whole step."""
        return max(self.computing, self.loader)

    @property
    def bottleneck(self) -> str:
        """The resource that takes most of it."""
        parts = self.parts()
        if parts.pop("loader") > self.computing:
            return "loader"
        if self.launches:
            # The device waits for the host: what runs on it is not what takes the time.
            parts["launches"] += parts.pop("arithmetic") + parts.pop("memory")
        return max(parts, key=lambda name: parts[name])

    def parts(self) -> dict[str, float]:
        """Every resource by its name."""
        return dict(vars(self))


def estimate(
    work: Work,
    exchange: Exchange,
    rates: Rates,
    group: Group,
    *,
    launch_s: float,
    loader_images_per_s: float,
) -> Seconds:
    """The seconds of a step.

    Args:
        work: A worker's step.
        exchange: What the group exchanges at a step.
        rates: The device.
        group: The workers.
        launch_s: What the host needs to start an operation; 0: `rates` has it.
        loader_images_per_s: What a worker's loader makes.
    """
    bounds = _by_bound(work.ops, rates)
    backward_s = sum(rates.seconds(op) for op in work.backward)
    alone = group.workers == 1
    launches = len(work.forward) + len(work.backward) + REST_OPS
    if not alone:
        launches += NORM_OPS * work.times(NORM)
    running_s = sum(bounds.values())
    waiting_s = max(launches * launch_s - running_s, 0.0)
    # Where the host is late the backward is as much longer.
    backward_s *= 1 + waiting_s / running_s
    early_s = group.all_reduce_s(exchange.early_bytes) + group.gather_s(exchange.row_bytes)
    late_s = group.all_reduce_s(exchange.gradient_bytes - exchange.early_bytes)
    beside_s = backward_s if group.beside else 0.0
    gradients_s = max(early_s, ENCODER_BEGINS * beside_s) + late_s
    moved_s = group.all_reduce_s(exchange.loss_bytes) + group.gather_s(exchange.gathered_bytes)
    norms = exchange.gathers + exchange.reductions
    hops_s = exchange.gathers * group.gather_hops_s + exchange.reductions * group.reduce_hops_s
    return Seconds(
        arithmetic=bounds["arithmetic"],
        memory=bounds["memory"],
        launches=waiting_s,
        gradients=0.0 if alone else max(gradients_s - beside_s, 0.0),
        embeddings=0.0 if alone else moved_s,
        statistics=0.0 if alone else hops_s + norms * launch_s,
        loader=work.rows / loader_images_per_s,
    )


def _by_bound(ops: Iterable[Op], rates: Rates) -> Mapping[str, float]:
    """Seconds of all operations by what each waits for."""
    found = {"arithmetic": 0.0, "memory": 0.0}
    for op in ops:
        found[rates.bound(op)] += rates.seconds(op)
    return found

"""A plan as it is told: lines for people, one document for machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlvicx_dist.plan.estimate import Group, Seconds
from mlvicx_dist.plan.work import Exchange, Work
from mlvicx_dist.progress import duration

REMEDIES = {
    "arithmetic": "train.precision=bf16 where it is float32, smaller views, or a faster GPU",
    "memory": "train.precision=bf16 where it is float32, smaller views, or a GPU whose memory is "
    "faster",
    "launches": "more images a GPU: fewer GPUs, or a larger train.batch_size",
    "gradients": "train.gather_rows=true where it is false and the batch small, a faster "
    "network, fewer and larger machines, train.gradients=bf16 where it is float32, a smaller "
    "model.projector.width, or more images a GPU",
    "embeddings": "a faster network, or a smaller model.projector.width",
    "statistics": "fewer and larger machines, a network with less delay, or more images a GPU",
    "loader": "more data.loader_workers, machines with more cores, or smaller stored images",
}


@dataclass(frozen=True)
class Loading:
    """The images of a run and how they are loaded.

    Attributes:
        images: Of an epoch.
        image_bytes: Of one, stored.
        images_per_s: What one loader process makes on its core, as two views each.
        processes: How many a worker has.
    """

    images: int
    image_bytes: float
    images_per_s: float
    processes: int


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        device: What each worker has: a GPU by its name, or a CPU.
        group: The workers and their machines.
        batch: The global batch.
        epochs: Of the whole run.
        steps: In all of them.
        work: A worker's step.
        exchange: What a step exchanges.
        needed_bytes: Memory that a worker needs.
        standing_bytes: The part of it for weights, the optimizer and DDP's buckets.
        memory_bytes: Memory that it has.
        loading: Its images.
        seconds: Of a step, by resource.
        paid: GPUs or workers that are paid.
        price_per_hour: Of one of them; None: not told.
        assumed: What all this rests on, a line each.
    """

    device: str
    group: Group
    batch: int
    epochs: float
    steps: int
    work: Work
    exchange: Exchange
    needed_bytes: int
    standing_bytes: int
    memory_bytes: int
    loading: Loading
    seconds: Seconds
    paid: int
    price_per_hour: float | None
    assumed: Sequence[str]

    @property
    def images_per_s(self) -> float:
        """Images of which the whole group takes both views, a second."""
        return self.batch / self.seconds.step

    @property
    def hours(self) -> float:
        """The whole run."""
        return self.steps * self.seconds.step / 3600

    @property
    def cost(self) -> float | None:
        """Of all that is paid for all these hours."""
        if self.price_per_hour is None:
            return None
        return self.hours * self.paid * self.price_per_hour

    @property
    def loader_cores(self) -> float:
        """Cores that the loader's processes keep busy, in all."""
        return self.images_per_s / self.loading.images_per_s

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "device": self.device,
            "gpus": self.group.workers,
            "machines": self.group.nodes,
            "batch_size": self.batch,
            "images_a_gpu": self.work.rows,
            "flops": self.work.flops,
            "parameters": self.work.parameters,
            "trained_parameters": self.work.trained,
            "needed_bytes": self.needed_bytes,
            "standing_bytes": self.standing_bytes,
            "memory_bytes": self.memory_bytes,
            "moved_bytes": self.work.moved_bytes,
            "exchange": asdict(self.exchange),
            "seconds": self.seconds.parts(),
            "step_s": self.seconds.step,
            "bottleneck": self.seconds.bottleneck,
            "images_per_s": self.images_per_s,
            "loader_images_per_s_a_core": self.loading.images_per_s,
            "loader_cores": self.loader_cores,
            "stored_bytes_per_s": self.images_per_s * self.loading.image_bytes,
            "images": self.loading.images,
            "epochs": self.epochs,
            "steps": self.steps,
            "hours": self.hours,
            "cost": self.cost,
            "assumed": list(self.assumed),
        }

    def lines(self) -> list[str]:
        """For people."""
        group, seconds, loading = self.group, self.seconds, self.loading
        rows = [
            ("workers", f"{group.workers} x {self.device} in {_many(group.nodes, 'machine')}"),
            ("batch", f"{self.batch} images, {self.work.rows} a worker at most"),
            ("FLOPs", f"{_scaled(self.work.flops)}FLOP a step a worker"),
            (
                "parameters",
                f"{self.work.parameters / 1e6:.1f} million, {self.work.trained / 1e6:.1f} trained",
            ),
            (
                "memory",
                f"{_scaled(self.needed_bytes)}B of {_scaled(self.memory_bytes)}B: "
                f"{_scaled(self.standing_bytes)}B for weights and optimizer, "
                f"{_scaled(self.needed_bytes - self.standing_bytes)}B for activations and "
                f"gradients; {_scaled(self.work.moved_bytes)}B moved a step",
            ),
            ("exchange", self._exchanged()),
            (
                "loader",
                f"{loading.images_per_s:.0f} images/s a core: {self.loader_cores:.1f} cores busy; "
                f"{_scaled(self.images_per_s * loading.image_bytes)}B/s from the store, "
                f"{_scaled(self.images_per_s * loading.image_bytes / group.nodes)}B/s a machine",
            ),
            ("step", f"{_seconds(seconds.step)}: {self._parts()}"),
            ("bottleneck", f"{seconds.bottleneck}: {self._remedy()}"),
            (
                "images/s",
                f"{_rate(self.images_per_s)}, {_rate(self.images_per_s / group.workers)} each",
            ),
            (
                "time",
                f"{duration(3600 * self.hours)} for {self.steps} steps, "
                f"{self.epochs:g} epochs of {loading.images} images",
            ),
        ]
        if self.cost is not None:
            rows.append(("cost", f"{_rate(self.cost)} at {self.price_per_hour:g} an hour each"))
        told = [f"{name:12}{words}" for name, words in rows]
        return [*told, "Assumed:", *(f"- {line}" for line in self.assumed)]

    def _remedy(self) -> str:
        """What would help, and how many loader processes would be enough."""
        remedy = REMEDIES[self.seconds.bottleneck]
        if self.seconds.bottleneck != "loader":
            return remedy
        enough = self.work.rows / self.seconds.computing / self.loading.images_per_s
        return f"{remedy}; {math.ceil(enough)} processes a worker would keep up"

    def _exchanged(self) -> str:
        if self.group.workers == 1:
            return "none: one worker"
        small = self.exchange.gathers + self.exchange.reductions
        rows = self.exchange.row_bytes
        gathered = f"{_scaled(rows)}B of rows of wide layers, " if rows else ""
        return (
            f"{_scaled(self.exchange.gradient_bytes)}B of gradients, {gathered}"
            f"{_scaled(self.exchange.loss_bytes + self.exchange.gathered_bytes)}B for the loss, "
            f"{small} waits for small ones a step"
        )

    def _parts(self) -> str:
        """Seconds by resource, the longest first; what takes none is left out."""
        parts = sorted(self.seconds.parts().items(), key=lambda part: -part[1])
        told = [f"{name} {_seconds(s)}" for name, s in parts if s > 0 and name != "loader"]
        return f"{', '.join(told)}; beside it loader {_seconds(self.seconds.loader)}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count > 1 else "")


def _rate(count: float) -> str:
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def _scaled(count: float) -> str:
    """To three digits, with the unit's prefix: `1.42 G`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:.3g} "


def _seconds(count: float) -> str:
    return f"{count:.3g} s" if count >= 1 else f"{1000 * count:.3g} ms"

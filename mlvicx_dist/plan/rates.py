"""How long an operation takes: on a GPU by its data sheet, on this CPU by what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol

import torch
from torch import nn

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.plan.machines import Gpu
from mlvicx_dist.plan.work import OPTIMIZER, Counter, Op
from mlvicx_dist.train.allocator import keep_freed_memory
from mlvicx_dist.train.rates import training_step

PRODUCTS_SHARE, TF32_SHARE, MEMORY_SHARE = 0.5, 0.25, 0.7
"""What of its data sheet a GPU reaches in products, in those in TF32 and in memory traffic: chosen
to meet five published rates of ResNets on an RTX 3090, a V100 and an A100, all within 12 %."""
FEW, MEASURED_S, REPEATS = 2, 1.0, 3
"""A step on so few images, on twice as many and so on, until it takes so long; that is timed so
often. A FLOP of a small step takes longer: at 96 px 17 ps with 2 images, 6.6 with 32."""
NARROW = 64
DENSE = {"mm", "addmm"}
"""Products with the weights of a projector."""

Bound = Literal["arithmetic", "memory"]


class Rates(Protocol):
    """What a device makes of an operation."""

    def seconds(self, op: Op) -> float:
        """How long it takes."""
        ...

    def bound(self, op: Op) -> Bound:
        """What it waits for."""
        ...


@dataclass(frozen=True)
class Roofline:
    """A GPU: the longer of an operation's products and its memory traffic."""

    gpu: Gpu

    def seconds(self, op: Op) -> float:
        """How long it takes."""
        return max(self._products_s(op), self._memory_s(op))

    def bound(self, op: Op) -> Bound:
        """What it waits for."""
        return "arithmetic" if self._products_s(op) > self._memory_s(op) else "memory"

    def _products_s(self, op: Op) -> float:
        share, peak = PRODUCTS_SHARE, self.gpu.fp32_tflops
        if op.precision == "bf16":
            peak = self.gpu.bf16_tflops
        # PyTorch takes TF32 for convolutions and not for matrices, unless told otherwise.
        elif op.name.startswith("convolution") and self.gpu.tf32_tflops:
            share, peak = TF32_SHARE, self.gpu.tf32_tflops
        return op.flops / (share * peak * 1e12) if op.flops else 0.0

    def _memory_s(self, op: Op) -> float:
        return op.moved_bytes / (MEMORY_SHARE * self.gpu.memory_gb_per_s * 1e9)


@dataclass(frozen=True)
class Measured:
    """A CPU: what a FLOP takes in operations with products, and a byte in others, by their names.

    Attributes:
        a_flop: Seconds a FLOP.
        a_byte: Seconds a byte.
        rows: Images of each view in the step that was timed.
    """

    a_flop: Mapping[str, float]
    a_byte: Mapping[str, float]
    rows: int

    def seconds(self, op: Op) -> float:
        """How long it takes; one of a name that was not timed, as long as the median of them."""
        known, work = (self.a_flop, op.flops) if op.flops else (self.a_byte, op.moved_bytes)
        return work * known.get(op.name, median(known.values()))

    def bound(self, op: Op) -> Bound:
        """What it waits for: products take their time by arithmetic."""
        return "arithmetic" if op.flops else "memory"


def measured(ops: Sequence[Op], seconds: Sequence[float], rows: int) -> Measured:
    """Rates from operations and what each took; all of an optimizer's are one."""
    totals: dict[tuple[bool, str], list[float]] = {}
    for op, took in zip(ops, seconds, strict=True):
        name = OPTIMIZER if op.name.startswith("_foreach") else op.name
        total = totals.setdefault((op.flops > 0, name), [0.0, 0.0])
        total[0] += took
        total[1] += op.flops or op.moved_bytes
    rates = {key: took / work for key, (took, work) in totals.items() if work}
    return Measured(
        {name: rate for (products, name), rate in rates.items() if products},
        {name: rate for (products, name), rate in rates.items() if not products},
        rows,
    )


def measure(
    config: PretrainConfig, rows: int, *, clock: Callable[[], float] = time.perf_counter
) -> Measured:
    """Time a step on few images on this CPU, operation by operation.

    The model is that of the settings with narrow projectors, whose weights would take the time of
    so few images. Products with their weights are timed on one layer of full width and all rows.

    Args:
        config: The settings; their threads are those of `workers.cpus_per_worker`.
        rows: Images of each view that a worker holds: no more are taken.
        clock: In seconds.
    """
    torch.set_num_threads(config.workers.cpus_per_worker)
    keep_freed_memory()
    narrow = config.model.projector.model_copy(update={"width": NARROW})
    small = config.model_copy(
        update={"model": config.model.model_copy(update={"projector": narrow})}
    )
    few = FEW
    while True:
        step = training_step(small, few, torch.device("cpu"))
        step()
        began = clock()
        step()
        if few >= rows or clock() - began >= MEASURED_S:
            break
        few = min(2 * few, rows)
    ops, seconds = _timed(step, clock)
    kept = [k for k, op in enumerate(ops) if op.name not in DENSE]
    layer_ops, layer_seconds = _timed(_layer(config, rows), clock)
    return measured(
        [*(ops[k] for k in kept), *layer_ops],
        [*(seconds[k] for k in kept), *layer_seconds],
        few,
    )


def _timed(
    call: Callable[[], None], clock: Callable[[], float]
) -> tuple[Sequence[Op], Sequence[float]]:
    """The operations of a call and the least that each took: what else runs only makes it more."""
    call()
    found = []
    for _ in range(REPEATS):
        with Counter(clock) as counter:
            call()
        found.append(counter)
    return found[0].ops, [min(times) for times in zip(*(c.seconds for c in found), strict=True)]


def _layer(config: PretrainConfig, rows: int) -> Callable[[], None]:
    """A layer of a projector, forward and backward."""
    width = config.model.projector.width
    layer, x = nn.Linear(width, width), torch.randn(max(rows, FEW), width, requires_grad=True)

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    return call

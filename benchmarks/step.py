"""Forward and backward of both views at 224 px: ours, the published form, lightly's VICReg.

python benchmarks/step.py [--json]

ResNet-18 at batch 16 and 32 and ResNet-50 at 16, on two threads, in float32, and in bf16 where the
CPU has it. `published` is configs/pretrain/published.yaml written out plainly (published.py), as it
was released and with our memory format; its memory is handed out as the C library does. The others
keep freed memory as our workers do (train/allocator.py). Ours has the weights, the loss and the
gradients of published (tests/model/test_published.py). lightly's VICReg has one projector of the
same size on the same backbone without levels. Ours and each of them by turns, in processes of their
own; medians. Peak memory is what a first step takes above the model, where all hand freed memory
back.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import timm
import torch
from lightly.loss import VICRegLoss
from published import Published, projector, published_loss
from table import Row, interleaved, main, peak_mb, seconds
from torch import nn

from mlvicx_dist.config import PretrainConfig, load_as
from mlvicx_dist.objective.global_batch import global_terms, weighted_loss
from mlvicx_dist.train.allocator import keep_freed_memory
from mlvicx_dist.train.step import Member, TwoViews, make_model
from mlvicx_dist.train.versions import bf16_in_software

SIZE, ROUNDS, THREADS = 224, 3, 2
PUBLISHED = Path(__file__).parents[1] / "configs" / "pretrain" / "published.yaml"
SETTINGS = load_as(PretrainConfig, PUBLISHED, ["model.init=random"])


def our_step(backbone: str, batch: int, precision: str) -> Callable[[], None]:
    """The published preset, as a worker trains it."""
    settings = SETTINGS.model.model_copy(update={"backbone": backbone})
    config = SETTINGS.model_copy(update={"model": settings})
    model = make_model(config, Member(0, 1, torch.device("cpu")))
    views = TwoViews(model)
    first, second = images(batch)

    def step() -> None:
        with autocast(precision):
            embeddings1, embeddings2, _ = views(first, second)
        terms, _ = global_terms(embeddings1, embeddings2)
        weighted_loss(terms, SETTINGS.loss).backward()
        model.zero_grad(set_to_none=True)

    return step


def published_step(
    backbone: str, batch: int, precision: str, layout: torch.memory_format
) -> Callable[[], None]:
    """The same mathematics, plainly."""
    model = Published(backbone, SETTINGS.model.projector.width).to(memory_format=layout)
    first, second = (view.contiguous(memory_format=layout) for view in images(batch))

    def step() -> None:
        with autocast(precision):
            loss = published_loss(model, first, second)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def vicreg_step(
    backbone: str, batch: int, precision: str, layout: torch.memory_format
) -> Callable[[], None]:
    """Lightly's loss on one projector."""
    net = timm.create_model(backbone, num_classes=0, in_chans=3).to(memory_format=layout)
    model = nn.Sequential(net, projector(net.num_features, SETTINGS.model.projector.width))
    loss = VICRegLoss()
    first, second = (view.contiguous(memory_format=layout) for view in images(batch))

    def step() -> None:
        with autocast(precision):
            a, b = model(first), model(second)
        loss(a.float(), b.float()).backward()
        model.zero_grad(set_to_none=True)

    return step


def bare_step(
    backbone: str, batch: int, precision: str, layout: torch.memory_format
) -> Callable[[], None]:
    """The backbone alone, on two views."""
    net = timm.create_model(backbone, num_classes=0, in_chans=3).to(memory_format=layout)
    first, second = (view.contiguous(memory_format=layout) for view in images(batch))

    def step() -> None:
        with autocast(precision):
            total = net(first).sum() + net(second).sum()
        total.backward()
        net.zero_grad(set_to_none=True)

    return step


def images(batch: int) -> torch.Tensor:
    """Two views."""
    return torch.randn(2, batch, 3, SIZE, SIZE)


def autocast(precision: str) -> torch.autocast:
    """The precision of a forward."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


CONTENDERS = {
    "ours": our_step,
    "published": partial(published_step, layout=torch.contiguous_format),
    "published, channels_last": partial(published_step, layout=torch.channels_last),
    "lightly VICReg": partial(vicreg_step, layout=torch.contiguous_format),
    "lightly VICReg, channels_last": partial(vicreg_step, layout=torch.channels_last),
    "bare backbone": partial(bare_step, layout=torch.contiguous_format),
    "bare backbone, channels_last": partial(bare_step, layout=torch.channels_last),
}
LIMITS = {
    ("resnet18", 16, "float32", "published"): 3.5,
    ("resnet18", 32, "float32", "published"): 4.0,
    ("resnet18", 16, "float32", "lightly VICReg"): 1 / 1.2,
    ("resnet18", 32, "float32", "lightly VICReg"): 1 / 1.2,
    ("resnet18", 32, "bf16", "lightly VICReg"): 1 / 1.2,
}


class Contender:
    """One of them in a process of its own."""

    step: Callable[[], None]

    @classmethod
    def prepare(cls, name: str, backbone: str, batch: int, precision: str, keeps: bool) -> None:
        """Called there, first."""
        torch.set_num_threads(THREADS)
        if keeps:
            keep_freed_memory()
        cls.step = staticmethod(CONTENDERS[name](backbone, batch, precision))

    @classmethod
    def seconds(cls) -> float:
        """Of a step."""
        return seconds(cls.step)

    @classmethod
    def peak_mb(cls) -> float:
        """What a step takes."""
        return peak_mb(cls.step)


def started(
    name: str, backbone: str, batch: int, precision: str, *, keeps: bool
) -> ProcessPoolExecutor:
    """The process of a contender."""
    told = (name, backbone, batch, precision, keeps)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, Contender.prepare, told)


def asked(process: ProcessPoolExecutor, what: Callable[[], float]) -> float:
    """What a contender answers."""
    return process.submit(what).result()


def against(ours: tuple[str, int, str], other: str, precision: str) -> tuple[float, float]:
    """Seconds of our step and of another's at its precision, by turns."""
    backbone, batch, _ = ours
    keeps = not other.startswith("published")
    with (
        started("ours", *ours, keeps=True) as mine,
        started(other, backbone, batch, precision, keeps=keeps) as theirs,
    ):
        return interleaved(
            partial(asked, mine, Contender.seconds),
            partial(asked, theirs, Contender.seconds),
            rounds=ROUNDS,
        )


def measure() -> Iterator[Row]:
    """Time, then memory."""
    for backbone, batch in (("resnet18", 16), ("resnet18", 32), ("resnet50", 16)):
        for precision in ("float32",) if bf16_in_software() else ("float32", "bf16"):
            for other in list(CONTENDERS)[1:]:
                name = f"{backbone}, batch {batch}, {precision}, against {other}"
                limit = LIMITS.get((backbone, batch, precision, other))
                yield Row(
                    name, *against((backbone, batch, precision), other, precision), "s", limit
                )
        if not bf16_in_software():
            name = f"{backbone}, batch {batch}, bf16, against published in float32"
            limit = 6.0 if (backbone, batch) == ("resnet18", 32) else None
            times = against((backbone, batch, "bf16"), "published", "float32")
            yield Row(name, *times, "s", limit)
    peaks = {}
    for name in ("ours", "published", "lightly VICReg"):
        with started(name, "resnet18", 32, "float32", keeps=False) as process:
            peaks[name] = asked(process, Contender.peak_mb)
    for other, limit in (("published", 1 / 0.6), ("lightly VICReg", None)):
        name = f"resnet18, batch 32, peak memory against {other}"
        yield Row(name, peaks["ours"], peaks[other], "MB", limit)


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))

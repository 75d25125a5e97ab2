"""From settings and a request to a plan: what is known is read, the rest is assumed and said.

On this machine's CPU a step's operations are timed for some seconds; for a GPU nothing is timed.
"""

from __future__ import annotations

import math
from pathlib import Path

from mlvicx_dist.capacity import memory_bytes
from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import ConfigError, DataError, ResourceError
from mlvicx_dist.plan.estimate import estimate
from mlvicx_dist.plan.machines import Gpu
from mlvicx_dist.plan.rates import (
    MEMORY_SHARE,
    PRODUCTS_SHARE,
    TF32_SHARE,
    Rates,
    Roofline,
    measure,
)
from mlvicx_dist.plan.request import Machines, Request, machines_for
from mlvicx_dist.plan.result import Loading, Plan
from mlvicx_dist.plan.work import count_work, exchange_of
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import is_local, place
from mlvicx_dist.stream.order import steps_per_epoch
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.memory import PROCESS_BYTES, needed_bytes, standing_bytes
from mlvicx_dist.train.rates import loader_rate
from mlvicx_dist.train.source import open_shards
from mlvicx_dist.train.versions import bf16_in_software

LAUNCH_S = 10e-6
"""What PyTorch needs to start an operation on a GPU."""
LOADER_IMAGES_PER_S = 750.0
"""Of one core, where no shards are here: EPYCs made 750 and 960 from 256 px, from 512 px half."""
SURE = 0.97
"""What is advised is so much of what would fit."""
IMAGE_BYTES = 17_400
"""Of a radiograph at 256 px, JPEG q95 (docs/data.md)."""


def make_plan(config: PretrainConfig, request: Request) -> Plan:
    """Plan a run.

    Raises:
        UserError: something that the user can mend, said in one sentence.
    """
    machines = machines_for(config, request)
    _check_precision(config, machines)
    batch = config.train.batch_size
    rows = math.ceil(batch / machines.workers)
    loading, steps, loading_said = _loading(config, request, machines)
    with progress("planning", 3, "parts") as bar:
        there, needed = _memory(machines), _needed(config, rows, machines)
        if needed > there:
            raise ResourceError(_too_large(config, machines, needed, there))
        bar.advance(note="memory")
        work = count_work(config, rows)
        bar.advance(note="work")
        rates, launch_s, rates_said = _rates(config, machines, rows)
        bar.advance(note="rates")
    exchange, group = exchange_of(work, batch), machines.group
    seconds = estimate(
        work,
        exchange,
        rates,
        group,
        launch_s=launch_s,
        loader_images_per_s=loading.images_per_s * loading.processes,
    )
    said = [*machines.said, rates_said, *loading_said]
    if group.workers > 1:
        said.append(machines.exchange_said)
    said.append("the run's start, checkpoints, log and judges, and what it may lose, take no time")
    if request.price_per_hour is not None:
        what = "GPUs, those of whole machines," if machines.gpu else "workers"
        said.append(f"{machines.paid} {what} are paid: no head node, disks, stores or traffic")
    return Plan(
        device=machines.gpu.name if machines.gpu else "this machine's CPU",
        group=group,
        batch=batch,
        epochs=config.train.total_steps(steps) / steps,
        steps=config.train.total_steps(steps),
        work=work,
        exchange=exchange,
        needed_bytes=needed,
        standing_bytes=standing_bytes(config, rows),
        memory_bytes=there,
        loading=loading,
        seconds=seconds,
        paid=machines.paid,
        price_per_hour=request.price_per_hour,
        assumed=said,
    )


def _check_precision(config: PretrainConfig, machines: Machines) -> None:
    gpu = machines.gpu
    lacking = not gpu.bf16_tflops if gpu else bf16_in_software()
    if config.train.precision == "bf16" and lacking:
        raise ConfigError(
            f"train.precision is bf16, which {gpu.name if gpu else 'this CPU'} computes in "
            "software only; give --set train.precision=float32."
        )


def _loading(
    config: PretrainConfig, request: Request, machines: Machines
) -> tuple[Loading, int, list[str]]:
    """The images and their loader, the steps of an epoch, and what is assumed of them."""
    batch, said = config.train.batch_size, []
    shards = _shards(config, request)
    there = steps_per_epoch(shards.sizes, 1, shards.weights) if shards else 0
    images = request.images or there
    if shards is None or request.images:
        steps = steps_per_epoch([images], batch)
    else:
        steps = steps_per_epoch(shards.sizes, batch, shards.weights)
    if shards and all(isinstance(shard, Path) for shard in shards.shards):
        rate = loader_rate(_trained(config, batch_size=min(batch, there)), shards)
        said.append(f"a core loads {rate:.0f} images/s, as this machine's did from these shards")
    else:
        rate = LOADER_IMAGES_PER_S
        said.append(f"a core loads {rate:.0f} images/s: no shards are here to be read")
    image_bytes = float(IMAGE_BYTES)
    if shards:
        infos = [s for m in shards.manifests for s in m.shards if s.split in config.data.splits]
        image_bytes = sum(s.bytes for s in infos) / sum(s.samples for s in infos)
    else:
        said.append(f"an image is stored in {IMAGE_BYTES / 1000:g} kB")
    processes = max(config.data.loader_workers, 1)
    if not config.data.loader_workers:
        said.append("data.loader_workers is 1: with 0 a batch is loaded between steps")
    if machines.gpu and machines.cores:
        # A core of each worker is that of its training process.
        free = max(machines.cores // machines.per_node - 1, 1)
        if free < processes:
            said.append(f"of {processes} loader processes {free} a worker have a core")
            processes = free
    return Loading(images, image_bytes, rate, processes), steps, said


def _shards(config: PretrainConfig, request: Request) -> ShardSet | None:
    """The shards of the settings; None where they are not at hand and not needed.

    Raises:
        DataError: they are needed.
    """
    if request.images and not all(is_local(place(s.path)) for s in config.data.shards):
        return None
    try:
        return open_shards(config)
    except DataError as error:
        if request.images:
            return None
        raise DataError(
            f"{str(error).rstrip('.')}, or tell how many images there are with --images."
        ) from None


def _memory(machines: Machines) -> int:
    """What a worker has for itself."""
    if machines.gpu:
        return int(machines.gpu.memory_gb * 1e9) - PROCESS_BYTES
    together = min(machines.per_node, machines.workers)
    return (memory_bytes(gpu=False) or 0) // together - PROCESS_BYTES


def _needed(config: PretrainConfig, rows: int, machines: Machines) -> int:
    return needed_bytes(config, rows, gpu=machines.gpu is not None)


def _too_large(config: PretrainConfig, machines: Machines, needed: int, there: int) -> str:
    """Why a worker's memory cannot hold its rows, and what it could."""
    batch, workers = config.train.batch_size, machines.workers
    rows = math.ceil(batch / workers)
    half = max(rows // 2, 2)
    ways = []
    if rows > half:
        an_image = (needed - _needed(config, half, machines)) / (rows - half)
        fit = int(SURE * (rows - (needed - there) / an_image))
        if fit >= 2:
            if machines.gpu:
                ways.append(f"give --gpus {math.ceil(batch / fit)}")
            ways.append(f"lower train.batch_size to {fit * workers}")
    if not config.train.recompute:
        try:
            less = _needed(_trained(config, recompute=True), rows, machines)
            if less <= there:
                ways.append(f"set train.recompute=true, which needs {less / 1e9:.1f} GB")
        except ConfigError:
            # It is no chain of stages.
            pass
    remedy = " or ".join(ways) or "take a GPU with more memory or a smaller model"
    where = f"one {machines.gpu.name}" if machines.gpu else "this machine"
    return (
        f"each of {workers} workers would hold {rows} images and need about {needed / 1e9:.1f} GB, "
        f"where {where} has {max(there, 0) / 1e9:.1f} GB for it; {remedy}."
    )


def _trained(config: PretrainConfig, **changes: object) -> PretrainConfig:
    """The settings with other ones of `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _rates(config: PretrainConfig, machines: Machines, rows: int) -> tuple[Rates, float, str]:
    """The device's rates, what the host needs for an operation, and where both are from."""
    if machines.gpu:
        return Roofline(machines.gpu), LAUNCH_S, _peaks(machines.gpu)
    found = measure(config, rows)
    return (
        found,
        0.0,
        f"each operation takes the time of its kind in a step of {found.rows} images a view on "
        f"{config.workers.cpus_per_worker} threads here, in proportion to what it computes or "
        "moves; each worker has its cores for itself",
    )


def _peaks(gpu: Gpu) -> str:
    """What is assumed of a GPU."""
    products = [
        f"{share:.0%} of its {peak:g} TFLOP/s in {kind}"
        for kind, peak, share in (
            ("bf16", gpu.bf16_tflops, PRODUCTS_SHARE),
            ("TF32, for convolutions of float32", gpu.tf32_tflops, TF32_SHARE),
            ("float32", gpu.fp32_tflops, PRODUCTS_SHARE),
        )
        if peak
    ]
    return (
        f"the {gpu.name} reaches {', '.join(products)}, and {MEMORY_SHARE:.0%} of its "
        f"{gpu.memory_gb_per_s:g} GB/s; the host starts an operation in {LAUNCH_S * 1e6:g} us"
    )

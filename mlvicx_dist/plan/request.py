"""What a plan is asked for, and the machines that follow from it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import ConfigError, ResourceError
from mlvicx_dist.plan.estimate import Group
from mlvicx_dist.plan.machines import CPU, Cluster, Gpu, gpu_named, read_cluster

PER_NODE, NETWORK_GBIT = 8, 100.0
"""GPUs and network of a machine of which nothing is known."""
LINK_SHARE, NETWORK_SHARE = 0.5, 0.7
"""What of a link's and a network's rate an exchange reaches."""
LINK_HOP_S, NETWORK_HOP_S = 2e-6, 20e-6
"""From one GPU to the next in a machine, and over a network."""
CPU_LINK_BYTES_PER_S, CPU_HOP_S = 1e9, 500e-6
"""What gloo reaches between processes of one machine, and its way from one to the next."""


@dataclass(frozen=True)
class Request:
    """What was asked beside the settings; None: not told.

    Attributes:
        gpus: How many, or workers where there is no GPU.
        gpu_type: A GPU by its name, or `cpu` for this machine.
        cluster: A cluster file.
        gpus_per_node: How many a machine has.
        network_gbit: Of a machine, in Gbit/s.
        price_per_hour: Of one GPU.
        images: How many an epoch has, where no shards are at hand.
    """

    gpus: int | None = None
    gpu_type: str | None = None
    cluster: str | None = None
    gpus_per_node: int | None = None
    network_gbit: float | None = None
    price_per_hour: float | None = None
    images: int | None = None


@dataclass(frozen=True)
class Machines:
    """What a run goes to.

    Attributes:
        gpu: Of each worker; None: a CPU like this machine's.
        workers: How many.
        per_node: Workers of a machine.
        cores: Of a machine; None: not known.
        network_gbit: Of a machine, in Gbit/s.
        said: Where all this is from, a line each.
    """

    gpu: Gpu | None
    workers: int
    per_node: int
    cores: int | None
    network_gbit: float
    said: tuple[str, ...]

    @property
    def group(self) -> Group:
        """The workers as they exchange."""
        link = self.gpu.link_gb_per_s * LINK_SHARE * 1e9 if self.gpu else CPU_LINK_BYTES_PER_S
        return Group(
            self.workers,
            self.per_node,
            link_bytes_per_s=link,
            network_bytes_per_s=self.network_gbit / 8 * NETWORK_SHARE * 1e9,
            link_hop_s=LINK_HOP_S if self.gpu else CPU_HOP_S,
            network_hop_s=NETWORK_HOP_S if self.gpu else CPU_HOP_S,
            beside=self.gpu is not None,
        )

    @property
    def paid(self) -> int:
        """GPUs of all machines, those too that no worker has; on a CPU the workers."""
        return self.group.nodes * self.per_node if self.gpu else self.workers

    @property
    def exchange_said(self) -> str:
        """What is assumed of it."""
        group = self.group
        when = (
            "the projectors' gradients or rows pass beside the backward, the encoder's gradients "
            "beside half of it"
            if group.beside
            else "gradients pass after the backward, on the cores that compute; that workers wait "
            "for the slowest at each batch norm is not counted"
        )
        return (
            f"an exchange reaches {group.link_bytes_per_s / 1e9:.3g} GB/s and "
            f"{group.link_hop_s * 1e6:g} us a hop in a machine, "
            f"{group.network_bytes_per_s / 1e9:.3g} GB/s a machine and "
            f"{group.network_hop_s * 1e6:g} us between them; {when}"
        )


def machines_for(config: PretrainConfig, request: Request) -> Machines:
    """The machines of a request; what it leaves open is taken from the settings or assumed.

    Raises:
        ConfigError: a number is out of range, or a GPU or a file is not known.
        ResourceError: the cluster does not grow that far, or the batch is smaller than the group.
    """
    _check(request)
    workers = request.gpus or config.workers.num
    asked = "--gpus" if request.gpus else "workers.num"
    if workers > config.train.batch_size:
        raise ResourceError(
            f"{asked} is {workers}, but a batch of {config.train.batch_size} images cannot be "
            f"shared by more workers than that; lower {asked} or raise train.batch_size."
        )
    if request.cluster:
        return _of_cluster(request.cluster, read_cluster(request.cluster), request, workers)
    kind = request.gpu_type or ("" if config.workers.use_gpu else CPU)
    if not kind:
        raise ConfigError("--gpu-type is missing; give one such as L4, cpu, or --cluster FILE.")
    network_gbit = request.network_gbit or NETWORK_GBIT
    if kind.lower() == CPU:
        cores = len(os.sched_getaffinity(0))
        per_node = request.gpus_per_node or max(cores // config.workers.cpus_per_worker, 1)
        return Machines(None, workers, per_node, cores, network_gbit, ())
    per_node = request.gpus_per_node or min(PER_NODE, workers)
    said = f"a machine has {per_node} GPUs and a network of {network_gbit:g} Gbit/s"
    several = (said,) if workers > per_node else ()
    return Machines(gpu_named(kind), workers, per_node, None, network_gbit, several)


def _of_cluster(path: str, cluster: Cluster, request: Request, workers: int) -> Machines:
    """The machines of a cluster file; options fill in what it does not tell."""
    node = cluster.node
    kind = request.gpu_type or (node.gpu if node else "")
    per_node = request.gpus_per_node or cluster.gpus
    if not kind or not per_node:
        raise ConfigError(
            f"{path}: it does not tell the GPUs of its {cluster.name}; give --gpu-type and "
            "--gpus-per-node."
        )
    if kind.lower() == CPU:
        raise ConfigError(f"{path}: a cluster is planned by its GPUs; leave out --gpu-type {kind}.")
    gpu = gpu_named(kind)
    if node and node.gpu != gpu.name:
        raise ConfigError(
            f"{path}: its {cluster.name} has {node.gpu}s, but --gpu-type is {gpu.name}; leave "
            "out one of the two."
        )
    most = cluster.nodes * per_node
    if workers > most:
        raise ResourceError(
            f"{path}: it grows to {cluster.nodes} {cluster.name} with {most} GPUs in all, but "
            f"{workers} are asked for; raise max_workers there or lower --gpus."
        )
    network_gbit = request.network_gbit or (node.network_gbit if node else NETWORK_GBIT)
    spot = ", which can be taken away" if cluster.spot else ""
    said = (
        f"{path}: {cluster.nodes} {cluster.name} at most{spot}, each with {per_node} {gpu.name} "
        f"and a network of {network_gbit:g} Gbit/s",
    )
    return Machines(gpu, workers, per_node, node.cores if node else None, network_gbit, said)


def _check(request: Request) -> None:
    for option, value, least in (
        ("--gpus", request.gpus, 1),
        ("--gpus-per-node", request.gpus_per_node, 1),
        ("--images", request.images, 1),
        ("--price-per-hour", request.price_per_hour, 0),
    ):
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{option} is {value:g}; give {least} or more.")
    if request.network_gbit is not None and not 0 < request.network_gbit < math.inf:
        raise ConfigError(f"--network-gbit is {request.network_gbit:g}; give more than 0.")

"""GPUs and machines by name, as their makers describe them, and cluster files that name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlvicx_dist.config import parse_yaml
from mlvicx_dist.errors import ConfigError, nearest

CPU = "cpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet, without sparsity.

    Attributes:
        name: What `--gpu-type` calls it.
        bf16_tflops: Of matrix products that add in float32; 0: it has no bf16.
        tf32_tflops: The same in TF32; 0: it has none.
        fp32_tflops: In float32, without tensor cores.
        memory_gb: Its memory.
        memory_gb_per_s: How fast it reads and writes it.
        link_gb_per_s: NVLink or PCIe, in one direction.
    """

    name: str
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        # name, bf16, tf32, fp32, memory, its bandwidth, link
        Gpu("T4", 0, 0, 8.1, 16, 320, 16),
        Gpu("V100", 0, 0, 15.7, 16, 900, 150),
        Gpu("A10G", 70, 35, 35, 24, 600, 32),
        Gpu("L4", 121, 60, 30.3, 24, 300, 32),
        Gpu("L40S", 362, 183, 91.6, 48, 864, 32),
        Gpu("RTX3090", 71, 35.6, 35.6, 24, 936, 32),
        Gpu("RTX4090", 165, 82.6, 82.6, 24, 1008, 32),
        Gpu("A100-40GB", 312, 156, 19.5, 40, 1555, 300),
        Gpu("A100-80GB", 312, 156, 19.5, 80, 2039, 300),
        Gpu("H100", 989, 494, 67, 80, 3350, 450),
        Gpu("H200", 989, 494, 67, 141, 4800, 450),
    )
}


@dataclass(frozen=True)
class Node:
    """A machine: its GPUs, its cores (None: not known) and its network in Gbit/s."""

    gpu: str
    gpus: int
    cores: int | None
    network_gbit: float


NODES = {
    # Amazon's
    "g4dn.12xlarge": Node("T4", 4, 48, 50),
    "g5.12xlarge": Node("A10G", 4, 48, 40),
    "g5.48xlarge": Node("A10G", 8, 192, 100),
    "g6.12xlarge": Node("L4", 4, 48, 40),
    "g6.48xlarge": Node("L4", 8, 192, 100),
    "g6e.12xlarge": Node("L40S", 4, 48, 100),
    "g6e.48xlarge": Node("L40S", 8, 192, 400),
    "p4d.24xlarge": Node("A100-40GB", 8, 96, 400),
    "p4de.24xlarge": Node("A100-80GB", 8, 96, 400),
    "p5.48xlarge": Node("H100", 8, 192, 3200),
    "p5en.48xlarge": Node("H200", 8, 192, 3200),
    # Google's
    "g2-standard-48": Node("L4", 4, 48, 50),
    "g2-standard-96": Node("L4", 8, 96, 100),
    "a2-highgpu-8g": Node("A100-40GB", 8, 96, 100),
    "a3-highgpu-8g": Node("H100", 8, 208, 1000),
}


@dataclass(frozen=True)
class Cluster:
    """What a cluster file says of its GPU machines.

    Attributes:
        name: The machine's type, or what the file is.
        nodes: How many it can have at most.
        node: The machine; None: the file does not tell its GPU.
        gpus: GPUs of a machine; 0: the file does not tell.
        spot: Whether they can be taken away.
    """

    name: str
    nodes: int
    node: Node | None = None
    gpus: int = 0
    spot: bool = False


def gpu_named(name: str) -> Gpu:
    """The GPU of that name, whatever its case.

    Raises:
        ConfigError: there is none.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}
    if name.lower() not in found:
        hint = nearest(name.upper(), [*GPUS, CPU]) or f"; known are {', '.join(GPUS)} and {CPU}"
        raise ConfigError(f"--gpu-type {name}: this GPU is not known{hint}.")
    return found[name.lower()]


def read_cluster(path: str | Path) -> Cluster:
    """The GPU machines of a file for `ray up` or of a KubeRay job.

    Raises:
        ConfigError: it cannot be read, or has no machines for workers.
    """
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"{path}: the cluster file cannot be read ({reason}); give one such as "
            "cluster/gpu.yaml."
        ) from None
    try:
        found = sorted(_kinds(tree), key=lambda kind: kind.node is None)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        found = []
    if not found:
        raise ConfigError(
            f"{path}: it names no machines for workers; give a file for `ray up` such as "
            "cluster/gpu.yaml, or --gpu-type and --gpus-per-node."
        )
    return found[0]


def _kinds(tree: Mapping[str, Any]) -> Iterator[Cluster]:
    """Each kind of machine for workers that a file has."""
    if tree.get("kind") == "RayJob":
        for group in tree["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            container = group["template"]["spec"]["containers"][0]
            gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
            yield Cluster("pods", int(group["maxReplicas"]), gpus=gpus)
    elif tree["provider"]["type"] == "local":
        yield Cluster("machines of its own", len(tree["provider"]["worker_ips"]))
    else:
        # Ray's own default is 2.
        most = int(tree.get("max_workers", 2))
        for name, kind in tree["available_node_types"].items():
            if name == tree["head_node_type"]:
                continue
            config = kind["node_config"]
            machine = str(config.get("InstanceType") or config["machineType"])
            node = NODES.get(machine)
            yield Cluster(
                machine,
                min(int(kind.get("max_workers", most)), most),
                node,
                node.gpus if node else int(kind.get("resources", {}).get("GPU", 0)),
                spot="spot" in str(config.get("InstanceMarketOptions", "")).lower()
                or config.get("scheduling", {}).get("provisioningModel") == "SPOT",
            )

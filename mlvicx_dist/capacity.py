"""What this machine has, and what a Ray cluster has or may grow to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mlvicx_dist.errors import ResourceError

MOST_NODES = 10_000
"""Where an autoscaler names no limit."""
UNKNOWN_BYTES = 2**60
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""What `ray up` leaves on the head node for its autoscaler."""
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""What Kubernetes tells a pod of itself."""


def this_machine() -> dict[str, float]:
    """The cores and GPUs of this machine."""
    import torch

    return {"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}


def memory_bytes(*, gpu: bool) -> int | None:
    """The memory of this node that its container allows, or that of its first GPU if it has one."""
    if gpu:
        import torch

        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.get_device_properties(0).total_memory)
    from ray._private.utils import get_system_memory

    return int(get_system_memory())


def whole_cluster() -> dict[str, float]:
    """What the cluster can grow to where its autoscaler's settings are known, else what it has."""
    nodes = known_nodes()
    kinds = sorted({kind for resources, _ in (*nodes.there, *nodes.more) for kind in resources})
    return {kind: nodes.at_most(partial(_amount, kind)) for kind in kinds}


def _amount(kind: str, resources: Mapping[str, float]) -> float:
    return resources.get(kind, 0)


def slots(needed: Mapping[str, float]) -> int:
    """How many workers that need this much fit on all nodes that there are or can be added.

    A node whose memory is not known has enough of it.
    """

    def on(resources: Mapping[str, float]) -> int:
        known = {"memory": UNKNOWN_BYTES, **resources}
        return int(min(known.get(kind, 0) // amount for kind, amount in needed.items()))

    return int(known_nodes().at_most(on))


@dataclass(frozen=True)
class Nodes:
    """The nodes that a cluster has or can have: kinds of them, (resources, count).

    Attributes:
        there: Those that it has in any case.
        more: Those that an autoscaler may add.
        added: How many of these at once, of all kinds together.
    """

    there: list[tuple[dict[str, float], int]]
    more: list[tuple[dict[str, float], int]]
    added: int

    def at_most(self, worth: Callable[[Mapping[str, float]], float]) -> float:
        """What the nodes are worth together, where those are added that are worth most."""
        total = sum(worth(resources) * count for resources, count in self.there)
        left = self.added
        for each, count in sorted(((worth(r), n) for r, n in self.more), reverse=True):
            total += each * min(count, left)
            left -= min(count, left)
        return total


def known_nodes() -> Nodes:
    """The nodes of this cluster.

    What an autoscaler may add is read from the cluster's own record, from the file that `ray up`
    leaves on the head node, or from Kubernetes. Where nothing tells it (a cluster of given
    machines), the nodes that are there count.
    """
    import ray
    from ray._private.state import state

    config = state.get_cluster_config()
    if config and config.node_group_configs:
        groups = [
            (dict(group.resources), MOST_NODES if group.max_count < 0 else group.max_count)
            for group in config.node_group_configs
        ]
        return Nodes([], groups, sum(count for _, count in groups))
    try:
        tree = _autoscaler_settings()
        head, most = tree["head_node_type"], int(tree["max_workers"])
        kinds = {
            name: (dict(kind["resources"]), int(kind.get("max_workers", most)))
            for name, kind in tree["available_node_types"].items()
        }
        if any(resources for resources, _ in kinds.values()):
            own, _ = kinds.pop(head)
            return Nodes([(own, 1)], list(kinds.values()), most)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        pass
    return Nodes([(node["Resources"], 1) for node in ray.nodes() if node["Alive"]], [], 0)


def _autoscaler_settings() -> Any:
    """What `ray up` wrote down for its autoscaler, or what KubeRay's is told by the RayCluster."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not POD_NAMESPACE.exists():
        return yaml.safe_load(BOOTSTRAP.expanduser().read_text(encoding="utf-8"))
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    cluster = KubernetesHttpApiClient(POD_NAMESPACE.read_text()).get(f"rayclusters/{name}")
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return {}
    return _derive_autoscaling_config_from_ray_cr(cluster)


def refused_launches() -> list[str]:
    """The machines that the cluster's autoscaler was refused, by a quota say, and why."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:
        # Ray's older autoscaler tells nothing that a program could read.
        return []
    return [
        f"{one.count} x {one.ray_node_type_name} ({one.instance_type_name}): {one.details}"
        for one in status.failed_launches
    ]


def room_for(needed: Mapping[str, float]) -> int:
    """How many more workers that need this much would find room now, on nodes that stay."""
    from ray._private.state import available_resources_per_node, state

    leaving = state.get_draining_nodes()
    return sum(
        int(min(free.get(kind, 0) // amount for kind, amount in needed.items()))
        for node, free in available_resources_per_node().items()
        if node not in leaving
    )


def check_resources(
    needed: Mapping[str, float], there: Mapping[str, float], where: str, asked: str, remedy: str
) -> None:
    """See that there is as much of each resource as is needed.

    Raises:
        ResourceError: there is less.
    """
    for kind, count in needed.items():
        if count > there.get(kind, 0):
            raise ResourceError(
                f"{asked} asks for {count:g} {kind}s, but {where} has {there.get(kind, 0):g}; "
                f"{remedy}, or set RAY_ADDRESS to a larger cluster."
            )

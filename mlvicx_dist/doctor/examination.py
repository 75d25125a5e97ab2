"""Look at every node of the cluster, or at this machine, and at what a run would need there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlvicx_dist.capacity import refused_launches, slots
from mlvicx_dist.config import NUMBER_BYTES, PretrainConfig
from mlvicx_dist.doctor import findings
from mlvicx_dist.doctor.findings import Finding
from mlvicx_dist.doctor.node import Probe
from mlvicx_dist.errors import UserError, last_line
from mlvicx_dist.progress import progress
from mlvicx_dist.session import ray_session

ANSWER_S = 60.0
"""A node that takes longer to answer is not well."""
EXCHANGE_S = 30.0
PAIRS = 5
"""The clock is asked so often; the quickest answer counts."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, on how many nodes."""

    nodes: int
    found: Sequence[Finding]

    @property
    def well(self) -> bool:
        """Whether nothing stands in the way of a run."""
        return all(finding.state != "bad" for finding in self.found)

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "well": self.well,
            "nodes": self.nodes,
            "findings": [finding.document() for finding in self.found],
        }

    def lines(self) -> list[str]:
        """For people."""
        return [finding.line() for finding in self.found]


def examine(config: PretrainConfig | None = None) -> Diagnosis:
    """Look at the cluster that this process is connected to, or at this machine.

    Args:
        config: A run that is to go there; without one, only the nodes are looked at.

    Raises:
        UserError: no cluster answers.
    """
    import ray

    with ray_session({}, asked="doctor", remedy="start Ray"):
        logging.getLogger("ray").setLevel(logging.ERROR)
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = {one["NodeManagerAddress"]: one for one in sorted(alive, key=_by_address)}
        with progress("looking", len(nodes), "nodes") as bar:
            cores = {name: node["Resources"].get("CPU", 0.0) for name, node in nodes.items()}
            probes = {name: _probe(node["NodeID"]) for name, node in nodes.items()}
            ward = _Ward(probes, cores)
            # Imported while the probes import the same: here, and by what follows.
            from mlvicx_dist.train.launch import absolute

            config = absolute(config) if config else None
            found = [*ward.nodes(config), *ward.network()]
            bar.advance(len(nodes))
            if config and ward.answers:
                found += ward.run(config)
        return Diagnosis(len(nodes), found)


class _Ward:
    """The nodes that are looked at, each by its probe."""

    def __init__(self, probes: dict[str, Any], cores: Mapping[str, float]) -> None:
        self._probes, self._cores = probes, cores
        self._facts: Mapping[str, Any] = {}
        self._bytes_per_s = 0.0

    @property
    def answers(self) -> bool:
        """Whether a node is left that answers."""
        return bool(self._probes)

    def _all(self, method: str, *arguments: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """What each node answers, and why the others do not; those are not asked again."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        asked = {n: getattr(p, method).remote(*arguments) for n, p in self._probes.items()}
        answers, silent = {}, {}
        until_s = time.monotonic() + ANSWER_S
        for node, reference in asked.items():
            try:
                answers[node] = ray.get(reference, timeout=max(until_s - time.monotonic(), 0.1))
            except GetTimeoutError:
                silent[node] = f"nothing in {ANSWER_S:.0f} s"
            except RayError as error:
                silent[node] = last_line(error)
        for node in silent:
            del self._probes[node]
        return answers, silent

    def nodes(self, config: PretrainConfig | None) -> Iterator[Finding]:
        """Each node by itself."""
        from mlvicx_dist.stream.cache import cache_of

        cache_dir = str(cache_of(config.data).path()) if config else "/tmp"
        self._facts, silent = self._all("facts", cache_dir)
        for node, why in silent.items():
            yield Finding(
                "nodes", "bad", f"{node} does not answer ({why})", "see its logs, or end it"
            )
        if self._facts:
            cores = sum(facts["cpus"] for facts in self._facts.values())
            yield Finding("nodes", "ok", f"{findings.few(self._facts)}: {cores} cores")
            yield from findings.versions(self._facts)
            yield from findings.devices(self._facts, config)
            yield from findings.limits(self._facts, config)
        yield from findings.launches(refused_launches())

    def network(self) -> Iterator[Finding]:
        """Clocks, and the rate between nodes."""
        skews = self._skews()
        if skews:
            yield findings.clocks(skews)
        if len(self._probes) < 2:
            return
        try:
            self._bytes_per_s = self._exchange()
        except Exception as error:
            yield Finding(
                "exchange",
                "bad",
                f"the nodes cannot exchange data ({last_line(error)})",
                "open all ports between them, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to "
                "the interface that they share",
            )
        else:
            yield findings.exchange(self._bytes_per_s)

    def _skews(self) -> dict[str, tuple[float, float]]:
        """How far each clock is ahead of this one, in seconds, and how well that is known."""
        skews: dict[str, tuple[float, float]] = {}
        for _ in range(PAIRS):
            before = time.time()
            there, _ = self._all("now")
            after = time.time()
            for node, at in there.items():
                found = (at - (before + after) / 2, (after - before) / 2)
                skews[node] = min(skews.get(node, found), found, key=lambda pair: pair[1])
        return skews

    def _exchange(self) -> float:
        import ray

        first, *_ = probes = list(self._probes.values())
        where = ray.get(first.meeting_point.remote(), timeout=ANSWER_S)
        rates = [
            probe.exchange.remote(rank, len(probes), where, EXCHANGE_S)
            for rank, probe in enumerate(probes)
        ]
        return float(min(ray.get(rates, timeout=2 * EXCHANGE_S)))

    def run(self, config: PretrainConfig) -> Iterator[Finding]:
        """What a run needs: room, shards, storage, a loader that keeps up."""
        from mlvicx_dist.stream.cache import RemoteShard
        from mlvicx_dist.train.dry import shapes_of
        from mlvicx_dist.train.group import each
        from mlvicx_dist.train.launch import check_model, check_workers
        from mlvicx_dist.train.source import open_shards, with_classes
        from mlvicx_dist.train.step import bytes_of_rows, gathered_layers

        room, workers = slots(each(config.workers)), config.workers.num
        if room < workers:
            asked = " and ".join(f"{n:g} {kind}" for kind, n in each(config.workers).items())
            yield Finding(
                "workers",
                "bad",
                f"workers.num is {workers}, but there is room for {room} of {asked} each",
                "lower workers.num, or take more or larger nodes",
            )
        else:
            yield Finding("workers", "ok", f"{workers} asked for, room for {room}")
        yield from self._storage(config.run.storage_path)
        # Measured while this process looks at the rest.
        measuring = self._ask_rates(config, each(config.workers)) if self._probes and room else None
        try:
            check_model(config)
            check_workers(config)
            self._check_memory(config)
            shards = open_shards(config)
            with_classes(config, shards)
        except UserError as error:
            yield Finding("run", "bad", str(error).rstrip("."))
            return
        remote = [shard for shard in shards.shards if isinstance(shard, RemoteShard)]
        yield Finding("shards", "ok", f"{len(shards)} images in {len(shards.shards)} shards")
        wanted = remote[0].cache.wanted_bytes if remote else 0
        yield findings.cache(self._facts, config, wanted)
        if measuring is None:
            return
        rates = _rates(measuring[1])
        if "error" in rates:
            yield Finding("worker", rates["state"], rates["error"], rates.get("remedy", ""))
            return
        yield findings.loading(rates["loader"], rates["step"], config.data.loader_workers)
        if self._bytes_per_s:
            step_s = config.train.batch_size / workers / rates["step"]
            model = shapes_of(config)
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            layers = gathered_layers(model, config.train)
            reduced = parameters - sum(layer.weight.numel() for layer in layers)
            exchanged = NUMBER_BYTES[config.train.gradients] * reduced
            # A gather passes a byte once, an all-reduce twice.
            exchanged += bytes_of_rows(layers, config.train) // 2
            yield findings.gradients(self._bytes_per_s, parameters, step_s, exchanged)

    def _check_memory(self, config: PretrainConfig) -> None:
        """See that a worker of the smallest group that is allowed fits where it would have least.

        Raises:
            ResourceError: it does not.
        """
        from mlvicx_dist.train.memory import check_memory

        workers = config.workers
        least = workers.min or workers.num
        rooms = []
        for facts in self._facts.values():
            if workers.use_gpu:
                rooms += [(gpu["memory_bytes"], 1) for gpu in facts["gpus"]]
            elif facts["cpus"] >= workers.cpus_per_worker:
                together = min(least, facts["cpus"] // workers.cpus_per_worker)
                rooms.append((facts["memory_bytes"], together))
        if rooms:
            there, together = min(rooms, key=lambda room: room[0] / room[1])
            check_memory(config, least, node_workers=together, where="a node", there=there)

    def _ask_rates(self, config: PretrainConfig, one: Mapping[str, float]) -> tuple[Any, Any]:
        """Have a worker's loader and its steps measured: by whom, and the answer to wait for.

        A probe with a GPU ends with its handle, the first of the two.
        """
        import ray

        if "GPU" in one:
            own = ray.remote(Probe).options(num_cpus=one["CPU"], num_gpus=one["GPU"]).remote()
        else:
            # The node with the most cores: the head of a cluster may have none.
            own = self._probes[max(self._probes, key=lambda node: self._cores[node])]
        return own, own.rates.remote(config)

    def _storage(self, folder: str) -> Iterator[Finding]:
        writes, silent = self._all("write", folder)
        writes |= {node: {"error": why} for node, why in silent.items()}
        names = {node: answer["name"] for node, answer in writes.items() if "name" in answer}
        blind = []
        for writer, name in names.items():
            seen, _ = self._all("sees", folder, name)
            blind += [(node, writer) for node, there in seen.items() if not there]
        for name in names.values():
            kept, _ = self._all("remove", folder, name)
            writes |= {
                node: {"error": f"nothing can be removed ({why})"}
                for node, why in kept.items()
                if why
            }
        yield from findings.storage(folder, "run.storage_path", writes, blind)


def _by_address(node: Mapping[str, Any]) -> str:
    return str(node["NodeManagerAddress"])


def _probe(node_id: str) -> Any:
    """A probe on a node; it holds no core, so that it finds room beside whatever runs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(Probe).options(num_cpus=0, scheduling_strategy=place).remote()


def _rates(asked: Any) -> dict[str, Any]:
    """What was measured, or why nothing was."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return dict(ray.get(asked, timeout=ANSWER_S))
    except GetTimeoutError:
        return {
            "state": "warn",
            "error": f"none was measured in {ANSWER_S:.0f} s: nodes are busy or not up yet",
            "remedy": "see `ray status`",
        }
    except RayError as error:
        return {"state": "bad", "error": f"a worker died ({last_line(error)})"}

"""From what nodes tell to what is well, what is not, and what to do about it: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlvicx_dist.config import PretrainConfig

OPEN_FILES = 4096
"""Sockets and shards of a node with many workers; Ray itself warns below this."""
SKEW_S = 1.0
"""Clocks further apart make logs and a cluster's health checks misleading."""
DISK_USED = 0.95
"""From here on Ray takes no more objects and logs."""
PREFETCHED = 3
"""Batches of a loader process that lie in shared memory at a time."""
SLOW_STORE_S = 5.0
"""A megabyte that takes longer than this is a store that training would wait for."""
EXCHANGE_SHARE = 0.5
"""From here on exchanging gradients is what a step consists of."""

State = Literal["ok", "warn", "bad"]
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        name: What was looked at.
        state: `ok`; `warn`, which costs time or may go wrong; `bad`, with which a run would fail.
        words: What was found, and where.
        remedy: What to do; nothing where it is well.
    """

    name: str
    state: State
    words: str
    remedy: str = ""

    def line(self) -> str:
        """For people."""
        return f"{self.state:4}  {self.name:10}  {self.words}" + (
            f"; {self.remedy}" if self.remedy else ""
        )

    def document(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def versions(nodes: Mapping[str, Facts]) -> Iterator[Finding]:
    """Whether all nodes run the same code on the same libraries and drivers."""
    keys = list(dict.fromkeys(key for facts in nodes.values() for key in facts["versions"]))
    mixed = False
    for key in keys:
        found: dict[str, list[str]] = {}
        for node, facts in nodes.items():
            if key == "driver" and not facts["gpus"]:
                continue
            found.setdefault(facts["versions"].get(key, "none"), []).append(node)
        if len(found) > 1:
            mixed = True
            told = ", ".join(f"{version} on {few(where)}" for version, where in found.items())
            state: State = "warn" if key in ("python", "driver") else "bad"
            yield Finding(
                "versions",
                state,
                f"{key} is {told}",
                "install the same on every node (cluster/node.sh)",
            )
    if not mixed:
        first = next(iter(nodes.values()))["versions"]
        yield Finding("versions", "ok", ", ".join(f"{key} {first[key]}" for key in first))


def devices(nodes: Mapping[str, Facts], config: PretrainConfig | None) -> Iterator[Finding]:
    """GPUs where they are wanted, or the CPUs."""
    gpus = [
        f"{gpu['name']} of {gpu['memory_bytes'] / 1e9:.0f} GB"
        for f in nodes.values()
        for gpu in f["gpus"]
    ]
    wanted = bool(config and config.workers.use_gpu)
    if gpus:
        kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
        unused = config is not None and not wanted
        yield Finding(
            "GPUs",
            "warn" if unused else "ok",
            kinds + (", but workers.use_gpu is false" if unused else ""),
            "set workers.use_gpu=true to train on them" if unused else "",
        )
    elif wanted:
        yield Finding(
            "GPUs",
            "warn",
            "workers.use_gpu is true, but no node that is up has a GPU with a driver",
            "see that `nvidia-smi` works there, or that the autoscaler may add such nodes",
        )
    else:
        yield Finding("GPUs", "ok", "none")
    slow = [node for node, facts in nodes.items() if not facts["bf16"]]
    if config and not wanted and config.train.precision == "bf16" and slow:
        yield Finding(
            "bf16",
            "warn",
            f"the CPU of {few(slow)} computes bf16 in software, some 20 times slower",
            "set train.precision=float32",
        )


def limits(nodes: Mapping[str, Facts], config: PretrainConfig | None) -> Iterator[Finding]:
    """Open files, shared memory and disk of each node."""
    scarce = {
        node: facts["open_files"]
        for node, facts in nodes.items()
        if facts["open_files"] < OPEN_FILES
    }
    if scarce:
        yield Finding(
            "open files",
            "warn",
            f"{few(scarce)}: at most {min(scarce.values())}",
            "run `ulimit -n 65536` before `ray start`",
        )
    else:
        yield Finding("open files", "ok", f"at most {min(f['open_files'] for f in nodes.values())}")
    needed = _shm_bytes(config) if config else 2**26
    short = {node: f["shm_bytes"] for node, f in nodes.items() if f["shm_bytes"] < needed}
    if short:
        yield Finding(
            "/dev/shm",
            "bad",
            f"{few(short)}: {_size(min(short.values()))} free, where batches need {_size(needed)}",
            "give containers more (--shm-size, or an emptyDir of medium Memory)",
        )
    else:
        yield Finding(
            "/dev/shm", "ok", f"{_size(min(f['shm_bytes'] for f in nodes.values()))} free"
        )
    full = [n for n, f in nodes.items() if f["temp"]["used"] > DISK_USED * f["temp"]["total"]]
    if full:
        yield Finding(
            "disk",
            "bad",
            f"{few(full)}: the disk of the temp dir is more than {DISK_USED:.0%} full, where Ray "
            "takes no more work",
            "make room, or start Ray with --temp-dir on another disk",
        )
    else:
        yield Finding("disk", "ok", f"{_size(min(f['temp']['free'] for f in nodes.values()))} free")


def _shm_bytes(config: PretrainConfig) -> int:
    rows = math.ceil(config.train.batch_size / config.workers.num)
    batch = 2 * rows * config.views.image_size_px**2
    return PREFETCHED * max(config.data.loader_workers, 1) * batch


def launches(refused: Sequence[str]) -> Iterator[Finding]:
    """Machines that the cloud refused."""
    for words in refused:
        yield Finding(
            "autoscaler",
            "bad",
            f"it was refused {words}",
            "raise the quota, try another zone or machine, or end what else runs there",
        )


def cache(nodes: Mapping[str, Facts], config: PretrainConfig, wanted_bytes: int) -> Finding:
    """Whether nodes can keep the shards of a store; `wanted_bytes` is 0 where they are local."""
    if not wanted_bytes:
        return Finding("cache", "ok", "not needed: the shards are in a folder")
    limit = int(config.data.cache_gb * 1e9)
    short = {
        n: f["cache_bytes"] for n, f in nodes.items() if f["cache_bytes"] < min(limit, wanted_bytes)
    }
    if short:
        return Finding(
            "cache",
            "bad",
            f"{few(short)}: {_size(min(short.values()))} free, where data.cache_gb asks for "
            f"{_size(min(limit, wanted_bytes))}",
            "set data.cache_dir to a larger disk, or lower data.cache_gb",
        )
    if limit < wanted_bytes:
        return Finding(
            "cache",
            "warn",
            f"the shards have {_size(wanted_bytes)}, of which a node keeps {_size(limit)}: the "
            "rest is downloaded in every epoch",
            "raise data.cache_gb",
        )
    return Finding("cache", "ok", f"{_size(wanted_bytes)} of shards find room on each node")


def clocks(skews: Mapping[str, tuple[float, float]]) -> Finding:
    """How far the clocks are from this one: node -> (seconds, within so many)."""
    worst = max(skews, key=lambda node: abs(skews[node][0]))
    skew, within = skews[worst]
    words = f"{abs(skew):.2g} s apart at most (within {within:.1g} s)"
    if abs(skew) - within > SKEW_S:
        return Finding("clocks", "warn", f"{worst}: {words}", "run a time service (chrony) there")
    return Finding("clocks", "ok", words)


def storage(
    folder: str, key: str, writes: Mapping[str, Facts], blind: Sequence[tuple[str, str]]
) -> Iterator[Finding]:
    """Whether all nodes can write a folder or store, how fast, and see what others wrote.

    Args:
        folder: What `key` names.
        key: The setting.
        writes: What `Probe.write` answered on each node.
        blind: Nodes that do not see what another wrote: (who looked, who wrote).
    """
    for node, answer in writes.items():
        if "error" in answer:
            yield Finding(
                "storage",
                "bad",
                f"{folder} cannot be used on {node} ({answer['error']})",
                f"correct {key}, or the node's rights and credentials",
            )
            return
    if blind:
        yield Finding(
            "storage",
            "bad",
            f"{folder}: {blind[0][0]} does not see what {blind[0][1]} wrote",
            f"set {key} to a folder that all nodes share, or to s3:// or gs://",
        )
        return
    written = max(answer["write_s"] for answer in writes.values())
    read = max(answer["read_s"] for answer in writes.values())
    slow = max(written, read) > SLOW_STORE_S
    yield Finding(
        "storage",
        "warn" if slow else "ok",
        f"{folder}: a megabyte is written in {_seconds(written)} and read in {_seconds(read)}",
        "use a store nearer to the nodes" if slow else "",
    )


def exchange(bytes_per_s: float) -> Finding:
    """The rate of an all-reduce among the nodes."""
    return Finding("exchange", "ok", f"{bytes_per_s / 1e9:.2g} GB/s all-reduced between nodes")


def gradients(
    bytes_per_s: float, parameters: int, step_s: float, exchanged_bytes: float
) -> Finding:
    """What exchanging the gradients of so many parameters costs, beside a step's seconds.

    Args:
        bytes_per_s: The rate of an all-reduce.
        parameters: Numbers that are trained.
        step_s: Of a step.
        exchanged_bytes: All-reduced for them, or what takes as long.
    """
    seconds = exchanged_bytes / bytes_per_s
    words = (
        f"{_seconds(seconds)} for those of {parameters / 1e6:.0f} million parameters, where a step "
        f"takes {_seconds(step_s)}"
    )
    if seconds > EXCHANGE_SHARE * step_s:
        remedy = (
            "use train.gather_rows=true where it is false and the batch small, fewer and larger "
            "nodes, a faster network between them, a larger batch, or train.gradients=bf16"
        )
        return Finding("gradients", "warn", words, remedy)
    return Finding("gradients", "ok", words)


def loading(loader: float, step: float, processes: int) -> Finding:
    """Whether a worker's loader keeps up with its steps; both in images/s."""
    if not processes:
        return Finding(
            "loader",
            "warn",
            f"{loader:.0f} images/s, loaded between steps, which alone take {step:.0f}",
            "raise data.loader_workers to 1: what loads beside the steps costs them no time",
        )
    words = f"{loader:.0f} images/s a worker, of which its steps take {step:.0f}"
    if loader < step:
        return Finding(
            "loader",
            "warn",
            words,
            "raise data.loader_workers, or pack smaller images (--short-side-px)",
        )
    return Finding("loader", "ok", words)


def few(nodes: Iterable[str]) -> str:
    """Nodes by name, if they are not many."""
    listed = list(nodes)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _seconds(count: float) -> str:
    return f"{count:.2g} s" if count >= 0.1 else f"{1000 * count:.1f} ms"

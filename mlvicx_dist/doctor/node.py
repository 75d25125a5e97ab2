"""What a node tells of itself; `Probe` runs there."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from mlvicx_dist.capacity import memory_bytes
from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import UserError
from mlvicx_dist.storage import make_folder, place, reaching, read_bytes, told, write_whole

EXCHANGE_BYTES = 2**25
"""What is all-reduced at a time: about one bucket of gradients."""
EXCHANGES = 4
CPU_ROWS = 4
"""Images in the step that is timed where there is no GPU."""
PROBE_BYTES = 2**20


class Probe:
    """An actor on one node; what it answers is for `findings`."""

    def now(self) -> float:
        """The node's clock, in seconds since 1970."""
        return time.time()

    def facts(self, cache_dir: str) -> dict[str, Any]:
        """Versions, GPUs and limits of this node.

        Args:
            cache_dir: Where shards of a store would be kept; it need not exist.
        """
        import torch

        from mlvicx_dist.train.versions import bf16_in_software, library_versions

        gpus, driver = _gpus()
        shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
        cache = Path(cache_dir)
        while not cache.exists():
            cache = cache.parent
        return {
            "versions": {
                "python": platform.python_version(),
                **library_versions(),
                "cuda": str(torch.version.cuda or "none"),
                "nccl": _nccl(),
                **({"driver": driver} if driver else {}),
            },
            "gpus": gpus,
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": memory_bytes(gpu=False),
            "bf16": not bf16_in_software(),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "shm_bytes": shm.free if shm else 0,
            "cache_bytes": shutil.disk_usage(cache).free,
            "temp": shutil.disk_usage(tempfile.gettempdir())._asdict(),
        }

    def write(self, folder: str) -> dict[str, Any]:
        """Write a small file into a folder or store and read it back: its name and the seconds."""
        there = place(folder)
        name = f".doctor-{uuid.uuid4().hex}"
        data = os.urandom(PROBE_BYTES)
        try:
            make_folder(there)
            began = time.perf_counter()
            write_whole(there / name, data)
            written = time.perf_counter()
            same = read_bytes(there / name) == data
        except OSError as error:
            return {"error": told(error)}
        if not same:
            return {"name": name, "error": "what was read is not what was written"}
        return {
            "name": name,
            "write_s": written - began,
            "read_s": time.perf_counter() - written,
        }

    def sees(self, folder: str, name: str) -> bool:
        """Whether a file that another node wrote is there."""
        try:
            return bool((place(folder) / name).exists())
        except OSError:
            return False

    def remove(self, folder: str, name: str) -> str:
        """Remove what `write` left; why that cannot be, or nothing."""
        path = place(folder) / name
        try:
            with reaching(path):
                path.unlink(missing_ok=True)
        except OSError as error:
            return told(error)
        return ""

    def meeting_point(self) -> str:
        """An address and a free port of this node."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return f"tcp://{address}:{free.getsockname()[1]}"

    def exchange(self, rank: int, world_size: int, where: str, timeout_s: float) -> float:
        """All-reduce with the other nodes: bytes a second, by NCCL where the node has GPUs."""
        import torch
        import torch.distributed as dist

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=where,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        try:
            data = torch.ones(EXCHANGE_BYTES // 4, device=device)
            dist.all_reduce(data)
            _wait(device)
            began = time.perf_counter()
            for _ in range(EXCHANGES):
                dist.all_reduce(data)
            _wait(device)
            return EXCHANGES * EXCHANGE_BYTES / (time.perf_counter() - began)
        finally:
            dist.destroy_process_group()

    def rates(self, config: PretrainConfig) -> dict[str, Any]:
        """Images/s of one worker's loader and of its training steps, one after the other."""
        import torch

        from mlvicx_dist.train.rates import loader_rate
        from mlvicx_dist.train.source import open_shards

        torch.set_num_threads(config.workers.cpus_per_worker)
        try:
            loader = loader_rate(config, open_shards(config))
            loader *= max(config.data.loader_workers, 1)
            return {"loader": loader, "step": _step_rate(config)}
        except UserError as error:
            return {"state": "bad", "error": str(error).rstrip(".")}


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """Names and memory of the GPUs and the driver's version, whatever Ray lets this process see."""
    asked = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [], ""
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines()]
    found = [{"name": row[0], "memory_bytes": int(row[1]) * 2**20} for row in rows]
    return found, rows[0][2] if rows else ""


def _nccl() -> str:
    import torch

    if not torch.distributed.is_nccl_available():
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _step_rate(config: PretrainConfig) -> float:
    """Images/s of one worker's training steps; without exchange with others."""
    import torch

    from mlvicx_dist.train.rates import training_step

    gpu = config.workers.use_gpu and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    # Batch norm and the loss refuse a batch of one.
    rows = max(math.ceil(config.train.batch_size / config.workers.num), 2)
    if device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    step = training_step(config, rows, device)
    step()
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return rows / (time.perf_counter() - began)

"""The versions and the machine that a run belongs to."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlvicx_dist

LIBRARIES = (
    *("torch", "ray", "timm", "numpy", "pillow", "imagecodecs", "scipy", "webdataset", "pydicom"),
    "lightly",
)


def library_versions() -> dict[str, str]:
    """Versions of this package and of what decides its numbers; `none` where one is optional."""
    return {"mlvicx_dist": mlvicx_dist.__version__, **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def bf16_in_software() -> bool:
    """Whether this CPU has no bf16, which then takes some 20 times as long as float32."""
    import torch

    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def machine() -> dict[str, Any]:
    """The machine in a few words; no host name and no user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _cpu() -> str:
    """The processor by its model name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

"""The versions and the machine that a run belongs to."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import mlvicx_dist

LIBRARIES = ("torch", "ray", "timm", "numpy", "pillow", "webdataset", "pydicom")


def library_versions() -> dict[str, str]:
    """Versions of this package and of what decides its numbers."""
    return {"mlvicx_dist": mlvicx_dist.__version__, **{name: version(name) for name in LIBRARIES}}


def bf16_in_software() -> bool:
    """Whether this CPU has no bf16, which then takes some 20 times as long as float32."""
    import torch

    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def machine() -> dict[str, Any]:
    """The machine in a few words; no host name and no user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
    }

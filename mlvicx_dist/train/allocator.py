"""How a process that trains on a CPU gets its memory."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
TOP_PAD_BYTES = 64 << 20
FROM_THE_START = {"MALLOC_ARENA_MAX": "1"}
"""The environment of a process that trains in a thread, as a worker of Ray does: one that has taken
memory from an arena of its own before `keep_freed_memory` keeps it, and gets blocks of over 64 MB
from the kernel each time."""


def keep_freed_memory() -> bool:
    """Let the allocator of this process keep what is freed, for the next step.

    glibc takes blocks of over 32 MB, which the large maps are, from the kernel and gives them back
    each time: their pages are cleared and mapped anew in every operation, at one or two GB/s. Other
    allocators are left alone.

    Returns:
        Whether it does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # One arena: another thread's cannot hold large blocks, and keeps nothing.
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES), (M_ARENA_MAX, 1))
    return all(mallopt(name, value) for name, value in wanted)

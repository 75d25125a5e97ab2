"""What a worker on a CPU frees is at hand for its next step."""

import os
import platform
import subprocess
import sys

import pytest

from mlvicx_dist.train.allocator import FROM_THE_START

# Faults of pages in ten blocks of 100 MB, one after the other, in a thread that has taken memory
# before, as that of a worker's loop has; glibc needs some more first, since what an aligned block
# leaves does not hold the next one.
FAULTS = """
import resource, sys, threading, torch
from mlvicx_dist.train.allocator import keep_freed_memory

torch.set_num_threads(1)

def faults():
    if sys.argv[1] == "keep":
        assert keep_freed_memory()
    for _ in range(20):
        torch.ones(25_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(25_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""


def faults(how, **env):
    command = [sys.executable, "-c", FAULTS, how]
    apart = {name: value for name, value in os.environ.items() if name not in FROM_THE_START}
    found = subprocess.run(
        command, env={**apart, **env}, capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_large_blocks_are_not_taken_from_the_system_again():
    kept = faults("keep", **FROM_THE_START)
    assert kept < 1000 < 100_000 < faults("leave", **FROM_THE_START)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_a_thread_with_an_arena_of_its_own_would_keep_nothing():
    """Why a worker's environment holds more."""
    assert faults("keep") > 100_000

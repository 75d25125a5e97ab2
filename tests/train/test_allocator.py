"""What a worker on a CPU frees is at hand for its next step."""

import platform
import subprocess
import sys

import pytest

# Faults of pages in ten blocks of 100 MB, one after the other, in a thread as a worker's loop is;
# glibc needs some more first, since what an aligned block leaves does not hold the next one.
FAULTS = """
import resource, sys, threading, torch
from mlvicx_dist.train.allocator import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
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


def faults(how):
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_large_blocks_are_not_taken_from_the_system_again():
    assert faults("keep") < 1000 < 100_000 < faults("leave")

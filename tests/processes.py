"""Groups of processes that start at once: what they import is imported once, before the fork."""

import multiprocessing
import socket

import torch.multiprocessing as mp


def run_processes(function, arguments, count):
    """Call function(rank, *arguments) in `count` processes and wait for them."""
    multiprocessing.set_forkserver_preload(["mlvicx_dist.train.loop", "tensorboardX"])
    mp.start_processes(function, arguments, nprocs=count, start_method="forkserver")


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

"""Randomness that is a pure function of its key (DESIGN 3.2).

Philox is counter-based: its raw output for a key and a counter is fixed by its definition, so
what is drawn here stays the same over numpy versions, processes and restarts.
"""

from __future__ import annotations

import threading

import numpy as np

SHARDS, SAMPLES, VIEWS = 0, 1, 2
"""What a draw is for; the first coordinate of its counter."""
NOTHING = np.zeros(4, np.uint64)


class _Generator(threading.local):
    """One a thread: a new one asks the system for randomness, at the time of several draws."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)


_GENERATOR = _Generator()


def raw(count: int, *, seed: int, epoch: int, purpose: int, item: int, part: int = 0) -> np.ndarray:
    """`count` uniform 64-bit integers of one stream, uint64 [count]."""
    # Philox counts up in the first word; the other three name the stream.
    counter = np.array([0, item, part, purpose], np.uint64)
    _GENERATOR.bits.state = {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": np.array([seed % 2**64, epoch], np.uint64)},
        "buffer": NOTHING,
        "buffer_pos": len(NOTHING),
        "has_uint32": 0,
        "uinteger": 0,
    }
    return _GENERATOR.bits.random_raw(count)


def uniform(
    count: int, *, seed: int, epoch: int, purpose: int, item: int, part: int = 0
) -> np.ndarray:
    """`count` numbers in [0, 1), float64 [count]."""
    integers = raw(count, seed=seed, epoch=epoch, purpose=purpose, item=item, part=part)
    return (integers >> np.uint64(11)) * 2.0**-53


def permutation(count: int, *, seed: int, epoch: int, purpose: int, item: int = 0) -> np.ndarray:
    """A random order of 0 … count - 1, int64 [count]."""
    keys = raw(count, seed=seed, epoch=epoch, purpose=purpose, item=item)
    return np.argsort(keys, kind="stable")

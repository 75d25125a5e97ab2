"""Locks on numbered places of one file, between the threads of a process and between processes.

They are POSIX record locks: the system drops them when their owner dies, however it dies. Such a
lock belongs to a process, so its threads are kept apart here.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.01


class RangeLocks:
    """The locks of one file; a process has one of these a file, since closing it drops them all."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held: set[range] = set()
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, first: int, count: int = 1, *, wait: bool = True) -> Iterator[bool]:
        """Hold the places `first` … `first + count` - 1; whether they are held.

        A thread holds several only in the order of their numbers, or two could wait for each other.

        Args:
            first: The first place.
            count: How many.
            wait: Until they are free; without it the answer may be no.

        Raises:
            OSError: the file system has no locks.
        """
        wanted = range(first, first + count)
        if not self._claim(wanted, wait):
            yield False
            return
        try:
            if not self._lock(wanted, wait):
                yield False
                return
            try:
                yield True
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, count, first)
        finally:
            with self._freed:
                self._held.remove(wanted)
                self._freed.notify_all()

    def _claim(self, wanted: range, wait: bool) -> bool:
        """Hold places against the other threads."""
        with self._freed:
            while any(
                max(held.start, wanted.start) < min(held.stop, wanted.stop) for held in self._held
            ):
                if not wait:
                    return False
                self._freed.wait()
            self._held.add(wanted)
            return True

    def _lock(self, wanted: range, wait: bool) -> bool:
        """Hold places against the other processes."""
        while True:
            try:
                # Asked again and again: the system's own waiting takes two threads of one process
                # for one, and calls that a deadlock.
                flags = fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._file, flags, len(wanted), wanted.start)
                return True
            except (BlockingIOError, PermissionError):
                if not wait:
                    return False
            time.sleep(POLL_S)

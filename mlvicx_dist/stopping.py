"""SIGTERM, which schedulers send, and Ctrl-C: what a command makes of them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT that comes while the block runs, in a list."""

    def handle(asked: list[int], number: int) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    with _handled(handle, signal.SIGTERM, signal.SIGINT) as asked:
        yield asked


@contextmanager
def sigterm_interrupts() -> Iterator[list[int]]:
    """SIGTERM ends the block as Ctrl-C does, by `KeyboardInterrupt`; it is in the list then."""

    def handle(asked: list[int], number: int) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    with _handled(handle, signal.SIGTERM) as asked:
        yield asked


def exit_code(asked: list[int]) -> int:
    """Of what `KeyboardInterrupt` ended, as shells say it: 128 and the signal; none is Ctrl-C."""
    return 128 + (asked[0] if asked else signal.SIGINT)


@contextmanager
def sigterm_as_before() -> Iterator[None]:
    """After the block SIGTERM does what it did before, where Ray's start has taken it.

    Ray would print a stack and abort.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _handled(handle: Callable[[list[int], int], None], *numbers: int) -> Iterator[list[int]]:
    """Signals by number in a block; Python hears them in its main thread alone."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def heard(number: int, frame: Any) -> None:
        handle(asked, number)

    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

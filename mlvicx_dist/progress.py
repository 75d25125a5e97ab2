"""Progress on stderr: a rich bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PLAIN_EVERY_S = 5.0
UNHEARD = (OSError, ValueError)
"""What a stderr raises that is full, gone or closed: no work ends because nobody reads of it."""


class Progress:
    """A count of things done out of `total`, with its rate and the time left."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._skipped = 0
        self._start = self._last = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the job began."""
        return max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note` stands behind the figures."""
        self.done += count
        self._show(note)

    def say(self, line: str) -> None:
        """Something that must be seen now, whatever the bar shows."""
        say(line)

    def skip(self, count: int) -> None:
        """Count what an earlier run did: done, but not in the rate, which begins with the work."""
        if self.done == self._skipped:
            self._start = time.monotonic()
        self.done += count
        self._skipped += count

    def line(self, note: str = "") -> str:
        """The state in words: `packing 120/600 images, 85.3 images/s, 6 s left`."""
        rate = (self.done - self._skipped) / self.elapsed_s
        left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
        tail = f", {note}" if note else ""
        speed = f"{rate:.3g} {self.unit}/s{left}{tail}"
        return f"{self.title} {self.done}/{self.total} {self.unit}, {speed}"

    def _show(self, note: str) -> None:
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY_S:
            self._last = now
            say(self.line(note))


class _Bar(Progress):
    """The same on a terminal, drawn by rich."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        super().__init__(title, total, unit)
        self._rich = RichProgress(
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._rich.add_task(title, total=total)
        self._rich.start()

    def _show(self, note: str) -> None:
        with suppress(*UNHEARD):
            self._rich.update(self._task, completed=self.done, description=self.line(note))

    def say(self, line: str) -> None:
        with suppress(*UNHEARD):
            self._rich.console.print(plain(line), markup=False)

    def stop(self) -> None:
        with suppress(*UNHEARD):
            self._rich.stop()


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Progress]:
    """Show how far a job of `total` `unit`s is, on stderr, while the block runs."""
    if not sys.stderr.isatty():
        plain = Progress(title, total, unit)
        plain.say(f"{title} {total} {unit}")
        yield plain
        return
    bar = _Bar(title, total, unit)
    try:
        yield bar
    finally:
        bar.stop()


def say(line: str) -> None:
    """A line on stderr, at once."""
    with suppress(*UNHEARD):
        print(plain(line), file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """A text for a terminal: what it would obey, which a name from elsewhere may hold, is a '?'."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def duration(seconds: float) -> str:
    """A length of time in words: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

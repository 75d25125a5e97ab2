"""The log of a run: metrics.jsonl, TensorBoard events, and, if wanted, the samples of each step."""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import Place, is_local, read_bytes, told, write_whole
from mlvicx_dist.train.left import left_text

log = logging.getLogger(__name__)

ROWS = "metrics.jsonl"


class RunLog:
    """metrics.jsonl and TensorBoard events of a run; rows past the step it resumes from go.

    Where the run's folder is remote they are written here and published with each checkpoint. A
    disk that is full stops nothing: rows wait until they can be written.
    """

    def __init__(self, run_dir: Place, *, step: int, patience_s: float | None = None) -> None:
        self._run_dir = run_dir
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        folder = run_dir
        if not is_local(run_dir):
            self._scratch = tempfile.TemporaryDirectory(prefix="mlvicx-log-")
            folder = Path(self._scratch.name)
            with suppress(FileNotFoundError):
                (folder / ROWS).write_bytes(read_bytes(run_dir / ROWS, patience_s=patience_s))
        self._folder = Path(folder)
        self._rows: list[str] = []
        self._start = step
        self._begin: int | None = step
        """The step past which rows are still to be cut."""
        self._board: Any = None

    def write(self, row: Mapping[str, float], *, fence: Callable[[], None] | None = None) -> None:
        """Add a row; its key `step` is the number of steps done.

        Args:
            row: The row.
            fence: Called before anything is written.

        Raises:
            OSError: it could not be written; the next call tries again.
        """
        self._rows.append(json.dumps(row) + "\n")
        if fence:
            fence()
        path = self._folder / ROWS
        if self._begin is not None:
            _cut(path, self._begin)
        with path.open("ab", buffering=0) as file:
            there = file.seek(0, os.SEEK_END)
            data = "".join(self._rows).encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(there)
                raise
        self._rows.clear()
        self._begin = None
        self._show(row)

    def _show(self, row: Mapping[str, float]) -> None:
        """The row as TensorBoard events."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        step, now = int(row["step"]), time.time()
        if self._board is None:
            (self._folder / "tensorboard").mkdir(parents=True, exist_ok=True)
            self._board = EventsWriter(str(self._folder / "tensorboard" / "events"))
            # TensorBoard leaves out what an earlier start showed from this step on.
            start = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(wall_time=now, step=self._start + 1, session_log=start))
        for name, value in row.items():
            if name != "step":
                summary = scalar(name, value)
                self._board.write_event(Event(wall_time=now, step=step, summary=summary))
        self._board.flush()

    def publish(self) -> None:
        """Let everything written so far stand in the run's folder.

        Raises:
            OSError: the store cannot be written.
        """
        if self._scratch is None:
            return
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                write_whole(self._run_dir / str(path.relative_to(self._folder)), path.read_bytes())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            if self._board is not None:
                self._board.close()
        if self._scratch is not None:
            self._scratch.cleanup()


class SampleLog:
    """Which samples a rank trained on at each step, for those who must prove it."""

    def __init__(self, folder: str, rank: int, world_size: int) -> None:
        path = Path(folder) / f"{time.time_ns()}-rank{rank}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise DataError(
                f"{folder}: run.samples_path cannot be written ({told(error)}); set it to a folder "
                "that can."
            ) from None
        self._about = {"rank": rank, "world_size": world_size, "pid": os.getpid()}

    def write(self, step: int, samples: torch.Tensor) -> None:
        """Note the global sample indices [b] of a step that is done."""
        row = {"step": step, **self._about, "time": time.time(), "samples": samples.tolist()}
        self._file.write(json.dumps(row) + "\n")


def read_rows(path: Place, *, patience_s: float | None = None) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out.

    Args:
        path: Of the file.
        patience_s: How long a store that fails is asked again; None: three times in all.

    Raises:
        DataError: it cannot be read.
    """
    return _rows(left_text(path, patience_s=patience_s), path)


def _rows(text: str, path: Place) -> list[dict[str, float]]:
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        else:
            log.warning("%s: left out a row that is cut short", path)
    return rows


def trained_s(run_dir: Place, step: int, *, patience_s: float | None = None) -> float:
    """Seconds of training behind a step, over all starts, as far as the log knows.

    Raises:
        DataError: the log cannot be read.
    """
    rows = read_rows(run_dir / ROWS, patience_s=patience_s) if step else []
    return max((row["time_s"] for row in rows if row["step"] <= step), default=0.0)


def _cut(path: Path, step: int) -> None:
    """Remove the rows past `step`: they will be written again.

    Raises:
        OSError: the file cannot be read or written.
    """
    if path.exists():
        rows = _rows(path.read_text(errors="replace"), path)
        kept = [row for row in rows if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

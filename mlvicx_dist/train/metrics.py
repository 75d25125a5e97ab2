"""What is measured while training, and the run's log: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mlvicx_dist.errors import TrainingError
from mlvicx_dist.storage import Place, is_local, read_bytes, write_whole

log = logging.getLogger(__name__)

ROWS = "metrics.jsonl"
RANK_ROWS = 1024
"""Encoder outputs, the latest ones, over which the effective rank is taken."""


def effective_rank(features: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1): the entropy of the singular values as a rank.

    Args:
        features: Encoder outputs, [N, F].

    Returns:
        A number between 1 and min(N, F).
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum() + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


class _Pending:
    """Values on their way from the device to the host."""

    def __init__(self, step: int, names: list[str], values: torch.Tensor) -> None:
        self.step, self._names, self._values = step, names, values
        self._arrived = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """The values by name, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


class Meter:
    """Loss terms since the last log row; stops the run when one is not finite.

    A step's values are looked at one step later, when the device has long computed them: the
    training thread never waits for them.
    """

    def __init__(self, representation_rows: int) -> None:
        self._pending: _Pending | None = None
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._features: deque[torch.Tensor] = deque(
            maxlen=max(1, RANK_ROWS // max(representation_rows, 1))
        )

    def add(self, step: int, terms: Mapping[str, torch.Tensor], features: torch.Tensor) -> None:
        """Count the terms of a step, scalars by name, and the encoder's output [b, F]."""
        self.settle()
        values = torch.stack([value.detach().float() for value in terms.values()])
        self._pending = _Pending(step, list(terms), values)
        self._features.append(features.detach().float())

    def settle(self) -> None:
        """Look at the last step's values.

        Raises:
            TrainingError: one of them is not finite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        for name, value in pending.read().items():
            if value - value != 0:
                level, _, term = name.partition("/")
                raise TrainingError(
                    f"step {pending.step}: the {term or 'sum'} of the {level} "
                    f"{'term' if term else 'value'} is {value}; start again from the last "
                    "checkpoint with a lower train.learning_rate_per_256 or more "
                    "train.warmup_epochs, or with train.precision=float32."
                )
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def row(self) -> dict[str, float]:
        """Means since the last row, and the effective rank of the latest encoder outputs."""
        self.settle()
        row = {name: total / self._steps for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        features = torch.cat(tuple(self._features))
        row["encoder/rankme"] = effective_rank(features)
        row["encoder/std"] = float(features.std(0).mean())
        return row


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
        self._begin: int | None = step
        self._board: Any = None

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; its key `step` is the number of steps done.

        Raises:
            OSError: it could not be written; the next call tries again.
        """
        self._rows.append(json.dumps(row) + "\n")
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
        self._show(row)
        self._begin = None

    def _show(self, row: Mapping[str, float]) -> None:
        """The row as TensorBoard events."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        step, now = int(row["step"]), time.time()
        if self._board is None:
            (self._folder / "tensorboard").mkdir(parents=True, exist_ok=True)
            self._board = EventsWriter(str(self._folder / "tensorboard" / "events"))
            if self._begin is not None:
                start = SessionLog(status=SessionLog.START)
                self._board.write_event(
                    Event(wall_time=now, step=self._begin + 1, session_log=start)
                )
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            if self._board is not None:
                self._board.close()
        if self._scratch is not None:
            self._scratch.cleanup()


class SampleLog:
    """Which samples a rank trained on at each step, for those who must prove it."""

    def __init__(self, folder: str, rank: int, world_size: int) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{time.time_ns()}-rank{rank}.jsonl"
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._about = {"rank": rank, "world_size": world_size, "pid": os.getpid()}

    def write(self, step: int, samples: torch.Tensor) -> None:
        """Note the global sample indices [b] of a step that is done."""
        row = {"step": step, **self._about, "time": time.time(), "samples": samples.tolist()}
        self._file.write(json.dumps(row) + "\n")


def read_rows(path: Place) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: left out a row that is cut short", path)
    return rows


def _cut(path: Path, step: int) -> None:
    """Remove the rows past `step`: they will be written again."""
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= step]
    if not path.exists():
        return
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)

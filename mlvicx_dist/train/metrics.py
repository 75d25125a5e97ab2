"""What is measured while training: loss terms, effective rank, and where the time goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mlvicx_dist.errors import DivergenceError

RANK_ROWS = 1024
"""Encoder outputs, the latest ones, over which the effective rank is taken."""


def effective_rank(features: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1): the entropy of the singular values as a rank.

    Args:
        features: Encoder outputs, [N, F].

    Returns:
        A number between 1 and min(N, F); 0 where all outputs are zero.
    """
    values = torch.linalg.svdvals(features.double())
    if not values.sum():
        return 0.0
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
            DivergenceError: one of them is not finite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        for name, value in pending.read().items():
            if value - value != 0:
                level, _, term = name.partition("/")
                raise DivergenceError(
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
        if len(features) > 1:
            row["encoder/std"] = float(features.std(0).mean())
        return row


class Clock:
    """Where the time of a step goes; it begins `before_s` seconds ago, those of earlier starts."""

    def __init__(self, before_s: float = 0.0) -> None:
        self._row_s, self._wait_s, self._row_step = time.monotonic(), 0.0, -1
        self._start_s = self._row_s - before_s

    def waiting(self, stream: Any) -> Any:
        """The stream's batches, with the time spent waiting for them counted."""
        iterator = iter(stream)
        while True:
            begin = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            if self._row_step < 0:
                # The first batch starts the loader's processes: no step waits for that again.
                self._row_s, self._row_step = time.monotonic(), batch.step
            else:
                self._wait_s += time.monotonic() - begin
            yield batch

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is no part of a step; it is not in the rate."""
        began_s = time.monotonic()
        yield
        self._row_s += time.monotonic() - began_s

    def row(self, done: int, batch_size: int) -> dict[str, float]:
        """Images/s and the share of time that waited for data since the last row; time in all."""
        now = time.monotonic()
        elapsed = max(now - self._row_s, 1e-9)
        row = {
            "images_per_s": (done - self._row_step) * batch_size / elapsed,
            "data_wait": self._wait_s / elapsed,
            "time_s": now - self._start_s,
        }
        self._row_s, self._wait_s, self._row_step = now, 0.0, done
        return row

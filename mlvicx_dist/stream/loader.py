"""From the order of samples to batches, one whole batch an item, in loader processes.

Step t of a run is column t mod steps of epoch t div steps: resuming is starting at a step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mlvicx_dist.config import Views
from mlvicx_dist.errors import ResourceError, UserError
from mlvicx_dist.storage import temporary
from mlvicx_dist.stream.ahead import Ahead
from mlvicx_dist.stream.augment import PARAMETERS, few_views
from mlvicx_dist.stream.labels import Labels
from mlvicx_dist.stream.order import epoch_lanes, rank_lanes, steps_per_epoch
from mlvicx_dist.stream.shardset import ShardSet

LOSSES = 2
"""How often in a row, at one step, loader processes may die."""
DIED = "DataLoader worker (pid"
"""What PyTorch says where a loader process is gone; what one raised it says in other words."""


@dataclass(frozen=True)
class Batch:
    """What one rank trains on at one step.

    Attributes:
        step: The step of the run.
        samples: Global sample indices, int64 [b].
        images: Both views, or the one of a training on labels, uint8 [2 or 1, b, 1, S, S].
        table: Photometric table of `augment`, float32 [2 or 1, b, 6].
        labels: 0, 1 or NaN (unknown), float32 [b, K]; None: none are read.
    """

    step: int
    samples: torch.Tensor
    images: torch.Tensor
    table: torch.Tensor
    labels: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """The same in page-locked memory (PyTorch's loader calls this)."""
        labels = None if self.labels is None else self.labels.pin_memory()
        images, table = self.images.pin_memory(), self.table.pin_memory()
        return Batch(self.step, self.samples, images, table, labels)


class Steps(Dataset[Batch | UserError]):
    """The batches of one rank, by the step of the run."""

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        count: int = 2,
        labels: Labels | None = None,
    ) -> None:
        """Of `count` views of each image, 1 or 2; `labels` are read where they are asked for."""
        self.shards, self.views, self.seed, self.batch = shards, views, seed, batch
        self.count, self.labels = count, labels
        self.lanes, self.world_size = rank_lanes(batch, rank, world_size), world_size
        self.steps_per_epoch = steps_per_epoch(shards.sizes, batch, shards.weights)
        self._epoch = -1
        self._order = np.empty((0, 0), np.int64)

    def __getitem__(self, step: int) -> Batch | UserError:
        # An error travels as a value: PyTorch would turn it into a traceback.
        try:
            return self._batch(step)
        except UserError as error:
            return error

    def _batch(self, step: int) -> Batch:
        epoch, column = divmod(step, self.steps_per_epoch)
        samples = self.samples(epoch)[:, column]
        size = self.views.image_size_px
        images = np.empty((self.count, len(samples), 1, size, size), np.uint8)
        table = np.empty((self.count, len(samples), len(PARAMETERS)), np.float32)
        for place, sample in enumerate(samples.tolist()):
            images[:, place], table[:, place] = few_views(
                as_bytes(self.shards.image(sample)),
                self.views,
                self.count,
                seed=self.seed,
                epoch=epoch,
                sample=sample,
            )
        return Batch(
            step,
            torch.from_numpy(np.ascontiguousarray(samples)),
            torch.from_numpy(images),
            torch.from_numpy(table),
            torch.from_numpy(self.labels.read(self.shards, samples.tolist())).float()
            if self.labels
            else None,
        )

    def samples(self, epoch: int) -> np.ndarray:
        """The order of this rank's lanes in an epoch, int64 [lanes, steps]."""
        if epoch != self._epoch:
            self._order, self._epoch = self.order(epoch), epoch
        return self._order

    def order(self, epoch: int) -> np.ndarray:
        """The same, computed and not remembered."""
        return epoch_lanes(
            self.shards.sizes,
            self.batch,
            self.seed,
            epoch,
            self.shards.weights,
            lanes=self.lanes,
            folder=temporary("order"),
        )


def as_bytes(image: np.ndarray) -> np.ndarray:
    """An image as the views take it: 16 bits become 8, uint8 [H, W]."""
    return image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)


def batches(
    steps: Steps, *, start: int, stop: int, workers: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """The batches of the steps `start` … `stop` - 1, loaded ahead by `workers` processes.

    Remote shards are fetched ahead too, by a thread that ends with the iterator. A loader process
    that dies is replaced; no batch is lost.

    Raises:
        UserError: a shard cannot be read, or loader processes die again and again.
    """
    at, losses = start, 0
    while at < stop:
        loader: DataLoader[Batch | UserError] = DataLoader(
            steps,
            batch_size=None,
            sampler=range(at, stop),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=_one_thread,
        )
        # The loader processes are there before the thread: a fork takes no locks of it along.
        items = iter(loader)
        with Ahead(
            steps.order,
            steps.shards,
            steps_per_epoch=steps.steps_per_epoch,
            start=at,
            stop=stop,
            world_size=steps.world_size,
        ) as ahead:
            try:
                for item in items:
                    if isinstance(item, UserError):
                        raise item
                    ahead.reached(item.step)
                    at, losses = item.step + 1, 0
                    yield item
            except RuntimeError as error:
                if DIED not in str(error):
                    raise
                # What a batch is depends on its step alone: new processes go on where it was lost.
                losses += 1
                if losses > LOSSES:
                    raise ResourceError(
                        f"step {at}: loader processes died {losses} times in a row, perhaps for "
                        "want of memory; lower data.loader_workers or train.batch_size and run the "
                        "same command again."
                    ) from None
            finally:
                # An error that is raised here would keep it, and its processes, in a cycle.
                del items


def lists_of(loader: DataLoader[Any]) -> Iterator[list[Any]]:
    """What a loader that collates by `list` gives, as long as no item is an error.

    Raises:
        UserError: an item is one: PyTorch would turn what is raised in a loader into a traceback.
        ResourceError: a loader process died.
    """
    try:
        for items in loader:
            for item in items:
                if isinstance(item, UserError):
                    raise item
            yield items
    except RuntimeError as error:
        if DIED not in str(error):
            raise
        raise ResourceError(
            "a loader process died, perhaps for want of memory; lower loader_workers or batch_size "
            "and run the same command again."
        ) from None


def _as_it_is(item: Any) -> Any:
    return item


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)

"""What memory a worker needs for its part of the batch, known before a worker starts.

One training step is run on tensors without data (`FakeTensorMode`), and what lives at once is
counted. Allocators keep what they are given back: what the optimizer takes at the end of a step is
therefore counted on top of the activations, though the two do not live at once. A worker on a CPU
keeps all that it frees (`allocator`), in pieces that not every later tensor fits into: `KEPT`. With
it, the count was 0.95 to 1.07 of the peak resident memory of five real steps (resnet18 at 96 and
224 px, 8 to 64 images, float32); where the whole is under 1 GB, small blocks take up to 0.3 GB
more. No GPU was measured. Not counted: the process itself with its libraries (about 0.6 GB) and
the loader's processes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlvicx_dist.capacity import memory_bytes
from mlvicx_dist.config import Method, PretrainConfig
from mlvicx_dist.errors import ResourceError
from mlvicx_dist.model.mlvicx import MLVICX
from mlvicx_dist.objective.baselines import FROM_LIBRARY
from mlvicx_dist.train.dry import back, embed, shapes_of, views_of, without_data

PROCESS_BYTES = 600_000_000
"""What a worker's process takes with its libraries, before it trains."""
KEPT = 1.25
"""What a worker on a CPU takes for a step, over what lives at once in it; measured 1.11 to 1.37."""
STATES = {"lars": 1, "adamw": 2}
"""Tensors of an optimizer's state for each trained parameter."""


def needed_bytes(config: PretrainConfig, rows: int, *, gpu: bool | None = None) -> int:
    """The memory that one worker needs to train on its rows of the global batch.

    Parameters, gradients, the optimizer's state and what it takes for a step; and the most that
    lives at once of views, activations, their gradients and the terms of the loss; on a CPU a
    quarter more of these, which its allocator keeps.

    Args:
        config: The settings.
        rows: Images of each view that the worker holds.
        gpu: Whether it trains on a GPU; None: as the settings say.

    Raises:
        ConfigError: the backbone or a level does not exist, or `train.recompute` cannot be had.
    """
    kept = 1.0 if (config.workers.use_gpu if gpu is None else gpu) else KEPT
    return standing_bytes(config, rows) + int(kept * _step_peak(shapes_of(config), config, rows))


def standing_bytes(config: PretrainConfig, rows: int) -> int:
    """The part of `needed_bytes` that no smaller share of the batch would spare.

    Weights and statistics, the optimizer's state and its update, and in a group DDP's buckets.
    """
    model = shapes_of(config)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    fixed = sum(t.nbytes for t in model.state_dict().values())
    # The state, and the update that the optimizer makes; DDP's buckets, which hold the gradients.
    fixed += (STATES[config.train.optimizer] + 1) * trained
    if rows < config.train.batch_size:
        fixed += trained
    return fixed


def check_memory(
    config: PretrainConfig,
    world_size: int,
    *,
    node_workers: int,
    where: str,
    there: int | None = None,
) -> None:
    """Refuse a group of which a worker would need more memory than it has on a node.

    Args:
        config: The settings.
        world_size: Workers that share the batch.
        node_workers: Workers that share the node's memory; each has a GPU of its own.
        where: What errors call the node, such as "this machine".
        there: The node's memory or that of its GPU, in bytes; None: this node's.

    Raises:
        ResourceError: there is less.
    """
    if there is None:
        there = memory_bytes(gpu=config.workers.use_gpu)
    if there is None:
        return
    if not config.workers.use_gpu:
        there = there // node_workers - PROCESS_BYTES
    rows = math.ceil(config.train.batch_size / world_size)
    needed = needed_bytes(config, rows)
    if needed <= there:
        return
    key = "min" if config.workers.min == world_size else "num"
    each = "its one worker" if world_size == 1 else f"each of {world_size} workers"
    recompute = "" if config.train.recompute else ", set train.recompute=true"
    raise ResourceError(
        f"workers.{key} is {world_size}, but {each} would hold {rows} images and need about "
        f"{_gigabytes(needed)}, where {where} has {_gigabytes(max(there, 0))} for it; "
        f"raise workers.{key}{recompute} or lower train.batch_size."
    )


def _gigabytes(count: int) -> str:
    """Bytes in words, to two digits."""
    size = count / 1e9
    return f"{size:.0f} GB" if size >= 10 else f"{size:.1f} GB"


def _step_peak(model: MLVICX, config: PretrainConfig, rows: int) -> int:
    """The most that lives at once in a step beside the model, its optimizer and DDP."""
    batch = config.train.batch_size
    with without_data(model, config), _Live(model) as live:
        # Both views' gradients of a parameter are summed before they reach it, so what the step
        # before left there lives until the backward, and DDP's buckets beside it.
        for parameter in model.parameters():
            if parameter.requires_grad and rows == batch:
                parameter.grad = torch.empty_like(parameter)
        _images, views = views_of(config, rows)
        embeddings = embed(model, config, views)
        count = (
            baseline_bytes(config.method, rows, batch, embeddings[0].shape[1])
            if config.method in FROM_LIBRARY
            else _terms_bytes(embeddings, batch)
        )
        terms = torch.empty(count, dtype=torch.uint8)
        del terms
        model.zero_grad(set_to_none=True)
        back(embeddings)
    return live.peak


def _terms_bytes(embeddings: Sequence[torch.Tensor], batch: int) -> int:
    """The most that the terms of the loss hold at once for their own use, see `global_terms`.

    Four times the rows in float32: as they are, centred, and twice as gradients. Where they are
    gathered, all ranks' rows twice, and a row of Z Z' for each; else a D x D product a piece.
    """
    rows = len(embeddings[0])
    numbers = 0
    for width in (x.shape[1] for x in embeddings):
        numbers += 4 * rows * width
        if batch >= width:
            numbers += width**2
        else:
            numbers += rows * batch + (2 * batch * width if rows < batch else 0)
    return 4 * numbers


def baseline_bytes(method: Method, rows: int, batch: int, width: int) -> int:
    """The most that a baseline's loss holds at once for its own use, see `baseline_loss`.

    At most, by what lived in real calls in float32; each rank holds the whole batch.

    Args:
        method: One of `FROM_LIBRARY`.
        rows: A worker's rows of the batch.
        batch: The global batch N.
        width: D of an embedding.
    """
    if method == "barlow_twins":
        pieces, numbers = 2, 4 * batch * width + 4 * width**2
    elif method == "simclr":
        pieces, numbers = 2, 6 * batch * width + 17 * batch**2
    else:
        pieces, numbers = 4, 6 * batch * width
    if rows < batch:
        # The pieces as they were gathered, and the parts of the one that is being put together.
        numbers += (pieces + 2) * batch * width
    return 4 * numbers


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, each storage once.

    Attributes:
        now: Bytes that live; the model's own are not counted.
        peak: The most that lived at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        own = [*model.parameters(), *model.buffers()]
        self._storages = {x.untyped_storage()._cdata for x in own}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size

"""What a training step computes, moves and exchanges: counted, not timed.

The forward and backward of both views run on tensors without data (`train.dry`), operation by
operation. What is small beside them (photometrics, terms of the loss, optimizer) is added from its
formula.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mlvicx_dist.config import NUMBER_BYTES, SUPERVISED, Method, Precision, PretrainConfig
from mlvicx_dist.objective.baselines import FROM_LIBRARY
from mlvicx_dist.stream.augment import blur_reaches
from mlvicx_dist.train.dry import back, embed, shapes_of, views_of, without_data
from mlvicx_dist.train.step import bytes_of_rows, gathered_layers

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
"""Operations that move nothing."""
OPTIMIZER_PASSES = {"lars": 15, "adamw": 21}
"""How often a step of an optimizer reads or writes as much as all trained parameters."""
PHOTOMETRIC_PASSES, BLUR_PASSES = 29, 12
"""How often the photometrics, and the blur of a view, read or write as much as it in float32."""
LOSS_PASSES = 34
"""How often the terms of the loss read or write as much as the embeddings in float32."""
REST_OPS = 350
"""Operations of photometrics, terms of the loss and optimizer, which `Work.rest` sums up."""
OPTIMIZER = "optimizer"
"""The name of all its operations together."""
FLOAT_BYTES = NUMBER_BYTES["float32"]
NORM, NORM_BACKWARD = "native_batch_norm", "native_batch_norm_backward"


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: As PyTorch calls it.
        flops: Of its products; a multiplication with its addition is two.
        moved_bytes: What it reads and writes, each tensor once.
        precision: What it computes in.
    """

    name: str
    flops: float
    moved_bytes: float
    precision: Precision = "float32"


class Counter(TorchDispatchMode):
    """Lists the operations that run inside, on tensors with data or without.

    Attributes:
        ops: The operations; views of a tensor and empty ones are left out.
        seconds: What each took by the clock; without data it means nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.seconds: list[float] = []
        self._clock = clock

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        began = self._clock()
        result = func(*args, **kwargs)
        seconds = self._clock() - began
        packet = func.overloadpacket
        name = packet.__name__
        if func.is_view or name in FREE:
            return result
        read = _tensors((args, {k: v for k, v in kwargs.items() if k != "out"}))
        # What changes a list of tensors in place answers with nothing.
        written = _tensors(result) or (_tensors(args[0]) if name.endswith("_") else [])
        if written:
            count = flop_registry.get(packet)
            low = any(x.dtype == torch.bfloat16 for x in read)
            self.ops.append(
                Op(
                    name,
                    float(count(*args, **kwargs, out_val=result)) if count else 0.0,
                    float(sum(x.numel() * x.element_size() for x in (*read, *written))),
                    "bf16" if low else "float32",
                )
            )
            self.seconds.append(seconds)
        return result


@dataclass(frozen=True)
class Work:
    """A worker's step.

    Attributes:
        rows: Images of each view.
        forward: Operations of both forwards.
        backward: Operations of the backward, recomputed ones included.
        rest: Photometrics, terms of the loss, optimizer.
        parameters: Numbers that the model has.
        trained: Numbers of them that are trained.
        gradient_bytes: Their gradients, as workers exchange them, but for those of `row_gathers`.
        early_bytes: Of those, what lies behind the encoder, whose gradients are whole first.
        widths: D of each embedding, both views.
        method: Whose loss it is.
        row_gathers: How many layers' rows are gathered in place of gradients.
        row_bytes: Those of the global batch.
    """

    rows: int
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    rest: tuple[Op, ...]
    parameters: int
    trained: int
    gradient_bytes: int
    early_bytes: int
    widths: tuple[int, ...]
    method: Method = "mlvicx"
    row_gathers: int = 0
    row_bytes: int = 0

    @property
    def ops(self) -> tuple[Op, ...]:
        """All operations."""
        return (*self.forward, *self.backward, *self.rest)

    @property
    def flops(self) -> float:
        """FLOPs of the step."""
        return sum(op.flops for op in self.ops)

    @property
    def moved_bytes(self) -> float:
        """Bytes that the step reads and writes in the device's memory."""
        return sum(op.moved_bytes for op in self.ops)

    def times(self, name: str) -> int:
        """How often an operation runs."""
        return sum(op.name == name for op in self.ops)


def count_work(config: PretrainConfig, rows: int) -> Work:
    """Count the step of a worker that holds `rows` images of the global batch.

    Raises:
        ConfigError: the backbone or a level does not exist, does not run on such images, or
            `train.recompute` cannot be had.
    """
    model = shapes_of(config)
    with without_data(model, config):
        _images, views = views_of(config, rows)
        with Counter() as forward:
            embeddings = embed(model, config, views)
        with Counter() as backward:
            back(embeddings)
    trained, encoded = (
        sum(p.numel() for p in part.parameters() if p.requires_grad)
        for part in (model, model.encoder)
    )
    number_bytes = NUMBER_BYTES[config.train.gradients]
    batch = config.train.batch_size
    wide = gathered_layers(model, config.train) if rows < batch else []
    reduced = trained - sum(layer.weight.numel() for layer in wide)
    widths = tuple(x.shape[1] for x in embeddings)
    rest = [
        *photometric_ops(config, rows),
        *(
            baseline_ops(config.method, batch, widths[0])
            if config.method in FROM_LIBRARY
            else loss_ops(rows, batch, widths)
        ),
        *(row_op(2 * (batch - rows), layer, config.train.precision) for layer in wide),
        Op(OPTIMIZER, 0, OPTIMIZER_PASSES[config.train.optimizer] * FLOAT_BYTES * trained),
    ]
    return Work(
        rows,
        tuple(forward.ops),
        tuple(backward.ops),
        tuple(rest),
        sum(p.numel() for p in model.parameters()),
        trained,
        number_bytes * reduced,
        number_bytes * (reduced - encoded),
        widths,
        config.method,
        len(wide),
        bytes_of_rows(wide, config.train),
    )


def row_op(rows: int, layer: nn.Linear, precision: Precision) -> Op:
    """What the rows of other workers add to the product that is a wide layer's gradient."""
    moved = NUMBER_BYTES[precision] * rows * (layer.in_features + layer.out_features)
    return Op("mm", 2.0 * rows * layer.weight.numel(), float(moved), precision)


def loss_ops(rows: int, batch: int, widths: Sequence[int]) -> list[Op]:
    """The terms of the loss, forward and backward, as `objective.global_batch` computes them.

    Args:
        rows: A worker's rows n of the batch.
        batch: The global batch N.
        widths: D of each embedding, both views.
    """
    ops = [Op("mul", 0, LOSS_PASSES * FLOAT_BYTES * rows * sum(widths))]
    for width in widths:
        # z_r Z' and its product with Z; or z_r' z_r and the product of z_r with it.
        other = batch if batch < width else width
        sizes = rows * width + other * width + rows * other
        ops += 2 * [Op("mm", 2.0 * rows * other * width, float(FLOAT_BYTES * sizes))]
    return ops


def baseline_ops(method: Method, batch: int, width: int) -> list[Op]:
    """A baseline's loss, forward and backward: each worker computes that of the whole batch.

    Args:
        method: One of `FROM_LIBRARY`.
        batch: The global batch N.
        width: D of an embedding.
    """
    rows, square, pairs = batch * width, width**2, batch**2
    if method == "barlow_twins":
        passes, sizes = 11 * rows + 32 * square, 2 * rows + square
        products = 3 * [Op("mm", 2.0 * batch * square, float(FLOAT_BYTES * sizes))]
    elif method == "simclr":
        passes, sizes = 81 * rows + 82 * pairs, 2 * rows + pairs
        products = 12 * [Op("bmm", 2.0 * width * pairs, float(FLOAT_BYTES * sizes))]
    else:
        passes, products = 69 * rows, []
    return [Op("mul", 0, float(FLOAT_BYTES * passes)), *products]


def photometric_ops(config: PretrainConfig, rows: int) -> list[Op]:
    """Jitter, blur and solarise of both views; the blur is two banded products an image.

    Args:
        config: The settings, of which the size and the share of blurred views count.
        rows: Images of each view.
    """
    side = config.views.image_size_px
    blurred = rows * sum(config.views.blur_p)
    pixels = 2 * rows * side**2
    band = sum(
        (place.stop - place.start) * (reach.stop - reach.start)
        for place, reach in blur_reaches(side, config.views.blur_kernel_px)
    )
    return [
        Op("mul", 0, PHOTOMETRIC_PASSES * FLOAT_BYTES * pixels),
        Op("bmm", blurred * 4.0 * side * band, blurred * BLUR_PASSES * FLOAT_BYTES * side**2),
    ]


@dataclass(frozen=True)
class Exchange:
    """What a group exchanges at a step.

    Attributes:
        gradient_bytes: Of the trained parameters, as far as they are all-reduced.
        early_bytes: Of those, what is ready when the backward reaches the encoder.
        loss_bytes: Sums of embeddings and D x D products, all-reduced.
        gathered_bytes: Embeddings of the global batch, gathered.
        gathers: How often something is gathered.
        reductions: How often something small is all-reduced.
        row_bytes: Rows of wide layers, gathered in place of their gradients.
    """

    gradient_bytes: int
    early_bytes: int
    loss_bytes: int
    gathered_bytes: int
    gathers: int
    reductions: int
    row_bytes: int = 0


def exchange_of(work: Work, batch: int) -> Exchange:
    """What a step exchanges; batch norm gathers statistics forward and sums gradients backward."""
    found = _of_method(work, batch)
    gathers = found.gathers + work.row_gathers
    return replace(found, gathers=gathers, row_bytes=work.row_bytes)


def _of_method(work: Work, batch: int) -> Exchange:
    """The same without the rows of wide layers."""
    if work.method in FROM_LIBRARY:
        return Exchange(
            gradient_bytes=work.gradient_bytes,
            early_bytes=work.early_bytes,
            loss_bytes=0,
            gathered_bytes=FLOAT_BYTES * batch * sum(work.widths),
            gathers=work.times(NORM) + len(work.widths),
            reductions=work.times(NORM_BACKWARD),
        )
    if work.method == SUPERVISED:
        return Exchange(
            gradient_bytes=work.gradient_bytes,
            early_bytes=work.early_bytes,
            loss_bytes=2 * FLOAT_BYTES,
            gathered_bytes=0,
            gathers=work.times(NORM),
            reductions=work.times(NORM_BACKWARD) + 1,
        )
    narrow = [width for width in work.widths if batch < width]
    wide = [width for width in work.widths if batch >= width]
    return Exchange(
        gradient_bytes=work.gradient_bytes,
        early_bytes=work.early_bytes,
        loss_bytes=FLOAT_BYTES * (2 * sum(work.widths) + sum(width**2 for width in wide)),
        gathered_bytes=FLOAT_BYTES * batch * sum(narrow),
        gathers=work.times(NORM) + bool(narrow),
        reductions=work.times(NORM_BACKWARD) + 2 + len(wide),
    )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

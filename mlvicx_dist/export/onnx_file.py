"""An encoder as one ONNX file, kept only if it gives PyTorch's numbers under onnxruntime.

Input `images`: uint8 [batch, 1, height, width], so that no scale can be mistaken; normalisation is
inside. Outputs: `embedding` [batch, F] and `level0`, `level1`, …, the gated maps. Batch, height and
width are free; where a backbone fixes height and width, they are those of the pretraining's views.
"""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from mlvicx_dist.errors import CheckpointError, ConfigError, first_line
from mlvicx_dist.export.agreement import TOLERANCE, difference, phantoms
from mlvicx_dist.model.encoder import Encoder

FILE = "encoder.onnx"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2**31
"""What protobuf can hold."""
FREE = {0: "batch", 2: "height", 3: "width"}
LEAST_SIDE_PX = 128
"""Of the images that a file of any size is traced with: a map of one pixel is taken for a rule."""


class Outputs(nn.Module):
    """The embedding and the maps of every level, as a tuple: what ONNX has for outputs."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images uint8 [B, 1, H, W] to [B, F] and a [B, C_l, H_l, W_l] a level."""
        maps = self.encoder.levels(images)
        return maps[-1].mean((2, 3)), *maps


def check_onnx() -> None:
    """Refuse to write ONNX where its libraries are not installed.

    Raises:
        ConfigError: one of them is missing.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--onnx: {', '.join(missing)} not installed here; install with "
            "pip install 'mlvicx_dist[onnx]', or export without it."
        )


def onnx_bytes(encoder: Encoder) -> tuple[bytes, bool]:
    """The ONNX file of an encoder, and whether it takes images of any size.

    Raises:
        CheckpointError: the backbone cannot be written as ONNX, or onnxruntime's numbers are not
            PyTorch's.
    """
    encoder = encoder.eval()
    size = encoder.image_size_px
    if sum(w.numel() * w.element_size() for w in encoder.state_dict().values()) >= MAX_BYTES:
        raise _cannot(encoder, "its weights are over 2 GiB, more than one file can hold")
    other = size + 32
    for free, sizes in ((FREE, (size, other)), ({0: "batch"}, (size,))):
        try:
            data = _written(encoder, free)
        except torch.onnx.errors.OnnxExporterError as error:
            reason = first_line(error.__cause__ or error)[:120]
        else:
            wrong = [why for size in sizes if (why := _wrong(encoder, data, size))]
            if not wrong:
                return data, free == FREE
            reason = wrong[0]
    raise _cannot(encoder, reason)


def _written(encoder: Encoder, free: dict[int, str]) -> bytes:
    """The encoder as ONNX with the dimensions `free` of its input left open."""
    names = ["embedding", *(f"level{k}" for k in range(len(encoder.backbone.channels)))]
    images = phantoms(encoder.image_size_px)
    if free == FREE:
        size = max(encoder.image_size_px, LEAST_SIDE_PX)
        # Nor are equal sides to be taken for one.
        images = phantoms(size)[:, :, :, : size - 32]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Of the exporter's own ways; what comes of them is checked.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Outputs(encoder).eval(),
                (images,),
                dynamo=True,
                external_data=False,
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": free},
                verbose=False,
            )
    finally:
        logging.disable(before)
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def _wrong(encoder: Encoder, data: bytes, size_px: int) -> str:
    """In what the outputs are not PyTorch's to `TOLERANCE`, in words; nothing where they are."""
    images = phantoms(size_px, count=3)
    with torch.inference_mode():
        expected = Outputs(encoder)(images)
    try:
        names, found = run(data, images.numpy())
    except _failures() as error:
        return f"onnxruntime fails at {size_px} px, {type(error).__name__}"
    for name, one, right in zip(names, found, expected, strict=True):
        apart = difference(torch.from_numpy(one), right)
        if not apart <= TOLERANCE:
            return f"onnxruntime's {name} differs from PyTorch's by {apart:.1e}"
    return ""


def words(encoder: Encoder, *, free: bool) -> str:
    """How the file is used, for the card."""
    size = encoder.image_size_px
    sides = "height and width as you like" if free else f"height and width {size}"
    return (
        f"`{FILE}` is the same encoder for onnxruntime: `images`, uint8 [batch, 1, height, width] "
        f"({sides}), to `embedding` and to `level0`, `level1`, …; normalisation is inside. Its "
        f"outputs were compared with PyTorch's when it was written and are equal to {TOLERANCE:g} "
        "of their largest value."
    )


def run(data: bytes, images: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """The outputs of an ONNX file by onnxruntime on this CPU, by name."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [one.name for one in session.get_outputs()], session.run(None, {"images": images})


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises where it cannot load or run a file."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NotImplemented",
        "RuntimeException",
    )
    return tuple(getattr(state, name) for name in names)


def _cannot(encoder: Encoder, reason: str) -> CheckpointError:
    return CheckpointError(
        f"--onnx: {encoder.settings.backbone} cannot be written as ONNX ({reason}); export it "
        "without --onnx."
    )

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

from mlvicx_dist.errors import CheckpointError, ConfigError
from mlvicx_dist.export.agreement import TOLERANCE, difference, phantoms
from mlvicx_dist.model.encoder import Encoder

FILE = "encoder.onnx"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2**31
"""What protobuf can hold."""
FREE = {0: "batch", 2: "height", 3: "width"}


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
    try:
        data, free = _written(encoder, FREE), True
    except torch.onnx.errors.OnnxExporterError:
        try:
            data, free = _written(encoder, {0: "batch"}), False
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:120]
            raise _cannot(encoder, reason) from None
    other = size + 32 if free else size
    for images in (phantoms(size), phantoms(other, count=3)):
        _check(encoder, data, images)
    return data, free


def _written(encoder: Encoder, free: dict[int, str]) -> bytes:
    """The encoder as ONNX with the dimensions `free` of its input left open."""
    names = ["embedding", *(f"level{k}" for k in range(len(encoder.backbone.channels)))]
    images = phantoms(encoder.image_size_px)
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


def _check(encoder: Encoder, data: bytes, images: torch.Tensor) -> None:
    """Compare every output with PyTorch's.

    Raises:
        CheckpointError: one differs by more than `TOLERANCE`.
    """
    with torch.inference_mode():
        expected = Outputs(encoder)(images)
    names, found = run(data, images.numpy())
    for name, one, right in zip(names, found, expected, strict=True):
        apart = difference(torch.from_numpy(one), right)
        if not apart <= TOLERANCE:
            raise _cannot(encoder, f"onnxruntime's {name} differs from PyTorch's by {apart:.1e}")


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


def _cannot(encoder: Encoder, reason: str) -> CheckpointError:
    return CheckpointError(
        f"--onnx: {encoder.settings.backbone} cannot be written as ONNX ({reason}); export it "
        "without --onnx."
    )

"""JPEG in all its DICOM forms and RLE through imagecodecs, as a decoder of pydicom's.

pydicom decodes JPEG baseline and JPEG 2000 through Pillow; JPEG extended (12 bits), JPEG lossless
and JPEG-LS need a library: imagecodecs (BSD) has them all. Its RLE stops where the image is full;
pydicom's own unpacks whatever is there, in Python.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import (
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

LABEL = "imagecodecs"
JPEG = (JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
JPEG_2000 = (JPEG2000, JPEG2000Lossless)
SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}
"""Markers of the frame header: baseline, extended, progressive, lossless, JPEG-LS."""


def register() -> None:
    """Make the decoder known to pydicom; a second call does nothing."""
    for uid in (*JPEG, *JPEG_LS, RLELossless):
        decoder = get_decoder(uid)
        if LABEL not in decoder.available_plugins:
            if uid == RLELossless:
                decoder.remove_plugin("pydicom")
            decoder.add_plugin(LABEL, (__name__, "decode_frame"))


def is_available(uid: str) -> bool:
    """Whether a transfer syntax is decoded here (pydicom asks)."""
    return uid in (*JPEG, *JPEG_LS, RLELossless)


def check_frame(dataset: Any) -> None:
    """See that the one frame of a dataset is as large as the dataset says, before it is decoded.

    Raises:
        ValueError: the frame's own header tells another size, or there is none.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax not in (JPEGBaseline8Bit, *JPEG, *JPEG_LS, *JPEG_2000):
        return
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    rows, columns = jpeg_2000_size(frame) if syntax in JPEG_2000 else frame_size(frame)
    if (rows, columns) != (dataset.Rows, dataset.Columns):
        raise ValueError(
            f"the compressed frame is {rows} x {columns}, the header says "
            f"{dataset.Rows} x {dataset.Columns}"
        )


def decode_frame(src: bytes, runner: DecodeRunner) -> bytearray:
    """The pixels of a frame (pydicom calls this)."""
    syntax = UID(runner.transfer_syntax)
    if syntax == RLELossless:
        runner.set_option("planar_configuration", 1)
        dtype = np.dtype(f"<u{runner.bits_allocated // 8}")
        size = runner.rows * runner.columns * runner.samples_per_pixel * dtype.itemsize
        return bytearray(imagecodecs.dicomrle_decode(src, dtype, out=size))
    if syntax in JPEG_LS:
        pixels = imagecodecs.jpegls_decode(src)
    else:
        pixels = imagecodecs.jpeg_decode(src)
    pixels = np.ascontiguousarray(pixels)
    if pixels.ndim == 3:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", 8 * pixels.itemsize)
    return bytearray(pixels.tobytes())


def frame_size(src: bytes) -> tuple[int, int]:
    """Rows and columns by the frame header of a JPEG stream.

    Raises:
        ValueError: there is no frame header.
    """
    place = 2
    while place + 9 <= len(src) and src[:2] == b"\xff\xd8":
        if src[place] != 0xFF:
            break
        marker = src[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker in SOF:
            rows, columns = struct.unpack(">HH", src[place + 5 : place + 9])
            return rows, columns
        place += 2 + int(struct.unpack(">H", src[place + 2 : place + 4])[0])
    raise ValueError("the compressed frame has no JPEG header")


def jpeg_2000_size(src: bytes) -> tuple[int, int]:
    """Rows and columns of a JPEG 2000 stream, as Pillow, which decodes it, will find them.

    Raises:
        ValueError: it is no such stream, or far too large.
    """
    try:
        with Image.open(io.BytesIO(src), formats=("JPEG2000",)) as image:
            return image.height, image.width
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"the compressed frame has no sane header ({error})") from None

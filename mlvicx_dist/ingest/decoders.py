"""JPEG in all its DICOM forms through imagecodecs, as a decoder of pydicom's.

pydicom decodes RLE itself, and JPEG baseline and JPEG 2000 through Pillow; JPEG extended (12 bits),
JPEG lossless and JPEG-LS need a library: imagecodecs (BSD) has them all.
"""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import (
    UID,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

LABEL = "imagecodecs"
JPEG = (JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}
"""Markers of the frame header: baseline, extended, progressive, lossless, JPEG-LS."""


def register() -> None:
    """Make the decoder known to pydicom; a second call does nothing."""
    for uid in (*JPEG, *JPEG_LS):
        decoder = get_decoder(uid)
        if LABEL not in decoder.available_plugins:
            decoder.add_plugin(LABEL, (__name__, "decode_frame"))


def is_available(uid: str) -> bool:
    """Whether a transfer syntax is decoded here (pydicom asks)."""
    return uid in (*JPEG, *JPEG_LS)


def decode_frame(src: bytes, runner: DecodeRunner) -> bytearray:
    """The pixels of a frame (pydicom calls this).

    Raises:
        ValueError: the frame's own header tells another size than the file's.
    """
    rows, columns = frame_size(src)
    if (rows, columns) != (runner.rows, runner.columns):
        raise ValueError(
            f"the compressed frame is {rows} x {columns}, the header says "
            f"{runner.rows} x {runner.columns}"
        )
    if UID(runner.transfer_syntax) in JPEG_LS:
        pixels = imagecodecs.jpegls_decode(src)
    else:
        pixels = imagecodecs.jpeg_decode(src)
    pixels = np.ascontiguousarray(pixels)
    if pixels.ndim == 3:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", 8 * pixels.itemsize)
    return bytearray(pixels.tobytes())


def frame_size(src: bytes) -> tuple[int, int]:
    """Rows and columns by the frame header of a JPEG stream, before anything is allocated.

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

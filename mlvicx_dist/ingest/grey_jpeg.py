"""Grey JPEG, which shards hold: Pillow's pixels from the same libjpeg-turbo, without its copies."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive: the markers before an image's size."""
SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
"""Tables, comments and applications' own: what may stand before a frame."""


def decode_grey_jpeg(data: bytes, *, most_pixels: int) -> np.ndarray | None:
    """A whole grey JPEG of 8 bits and at most `most_pixels`, uint8 [H, W].

    Returns:
        None where it is anything else or damaged: Pillow finds out what.
    """
    if not (data.startswith(START) and data.endswith(END)):
        return None  # libjpeg fills up what was cut off
    at = len(START)
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] in SEGMENTS:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if at + 10 > len(data) or data[at] != 0xFF or data[at + 1] not in FRAMES:
        return None
    bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
    if bits != 8 or components != 1 or height * width > most_pixels:
        return None
    try:
        return np.asarray(imagecodecs.jpeg8_decode(data))
    except imagecodecs.Jpeg8Error:
        return None

"""A DICOM file as a grey image: air dark, bone bright, whatever the file says.

The header is looked at first, so that what is no frontal chest radiograph costs nothing. The
transforms are pydicom's own: modality LUT, then the file's window or VOI LUT, then the inversion.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from mlvicx_dist.errors import last_line
from mlvicx_dist.ingest import decoders
from mlvicx_dist.ingest.dicom_header import (
    ANYTHING,
    BROKEN,
    Header,
    Rules,
    check,
    describe,
    text_of,
)
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import MAX_PIXELS
from mlvicx_dist.storage import place, reaching

decoders.register()
logging.getLogger("pydicom").setLevel(logging.ERROR)

PERCENTILES = (0.5, 99.5)
"""What becomes black and white where the file has neither a window nor a VOI LUT."""
MAX_INFLATED_BYTES = 4 * MAX_PIXELS
"""A deflated file that grows beyond this is taken for an attack on memory."""
PIECE_PIXELS = 1 << 20
LONG_VRS = (
    b"OB",
    b"OW",
    b"OF",
    b"OD",
    b"OL",
    b"OV",
    b"SQ",
    b"UC",
    b"UN",
    b"UR",
    b"UT",
    b"SV",
    b"UV",
)
"""Kinds of elements whose length takes four bytes."""
LUMA = (0.299, 0.587, 0.114)
"""Grey of an RGB pixel (ITU-R BT.601, as Pillow weighs them)."""


def is_dicom(data: bytes) -> bool:
    """Whether a file's first bytes say that it is DICOM: by its preamble, not by its name."""
    return data[128:132] == b"DICM"


def read_grey(path: str | Path, bits: int = 8) -> np.ndarray:
    """The image of a DICOM file, whatever it shows.

    Args:
        path: The file, a path or a URL.
        bits: 8 or 16, the depth wanted.

    Returns:
        uint8 or uint16 [H, W] over the full range; air dark and bone bright.

    Raises:
        Refused: the file holds no single image that can be read, with the reason's code.
    """
    with place(path).open("rb") as file:
        return read_radiograph(file, bits=bits, rules=ANYTHING)[0]


def read_radiograph(file: BinaryIO, *, bits: int, rules: Rules) -> tuple[np.ndarray, Header]:
    """The image and the header of a DICOM file that keeps the rules.

    Args:
        file: The file, open; of one that does not keep the rules the header alone is read.
        bits: 8 or 16, the depth wanted.
        rules: What is taken.

    Raises:
        Refused: it does not keep a rule, or cannot be read.
    """
    with warnings.catch_warnings():
        # pydicom warns of every oddity of a header; what matters ends in a refusal.
        warnings.simplefilter("ignore")
        header = _parse(file, pixels=False)
        check(header, rules)
        dataset = _parse(file, pixels=True)
        if "PixelData" not in dataset:
            raise Refused("no-pixels", "the file has no PixelData")
        try:
            decoders.check_frame(dataset)
            grey = _grey(dataset, rules, bits)
        except BROKEN as error:
            raise Refused(*_why(dataset, error)) from None
        return grey, describe(header)


def read_header(path: str | Path) -> Header | None:
    """What the header of a DICOM file tells of the patient and the view; None of another file.

    Raises:
        Refused: the header cannot be read.
        OSError: the file cannot be read.
    """
    where = place(path)
    with reaching(where), where.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return describe(_parse(file, pixels=False)) if is_dicom(file.read(132)) else None


def _parse(file: BinaryIO, *, pixels: bool) -> Any:
    """The dataset of a file, from its beginning; without pixels, as far as they begin."""
    try:
        _bound_inflation(file)
        file.seek(0)
        return pydicom.dcmread(file, stop_before_pixels=not pixels)
    except InvalidDicomError:
        raise Refused("not-dicom", "no DICOM preamble") from None
    except BROKEN as error:
        raise Refused("unreadable", last_line(error)) from None


def _bound_inflation(file: BinaryIO) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates without a bound.

    The meta information is walked element by element, as pydicom does: the length that it tells of
    itself may lie.
    """
    file.seek(132)
    syntax = b""
    while (head := file.read(8))[:2] == b"\x02\x00" and len(head) == 8:
        if head[4:6] in LONG_VRS:
            size = int(struct.unpack("<I", file.read(4))[0])
        else:
            size = int(struct.unpack("<H", head[6:8])[0])
        value = file.read(size)
        if head[2:4] == b"\x10\x00":
            syntax = value.rstrip(b"\0 ")
    if syntax != DeflatedExplicitVRLittleEndian.encode():
        return
    packer = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = packer.decompress(head + file.read(), MAX_INFLATED_BYTES)
    if len(inflated) >= MAX_INFLATED_BYTES:
        raise Refused("size", f"it inflates to more than {MAX_INFLATED_BYTES:,} bytes")


def _grey(dataset: Any, rules: Rules, bits: int) -> np.ndarray:
    """The image to show, [H, W] of 8 or 16 bits."""
    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return _luma(pixels, 8 * pixels.itemsize, bits)
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return _luma(pixels, int(dataset.BitsStored), bits)
    if pixels.ndim != 2:
        raise Refused("not-grey", f"pixels of shape {pixels.shape}")
    # Every transform is one of values: it is made once for each value that occurs, not a pixel.
    low, high = int(pixels.min()), int(pixels.max())
    if high - low >= 2**16:
        raise Refused("depth", f"values from {low} to {high} are more than 16 bits")
    counts = np.zeros(high - low + 1, np.int64)
    for rows in _pieces(pixels):
        counts += np.bincount((rows.astype(np.int64) - low).reshape(-1), minlength=len(counts))
    shown = _shown(np.arange(low, high + 1), counts, dataset, rules.window)
    if not np.isfinite(shown).all():
        raise Refused("undecodable", "its transforms give values that are no numbers")
    table = _as_bits(shown, bits)
    return np.concatenate([table[rows.astype(np.int64) - low] for rows in _pieces(pixels)])


def _pieces(pixels: np.ndarray) -> list[np.ndarray]:
    """Runs of rows: numpy's look-ups need eight bytes a pixel, so not of all at once."""
    return np.array_split(pixels, -(-pixels.size // PIECE_PIXELS))


def _as_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Values in [0, 1] over the full range of 8 or 16 bits."""
    return np.round(values * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def _shown(values: np.ndarray, counts: np.ndarray, dataset: Any, window: int) -> np.ndarray:
    """How bright each stored value is shown, float64 [n] in [0, 1].

    Args:
        values: Stored values, ascending, int64 [n].
        counts: How many pixels have each, [n].
        dataset: The file.
        window: Which window or VOI LUT is taken.
    """
    padding = _padding(values, dataset)
    modality = apply_modality_lut(values, dataset)
    shown = _windowed(modality, dataset, window)
    if shown is None:
        inside = counts * ~padding if (counts * ~padding).any() else counts
        shown = _stretched(modality.astype(np.float64), *_percentiles(modality, inside))
    if _inverted(dataset):
        shown = 1 - shown
    return np.where(padding, 0.0, shown)


def _percentiles(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """`PERCENTILES` of an image by its histogram."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[order]) / counts.sum()
    low, high = (values[order][np.searchsorted(reached, p / 100)] for p in PERCENTILES)
    return float(low), float(high)


def _luma(pixels: np.ndarray, stored_bits: int, bits: int) -> np.ndarray:
    """RGB [H, W, 3] to grey, [H, W] of 8 or 16 bits."""
    weights = np.array(LUMA) / (2**stored_bits - 1)
    return np.concatenate(
        [_as_bits(np.clip(rows @ weights, 0, 1), bits) for rows in _pieces(pixels)]
    )


def _padding(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Which stored values say that the detector saw nothing there, bool [n]."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(len(values), bool)
    low, high = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    return np.asarray((values >= low) & (values <= high))


def _windowed(values: np.ndarray, dataset: Any, index: int) -> np.ndarray | None:
    """The VOI LUT or window applied, float64 in [0, 1]; None where there is none that works."""
    luts = dataset.get("VOILUTSequence")
    if luts:
        chosen = min(index, len(luts) - 1)
        entries, lowest, depth = (int(number) for number in luts[chosen].LUTDescriptor)
        # pydicom indexes a table of 8-bit values with 8 bits, which wraps: called 16, it does not.
        luts[chosen].LUTDescriptor = [entries, lowest, max(depth, 16)]
        whole = np.round(values).astype(np.int64)
        seen = apply_voi_lut(whole, dataset, index=chosen).astype(np.float64)
        return _stretched(seen, 0, 2**depth - 1)
    centers, widths = (_numbers(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if not centers or not widths:
        return None
    chosen = min(index, len(centers) - 1, len(widths) - 1)
    linear = text_of(dataset, "VOILUTFunction").upper() in ("", "LINEAR")
    if not widths[chosen] >= (1 if linear else 1e-9) or not np.isfinite(centers[chosen]):
        return None
    # pydicom's window reaches over the range that the stored bits have after the modality LUT.
    seen = apply_voi_lut(values, dataset, index=chosen, prefer_lut=False).astype(np.float64)
    return _stretched(seen, *_range(dataset))


def _numbers(value: Any) -> list[float]:
    """The numbers of a tag that holds one or several."""
    if value is None or value == "":
        return []
    many = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [float(one) for one in many]


def _range(dataset: Any) -> tuple[float, float]:
    """The output range of pydicom's windowing: that of the stored bits, rescaled.

    Under a negative slope its first end is the larger, as in pydicom.
    """
    bits = int(dataset.BitsStored)
    if int(dataset.PixelRepresentation):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        low, high = 0, 2**bits - 1
    if dataset.get("ModalityLUTSequence"):
        return 0, 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    return low * slope + intercept, high * slope + intercept


def _stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values - low) / (high - low or 1.0), 0, 1)


def _inverted(dataset: Any) -> bool:
    """Whether small stored values are bright: by interpretation, or by presentation."""
    monochrome1 = text_of(dataset, "PhotometricInterpretation") == "MONOCHROME1"
    shape = text_of(dataset, "PresentationLUTShape").upper()
    # MONOCHROME1 images say INVERSE too: the two name one inversion.
    return monochrome1 or shape == "INVERSE"


def _why(dataset: Any, error: Exception) -> tuple[str, str]:
    """The code and the words of a file whose pixels cannot be had."""
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if "missing" in str(error) and syntax.is_compressed:
        return (
            "no-decoder",
            f"no decoder for {syntax.name} is installed; decompress the file, "
            "as with dcmdjpeg or gdcmconv --raw",
        )
    return "undecodable", last_line(error)

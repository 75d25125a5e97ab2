"""A DICOM file as a grey image: air dark, bone bright, whatever the file says.

Uncompressed files; the transforms are pydicom's own (modality LUT, VOI LUT or window).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import UID

from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import MAX_PIXELS

PERCENTILES = (0.5, 99.5)
"""What becomes black and white where the file has neither a window nor a VOI LUT."""


def is_dicom(path: Path) -> bool:
    """Whether a file says it is DICOM: by its preamble, not by its name."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_grey(path: str | Path, bits: int = 8) -> np.ndarray:
    """The image of a DICOM file.

    Args:
        path: The file.
        bits: 8 or 16, the depth wanted.

    Returns:
        uint8 or uint16 [H, W] over the full range; air dark and bone bright.

    Raises:
        Refused: the file holds no single grey image that can be read, with the reason's code.
    """
    dataset = _read(Path(path))
    _check(dataset)
    try:
        pixels = dataset.pixel_array
    except (ValueError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
        raise Refused("undecodable", str(error).splitlines()[0]) from None
    if pixels.ndim != 2:
        raise Refused("not-grey", f"pixels of shape {pixels.shape}")
    values = apply_modality_lut(pixels, dataset)
    if dataset.get("VOILUTSequence") or dataset.get("WindowCenter") is not None:
        values = _windowed(values, dataset)
    else:
        values = _stretched(values.astype(np.float64), *np.percentile(values, PERCENTILES))
    if _inverted(dataset):
        values = 1 - values
    top = 2**bits - 1
    return np.round(values * top).astype(np.uint8 if bits == 8 else np.uint16)


def _read(path: Path) -> Any:
    try:
        return pydicom.dcmread(path)
    except InvalidDicomError:
        raise Refused("not-dicom", "no DICOM preamble") from None
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise Refused("unreadable", str(error).splitlines()[0]) from None


def _check(dataset: Any) -> None:
    """Refuse by the header what is no single grey image of a sane size."""
    if "PixelData" not in dataset:
        raise Refused("no-pixels", "the file has no PixelData")
    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if syntax is None:
        raise Refused("unreadable", "the file names no transfer syntax")
    if UID(syntax).is_compressed and not UID(syntax).is_deflated:
        raise Refused("compressed", f"{UID(syntax).name} is not supported yet")
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise Refused("multi-frame", f"{dataset.NumberOfFrames} frames")
    if int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise Refused("not-grey", f"{dataset.SamplesPerPixel} samples a pixel")
    rows, columns = int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0))
    if not 0 < rows * columns <= MAX_PIXELS:
        raise Refused("size", f"{rows} x {columns} pixels")


def _windowed(values: np.ndarray, dataset: Any) -> np.ndarray:
    """The first VOI LUT or window applied, float64 in [0, 1]."""
    seen = apply_voi_lut(values, dataset, index=0).astype(np.float64)
    if "VOILUTSequence" in dataset:
        depth = dataset.VOILUTSequence[0].LUTDescriptor[2]
        return _stretched(seen, 0, 2 ** int(depth) - 1)
    # pydicom's window reaches over the range that the stored bits have after the modality LUT.
    low, high = _range(dataset)
    return _stretched(seen, low, high)


def _range(dataset: Any) -> tuple[float, float]:
    """The output range of pydicom's windowing: that of the stored bits, rescaled."""
    bits = int(dataset.BitsStored)
    if int(dataset.PixelRepresentation):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        low, high = 0, 2**bits - 1
    if "ModalityLUTSequence" in dataset:
        return 0, 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    ends = (low * slope + intercept, high * slope + intercept)
    return min(ends), max(ends)


def _stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values - low) / max(high - low, 1e-9), 0, 1)


def _inverted(dataset: Any) -> bool:
    """Whether small stored values are bright: by interpretation, or by presentation."""
    monochrome1 = str(dataset.get("PhotometricInterpretation", "")) == "MONOCHROME1"
    shape = str(dataset.get("PresentationLUTShape", "")).upper()
    # MONOCHROME1 images say INVERSE too: the two name one inversion.
    return monochrome1 or shape == "INVERSE"

"""From an image file to the bytes that are stored: read grey, resize, encode, hash."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlvicx_dist.ingest.dicom import is_dicom, read_grey
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import MAX_PIXELS

Format = Literal["jpeg", "png8", "png16"]
SMALLEST_SIDE_PX = 32


@dataclass(frozen=True)
class Stored:
    """An encoded image.

    Attributes:
        suffix: jpg or png.
        data: Its bytes.
        scale: Stored pixels over original pixels.
        phash: Perceptual hash, 16 hexadecimal digits.
    """

    suffix: str
    data: bytes
    scale: float
    phash: str


def store(path: Path, *, short_side_px: int, format: Format, quality: int) -> Stored:
    """Read, resize so that the short side is at most `short_side_px`, and encode an image.

    Raises:
        Refused: the file cannot be read as a radiograph.
    """
    image = read_image(path, bits=16 if format == "png16" else 8)
    short = min(image.size)
    if short < SMALLEST_SIDE_PX:
        raise Refused("size", f"{image.width} x {image.height} pixels are too few")
    scale = min(1.0, short_side_px / short)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if format == "jpeg":
        image.save(buffer, "JPEG", quality=quality)
    elif format == "png8":
        image.save(buffer, "PNG")
    else:
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        Image.fromarray(values).save(buffer, "PNG")
    suffix = "jpg" if format == "jpeg" else "png"
    return Stored(suffix, buffer.getvalue(), scale, difference_hash(image))


def read_image(path: Path, *, bits: int = 8) -> Image.Image:
    """A DICOM or image file as a grey picture.

    Args:
        path: The file.
        bits: 8 gives mode L; 16 gives mode F with values 0 to 65535, which resizes exactly.

    Raises:
        Refused: it cannot be read.
    """
    try:
        if is_dicom(path):
            values = read_grey(path, bits)
            return Image.fromarray(values if bits == 8 else values.astype(np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Refused("size", f"{image.width} x {image.height} pixels are too many")
                if getattr(image, "n_frames", 1) > 1:
                    raise Refused("multi-frame", f"{getattr(image, 'n_frames', 1)} frames")
                return _grey(ImageOps.exif_transpose(image), bits)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Refused("size", str(error).split(",")[0]) from None
    except FileNotFoundError:
        raise Refused("missing", "the file is gone") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise Refused("unreadable", reason.splitlines()[0]) from None


def _grey(image: Image.Image, bits: int) -> Image.Image:
    """Any mode of Pillow's to grey of the depth wanted; transparency lies over black."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        wide = values if values.max(initial=0) > 255 else values * 257
        return Image.fromarray(wide if bits == 16 else np.round(wide / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    grey = image.convert("L")
    if bits == 8:
        return grey
    return Image.fromarray(np.asarray(grey).astype(np.float32) * 257)


def difference_hash(image: Image.Image) -> str:
    """dHash: which of two neighbours is brighter in a 9 x 8 thumbnail; 16 hexadecimal digits."""
    small = np.asarray(image.resize((9, 8), Image.Resampling.BOX), dtype=np.float32)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return bits.tobytes().hex()

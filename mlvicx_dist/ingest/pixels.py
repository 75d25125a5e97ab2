"""From an image file to the bytes that are stored: read grey, resize, encode, hash."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlvicx_dist.errors import last_line
from mlvicx_dist.ingest.dicom import is_dicom, read_radiograph
from mlvicx_dist.ingest.dicom_header import ANYTHING, BROKEN, Header, Rules
from mlvicx_dist.ingest.phash import perceptual_hash
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import MAX_PIXELS

Format = Literal["jpeg", "png8", "png16"]
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
"""What is read whatever a file is called: Pillow gives EPS to a program of its own, for one."""
MAX_JPEG_SIDE_PX = 65500
TOPS = [2**bits - 1 for bits in (8, 10, 12, 14, 15, 16)]
"""Largest values of the depths that radiographs come in."""


@dataclass(frozen=True)
class Stored:
    """An encoded image.

    Attributes:
        suffix: jpg or png.
        data: Its bytes.
        size: (width, height) of the stored image in pixels.
        original: The same of the file's image.
        phash: Perceptual hash, 64 hexadecimal digits.
        header: What a DICOM header told; None for other files.
    """

    suffix: str
    data: bytes
    size: tuple[int, int]
    original: tuple[int, int]
    phash: str
    header: Header | None

    @property
    def scale(self) -> float:
        """Stored pixels over original pixels."""
        return self.size[0] / self.original[0]


def store(
    file: BinaryIO,
    *,
    short_side_px: int,
    format: Format,
    quality: int,
    smallest_side_px: int,
    rules: Rules = ANYTHING,
) -> Stored:
    """Read, resize so that the short side is at most `short_side_px`, and encode an image.

    Args:
        file: A DICOM or image file, open.
        short_side_px: Of the stored image; a smaller image stays as it is.
        format: JPEG, or PNG of 8 or 16 bits.
        quality: Of JPEG.
        smallest_side_px: An image with a shorter side is refused.
        rules: What a DICOM file must keep.

    Raises:
        Refused: the file cannot be read as a radiograph.
    """
    image, header = read_image(file, bits=16 if format == "png16" else 8, rules=rules)
    # Pillow hands comments and profiles on to what it saves: they may name a patient.
    image.info.clear()
    original = image.size
    if min(original) < smallest_side_px:
        raise Refused("small", f"{image.width} x {image.height} pixels are too few")
    scale = min(1.0, short_side_px / min(original))
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    lowest, highest = image.getextrema()
    if lowest == highest:
        raise Refused("blank", "every pixel has the same value")
    if format == "jpeg" and max(image.size) > MAX_JPEG_SIDE_PX:
        raise Refused("size", f"{image.width} x {image.height} pixels are too long for JPEG")
    buffer = io.BytesIO()
    if format == "jpeg":
        image.save(buffer, "JPEG", quality=quality)
    elif format == "png8":
        image.save(buffer, "PNG")
    else:
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        Image.fromarray(values).save(buffer, "PNG")
    suffix = "jpg" if format == "jpeg" else "png"
    hashed = perceptual_hash(image)
    return Stored(suffix, buffer.getvalue(), image.size, original, hashed, header)


def read_image(
    file: BinaryIO, *, bits: int = 8, rules: Rules = ANYTHING
) -> tuple[Image.Image, Header | None]:
    """A DICOM or image file as a grey picture, and a DICOM file's header.

    Args:
        file: The file, open.
        bits: 8 gives mode L; 16 gives mode F with values 0 to 65535, which resizes exactly.
        rules: What a DICOM file must keep.

    Raises:
        Refused: it cannot be read.
    """
    if is_dicom(file.read(132)):
        values, header = read_radiograph(file, bits=bits, rules=rules)
        return Image.fromarray(values if bits == 8 else values.astype(np.float32)), header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Refused("size", f"{image.width} x {image.height} pixels are too many")
                if getattr(image, "n_frames", 1) > 1:
                    raise Refused("multi-frame", f"{getattr(image, 'n_frames', 1)} frames")
                return _grey(ImageOps.exif_transpose(image), bits), None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Refused("size", str(error).split(",")[0]) from None
    except (SyntaxError, *BROKEN) as error:
        if isinstance(error, UnidentifiedImageError):
            raise Refused("unreadable", "not an image") from None
        raise Refused("unreadable", last_line(error)) from None


def _grey(image: Image.Image, bits: int) -> Image.Image:
    """Any mode of Pillow's to grey of the depth wanted; transparency lies over black."""
    if image.mode.startswith("I") or image.mode == "F":
        wide = _wide(np.asarray(image).astype(np.float32), fractions=image.mode == "F")
        return Image.fromarray(wide if bits == 16 else np.round(wide / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    grey = image.convert("L")
    if bits == 8:
        return grey
    return Image.fromarray(np.asarray(grey).astype(np.float32) * 257)


def _wide(values: np.ndarray, *, fractions: bool) -> np.ndarray:
    """Values of 8 to 16 bits, or fractions of one, over the range of 16 bits, float32 [H, W].

    A file of 16 bits does not tell how many it uses: the fewest that hold its largest value.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):
        raise Refused("depth", f"values from {low:g} to {high:g} are not 8 to 16 bits")
    top = 1 if fractions and high <= 1 else next(t for t in TOPS if high <= t)
    return np.asarray(values * np.float32(65535 / top))

"""From the bytes of an image file to those that are stored: read grey, resize, encode, hash."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlvicx_dist.ingest.dicom import ANYTHING, Header, Rules, is_dicom, read_radiograph
from mlvicx_dist.ingest.phash import perceptual_hash
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import MAX_PIXELS

Format = Literal["jpeg", "png8", "png16"]


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
    data: bytes,
    *,
    short_side_px: int,
    format: Format,
    quality: int,
    smallest_side_px: int,
    rules: Rules = ANYTHING,
) -> Stored:
    """Read, resize so that the short side is at most `short_side_px`, and encode an image.

    Args:
        data: The bytes of a DICOM or image file.
        short_side_px: Of the stored image; a smaller image stays as it is.
        format: JPEG, or PNG of 8 or 16 bits.
        quality: Of JPEG.
        smallest_side_px: An image with a shorter side is refused.
        rules: What a DICOM file must keep.

    Raises:
        Refused: the file cannot be read as a radiograph.
    """
    image, header = read_image(data, bits=16 if format == "png16" else 8, rules=rules)
    original = image.size
    if min(original) < smallest_side_px:
        raise Refused("small", f"{image.width} x {image.height} pixels are too few")
    scale = min(1.0, short_side_px / min(original))
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
    hashed = perceptual_hash(image)
    return Stored(suffix, buffer.getvalue(), image.size, original, hashed, header)


def read_image(
    data: bytes, *, bits: int = 8, rules: Rules = ANYTHING
) -> tuple[Image.Image, Header | None]:
    """The bytes of a DICOM or image file as a grey picture, and a DICOM file's header.

    Args:
        data: The bytes.
        bits: 8 gives mode L; 16 gives mode F with values 0 to 65535, which resizes exactly.
        rules: What a DICOM file must keep.

    Raises:
        Refused: it cannot be read.
    """
    if is_dicom(data):
        values, header = read_radiograph(data, bits=bits, rules=rules)
        return Image.fromarray(values if bits == 8 else values.astype(np.float32)), header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Refused("size", f"{image.width} x {image.height} pixels are too many")
                if getattr(image, "n_frames", 1) > 1:
                    raise Refused("multi-frame", f"{getattr(image, 'n_frames', 1)} frames")
                return _grey(ImageOps.exif_transpose(image), bits), None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Refused("size", str(error).split(",")[0]) from None
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

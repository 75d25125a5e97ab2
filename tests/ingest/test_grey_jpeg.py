"""Grey JPEG: Pillow's pixels or nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from mlvicx_dist.ingest.grey_jpeg import decode_grey_jpeg

PIXELS = np.add.outer(np.arange(70), 3 * np.arange(50)) % 251


def encoded(mode="L", format="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS.astype(np.uint8)).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95},
        {"quality": 30},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"comment": b"\xff\xc0 here", "dpi": (72, 72)},
    ],
)
def test_pixels_are_pillows(options):
    data = encoded(**options)
    assert np.array_equal(decode_grey_jpeg(data, most_pixels=3500), by_pillow(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff\xd9",
        encoded()[:-2],
        encoded()[:300],
        encoded()[:300] + b"\xff\xd9",
        encoded().replace(b"\xff\xda", b"\xff\xd9"),
        encoded("RGB"),
        encoded("CMYK"),
        encoded(format="PNG"),
    ],
)
def test_anything_else_is_left_to_pillow(data):
    assert decode_grey_jpeg(data, most_pixels=3500) is None


def test_too_large_an_image_is_left_to_pillow():
    assert decode_grey_jpeg(encoded(), most_pixels=3499) is None


def test_damage_that_pillow_sees_is_left_to_it():
    rng = np.random.default_rng(0)
    whole = encoded()
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=3):
            data[place] = rng.integers(256)
        found = decode_grey_jpeg(bytes(data), most_pixels=10**6)
        if found is not None:
            assert np.array_equal(found, by_pillow(bytes(data)))

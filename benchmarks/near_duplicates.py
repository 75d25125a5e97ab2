"""How well the perceptual hash tells copies of a radiograph from other radiographs.

python benchmarks/near_duplicates.py FOLDER [--json]

Every image of the folder, and every fifth one changed as copies are, against the hash of 256 bits
that shards hold and the 64-bit difference hash that is usual. The table of docs/data.md.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlvicx_dist.ingest.phash import perceptual_hash

Change = Callable[[Image.Image], Image.Image]


def difference_hash(image: Image.Image) -> str:
    """The usual one: which of two neighbours is brighter in a 9 x 8 thumbnail."""
    small = np.asarray(image.resize((9, 8), Image.Resampling.BOX), dtype=np.float32)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex()


def jpeg(image: Image.Image) -> Image.Image:
    """Encoded again at quality 75."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def smaller(image: Image.Image) -> Image.Image:
    """Resized to a width of 256 px."""
    size = (256, round(256 * image.height / image.width))
    return image.resize(size, Image.Resampling.LANCZOS)


def gamma(image: Image.Image) -> Image.Image:
    """Every value to the power 1.4."""
    return image.point([round(255 * (v / 255) ** 1.4) for v in range(256)])


def window(image: Image.Image) -> Image.Image:
    """Values 20 to 230 over the whole range."""
    return image.point([round(min(max((v - 20) * 255 / 210, 0), 255)) for v in range(256)])


def cropped(image: Image.Image) -> Image.Image:
    """Without 1 % at each side."""
    x, y = round(image.width / 100), round(image.height / 100)
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES: dict[str, Change] = {
    "JPEG again, q75": jpeg,
    "resized to 256 px": smaller,
    "window 20 to 230": window,
    "gamma 1.4": gamma,
    "1 % cropped": cropped,
}


def measure(folder: str) -> dict[str, Any]:
    """Distances in bits by hash: of copies by change, and of different images."""
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix in (".jpg", ".jpeg", ".png"))
    images = [Image.open(path).convert("L") for path in paths]
    result: dict[str, Any] = {"images": len(images)}
    for name, hashed in (("256 bits", perceptual_hash), ("64-bit dHash", difference_hash)):
        bits = unpacked([hashed(image) for image in images])
        rows = {}
        for change, apply in CHANGES.items():
            changed = unpacked([hashed(apply(image)) for image in images[::5]])
            far = (changed != bits[::5]).sum(1)
            rows[change] = [int(np.median(far)), int(np.quantile(far, 0.99)), int(far.max())]
        signs = bits.astype(np.float32)
        distance = signs @ (1 - signs.T) + (1 - signs) @ signs.T
        apart = distance[np.triu_indices(len(bits), 1)]
        quantiles = np.quantile(apart, [1e-5, 1e-4, 0.5]).round().astype(int).tolist()
        result[name] = {"copies": rows, "different": quantiles, "pairs": len(apart)}
    return result


def unpacked(hashes: list[str]) -> np.ndarray:
    """Hashes as bits, bool [n, bits]."""
    octets = np.frombuffer(b"".join(map(bytes.fromhex, hashes)), np.uint8)
    return np.unpackbits(octets.reshape(len(hashes), -1), axis=1).astype(bool)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    result = measure(options.folder)
    if options.json:
        print(json.dumps(result))
        return 0
    names = [name for name in result if name != "images"]
    print(f"| {result['images']} images | {' | '.join(names)} |")
    for change in CHANGES:
        cells = ["{} / {} / {}".format(*result[name]["copies"][change]) for name in names]
        print(f"| {change} | {' | '.join(cells)} |")
    cells = ["{} / {} / {}".format(*result[name]["different"]) for name in names]
    print(f"| different images, 1 in 100,000 / 1 in 10,000 / median | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

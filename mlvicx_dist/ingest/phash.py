"""A perceptual hash of 256 bits, and the pairs of images whose hashes are near.

Chest radiographs look alike: a hash of 64 bits confuses patients. Measured on 1,359 radiographs
(docs/data.md): re-encoded and resized copies differ in at most 10 of these 256 bits, windowed or
gamma-changed ones in at most 30, and of different images one pair in 100,000 in 64 or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from mlvicx_dist.errors import DataError

SIDE_PX, FIRST, COUNT = 64, 2, 16
"""Side of the thumbnail, and which of its frequencies a side are kept: 2 to 17."""
BITS = COUNT**2
BANDS = 16
NEAR_BITS = 24
"""Two images that differ in so many bits or fewer are taken for copies of one."""
_COSINES = np.cos(
    math.pi / SIDE_PX * (np.arange(SIDE_PX) + 0.5) * np.arange(FIRST, FIRST + COUNT)[:, None]
)
_SPREAD = np.random.Generator(np.random.Philox(0)).permutation(BITS)
"""Neighbouring frequencies go together: spread over the bands, a band of 16 bits tells more."""
_CHUNK = 1 << 22
"""Pairs compared at once."""


def perceptual_hash(image: Image.Image) -> str:
    """The signs of the low frequencies of a thumbnail, against their median; 64 hex digits."""
    small = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    waves = _COSINES @ np.asarray(small, dtype=np.float64) @ _COSINES.T
    return np.packbits(waves.reshape(-1) > np.median(waves)).tobytes().hex()


def as_words(hashes: Sequence[str]) -> np.ndarray:
    """Hashes as numbers, uint64 [n, 4].

    Raises:
        DataError: one of them is not 64 hexadecimal digits.
    """
    try:
        octets = [bytes.fromhex(one) for one in hashes]
    except (ValueError, TypeError):
        octets = [b""]
    if any(len(one) != BITS // 8 for one in octets):
        raise DataError("a perceptual hash is damaged; run 'mlvicx verify' on each shard folder.")
    joined = b"".join(octets)
    return np.frombuffer(joined, dtype=">u8").reshape(len(hashes), BITS // 64).astype(np.uint64)


def near_pairs(
    words: np.ndarray, groups: np.ndarray, *, bits: int = NEAR_BITS
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images of different groups whose hashes differ in at most `bits` bits.

    Images are compared where one of 16 bands of 16 bits is equal, not all with all: every pair of
    up to 15 bits is found, of 24 bits nearly every one.

    Args:
        words: Hashes, uint64 [n, 4].
        groups: Images of one group are not compared, [n] integers.
        bits: The largest distance.

    Returns:
        The pairs, int64 [m, 2], the smaller index first, and their distances, int64 [m].
    """
    found = [np.empty((0, 2), np.int64)]
    for first, second in _candidates(words, groups):
        distance = np.bitwise_count(words[first] ^ words[second]).sum(1)
        near = distance <= bits
        found.append(np.stack([first[near], second[near]], 1))
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    distances = np.bitwise_count(words[pairs[:, 0]] ^ words[pairs[:, 1]]).sum(1)
    return pairs, distances.astype(np.int64)


def _candidates(words: np.ndarray, groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of different groups that agree in a band, in pieces."""
    for band in _bands(words):
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        # Where the bucket of each place ends: its partners stand between it and there.
        ends = np.searchsorted(ordered, ordered, side="right")
        for start, stop in _pieces(ends - np.arange(len(ends)) - 1):
            partners = ends[start:stop] - np.arange(start, stop) - 1
            left = np.repeat(np.arange(start, stop), partners)
            within = np.arange(len(left)) - np.repeat(np.cumsum(partners) - partners, partners)
            first, second = order[left], order[left + 1 + within]
            differ = groups[first] != groups[second]
            yield first[differ], second[differ]


def _bands(words: np.ndarray) -> Iterator[np.ndarray]:
    """Each band of every hash, uint16 [n]."""
    octets = words.astype(">u8").view(np.uint8).reshape(len(words), BITS // 8)
    for places in _SPREAD.reshape(BANDS, BITS // BANDS):
        band = np.zeros(len(words), np.uint16)
        for place in places.tolist():
            band = (band << 1) | ((octets[:, place // 8] >> (7 - place % 8)) & 1)
        yield band


def _pieces(partners: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of places that have about `_CHUNK` partners together."""
    before = np.concatenate([[0], np.cumsum(partners)])
    start = 0
    while start < len(partners):
        stop = int(np.searchsorted(before, before[start] + _CHUNK, side="right"))
        stop = min(max(stop, start + 1), len(partners))
        yield start, stop
        start = stop

"""Keyed draws: Philox at their key and counter, whatever was drawn before and in which thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlvicx_dist.stream import keyed


def fresh(count, *, seed, epoch, purpose, item, part):
    bits = np.random.Philox(key=[seed, epoch], counter=[0, item, part, purpose])
    return bits.random_raw(count)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -1])
def test_draws_are_those_of_a_fresh_generator(seed):
    for count, item in ((1, 0), (48, 10**8), (3, 5), (2047, 9)):
        key = {"seed": seed, "epoch": 3, "purpose": keyed.VIEWS, "item": item, "part": 1}
        assert np.array_equal(keyed.raw(count, **key), fresh(count, **key))


def test_threads_do_not_share_a_stream():
    keys = [
        {"seed": 1, "epoch": 2, "purpose": keyed.SAMPLES, "item": item, "part": 0}
        for item in range(200)
    ]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: keyed.raw(5000, **key), keys))
    for draws, key in zip(found, keys, strict=True):
        assert np.array_equal(draws, fresh(5000, **key))

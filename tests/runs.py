"""Masks as SIIM-ACR writes them."""

import numpy as np


def encode_runs(mask):
    """The text of a mask, bool [height, width]: what `decode_runs` reads."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat)).reshape(-1, 2)
    offsets = edges[:, 0] - np.concatenate([[0], edges[:-1, 1]])
    return " ".join(map(str, np.stack([offsets, edges[:, 1] - edges[:, 0]], 1).reshape(-1)))

"""How many of the images that an encoder is judged on were in its pretraining.

Pretraining reads no labels, so what it may have seen of a test image is the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlvicx_dist.config import PretrainConfig, parse_config, parse_yaml
from mlvicx_dist.errors import UserError
from mlvicx_dist.ingest.leaks import Hashed, hashed
from mlvicx_dist.ingest.phash import as_words, near_pairs
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import Place, read_bytes, told


def overlap_with_run(about: Sequence[dict[str, Any]], run_dir: Place) -> dict[str, Any]:
    """The test images that are in the pretraining shards of a run.

    Args:
        about: The JSON of each test image, with its `key`.
        run_dir: Where `config.yaml` is.

    Returns:
        `tested`, the images looked for; `seen`, the images of the pretraining; `images`, how many
        of the tested ones are among them, `same_key` and `near_duplicates` of these by sample key
        and by perceptual hash; `patients`, how many tested patients have an image there. Or
        `unknown`, why this cannot be told.
    """
    path = run_dir / "config.yaml"
    try:
        config = parse_config(parse_yaml(read_bytes(path).decode(), str(path)), str(path))
        if not isinstance(config, PretrainConfig):
            return {"unknown": f"{path} is no pretraining's"}
        seen = list(pretraining_images(config))
    except FileNotFoundError:
        return {"unknown": f"there is no {path}, which names them"}
    except OSError as error:
        return {"unknown": f"{path} cannot be read, {told(error)}"}
    except UserError as error:
        return {"unknown": str(error).rstrip(".")}
    return overlap(about, seen)


def overlap(about: Sequence[dict[str, Any]], seen: Sequence[Hashed]) -> dict[str, Any]:
    """The same for images of known hash; keys and patients agree where the salt does."""
    keys, patients = {one.key for one in seen}, {one.patient for one in seen}
    count = len(about)
    same = np.array([one["key"] in keys for one in about], dtype=bool)
    words = as_words([one["phash"] for one in about] + [one.phash for one in seen])
    pairs, _ = near_pairs(words, (np.arange(len(words)) >= count).astype(np.int64))
    near = np.zeros(count, dtype=bool)
    near[pairs[:, 0]] = True
    return {
        "tested": count,
        "seen": len(seen),
        "images": int((same | near).sum()),
        "same_key": int(same.sum()),
        "near_duplicates": int(near.sum()),
        "patients": len({f"{one['source']}/{one['patient']}" for one in about} & patients),
    }


def overlap_words(found: Mapping[str, Any]) -> str:
    """The overlap as a sentence."""
    if "unknown" in found:
        return f"Overlap with the pretraining shards: unknown ({found['unknown']})."
    return (
        "Overlap with the pretraining shards: {images} of {tested} test images are among their "
        "{seen} ({same_key} by key, {near_duplicates} by near-duplicate hash), and images of "
        "{patients} test patients; labels were not read."
    ).format(**found)


def pretraining_images(config: PretrainConfig) -> Iterator[Hashed]:
    """The images that a run is trained on.

    Raises:
        UserError: the shards cannot be read.
    """
    manifests = []
    for folder in config.data.shards:
        manifest = read_manifest(folder.path)
        chosen = tuple(s for s in manifest.shards if s.split in config.data.splits)
        manifests.append(replace(manifest, shards=chosen))
    total = sum(shard.samples for manifest in manifests for shard in manifest.shards)
    with progress("looking for test images in the pretraining shards", total, "images") as bar:
        for manifest in manifests:
            for one in hashed(manifest):
                bar.advance()
                yield one

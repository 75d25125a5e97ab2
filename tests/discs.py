"""Noise, some with a bright disc whose mask and box are known, as shards; a model to judge."""

import numpy as np
from PIL import Image
from runs import encode_runs

from mlvicx_dist.config import EvaluateConfig, LocalHead, Model, Projector
from mlvicx_dist.ingest.masks import RunLengths
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.record import Box, Record
from mlvicx_dist.ingest.shard_task import PackSettings

MODEL = Model(
    backbone="test_resnet",
    local=LocalHead(resize_px=8, channels=4, pool=2),
    projector=Projector(width=8),
)
SIDE_PX = 64
SPLITS = {"train": 48, "val": 16, "test": 24}


def draw(folder, *, height_px=SIDE_PX, counts=SPLITS, seed=0):
    """The pictures, two of a patient; every other one has a disc."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height_px, :SIDE_PX]
    records = []
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        for number in range(count):
            radius = rng.uniform(6, 10)
            y, x = rng.uniform(12, height_px - 12), rng.uniform(12, SIDE_PX - 12)
            disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            disc &= number % 2 == 0
            # Brightness as a whole tells nothing.
            picture = rng.uniform(60, 120) + rng.normal(0, 15, disc.shape) + 90 * disc
            path = folder / f"{split}-{number}.png"
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)
            box = Box(
                label="disc", left=x - radius, top=y - radius, right=x + radius, bottom=y + radius
            )
            runs = (encode_runs(disc),) if disc.any() else ()
            records.append(
                Record(
                    source="discs",
                    image_id=path.stem,
                    path=str(path),
                    patient_id=f"{split}-{number // 2}",
                    labels={"disc": int(disc.any())},
                    split=split,
                    boxes=(box,) if disc.any() else (),
                    mask=RunLengths(runs, height_px, SIDE_PX),
                )
            )
    return records


def pack_discs(folder, salt, **changes):
    """The same packed; the folder of the shards."""
    records = draw(folder / "pictures", **changes)
    settings = PackSettings(
        short_side_px=48, smallest_side_px=32, samples_per_shard=16, format="png8"
    )
    pack(records, folder / "shards", settings=settings, salt=salt)
    return folder / "shards"


def settings(shards, **changes):
    """Of an evaluation on these shards."""
    tree = {
        "kind": "evaluate",
        "name": "t",
        "data": {"shards": [str(shards)], "loader_workers": 0},
        "bootstrap": {"draws": 100},
    }
    return EvaluateConfig.model_validate({**tree, **changes})

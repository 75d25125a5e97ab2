"""What checkpoints cost a training: the state is written by a thread beside it.

python benchmarks/checkpoint.py [--json]

The default model at 64 px (its state is that of any size: 0.9 GB) with a batch of 16 and two
threads. How long the training thread is held for a checkpoint, against writing it then and there;
and the seconds that a checkpoint adds to the steps beside it, as a share of the time between two
checkpoints at the default `checkpoint.every_s`: the least ratio of 50 allows 2 %.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from table import Row, main, seconds

from mlvicx_dist.config import PretrainConfig, load_as
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.stream.augment import PARAMETERS
from mlvicx_dist.stream.loader import Batch
from mlvicx_dist.train.optim import make_optimizer
from mlvicx_dist.train.saver import Saver
from mlvicx_dist.train.step import Member, TwoViews, train_step

BATCH, SIZE, ROUNDS = 16, 64, 4
DEFAULT = Path(__file__).parents[1] / "configs" / "pretrain" / "default.yaml"


def measure() -> list[Row]:
    """Time held and time added."""
    torch.set_num_threads(2)
    config = load_as(
        PretrainConfig,
        DEFAULT,
        [f"train.batch_size={BATCH}", f"views.image_size_px={SIZE}", "views.blur_kernel_px=7"],
    )
    model = build_model(config.model, 0)
    optimizer = make_optimizer(model, config.train)
    views = TwoViews(model)
    images = torch.randint(0, 255, (2, BATCH, 1, SIZE, SIZE), dtype=torch.uint8)
    table = torch.ones(2, BATCH, len(PARAMETERS))
    member = Member(0, 1, torch.device("cpu"))

    def step() -> None:
        batch = Batch(0, torch.zeros(BATCH), images, table)
        train_step(views, optimizer, batch, 1e-3, config, member)

    step()
    held, there, added = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(config, Path(folder), model, optimizer, [], say=print, before=lambda: None)
        saver.save(0)
        saver.look(wait=True)
        for round_ in range(1, ROUNDS + 1):
            alone = statistics.median(seconds(step) for _ in range(5))
            held.append(seconds(lambda number=round_: saver.save(number)))
            beside, steps = 0.0, 0
            while saver.writing:
                beside, steps = beside + seconds(step), steps + 1
            added.append(held[-1] + max(beside - steps * alone, 0.0))
            saver.look(wait=True)
            there.append(seconds(lambda number=round_: saver.finish(number, final=False)))
    every_s = config.checkpoint.every_s
    return [
        Row("training held by a checkpoint", *map(statistics.median, (held, there)), "s", 1),
        Row(f"added to the {every_s:g} s between two", statistics.median(added), every_s, "s", 50),
    ]


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))

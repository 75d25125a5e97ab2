"""What `mlvicx plan` foretells of a step on this CPU, against the step.

python benchmarks/plan.py [--json]

Three configurations of the default preset in float32, whole training steps on noise, on all cores
that this process may use. By turns: the rates are timed anew before each step; the least of each,
since what else runs only adds to it. Each both ways, so that neither a forecast nor a step may be a
quarter below the other; a ratio of 1 is a perfect forecast.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from table import Row, main, seconds

from mlvicx_dist.config import PretrainConfig, load_as
from mlvicx_dist.plan.estimate import Group, estimate
from mlvicx_dist.plan.rates import measure
from mlvicx_dist.plan.work import count_work, exchange_of
from mlvicx_dist.train.rates import training_step

DEFAULT = Path(__file__).parents[1] / "configs" / "pretrain" / "default.yaml"
STEPS = (("resnet18", 96, 32), ("resnet18", 224, 16), ("resnet50", 128, 16))
THREADS, ROUNDS, LEAST = len(os.sched_getaffinity(0)), 3, 0.75


def measure_all() -> list[Row]:
    """A row a configuration."""
    rows = []
    for backbone, side, images in STEPS:
        config = load_as(
            PretrainConfig,
            DEFAULT,
            [
                f"model.backbone={backbone}",
                f"views.image_size_px={side}",
                f"train.batch_size={images}",
                "train.precision=float32",
                f"workers.cpus_per_worker={THREADS}",
            ],
        )
        work, alone = count_work(config, images), Group(1, 1, 1, 1, 0, 0)
        step = training_step(config, images, torch.device("cpu"))
        step()
        foretold, taken = [], []
        for _ in range(ROUNDS):
            found = estimate(
                work,
                exchange_of(work, images),
                measure(config, images),
                alone,
                launch_s=0,
                loader_images_per_s=1e9,
            )
            foretold.append(found.step)
            taken.append(seconds(step))
        name = f"{backbone}, {side} px, batch {images}, {THREADS} threads"
        ours, theirs = min(foretold), min(taken)
        rows.append(Row(f"{name}: foretold, against taken", ours, theirs, "s", LEAST))
        rows.append(Row(f"{name}: taken, against foretold", theirs, ours, "s", LEAST))
    return rows


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure_all))

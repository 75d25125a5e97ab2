"""The whole way on a machine with no data and no GPU: phantoms to a measured encoder and a page.

Each step is what a command does, and the settings are left as files beside the results, so that
every step can be run again by hand.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlvicx_dist.config import EvaluateConfig, PretrainConfig, load_as
from mlvicx_dist.evaluate.evaluation import evaluate_checkpoint
from mlvicx_dist.evaluate.summary import summary
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.sources.anatomy import CLASSES
from mlvicx_dist.ingest.sources.folder import Columns, list_csv
from mlvicx_dist.ingest.sources.phantom import SALT, write_phantoms
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.progress import duration, progress, say
from mlvicx_dist.report.page import write_report
from mlvicx_dist.session import ray_session
from mlvicx_dist.storage import write_whole
from mlvicx_dist.train.launch import pretrain, writing

LEAST_GAIN = 0.03
"""The mean AUROC by which the pretrained encoder must beat the untrained one."""
PHANTOMS, SIZE_PX = 1500, 160
PACKING = PackSettings(short_side_px=128, fractions=Fractions(0.6, 0.1, 0.3))

PRETRAIN = """\
# The demo's pretraining: about 1,040 phantoms, 64 px, one worker of two cores
# (two workers of one core each take twice as long).
# Command: mlvicx pretrain {out}/pretrain.yaml
kind: pretrain
run: {{name: demo, storage_path: "{out}"}}
data:
  shards: [{{path: "{out}/shards"}}]
  splits: [train, val]
views:
  image_size_px: 64
  crop_scale: [0.3, 1.0]
  blur_kernel_px: 7
  blur_sigma_px: [0.1, 1.0]
  blur_p: [0.5, 0.1]
  solarise_p: [0.0, 0.0]
model:
  projector: {{width: 512}}
  local: {{resize_px: 16, channels: 128}}
train:
  batch_size: 32
  epochs: 5
  optimizer: adamw
  learning_rate_per_256: 8e-3
  weight_decay: 1e-4
  warmup_epochs: 1
workers: {{num: 1, cpus_per_worker: 2}}
checkpoint: {{every_s: 60}}
"""
EVALUATE = """\
# The demo's probe.
# Command: mlvicx evaluate {out}/demo {out}/evaluate.yaml
kind: evaluate
name: phantoms
data: {{shards: ["{out}/shards"]}}
"""


@dataclass(frozen=True)
class Demonstration:
    """What the demo found: whether the gain is enough, and the result for machines and people."""

    better: bool
    document: dict[str, Any]
    lines: Sequence[str]


def demo(out: str | Path) -> Demonstration:
    """Run the demo in the folder `out`; what an earlier start finished is not done again.

    Raises:
        UserError: the folder cannot be written, or the machine has fewer cores than workers.
    """
    out = Path(out).absolute()
    begin = time.monotonic()
    with ray_session({"CPU": 2}, asked="the demo", remedy="take a machine of two cores"):
        say(f"1 of 4: {PHANTOMS} phantom radiographs into shards")
        _shard(out)
        for name, text in (("pretrain", PRETRAIN), ("evaluate", EVALUATE)):
            # As JSON has it, and so YAML, between quotes.
            quoted = json.dumps(str(out), ensure_ascii=False)[1:-1]
            with writing(out, "--out"):
                write_whole(out / f"{name}.yaml", text.format(out=quoted).encode())
        say("2 of 4: pretraining without labels")
        outcome = pretrain(load_as(PretrainConfig, out / "pretrain.yaml"))
    if outcome.stopped_by:
        # To whoever listens for the whole command, whose exit code tells which it was.
        signal.raise_signal(outcome.stopped_by)
        raise KeyboardInterrupt
    run = outcome.run_dir
    say("3 of 4: a linear probe, beside the same encoder untrained")
    result, _ = evaluate_checkpoint(run, load_as(EvaluateConfig, out / "evaluate.yaml"))
    say("4 of 4: the report")
    page = write_report(run)
    return _judged(result, page, time.monotonic() - begin)


def _shard(out: Path) -> None:
    """Draw the phantoms and pack them."""
    with progress("drawing", PHANTOMS, "phantoms") as bar:
        table = write_phantoms(
            out / "images", PHANTOMS, size_px=SIZE_PX, workers=None, progress=bar
        )
    listing = list_csv(out / "images", table, name="phantom", columns=Columns(), classes=CLASSES)
    with progress("packing", PHANTOMS, "images") as bar:
        pack(
            listing.records, out / "shards", settings=PACKING, salt=SALT, workers=None, progress=bar
        )


def _judged(result: dict[str, Any], page: Path, seconds: float) -> Demonstration:
    """Whether the pretrained encoder is better by enough, with an interval that excludes zero."""
    gain = result["probe"]["difference"]["mean"]
    better = gain["value"] >= LEAST_GAIN and gain["low"] > 0
    verdict = (
        f"Pretraining without labels raises the mean AUROC by {gain['value']:.3f} "
        f"[{gain['low']:.3f}, {gain['high']:.3f}]."
        if better
        else f"Not shown: the gain of {gain['value']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}] "
        f"should be {LEAST_GAIN} or more with an interval above zero."
    )
    document = {
        "better": better,
        "seconds": round(seconds, 1),
        "report": str(page),
        "difference": gain,
        "pretrained": result["probe"]["pretrained"]["mean"],
        "untrained": result["probe"]["untrained"]["mean"],
    }
    lines = [*summary(result), "", verdict, f"{page} ({duration(seconds)} in all)"]
    return Demonstration(better, document, lines)

"""What the stored size and quality of radiographs cost and bring: bytes, decode time, probe AUROC.

python benchmarks/stored_size.py --source FOLDER --csv labels.csv --encoder runs/cxr96 [--json]

Packs the NIH pneumonia rows of the table at each short side and quality, and probes one frozen
encoder on them at 224 px: training patients to test patients, the penalty chosen on the validation
ones, intervals over patients. The table of docs/data.md is made by this.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mlvicx_dist.config import Bootstrap, Probe
from mlvicx_dist.evaluate.embed import embed_shards
from mlvicx_dist.evaluate.metrics import auroc, bootstrap_areas, interval
from mlvicx_dist.evaluate.probe import fit_probe
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.sources.folder import Columns, list_csv
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.weights import load_encoder

SIDES_PX = (224, 256, 320, 512)
KINDS = (("q90", "jpeg", 90), ("q95", "jpeg", 95), ("lossless", "png8", 95))
VIEW_PX = 224
SALT = b"\x01" * 32
SPLITS = ("train", "val", "test")


def measure(source: str, table: str, encoder: str) -> Iterator[dict[str, Any]]:
    """A row for each side and quality."""
    records = list_csv(
        source,
        table,
        name="nih",
        columns=Columns(path="file", labels="label", patient="patient_id"),
        classes=["pneumonia"],
        where=["file=images/nih_*"],
    ).records
    for side in SIDES_PX:
        for kind, form, quality in KINDS:
            settings = PackSettings(
                short_side_px=side,
                format=form,  # type: ignore[arg-type]
                quality=quality,
                fractions=Fractions(0.6, 0.1, 0.3),
            )
            with tempfile.TemporaryDirectory() as name:
                out = Path(name) / "shards"
                report = pack(records, out, settings=settings, salt=SALT)
                size = sum(shard.bytes for shard in report.manifest.shards) / len(records)
                yield {
                    "short_side_px": side,
                    "quality": kind,
                    "kB": size / 1e3,
                    "decode_ms": decode_ms(out),
                    **probed(out, encoder),
                }


def decode_ms(shards: Path) -> float:
    """Median milliseconds to decode an image on one core."""
    images = ShardSet.open([shards], splits=["train"])
    times = []
    for sample in range(len(images)):
        begin = time.perf_counter()
        images.image(sample)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def probed(shards: Path, encoder: str) -> dict[str, float]:
    """AUROC on the test patients, with its interval."""
    seen = embed_shards([load_encoder(encoder)], [shards], size_px=VIEW_PX, loader_workers=0)
    rows = [seen.rows(split) for split in SPLITS]
    features = [seen.features[0][chosen] for chosen in rows]
    labels = [seen.labels[chosen] for chosen in rows]
    probe = fit_probe(features[0], labels[0], validation=(features[1], labels[1]), settings=Probe())
    scores, patients = probe.scores(features[2]), seen.patients()[rows[2]]
    draws = bootstrap_areas(scores, labels[2], patients, draws=Bootstrap().draws, seed=0).auroc
    low, high = interval(draws[:, 0], Bootstrap().confidence)
    return {"auroc": auroc(scores[:, 0], labels[2][:, 0]), "low": low, "high": high}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name in ("--source", "--csv", "--encoder"):
        parser.add_argument(name, required=True)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for row in measure(options.source, options.csv, options.encoder):
        rows.append(row)
        line = (
            "| {short_side_px} | {quality} | {kB:.1f} | {decode_ms:.2f} | "
            "{auroc:.3f} [{low:.3f}, {high:.3f}] |"
        )
        print(line.format(**row), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

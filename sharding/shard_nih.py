"""Pack NIH ChestX-ray14 into WebDataset shards: 14 findings, the official split, boxes.

python sharding/shard_nih.py --source ChestX-ray14 --out shards/nih
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mlvicx_dist.ingest.command import run_sharding

if TYPE_CHECKING:
    from mlvicx_dist.ingest.sources.tables import Listing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this source."""
    add = parser.add_argument
    add("--source", required=True, help="folder or URL of the set as it was unpacked")
    add("--labels", help="the label file (default: the one in the folder)")


def list_records(options: argparse.Namespace) -> Listing:
    """From the arguments to the images."""
    from mlvicx_dist.ingest.sources.nih import list_nih

    official = not options.no_official_splits
    return list_nih(options.source, labels=options.labels, official=official)


if __name__ == "__main__":
    sys.exit(run_sharding(__doc__, add_arguments, list_records))

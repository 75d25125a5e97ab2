"""Pack the RSNA Pneumonia Detection Challenge into WebDataset shards: classes and boxes.

python sharding/shard_rsna.py --source rsna-pneumonia --out shards/rsna
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
    add("--source", required=True, help="folder or URL with stage_2_train_*.csv and images")
    add("--labels", help="the label file (default: the one in the folder)")


def list_records(options: argparse.Namespace) -> Listing:
    """From the arguments to the images."""
    from mlvicx_dist.ingest.sources.rsna import list_rsna

    return list_rsna(options.source, labels=options.labels)


if __name__ == "__main__":
    sys.exit(run_sharding(__doc__, add_arguments, list_records))

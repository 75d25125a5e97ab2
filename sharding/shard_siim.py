"""Pack SIIM-ACR Pneumothorax into WebDataset shards: one class, masks as PNG members.

python sharding/shard_siim.py --source siim-acr --out shards/siim
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
    add("--source", required=True, help="folder or URL with the label file and images")
    add("--labels", help="the label file (default: the one in the folder)")


def list_records(options: argparse.Namespace) -> Listing:
    """From the arguments to the images."""
    from mlvicx_dist.ingest.sources.siim import list_siim

    return list_siim(options.source, labels=options.labels)


if __name__ == "__main__":
    sys.exit(run_sharding(__doc__, add_arguments, list_records))

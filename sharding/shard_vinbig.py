"""Pack VinBigData into WebDataset shards: 14 findings of three readers, boxes.

python sharding/shard_vinbig.py --source vinbigdata --out shards/vinbig
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
    add("--source", required=True, help="folder or URL with train.csv and train/*.dicom")
    add("--labels", help="the label file (default: the one in the folder)")
    add("--readers", choices=("union", "majority"), default="union", help="(%(default)s)")


def list_records(options: argparse.Namespace) -> Listing:
    """From the arguments to the images."""
    from mlvicx_dist.ingest.sources.vinbig import list_vinbig

    return list_vinbig(options.source, labels=options.labels, readers=options.readers)


if __name__ == "__main__":
    sys.exit(run_sharding(__doc__, add_arguments, list_records))

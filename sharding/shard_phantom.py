"""Draw phantom radiographs (no data needed) and pack them into WebDataset shards.

python sharding/shard_phantom.py --count 1000 --out shards/phantom
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from mlvicx_dist.ingest.command import run_sharding

if TYPE_CHECKING:
    from mlvicx_dist.ingest.sources.tables import Listing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this source."""
    add = parser.add_argument
    add("--count", type=int, default=1000, help="phantoms, one patient each (%(default)s)")
    add("--seed", type=int, default=0, help="of the population (%(default)s)")
    add("--size-px", type=int, default=256, help="side of the drawn images (%(default)s)")
    add("--dicom-fraction", type=float, default=0.2, help="written as DICOM (%(default)s)")
    add("--source", help="folder of the drawn images (default: OUT-images)")


def list_records(options: argparse.Namespace) -> Listing:
    """Draw what is not drawn yet, then list it as the folder source does."""
    from mlvicx_dist.errors import DataError
    from mlvicx_dist.ingest.sources.anatomy import CLASSES
    from mlvicx_dist.ingest.sources.folder import Columns, list_csv
    from mlvicx_dist.ingest.sources.phantom import SALT, write_phantoms
    from mlvicx_dist.progress import progress
    from mlvicx_dist.storage import is_local, place

    source = place(options.source or f"{options.out.rstrip('/')}-images")
    if not is_local(source):
        raise DataError(
            f"{source}: phantoms are drawn into a folder of this machine; give one with --source."
        )
    with progress("drawing", options.count, "phantoms") as bar:
        table = write_phantoms(
            source,
            options.count,
            seed=options.seed,
            size_px=options.size_px,
            dicom_fraction=options.dicom_fraction,
            workers=options.workers,
            progress=bar,
        )
    listing = list_csv(source, table, name="phantom", columns=Columns(), classes=CLASSES)
    return replace(listing, salt=SALT)


if __name__ == "__main__":
    sys.exit(run_sharding(__doc__, add_arguments, list_records))

"""Pack any folder of radiographs (images or DICOM) into WebDataset shards.

python sharding/shard_folder.py --source FOLDER --out shards/mine
python sharding/shard_folder.py --source FOLDER --csv labels.csv --out shards/mine
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlvicx_dist.ingest.command import run_sharding

if TYPE_CHECKING:
    from mlvicx_dist.ingest.sources.tables import Listing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this source."""
    add = parser.add_argument
    add("--source", required=True, help="folder or URL of images; subfolder = class")
    add("--name", help="what the shards call this source (default: the folder's name)")
    add("--patient-regex", help="group 1 in a file's name or path is the patient: '(person[0-9]+)'")
    add("--csv", help="a table of the files instead of subfolders")
    add("--no-classes", action="store_true", help="subfolders are not classes")
    for column in ("path", "labels", "patient", "split", "view", "sex", "age"):
        add(f"--{column}-column", metavar="NAME", help=f"(default: {column})")
    add("--classes", help="class names in order, joined by commas (default: all, sorted)")
    add("--unknown", metavar="CELL", help="the labels cell of an image without labels")
    add(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=PATTERN",
        help="take only such rows, as in 'file=images/nih_*'; may be repeated",
    )


def list_records(options: argparse.Namespace) -> Listing:
    """From the arguments to the images."""
    from mlvicx_dist.ingest.sources.folder import Columns, list_csv, list_folder

    columns = {field: getattr(options, f"{field}_column") for field in Columns.__dataclass_fields__}
    name = options.name or Path(options.source).absolute().name
    _check(options, [f"{field}_column" for field in columns])
    if options.csv is None:
        return list_folder(
            options.source,
            name=name,
            patient_regex=options.patient_regex,
            classes=not options.no_classes,
            workers=options.workers,
        )
    return list_csv(
        options.source,
        options.csv,
        name=name,
        columns=Columns(**columns),
        patient_regex=options.patient_regex,
        classes=options.classes.split(",") if options.classes else None,
        unknown=options.unknown,
        where=options.where,
        workers=options.workers,
    )


def _check(options: argparse.Namespace, columns: list[str]) -> None:
    """Raise a ConfigError where an argument would have no effect."""
    from mlvicx_dist.errors import ConfigError

    if options.csv is not None and options.no_classes:
        raise ConfigError(
            "--no-classes: it is about subfolders, but --csv is given; leave one out."
        )
    for name in [*columns, "classes", "unknown", "where"]:
        if options.csv is None and getattr(options, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: it is about a table; give that with --csv, or leave "
                "this out."
            )


if __name__ == "__main__":
    sys.exit(run_sharding(__doc__, add_arguments, list_records))

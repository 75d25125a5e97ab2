"""SIIM-ACR Pneumothorax (2019): NIH images as DICOM, with masks as run lengths."""

from __future__ import annotations

from pathlib import Path

from mlvicx_dist.ingest.masks import RunLengths, check_runs
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.sources.tables import (
    Files,
    Listing,
    Table,
    differences,
    present,
)

NAME = "siim"
PUBLISHED = {"rows": 12_954, "images": 12_047, "positive": 2_669}
"""Counts of the later release, stage_2_train.csv."""
CLASSES = ("Pneumothorax",)
LABELS = ("stage_2_train.csv", "train-rle.csv")
EMPTY = "-1"
SIDE_PX = 1024


def list_siim(source: str | Path, *, labels: str | Path | None = None) -> Listing:
    """The labelled images of the SIIM-ACR challenge that are below `source`; one a patient.

    Several rows of an image are parts of one mask: they are joined, and the image stays whole.

    Args:
        source: The folder or its URL, with the label file and DICOM files named by their ImageId
            anywhere in it (`dicom-images-train/…/…/<ImageId>.dcm`, `stage_2_images/<ImageId>.dcm`).
        labels: The label file; None: the one in the folder.

    Raises:
        DataError: a file of the set is missing or has a row that cannot be.
    """
    files = Files(source)
    table = files.labels(labels, *LABELS)
    table.need("ImageId", "EncodedPixels")
    masks = _masks(table)
    paths = files.by_stem([".dcm"])
    there, notes = present(source, table.path.name, list(masks), paths)
    records = [
        Record(
            source=NAME,
            image_id=name,
            path=paths[name],
            patient_id=name,
            labels={CLASSES[0]: int(bool(masks[name]))},
            mask=RunLengths(masks[name], SIDE_PX, SIDE_PX),
        )
        for name in there
    ]
    counts = {
        "rows": len(table.rows),
        "images": len(masks),
        "positive": sum(map(bool, masks.values())),
    }
    notes += differences(table.path.name, counts, PUBLISHED, of="images")
    return Listing(records, notes)


def _masks(table: Table) -> dict[str, tuple[str, ...]]:
    """The run lengths of each image; none where it is negative."""
    masks: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for line, cells in table:
        name, runs = cells["ImageId"], cells["EncodedPixels"]
        if not name or not runs:
            raise table.wrong(line, "the image has no name or no EncodedPixels")
        if name in seen and (runs == EMPTY or not masks[name]):
            raise table.wrong(line, f"{name} is negative and stands more than once")
        seen.add(name)
        if runs == EMPTY:
            masks[name] = ()
            continue
        try:
            check_runs(runs, SIDE_PX**2)
        except (ValueError, OverflowError) as error:
            raise table.wrong(line, f"the mask of {name} cannot be read: {error}") from None
        masks[name] = (*masks.get(name, ()), runs)
    return masks

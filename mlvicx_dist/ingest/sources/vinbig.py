"""VinBigData (Nguyen et al. 2020): 15,000 DICOM files, each read by three radiologists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlvicx_dist.errors import nearest
from mlvicx_dist.ingest.record import Box, Record
from mlvicx_dist.ingest.sources.tables import (
    Files,
    Listing,
    Table,
    differences,
    number,
    present,
)

NAME = "vinbig"
PUBLISHED = {"rows": 67_914, "images": 15_000, "images without finding": 10_606}
CLASSES = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Nodule/Mass",
    "Other lesion",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
)
"""By their `class_id`; 14 is `No finding`."""
NO_FINDING = "No finding"
SUFFIXES = (".dicom", ".dcm")
CORNERS = ("x_min", "y_min", "x_max", "y_max")

Readers = Literal["union", "majority"]


@dataclass
class _Reading:
    """What the readers of one image found."""

    readers: set[str] = field(default_factory=set)
    votes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    boxes: list[Box] = field(default_factory=list)

    def kept(self, readers: Readers) -> set[str]:
        """The findings that one reader (union) or more than half of them (majority) marked."""
        least = 1 if readers == "union" else len(self.readers) // 2 + 1
        return {name for name, who in self.votes.items() if len(who) >= least}


def list_vinbig(
    source: str | Path, *, labels: str | Path | None = None, readers: Readers = "union"
) -> Listing:
    """The labelled images of VinBigData that are below `source`; each is a patient of its own.

    Args:
        source: The folder or its URL, with `train.csv` and `train/<image_id>.dicom`.
        labels: The label file; None: `train.csv` in the folder.
        readers: A finding counts when one reader marked it, or when more than half did.

    Raises:
        DataError: a file of the set is missing or has a row that cannot be.
    """
    files = Files(source)
    table = files.labels(labels, "train.csv")
    table.need("image_id", "class_name", "class_id", "rad_id", *CORNERS)
    readings = _readings(table)
    paths = files.by_stem(SUFFIXES)
    there, notes = present(source, table.path.name, list(readings), paths)
    records = [_record(name, paths[name], readings[name], readers) for name in there]
    counts = {
        "rows": len(table.rows),
        "images": len(readings),
        "images without finding": sum(not one.votes for one in readings.values()),
    }
    notes += differences(table.path.name, counts, PUBLISHED, of="images")
    return Listing(records, notes)


def _readings(table: Table) -> dict[str, _Reading]:
    readings: dict[str, _Reading] = defaultdict(_Reading)
    for line, cells in table:
        if not cells["image_id"] or not cells["rad_id"]:
            raise table.wrong(line, "the image or its reader has no name")
        reading = readings[cells["image_id"]]
        reading.readers.add(cells["rad_id"])
        name = cells["class_name"]
        _check_class(table, line, name, cells["class_id"])
        if name == NO_FINDING:
            continue
        left, top, right, bottom = (number(table, line, cells[corner]) for corner in CORNERS)
        if right <= left or bottom <= top:
            raise table.wrong(line, f"the box of {name} is empty")
        reading.votes[name].add(cells["rad_id"])
        reading.boxes.append(Box(label=name, left=left, top=top, right=right, bottom=bottom))
    return dict(readings)


def _check_class(table: Table, line: int, name: str, class_id: str) -> None:
    names: Mapping[str, str] = {str(k): n for k, n in enumerate((*CLASSES, NO_FINDING))}
    if name not in names.values():
        raise table.wrong(line, f"'{name}' is no class of this set{nearest(name, CLASSES)}")
    if names.get(class_id) != name:
        raise table.wrong(line, f"class_id {class_id} is not '{name}'")


def _record(name: str, path: str, reading: _Reading, readers: Readers) -> Record:
    kept = reading.kept(readers)
    return Record(
        source=NAME,
        image_id=name,
        path=path,
        patient_id=name,
        labels={c: int(c in kept) for c in CLASSES},
        boxes=tuple(box for box in reading.boxes if box.label in kept),
    )

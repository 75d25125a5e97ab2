"""RSNA Pneumonia Detection (2018): NIH images as DICOM, with boxes of lung opacities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.record import Box, Record
from mlvicx_dist.ingest.sources.tables import (
    Files,
    Listing,
    Table,
    differences,
    number,
    present,
    read_table,
)

NAME = "rsna"
PUBLISHED = {"rows": 30_227, "patients": 26_684, "positive": 6_012, "boxes": 9_555}
OPACITY = "Lung Opacity"
CLASSES = (OPACITY, "No Lung Opacity / Not Normal", "Normal")
"""The official class of an image is one of the three; `Lung Opacity` is `Target`."""
LABELS, DETAIL = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
SIDES = ("x", "y", "width", "height")


def list_rsna(source: str | Path, *, labels: str | Path | None = None) -> Listing:
    """The labelled images of the RSNA challenge that are below `source`; one a patient.

    Without `stage_2_detailed_class_info.csv` the two other classes of a negative are unknown.

    Args:
        source: The folder or its URL, with the label files and
            `stage_2_train_images/<patientId>.dcm`.
        labels: The label file; None: `stage_2_train_labels.csv` in the folder.

    Raises:
        DataError: a file of the set is missing or has a row that cannot be.
    """
    files = Files(source)
    table = files.labels(labels, LABELS)
    table.need("patientId", "Target", *SIDES)
    boxes = _boxes(table)
    detail_path = files.find(DETAIL)
    detail = _detail(read_table(detail_path), boxes) if detail_path is not None else {}
    paths = files.by_stem([".dcm"])
    there, notes = present(source, table.path.name, list(boxes), paths)
    records = [
        Record(
            source=NAME,
            image_id=name,
            path=paths[name],
            patient_id=name,
            labels=_labels(detail.get(name), positive=bool(boxes[name])),
            boxes=boxes[name],
        )
        for name in there
    ]
    counts = {
        "rows": len(table.rows),
        "patients": len(boxes),
        "positive": sum(map(bool, boxes.values())),
        "boxes": sum(map(len, boxes.values())),
    }
    notes += differences(table.path.name, counts, PUBLISHED, of="patients")
    return Listing(records, notes)


def _boxes(table: Table) -> dict[str, tuple[Box, ...]]:
    """The boxes of each patient: one row a box, one row without for a negative."""
    boxes: dict[str, tuple[Box, ...]] = {}
    for line, cells in table:
        name, target = cells["patientId"], cells["Target"]
        if not name or target not in ("0", "1"):
            raise table.wrong(line, f"the patient '{name}' has the Target '{target}'")
        if target == "0":
            if any(cells[side] for side in SIDES):
                raise table.wrong(line, "a negative has a box")
            if boxes.setdefault(name, ()):
                raise table.wrong(line, f"{name} is positive and negative")
            continue
        if boxes.get(name) == ():
            raise table.wrong(line, f"{name} is positive and negative")
        x, y, width, height = (number(table, line, cells[side]) for side in SIDES)
        if width <= 0 or height <= 0:
            raise table.wrong(line, "the box is empty")
        box = Box(label=OPACITY, left=x, top=y, right=x + width, bottom=y + height)
        boxes[name] = (*boxes.get(name, ()), box)
    return boxes


def _detail(table: Table, boxes: Mapping[str, tuple[Box, ...]]) -> dict[str, str]:
    """The class of each patient; its rows repeat as often as the patient has boxes."""
    table.need("patientId", "class")
    classes: dict[str, str] = {}
    for line, cells in table:
        name, found = cells["patientId"], cells["class"]
        if found not in CLASSES:
            raise table.wrong(line, f"'{found}' is no class of this set")
        if classes.setdefault(name, found) != found:
            raise table.wrong(line, f"{name} has two classes")
    for name, found in classes.items():
        if name in boxes and bool(boxes[name]) != (found == OPACITY):
            raise DataError(
                f"{table.path}: {name} is '{found}' there, but its Target says otherwise; "
                "take both label files from the same release."
            )
    return classes


def _labels(detail: str | None, *, positive: bool) -> dict[str, int | None]:
    if positive or detail is not None:
        found = OPACITY if positive else detail
        return {name: int(name == found) for name in CLASSES}
    return {name: 0 if name == OPACITY else None for name in CLASSES}

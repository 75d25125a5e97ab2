"""NIH ChestX-ray14 (Wang et al. 2017), every release: labels, official split, boxes (DESIGN 7)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from mlvicx_dist.errors import DataError, nearest
from mlvicx_dist.ingest.record import Box, Record
from mlvicx_dist.ingest.sources.tables import (
    Files,
    Listing,
    Table,
    age_years,
    differences,
    number,
    present,
    read_table,
    read_text,
)
from mlvicx_dist.ingest.splits import TRAIN_VAL

NAME = "nih"
PUBLISHED = {
    "No Finding": 60_361,
    "Infiltration": 19_894,
    "Effusion": 13_317,
    "Atelectasis": 11_559,
    "Nodule": 6_331,
    "Mass": 5_782,
    "Pneumothorax": 5_302,
    "Consolidation": 4_667,
    "Pleural_Thickening": 3_385,
    "Cardiomegaly": 2_776,
    "Emphysema": 2_516,
    "Edema": 2_303,
    "Fibrosis": 1_686,
    "Pneumonia": 1_431,
    "Hernia": 227,
    "images": 112_120,
    "patients": 30_805,
    "train_val": 86_524,
    "test": 25_596,
}
"""Counts of the whole set."""
NO_FINDING = "No Finding"
CLASSES = tuple(sorted(name for name in PUBLISHED if name[0].isupper() and name != NO_FINDING))
"""The 14 findings; an image without any is `No Finding`, which is no class of its own."""
LABELS = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
LISTS = {TRAIN_VAL: "train_val_list.txt", "test": "test_list.txt"}
BOXES = "BBox_List_2017.csv"
BOX_NAMES = {"Infiltrate": "Infiltration"}
"""The box list writes one finding another way."""


def list_nih(
    source: str | Path, *, labels: str | Path | None = None, official: bool = True
) -> Listing:
    """The images of ChestX-ray14 that are below `source`.

    Args:
        source: The folder or its URL; images in `images/`, `images_001/images/` … or anywhere
            below it.
        labels: The label file; None: the one in the folder.
        official: Whether the official lists are needed.

    Raises:
        DataError: a file of the set is missing or has a row that cannot be.
    """
    files = Files(source)
    table = files.labels(labels, *LABELS)
    table.need(
        "Image Index",
        "Finding Labels",
        "Patient ID",
        "Patient Age",
        "Patient Gender",
        "View Position",
    )
    splits = _splits(files) if official else {}
    boxes = _boxes(files)
    rows = _rows(table, splits if official else None)
    paths = {f"{stem}.png": path for stem, path in files.by_stem([".png"]).items()}
    there, notes = present(source, table.path.name, list(rows), paths)
    records = [
        Record(
            source=NAME,
            image_id=name,
            path=paths[name],
            patient_id=cells["Patient ID"],
            labels=found,
            split=splits.get(name),
            view=cells["View Position"] or None,
            sex=cells["Patient Gender"] or None,
            age=age_years(table, line, cells["Patient Age"]),
            boxes=boxes.get(name, ()),
        )
        for name, (line, cells, found) in ((name, rows[name]) for name in there)
    ]
    notes += differences(table.path.name, _counts(rows, splits), PUBLISHED, of="images")
    return Listing(records, notes)


Rows = dict[str, tuple[int, Mapping[str, str], dict[str, int | None]]]


def _rows(table: Table, splits: Mapping[str, str] | None) -> Rows:
    """Each image's line, cells and labels."""
    rows: Rows = {}
    for line, cells in table:
        name = cells["Image Index"]
        if name in rows:
            raise table.wrong(line, f"the image {name} stands twice")
        if not name or not cells["Patient ID"]:
            raise table.wrong(line, "the image or its patient has no name")
        if splits is not None and name not in splits:
            raise table.wrong(line, f"{name} is in neither {' nor '.join(LISTS.values())}")
        found = {finding.strip() for finding in cells["Finding Labels"].split("|")}
        for bad in sorted(found - {NO_FINDING, *CLASSES}):
            raise table.wrong(line, f"'{bad}' is no finding of this set{nearest(bad, CLASSES)}")
        if NO_FINDING in found and len(found) > 1:
            raise table.wrong(line, f"'{NO_FINDING}' stands beside a finding")
        rows[name] = (line, cells, {name: int(name in found) for name in CLASSES})
    return rows


def _splits(files: Files) -> dict[str, str]:
    """The official split of each image."""
    splits: dict[str, str] = {}
    for split, file in LISTS.items():
        path = files.one(file, option="--no-official-splits to draw splits by patient")
        for line, text in enumerate(read_text(path).splitlines(), 1):
            name = text.strip()
            if splits.get(name, split) != split:
                raise DataError(f"{path}, line {line}: {name} is in both official lists.")
            if name:
                splits[name] = split
    return splits


def _boxes(files: Files) -> dict[str, tuple[Box, ...]]:
    """The boxes of each image, where the list of them is there: 984 on 880 images."""
    path = files.find(BOXES)
    if path is None:
        return {}
    table = read_table(path)
    # "Bbox [x,y,w,h]" holds commas: the four numbers are the next four cells.
    corner = ["Bbox [x", "y", "w", "h]"]
    table.need("Image Index", "Finding Label", *corner)
    boxes: dict[str, tuple[Box, ...]] = defaultdict(tuple)
    for line, cells in table:
        x, y, w, h = (number(table, line, cells[column]) for column in corner)
        label = BOX_NAMES.get(cells["Finding Label"], cells["Finding Label"])
        if label not in CLASSES or w <= 0 or h <= 0:
            raise table.wrong(line, f"the box of '{label}' is empty or of no finding of this set")
        box = Box(label=label, left=x, top=y, right=x + w, bottom=y + h)
        boxes[cells["Image Index"]] += (box,)
    return boxes


def _counts(rows: Rows, splits: Mapping[str, str]) -> dict[str, int]:
    counts: Counter[str] = Counter(images=len(rows))
    counts["patients"] = len({cells["Patient ID"] for _, cells, _ in rows.values()})
    for name, (_, _, found) in rows.items():
        counts.update(finding for finding, value in found.items() if value)
        counts[NO_FINDING] += not any(found.values())
        counts[splits.get(name, "")] += 1
    if not splits:
        counts.update({split: PUBLISHED[split] for split in LISTS})
    return counts

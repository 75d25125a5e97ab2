"""Any folder of images or DICOM files: subfolder = class, or a CSV that describes the files."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.dicom import read_header
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.sources.tables import Listing, Table, age_years, read_table
from mlvicx_dist.session import in_parallel
from mlvicx_dist.storage import Place, files_below, place

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
DICOM = {".dcm", ".dicom", ""}
"""A file without a suffix may be DICOM; its preamble tells."""
NO_FINDING = {"", "no finding", "normal", "none"}
MOST_CLASSES = 40
"""More subfolders than this are patients or dates, not classes: their names stay out of shards."""
CHUNK = 512


@dataclass(frozen=True)
class Columns:
    """Names of a CSV's columns; all but `path` may be absent."""

    path: str = "path"
    labels: str = "labels"
    patient: str = "patient"
    split: str = "split"
    view: str = "view"
    sex: str = "sex"
    age: str = "age"


def list_folder(
    source: str | Path,
    *,
    name: str,
    patient_regex: str | None = None,
    classes: bool = True,
    workers: int | None = 1,
) -> Listing:
    """The images below a folder; the first subfolder on an image's path is its class.

    A patient is what the pattern finds in a file's name, else what a DICOM header says, else the
    file itself.

    Args:
        source: The folder or its URL; nothing in it is ever written.
        name: What the shards call this source.
        patient_regex: A pattern whose group 1, or whole match, in the file's name is the patient.
        classes: Whether subfolders are classes.
        workers: Ray tasks that read headers.

    Raises:
        DataError: the folder is missing or holds no image, has too many subfolders for classes, or
            the pattern is wrong.
    """
    folder = place(source)
    pattern = _pattern(patient_regex)
    paths = [path for path in files_below(folder) if _wanted(path)]
    headers = _headers(folder, [path for path in paths if _suffix(path) in DICOM], workers)
    # A file without a suffix that is no DICOM file is no image.
    paths = [path for path in paths if _suffix(path) != "" or headers[path] is not None]
    if not paths:
        raise DataError(
            f"{source}: there are no images in it; files of {', '.join(sorted(IMAGES | DICOM))} "
            "and any with a DICOM preamble are taken."
        )
    names = sorted({_top(path) for path in paths} - {""}) if classes else []
    if len(names) > MOST_CLASSES:
        raise DataError(
            f"{source}: {len(names)} subfolders would become classes, and their names part of the "
            "shards; give --no-classes if they are not classes, or a --csv with the labels."
        )
    return Listing(
        [
            Record(
                source=name,
                image_id=path,
                path=str(folder / path),
                patient_id=_patient(pattern, path) or headers.get(path) or path,
                labels={c: int(_top(path) == c) if _top(path) else None for c in names},
            )
            for path in paths
        ]
    )


def list_csv(
    source: str | Path,
    table: str | Path,
    *,
    name: str,
    columns: Columns,
    classes: Sequence[str] | None = None,
    unknown: str | None = None,
    where: Sequence[str] = (),
    workers: int | None = 1,
) -> Listing:
    """The images that a CSV names.

    Labels are class names joined by '|'. An empty cell, 'No Finding' or 'Normal' says that every
    class is absent; a cell equal to `unknown` says that none is known. A patient is the cell of the
    table, else what a DICOM header says, else the file itself.

    Args:
        source: The folder, or its URL, that the paths are relative to.
        table: The CSV file.
        name: What the shards call this source.
        columns: Names of its columns.
        classes: The classes, in order; None: all that occur, sorted. Others are left out.
        unknown: The cell of an image without labels.
        where: Conditions `COLUMN=PATTERN`, all of which a row must meet; `*` stands for anything.
        workers: Ray tasks that read headers.

    Raises:
        DataError: the CSV or a file it names is missing, or a cell or column is wrong.
    """
    folder = place(source)
    rows = read_table(place(table))
    rows.need(columns.path, *(condition.partition("=")[0] for condition in where))
    chosen = [(line, cells) for line, cells in rows if _meets(cells, where)]
    if not chosen:
        raise DataError(f"{table}: no row is left; check the file and --where.")
    _check_there(folder, rows, [cells[columns.path] for _, cells in chosen])
    found = [_labels(cells.get(columns.labels, ""), unknown) for _, cells in chosen]
    if classes is None:
        classes = sorted({label for labels in found if labels for label in labels})
    records = [
        Record(
            source=name,
            image_id=cells[columns.path],
            path=str(folder / cells[columns.path]),
            patient_id=cells.get(columns.patient, ""),
            labels={c: None if labels is None else int(c in labels) for c in classes},
            split=cells.get(columns.split) or None,
            view=cells.get(columns.view) or None,
            sex=cells.get(columns.sex, "").upper()[:1] or None,
            age=age_years(rows, line, cells.get(columns.age, "")),
        )
        for (line, cells), labels in zip(chosen, found, strict=True)
    ]
    unnamed = [r.image_id for r in records if not r.patient_id and _suffix(r.image_id) in DICOM]
    headers = _headers(folder, unnamed, workers)
    return Listing(
        [
            r if r.patient_id else replace(r, patient_id=headers.get(r.image_id) or r.image_id)
            for r in records
        ]
    )


def _wanted(path: str) -> bool:
    return _suffix(path) in IMAGES | DICOM and not any(
        part.startswith(".") for part in path.split("/")
    )


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _top(path: str) -> str:
    """The first subfolder on a path; empty where there is none."""
    return path.partition("/")[0] if "/" in path else ""


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise DataError(f"--patient-regex {text}: {error}; correct the pattern.") from None


def _patient(pattern: re.Pattern[str] | None, path: str) -> str | None:
    match = pattern.search(posixpath.basename(path)) if pattern else None
    if match is None:
        return None
    return match.group(1) if match.groups() else match.group()


def _headers(folder: Place, paths: Sequence[str], workers: int | None) -> dict[str, str | None]:
    """The patient of each DICOM file: empty where its header names none, None of another file."""
    if not paths:
        return {}
    chunks = [(str(folder), paths[i : i + CHUNK]) for i in range(0, len(paths), CHUNK)]
    found: dict[str, str | None] = {}
    for _, part in in_parallel(_read_headers, chunks, workers=workers):
        found.update(part)
    return found


def _read_headers(chunk: tuple[str, Sequence[str]]) -> dict[str, str | None]:
    folder, found = place(chunk[0]), {}
    for path in chunk[1]:
        try:
            header = read_header(folder / path)
            found[path] = None if header is None else header.patient_id or ""
        except (Refused, OSError):
            found[path] = ""  # packing says what is wrong with it
    return found


def _check_there(folder: Place, table: Table, paths: Sequence[str]) -> None:
    """Raise a DataError where files that a table names are missing.

    What http has cannot be listed: there a missing file is refused when it is packed.
    """
    if str(folder).startswith("http"):
        return
    there = set(files_below(folder))
    absent = [path for path in paths if posixpath.normpath(path) not in there]
    if absent:
        raise DataError(
            f"{table.path}: {len(absent)} of {len(paths)} files are not in {folder} "
            f"(the first is {absent[0]}); set --source to the folder that the paths start from."
        )


def _meets(cells: Mapping[str, str], where: Iterable[str]) -> bool:
    pairs = (condition.partition("=") for condition in where)
    return all(fnmatchcase(cells[column], pattern) for column, _, pattern in pairs)


def _labels(cell: str, unknown: str | None) -> set[str] | None:
    if unknown is not None and cell == unknown:
        return None
    labels = {label.strip() for label in cell.split("|")}
    return {label for label in labels if label.lower() not in NO_FINDING}

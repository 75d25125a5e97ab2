"""Any folder of images or DICOM files: subfolder = class, or a CSV that describes the files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlvicx_dist.errors import DataError, nearest
from mlvicx_dist.ingest.dicom import is_dicom
from mlvicx_dist.ingest.record import Record

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom"}
NO_FINDING = {"", "no finding", "normal", "none"}


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


def list_folder(source: Path, *, name: str, patient_regex: str | None = None) -> list[Record]:
    """The images below a folder; the first subfolder on an image's path is its class.

    Args:
        source: The folder; nothing in it is ever written.
        name: What the shards call this source.
        patient_regex: A pattern whose group 1, or whole match, in the file's name is the patient;
            a file that it does not match is a patient of its own, as all are without one.

    Raises:
        DataError: the folder is missing or holds no image, or the pattern is wrong.
    """
    if not source.is_dir():
        raise DataError(f"{source}: there is no such folder; give one with --source.")
    pattern = _pattern(patient_regex)
    paths = sorted(path for path in source.rglob("*") if _is_image(path))
    if not paths:
        raise DataError(
            f"{source}: there are no images in it; files of {', '.join(sorted(SUFFIXES))} and any "
            "with a DICOM preamble are taken."
        )
    relative = [path.relative_to(source) for path in paths]
    classes = sorted({path.parts[0] for path in relative if len(path.parts) > 1})
    return [
        Record(
            source=name,
            image_id=short.as_posix(),
            path=path,
            patient_id=_patient(pattern, short),
            labels={c: int(short.parts[0] == c) if len(short.parts) > 1 else None for c in classes},
        )
        for path, short in zip(paths, relative, strict=True)
    ]


def list_csv(
    source: Path,
    table: Path,
    *,
    name: str,
    columns: Columns,
    classes: Sequence[str] | None = None,
    unknown: str | None = None,
    where: Sequence[str] = (),
) -> list[Record]:
    """The images that a CSV names.

    Labels are class names joined by '|'. An empty cell, 'No Finding' or 'Normal' says that every
    class is absent; a cell equal to `unknown` says that none is known.

    Args:
        source: The folder that the paths are relative to.
        table: The CSV file.
        name: What the shards call this source.
        columns: Names of its columns.
        classes: The classes, in order; None: all that occur, sorted. Others are left out.
        unknown: The cell of an image without labels.
        where: Conditions `COLUMN=PATTERN`, all of which a row must meet; `*` stands for anything.

    Raises:
        DataError: the CSV or a file it names is missing, or a cell or column is wrong.
    """
    rows, header = _rows(table)
    for needed in (columns.path, *(c.partition("=")[0] for c in where)):
        if needed not in header:
            raise DataError(
                f"{table}: there is no column '{needed}'{nearest(needed, header)}; "
                f"it has {', '.join(header)}."
            )
    chosen = [(line, row) for line, row in rows if _meets(row, where)]
    if not chosen:
        raise DataError(f"{table}: no row is left; check the file and --where.")
    absent = [row[columns.path] for _, row in chosen if not (source / row[columns.path]).is_file()]
    if absent:
        raise DataError(
            f"{table}: {len(absent)} of {len(chosen)} files are not in {source} "
            f"(the first is {absent[0]}); set --source to the folder that the paths start from."
        )
    found = [_labels(row.get(columns.labels, ""), unknown) for _, row in chosen]
    if classes is None:
        classes = sorted({label for labels in found if labels for label in labels})
    return [
        Record(
            source=name,
            image_id=row[columns.path],
            path=source / row[columns.path],
            patient_id=row.get(columns.patient) or row[columns.path],
            labels={c: None if labels is None else int(c in labels) for c in classes},
            split=row.get(columns.split) or None,
            view=row.get(columns.view) or None,
            sex=(row.get(columns.sex) or "").strip().upper()[:1] or None,
            age=_age(row.get(columns.age) or "", table, line),
        )
        for (line, row), labels in zip(chosen, found, strict=True)
    ]


def _is_image(path: Path) -> bool:
    if not path.is_file() or any(part.startswith(".") for part in path.parts[-2:]):
        return False
    return path.suffix.lower() in SUFFIXES or (path.suffix == "" and is_dicom(path))


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise DataError(f"--patient-regex {text}: {error}; correct the pattern.") from None


def _patient(pattern: re.Pattern[str] | None, path: Path) -> str:
    match = pattern.search(path.name) if pattern else None
    if match is None:
        return path.as_posix()
    return match.group(1) if match.groups() else match.group()


def _rows(table: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows = [(reader.line_num, row) for row in reader]
            header = [name for name in reader.fieldnames or [] if name]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a CSV in UTF-8"
        raise DataError(f"{table}: the table cannot be read ({reason}); give a CSV file.") from None
    long = next((line for line, row in rows if None in row), None)
    if long is not None:
        raise DataError(f"{table}, line {long}: more cells than columns; quote cells with commas.")
    return rows, header


def _meets(row: dict[str, str], where: Iterable[str]) -> bool:
    pairs = (condition.partition("=") for condition in where)
    return all(fnmatchcase(row[column], pattern) for column, _, pattern in pairs)


def _labels(cell: str, unknown: str | None) -> set[str] | None:
    if unknown is not None and cell.strip() == unknown:
        return None
    labels = {label.strip() for label in cell.split("|")}
    return {label for label in labels if label.lower() not in NO_FINDING}


def _age(cell: str, table: Path, line: int) -> int | None:
    """An age in years: `58`, `58.0` or the older `058Y`."""
    text = cell.strip().upper().removesuffix("Y")
    if not text:
        return None
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise DataError(
            f"{table}, line {line}: the age '{cell}' is not a number of years; correct it, or name "
            "another column with --age-column."
        ) from None

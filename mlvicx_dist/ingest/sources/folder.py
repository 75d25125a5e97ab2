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
from mlvicx_dist.ingest.dicom_header import Header
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.sources.tables import Listing, Table, age_years, read_table
from mlvicx_dist.ingest.splits import TRAIN_VAL
from mlvicx_dist.progress import progress
from mlvicx_dist.session import in_parallel
from mlvicx_dist.storage import Place, files_below, place

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
DICOM = {".dcm", ".dicom"}
"""Any other file may be DICOM too, as a UID for a name has no suffix; its preamble tells."""
NO_FINDING = {"", "no finding", "normal", "none"}
MOST_CLASSES = 40
"""More subfolders than this are patients or dates, not classes: their names stay out of shards."""
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""First subfolders that are splits where all of them are, as in train/NORMAL/a.png."""
CHUNK = 512

NAMELIKE = re.compile(r"\^|\d{4}")
"""What class names do not hold, but names and numbers of patients and dates do."""


@dataclass(frozen=True)
class Columns:
    """Names of a CSV's columns; None: the field's own name, which may be absent but for `path`."""

    path: str | None = None
    labels: str | None = None
    patient: str | None = None
    split: str | None = None
    view: str | None = None
    sex: str | None = None
    age: str | None = None

    def of(self, table: Table) -> dict[str, str]:
        """The column of each field; of a field that has none, the empty name.

        Raises:
            DataError: a column that was named is not there, or that of the paths is not.
        """
        given = {field: name for field, name in vars(self).items() if name is not None}
        table.need(given.get("path", "path"), *given.values())
        return {f: given.get(f) or (f if f in table.header else "") for f in vars(self)}


def list_folder(
    source: str | Path,
    *,
    name: str,
    patient_regex: str | None = None,
    classes: bool = True,
    workers: int | None = 1,
) -> Listing:
    """The images below a folder; the first subfolder on an image's path is its class.

    Where all first subfolders are called as splits are, they are the splits, and the second ones
    the classes. A patient is what the pattern finds, else what a DICOM header says, its study where
    it names no patient, else the file itself.

    Args:
        source: The folder or its URL; nothing in it is ever written.
        name: What the shards call this source.
        patient_regex: A pattern whose group 1, or whole match, is the patient: in the file's name,
            or where it is not found there in the path below the folder.
        classes: Whether subfolders are classes.
        workers: Ray tasks that read headers.

    Raises:
        DataError: the folder is missing or holds no image, has too many subfolders for classes, or
            the pattern is wrong.
    """
    folder = place(source)
    pattern = _pattern(patient_regex)
    found = files_below(folder)
    shown = [path for path in found if not any(part.startswith(".") for part in path.split("/"))]
    headers = _headers(folder, [path for path in shown if _suffix(path) not in IMAGES], workers)
    paths = [path for path in shown if _suffix(path) in IMAGES | DICOM or headers[path] is not None]
    if not paths:
        raise DataError(
            f"{source}: there are no images in it; files of {', '.join(sorted(IMAGES | DICOM))} "
            "and any with a DICOM preamble are taken."
        )
    splits = _splits({_top(path) for path in paths})
    below = {path: path.partition("/")[2] if splits else path for path in paths}
    names = sorted({_top(path) for path in below.values()} - {""}) if classes else []
    _check_classes(
        f"{source}: the subfolders",
        names,
        "give --no-classes if they are not classes, or a --csv with the labels",
    )
    named = {path: _patient(pattern, path) for path in paths}
    patients, notes = _patients(source, named, headers, "--patient-regex or a --csv")
    records = [
        Record(
            source=name,
            image_id=path,
            path=str(folder / path),
            patient_id=patients[path],
            labels={c: int(_top(below[path]) == c) if _top(below[path]) else None for c in names},
            split=splits.get(_top(path)),
        )
        for path in paths
    ]
    if splits:
        cut = "; train is cut by patient into train and val" if TRAIN_VAL in splits.values() else ""
        notes.append(f"{source}: splits by subfolder: {', '.join(sorted(splits))}{cut}.")
    if names:
        notes.append(f"{source}: classes by subfolder, named in the shards: {', '.join(names)}.")
    if len(paths) < len(found):
        notes.append(f"{source}: {len(found) - len(paths)} of {len(found)} files are no images.")
    return Listing(records, notes)


def list_csv(
    source: str | Path,
    table: str | Path,
    *,
    name: str,
    columns: Columns,
    patient_regex: str | None = None,
    classes: Sequence[str] | None = None,
    unknown: str | None = None,
    where: Sequence[str] = (),
    workers: int | None = 1,
) -> Listing:
    """The images that a CSV names.

    Labels are class names joined by '|'. An empty cell, 'No Finding' or 'Normal' says that every
    class is absent; a cell equal to `unknown` says that none is known. A patient is the cell of the
    table, else as in `list_folder`.

    Args:
        source: The folder, or its URL, that the paths are relative to.
        table: The CSV file.
        name: What the shards call this source.
        columns: Names of its columns.
        patient_regex: As in `list_folder`.
        classes: The classes, in order; None: all that occur, sorted. Others are left out.
        unknown: The cell of an image without labels.
        where: Conditions `COLUMN=PATTERN`, all of which a row must meet; `*` stands for anything.
        workers: Ray tasks that read headers.

    Raises:
        DataError: the CSV or a file it names is missing, or a cell or column is wrong.
    """
    folder, pattern = place(source), _pattern(patient_regex)
    rows = read_table(place(table))
    column = columns.of(rows)
    rows.need(*(condition.partition("=")[0] for condition in where))
    chosen = [(line, cells) for line, cells in rows if _meets(cells, where)]
    if not chosen:
        raise DataError(f"{table}: no row is left; check the file and --where.")
    _check_there(folder, rows, [cells[column["path"]] for _, cells in chosen])
    found = [_labels(cells.get(column["labels"], ""), unknown) for _, cells in chosen]
    occurring = sorted({label for labels in found if labels for label in labels})
    notes = _check_labels(rows, column["labels"], classes, occurring)
    classes = occurring if classes is None else classes
    records = [
        Record(
            source=name,
            image_id=cells[column["path"]],
            path=str(folder / cells[column["path"]]),
            patient_id=cells.get(column["patient"], ""),
            labels={c: None if labels is None else int(c in labels) for c in classes},
            split=cells.get(column["split"]) or None,
            view=cells.get(column["view"]) or None,
            sex=cells.get(column["sex"], "").upper()[:1] or None,
            age=age_years(rows, line, cells.get(column["age"], "")),
        )
        for (line, cells), labels in zip(chosen, found, strict=True)
    ]
    named = {r.image_id: r.patient_id or _patient(pattern, r.image_id) for r in records}
    unnamed = [path for path, who in named.items() if not who and _suffix(path) not in IMAGES]
    patients, told = _patients(
        table, named, _headers(folder, unnamed, workers), "--patient-column or --patient-regex"
    )
    return Listing([replace(r, patient_id=patients[r.image_id]) for r in records], notes + told)


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


def _splits(folders: set[str]) -> dict[str, str]:
    """The split that each first subfolder is; none, unless all of them are splits."""
    if not all(folder.lower() in SPLIT_FOLDERS for folder in folders):
        return {}
    splits = {folder: SPLIT_FOLDERS[folder.lower()] for folder in folders}
    if "val" in splits.values():
        return splits
    return {folder: TRAIN_VAL if split == "train" else split for folder, split in splits.items()}


def _patient(pattern: re.Pattern[str] | None, path: str) -> str | None:
    match = pattern and (pattern.search(posixpath.basename(path)) or pattern.search(path))
    if not match:
        return None
    return match.group(1) if match.groups() else match.group()


def _patients(
    where: str | Path,
    named: Mapping[str, str | None],
    headers: Mapping[str, Header | None],
    remedy: str,
) -> tuple[dict[str, str], list[str]]:
    """The patient of each image by its path, and notes of what is not known of them."""
    found, studies, unknown = {}, 0, 0
    for path, who in named.items():
        header = headers.get(path) or Header()
        found[path] = who or header.patient_id or header.study_id or path
        studies += not who and not header.patient_id and bool(header.study_id)
        unknown += found[path] == path
    notes = []
    if studies:
        notes.append(
            f"{where}: of {studies:,} of {len(named):,} images the header names a study and no "
            "patient, so each study is split as a patient of its own; name the patients with "
            f"{remedy}."
        )
    if unknown:
        notes.append(
            f"{where}: of {unknown:,} of {len(named):,} images the patient is not known, so each "
            f"is split as a patient of its own; name the patients with {remedy}."
        )
    if len(named) > 1 and len(set(found.values())) == 1:
        notes.append(
            f"{where}: all {len(named):,} images are of one patient, so all come into one split; "
            f"if they are not, name the patients with {remedy}."
        )
    return found, notes


def _headers(folder: Place, paths: Sequence[str], workers: int | None) -> dict[str, Header | None]:
    """What the header of each DICOM file tells; None of another file."""
    if not paths:
        return {}
    chunks = [(str(folder), paths[i : i + CHUNK]) for i in range(0, len(paths), CHUNK)]
    found: dict[str, Header | None] = {}
    with progress("reading headers", len(paths), "files") as bar:
        for _, part in in_parallel(_read_headers, chunks, workers=workers):
            found.update(part)
            bar.advance(len(part))
    return found


def _check_classes(which: str, names: Sequence[str], remedy: str) -> None:
    """Raise a DataError where names look like patients: those of classes stand in the shards."""
    namelike = [name for name in names if NAMELIKE.search(name)]
    if len(names) > MOST_CLASSES or namelike:
        why = "look like patients or dates" if namelike else f"are {len(names)}"
        raise DataError(
            f"{which} {why}, and as classes their names would stand in the shards; {remedy}."
        )


def _check_labels(
    table: Table, column: str, classes: Sequence[str] | None, occurring: Sequence[str]
) -> list[str]:
    """Notes of the classes that are taken from the table, or of those that no image has.

    Raises:
        DataError: classes are asked for and there is no column of labels, or one is misspelt; or
            the labels look like patients.
    """
    if classes is None:
        if not column:
            told = f"{table.path}: it has no column 'labels', so no image has a label; name the "
            return [told + "column of the labels with --labels-column."]
        _check_classes(
            f"{table.path}: the labels of column '{column}'",
            occurring,
            "name another column with --labels-column, or the classes with --classes",
        )
        listed = ", ".join(occurring)
        return [f"{table.path}: classes, named in the shards: {listed}."] if occurring else []
    if not column:
        table.need("labels")
    notes = []
    for name in classes:
        if name not in occurring:
            same = next((o for o in occurring if _letters(o) == _letters(name)), None)
            if same:
                raise DataError(
                    f"{table.path}: no label is '{name}' (did you mean '{same}'?); "
                    "correct --classes."
                )
            notes.append(f"{table.path}: no image has the label '{name}'.")
    return notes


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _read_headers(chunk: tuple[str, Sequence[str]]) -> dict[str, Header | None]:
    folder = place(chunk[0])
    found: dict[str, Header | None] = {}
    for path in chunk[1]:
        try:
            found[path] = read_header(folder / path)
        except (Refused, OSError):
            found[path] = Header()  # packing says what is wrong with it
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

"""What the sources share: reading tables, finding files, and the count of what is there."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlvicx_dist.errors import DataError, nearest
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.storage import Place, files_below, place, read_bytes, told


@dataclass(frozen=True)
class Listing:
    """The images of a source, and what was noticed: counts that differ, files that are missing.

    A `salt` is of images that are nobody's; else the user's own is taken.
    """

    records: Sequence[Record]
    notes: Sequence[str] = ()
    salt: bytes | None = None


@dataclass(frozen=True)
class Table:
    """A CSV file: its cells by column name, stripped of blanks at both ends."""

    path: Place
    header: tuple[str, ...]
    rows: tuple[tuple[int, Mapping[str, str]], ...]
    """(line number, cells) of each row."""

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, str]]]:
        return iter(self.rows)

    def need(self, *columns: str) -> None:
        """Raise a DataError where a column is missing."""
        for column in columns:
            if column not in self.header:
                raise DataError(
                    f"{self.path}: there is no column '{column}'{nearest(column, self.header)}; "
                    f"it has {', '.join(self.header)}."
                )

    def wrong(self, line: int, what: str) -> DataError:
        """The error of a cell: where it is, what is wrong, what to do."""
        return DataError(f"{self.path}, line {line}: {what}; correct it or take the official file.")


def read_table(path: Place) -> Table:
    """Read a CSV; empty column names, which a trailing comma makes, are left out.

    Raises:
        DataError: it cannot be read, or a row has more cells than the header.
    """
    text = read_text(path)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        names = reader.fieldnames or []
        rows = []
        for row in reader:
            extra = row.pop(None, [])
            if any(cell.strip() for cell in extra):
                raise DataError(
                    f"{path}, line {reader.line_num}: more cells than columns; "
                    "quote cells that hold commas."
                )
            cells = {name.strip(): cell.strip() for name, cell in row.items() if name.strip()}
            if any(cells.values()):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise DataError(f"{path}: the table cannot be read ({error}); give a CSV file.") from None
    header = [name.strip() for name in names if name.strip()]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice:
        raise DataError(f"{path}: the column '{twice}' stands twice; rename one of the two.")
    return Table(path, tuple(header), tuple(rows))


def read_text(path: Place) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        reason = told(error)
    except UnicodeDecodeError:
        reason = "it is not a text in UTF-8"
    raise DataError(f"{path}: the table cannot be read ({reason}); give a CSV file.")


def age_years(table: Table, line: int, cell: str) -> int | None:
    """An age: `58`, `58.0`, or DICOM's `058Y`, `011M`."""
    text = cell.upper()
    per_year = {"Y": 1, "M": 12, "W": 52, "D": 365}.get(text[-1:], 0)
    try:
        return int(float(text[:-1] if per_year else text) / (per_year or 1)) if text else None
    except (ValueError, OverflowError):
        raise table.wrong(line, f"the age '{cell}' is not a number of years") from None


def number(table: Table, line: int, cell: str) -> float:
    """A finite number."""
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if value - value != 0:
        raise table.wrong(line, f"'{cell}' is not a number")
    return value


class Files:
    """The files below a source's folder, found by name wherever they lie."""

    def __init__(self, source: str | Path) -> None:
        self.source = place(source)
        self._paths = files_below(self.source)

    def find(self, *names: str) -> Place | None:
        """The first of `names` that is there, the nearest to the top of the folder, or None."""
        by_depth = sorted(self._paths, key=lambda path: (path.count("/"), path))
        for name in names:
            for path in by_depth:
                if posixpath.basename(path) == name:
                    return self.source / path
        return None

    def one(self, *names: str, option: str) -> Place:
        """The same where there has to be one.

        Raises:
            DataError: there is none of them.
        """
        found = self.find(*names)
        if found is not None:
            return found
        raise DataError(
            f"{self.source}: {' or '.join(names)} is not in it; give the folder of the data set "
            f"as it was unpacked, or {option}."
        )

    def labels(self, given: str | Path | None, *names: str) -> Table:
        """The label file that was given with `--labels`, or the one in the folder.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        return read_table(
            place(given) if given else self.one(*names, option="the file itself with --labels")
        )

    def by_stem(self, suffixes: Sequence[str]) -> dict[str, str]:
        """Paths, as records hold them, of the files with one of the suffixes, by name without it.

        Raises:
            DataError: two files have the same name.
        """
        found: dict[str, str] = {}
        for path in self._paths:
            stem, suffix = posixpath.splitext(posixpath.basename(path))
            if suffix.lower() not in suffixes or stem.startswith("."):
                continue
            if stem in found:
                raise DataError(
                    f"{self.source}: {stem}{suffix} is there twice ({found[stem]} and {path}); "
                    "leave one of the two."
                )
            found[stem] = path
        return {stem: str(self.source / path) for stem, path in found.items()}


def present(
    source: str | Path, what: str, wanted: Sequence[str], files: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Which of the wanted images are there, and a note of those that are not.

    Raises:
        DataError: there is not one.
    """
    there = [name for name in wanted if name in files]
    missing = len(wanted) - len(there)
    if not there:
        raise DataError(
            f"{source}: none of the {len(wanted)} images of {what} is in it "
            f"(the first is {wanted[0] if wanted else 'not named'}); give the folder of the data "
            "set as it was unpacked."
        )
    if not missing:
        return there, []
    first = next(name for name in wanted if name not in files)
    return there, [
        f"{missing:,} of {len(wanted):,} images of {what} are missing (the first is {first}); "
        "what is there is packed."
    ]


def differences(
    what: str, found: Mapping[str, int], published: Mapping[str, int], *, of: str
) -> list[str]:
    """How a label file stands to the published counts.

    Args:
        what: The label file.
        found: Its counts.
        published: The published ones.
        of: The count that tells whether the file is whole.

    Returns:
        A note that it is a part, or for each count that differs, or one of agreement.
    """
    if found[of] != published[of]:
        return [f"{what}: a part of the set, {found[of]:,} of {published[of]:,} {of}."]
    wrong = [
        f"{what}: {name} {found.get(name, 0):,}, but {count:,} were published; the label file is "
        "not the official one, or another release."
        for name, count in published.items()
        if found.get(name, 0) != count
    ]
    return wrong or [f"{what}: whole, every count as published."]

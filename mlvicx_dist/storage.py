"""Where files are: local folders, s3://, gs:// and http(s), by way of fsspec.

A file is there whole or not at all: a local one is renamed into its place, an object of a store
is put in one piece.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from upath import UPath

from mlvicx_dist.errors import DataError, first_line, nearest

T = TypeVar("T")
Place: TypeAlias = Any
"""A local `Path` or a remote `UPath`; both have the methods of pathlib."""

SCHEMES = ("file", "s3", "gs", "http", "https")
TRIES = 3
PATIENCE_S = 300.0
"""How long a store that fails is asked again before a run gives up."""
LONGEST_PAUSE_S = 30.0
ANSWER_S = 60.0
"""A request without an answer for so long has failed."""
JITTER = random.SystemRandom()
"""The run's own seed is not touched."""
EXTRAS = {"s3": "s3", "gs": "gs"}
"""What to install for a scheme whose library is not a dependency."""


def place(text: str | Path) -> Place:
    """A path or URL as a pathlib path (`UPath`), local ones as a plain and absolute `Path`.

    Raises:
        DataError: the scheme is not one of ours (`pipe:` runs a shell), its library is missing, or
            it is no path at all.
    """
    try:
        return _place(text)
    except (OSError, RuntimeError, ValueError) as error:
        # Of a home that nobody has, a name that is too long, half of an IPv6 address.
        raise DataError(
            f"{text}: it is no path or URL ({first_line(error)}); give a folder, or a URL."
        ) from None


def _place(text: str | Path) -> Place:
    if isinstance(text, UPath):
        return text
    if isinstance(text, Path):
        # Ray's workers have another working folder.
        return text.expanduser().absolute()
    scheme, colon, rest = text.partition(":")
    if not colon or "/" in scheme or (not rest.startswith("//") and Path(text).exists()):
        return _place(Path(text))
    if scheme not in SCHEMES or not rest.startswith("//"):
        raise DataError(
            f"{text}: '{scheme}:' is no place that can be used{nearest(scheme, SCHEMES)}; give a "
            f"folder, or a URL that begins with {', '.join(f'{s}://' for s in SCHEMES)}."
        )
    if scheme == "file":
        return _place(Path(rest.removeprefix("//")))
    try:
        # Other processes write there too: what was listed once is not what is there.
        path = UPath(text, use_listings_cache=False)
        path.fs  # noqa: B018  (here the library is imported)
        return path
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'mlvicx_dist[{extra}]'" if extra else str(error)
        raise DataError(f"{text}: {scheme}:// needs a library; {remedy}.") from None


def is_local(path: Place) -> bool:
    """Whether a place is on this machine's file system."""
    return isinstance(path, Path)


@contextmanager
def reaching(path: Place) -> Iterator[None]:
    """Turn what a store's own library raises into an OSError, so that there is one thing to catch.

    Raises:
        OSError: what is done in the block could not be done.
    """
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        words = str(error).strip().splitlines()[:1]
        raise OSError(": ".join([type(error).__name__, *words])) from error


@contextmanager
def becoming(path: Place, *, mode: int = 0o644) -> Iterator[Path]:
    """A local file to write, which becomes `path` when the block ends well, and else is gone.

    Raises:
        OSError: no room, no rights, or a store that cannot be written.
    """
    lock = None
    if is_local(path):
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    else:
        try:
            folder = temporary("partial")
        except DataError as error:
            # Who writes knows what to do when it cannot be.
            raise OSError(str(error)) from None
        _remove_left(folder)
        while True:
            lock, name = tempfile.mkstemp(dir=folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Until it was locked, another process could take it for one that was left.
            if os.fstat(lock).st_nlink:
                break
            os.close(lock)
        partial = Path(name)
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if is_local(path):
            partial.replace(path)
        else:
            with reaching(path):
                path.fs.put_file(str(partial), path.path)
    finally:
        partial.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _remove_left(folder: Path) -> None:
    """Remove the files of processes that died: nobody holds their lock any more."""
    for path in folder.iterdir():
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue


def make_folder(folder: Place) -> None:
    """A folder and those above it, where places have folders."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)


def listed(folder: Place) -> list[Place]:
    """What lies in a folder; nothing where there is no such folder.

    Some stores' `is_dir` takes a store that does not answer for a folder that is not there.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        if is_local(folder):
            return list(folder.iterdir())
        with reaching(folder):
            names = folder.fs.ls(folder.path, detail=False)
    except FileNotFoundError:
        return []
    own = folder.path.rstrip("/")
    ends = [name.rstrip("/").rpartition("/")[2] for name in names if name.rstrip("/") != own]
    return [folder / end for end in ends]


def temporary(kind: str, below: str = "", *, root: str | None = None) -> Path:
    """This user's folder of a kind in the temporary folder, or one below it; for copies and such.

    Args:
        kind: What it is for.
        below: A folder in it.
        root: Where it lies; None: where TMPDIR says.

    Raises:
        DataError: it is another user's, whose files are not to be trusted, or cannot be made.
    """
    folder = Path(root or tempfile.gettempdir()) / f"mlvicx-{kind}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = all(stat.st_uid == os.geteuid() for stat in (folder.lstat(), folder.stat()))
        if own:
            (folder / below).mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: the folder cannot be made ({told(error)}); set TMPDIR to one that can."
        ) from None
    if not own:
        raise DataError(
            f"{folder}: the folder belongs to another user; set TMPDIR to one of yours."
        )
    return folder / below


def write_whole(path: Place, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that it is there whole or not at all."""
    with becoming(path, mode=mode) as partial:
        partial.write_bytes(data)


def read_bytes(path: Place, *, patience_s: float | None = None) -> bytes:
    """The bytes of a file.

    Args:
        path: Of the file.
        patience_s: How long a store that fails is asked again; None: three times in all.

    Raises:
        OSError: it cannot be read.
    """
    if is_local(path):
        return bytes(path.read_bytes())
    # Opening a file of http takes every failure for a file that is missing; this does not.
    return insist(path, lambda: bytes(path.fs.cat_file(path.path)), patience_s)


def read_range(path: Place, offset: int, size: int, *, patience_s: float | None = None) -> bytes:
    """Bytes `offset` … `offset + size` - 1 of a file, all of them.

    Args:
        path: Of the file.
        offset: The first byte.
        size: How many bytes.
        patience_s: How long a store that fails is asked again; None: `PATIENCE_S`.

    Raises:
        DataError: there is no such file, or it could not be read for that long.
    """
    if not size:
        return b""
    patience_s = PATIENCE_S if patience_s is None else patience_s

    def ask() -> bytes:
        if is_local(path):
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        else:
            # `timeout` is taken by fsspec's bridge to asyncio, whichever the store.
            end = offset + size
            data = path.fs.cat_file(path.path, start=offset, end=end, timeout=ANSWER_S)
        if len(data) > size:
            raise DataError(
                f"{path}: the server sends the whole file where a part was asked for; use one that "
                "answers range requests."
            )
        if len(data) < size:
            raise OSError(f"{len(data)} bytes came where {size} were asked for")
        return bytes(data)

    try:
        return insist(path, ask, 0 if is_local(path) else patience_s)
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file; run 'mlvicx verify {path.parent}' to see what is "
            "missing."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: it could not be read for {patience_s:.0f} s ({told(error)}); check the store "
            "and the network, then run the same command again."
        ) from None


def told(error: OSError) -> str:
    """What went wrong, in a few words."""
    return error.strerror or str(error) or type(error).__name__


def insist(path: Place, ask: Callable[[], T], patience_s: float | None) -> T:
    """What `ask` gives; asked again after 1, 2, 4, … s where it fails, but not for what is missing.

    Args:
        path: What is asked.
        ask: Asks once.
        patience_s: For how long; None: `TRIES` times.

    Raises:
        OSError: it did not.
    """
    began_s = time.monotonic()
    for attempt in itertools.count(1):
        try:
            with reaching(path):
                return ask()
        except FileNotFoundError:
            raise
        except OSError:
            pause_s = min(2.0 ** (attempt - 1), LONGEST_PAUSE_S) * JITTER.uniform(0.8, 1.2)
            if patience_s is None:
                if attempt == TRIES:
                    raise
            else:
                left_s = began_s + patience_s - time.monotonic()
                if left_s <= 0:
                    raise
                pause_s = min(pause_s, left_s)
        time.sleep(pause_s)
    raise AssertionError


def files_below(folder: Place) -> list[str]:
    """Every file below a folder, links followed, as sorted paths relative to it.

    Raises:
        DataError: there is no such folder, or it or one below it cannot be read.
    """
    try:
        with reaching(folder):
            if not folder.is_dir():
                raise DataError(f"{folder}: there is no such folder; give one with --source.")
            if is_local(folder):
                return sorted(
                    os.path.relpath(os.path.join(parent, name), folder)
                    for parent, _, names in os.walk(folder, followlinks=True, onerror=_raise)
                    for name in names
                )
            prefix = folder.path.rstrip("/") + "/"
            return sorted(path.removeprefix(prefix) for path in folder.fs.find(folder.path))
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: the folder cannot be read ({told(error)}); "
            "mend its rights or your access to it."
        ) from None


def _raise(error: OSError) -> None:
    raise error

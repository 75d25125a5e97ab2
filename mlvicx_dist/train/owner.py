"""Whose run it is: a lock for the driver, and a token that its workers see and no others'.

A third hold, the guard's name in a cluster, is in `guard`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import TypeVar

from filelock import FileLock, Timeout

from mlvicx_dist.errors import DataError, ResourceError
from mlvicx_dist.storage import (
    PATIENCE_S,
    Place,
    insist,
    is_local,
    listed,
    reaching,
    told,
    write_whole,
)

T = TypeVar("T")
TOKEN = ".driver-{}"
"""A file that the driver puts into the run's folder, in place of that of a driver before it.

A worker whose node does not see it has another disk. A worker that no longer sees it has outlived
its driver, and must not write beside the workers of the next one.
"""


class TakenError(ResourceError):
    """Another process has the run."""


def taken(folder: Place | str, kind: str, key: str) -> TakenError:
    """The sentence for a second driver of a run or a sweep, whose name the setting `key` gives."""
    return TakenError(
        f"{folder}: another process is at work on this {kind}; wait for it or stop it, "
        f"or give this one another {key}."
    )


def once_free(ask: Callable[[], T], patience_s: float) -> T:
    """What `ask` gives, once a process that was just killed has let the run or sweep go.

    Raises:
        TakenError: another process has it, and kept it for so long.
    """
    until_s = time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except TakenError:
            if time.monotonic() > until_s:
                raise
            time.sleep(1.0)


@contextmanager
def only_driver(run_dir: Place, kind: str = "run", key: str = "run.name") -> Iterator[None]:
    """One driver a run or sweep: a lock that the system releases when its owner dies.

    It reaches as far as the file system does; drivers of one cluster are kept apart by the guard.

    Raises:
        ResourceError: another process has it.
        OSError: the folder cannot be written.
    """
    if not is_local(run_dir):
        yield
        return
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise taken(run_dir, kind, key) from None
    try:
        yield
    finally:
        lock.release()


def check_shared(run_dir: Place, token: str) -> None:
    """See that this node's run folder is the driver's.

    Raises:
        DataError: it is another one, or cannot be reached.
    """
    try:
        patience_s = 0 if is_local(run_dir) else PATIENCE_S
        seen = insist(run_dir, lambda: _sees(run_dir, token), patience_s)
    except OSError as error:
        raise DataError(
            f"{run_dir}: a worker's node cannot reach the run's folder ({told(error)}); "
            "check that all nodes have access to it."
        ) from None
    if not seen:
        raise DataError(
            f"{run_dir}: the run's folder is not shared by all nodes; set run.storage_path to a "
            "network folder that all of them mount, or to an s3:// or gs:// URL."
        )


def check_owner(run_dir: Place, token: str) -> None:
    """See, before something is written, that the run still belongs to this group's driver.

    Raises:
        ResourceError: another driver has taken it.
        OSError: the folder cannot be reached.
    """
    if not _sees(run_dir, token):
        raise ResourceError(
            f"{run_dir}: another process has taken this run since its driver ended; it goes on "
            "there."
        )


def take_over(run_dir: Place, token: str) -> None:
    """Let the run belong to the driver of this token, and to no other."""
    with reaching(run_dir):
        others = [path for path in listed(run_dir) if fnmatch(path.name, TOKEN.format("*"))]
    write_whole(run_dir / TOKEN.format(token), b"")
    with reaching(run_dir):
        for path in others:
            path.unlink(missing_ok=True)


def _sees(run_dir: Place, token: str) -> bool:
    with reaching(run_dir):
        return bool((run_dir / TOKEN.format(token)).exists())

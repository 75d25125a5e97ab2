"""The folder in which a node keeps remote shards and embeddings: its owner, locks and room."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from pathlib import Path

from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import told
from mlvicx_dist.stream.locks import RangeLocks

IN_USE_S = 30.0
"""A shard that someone touched since then is not removed."""
ACCOUNTS = 2**62
"""The place of the lock file that who makes, renames or removes a shard holds."""
OURS = re.compile(r"\.?([0-9a-f]{64})\.")
"""What the names of our files begin with; nothing else is ever counted or removed."""


class Room:
    """The folder as this process holds it.

    Raises:
        DataError: it is another user's, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.make_folder()
            if any(stat.st_uid != os.geteuid() for stat in (path.lstat(), path.stat())):
                raise DataError(
                    f"{path}: the folder for remote shards and embeddings belongs to another user; "
                    "set data.cache_dir to one of yours."
                )
            self.locks = RangeLocks(path / "lock")
            with self.locks.hold(ACCOUNTS):
                pass
        except OSError as error:
            raise self.unwritable(error) from None

    def make_folder(self) -> None:
        """Make it, for its owner alone; someone may have removed it since."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def unwritable(self, error: OSError) -> DataError:
        """The sentence for a folder that cannot be used."""
        return DataError(
            f"{self.path}: nothing can be kept there ({told(error)}); set data.cache_dir to a "
            "folder on a local disk that can be written."
        )

    def make(self, sha256: str, needed: int, limit: int) -> int:
        """Make room for a file, if need be by removing those that were used least recently.

        The caller holds `ACCOUNTS`. A file that is removed lives on for who has it open.

        Args:
            sha256: What its name begins with; what there is of it stays.
            needed: Its bytes.
            limit: Bytes that the folder may hold.

        Returns:
            0 where there is room; else how many bytes `limit` would have to be at least.
        """
        files: defaultdict[str, list[Path]] = defaultdict(list)
        sizes: defaultdict[str, int] = defaultdict(int)
        used_s: defaultdict[str, float] = defaultdict(float)
        with os.scandir(self.path) as entries:
            for entry in entries:
                match = OURS.match(entry.name)
                if not match:
                    continue
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    # An index that was just renamed into its place.
                    continue
                name = match[1]
                files[name].append(Path(entry.path))
                # A part counts whole: nothing is asked for again while it fills.
                sizes[name] += stat.st_size
                used_s[name] = max(used_s[name], stat.st_mtime)
        idle = [n for n in files if used_s[n] < time.time() - IN_USE_S and n != sha256]
        total = sum(sizes.values()) + needed
        least = total - sum(sizes[name] for name in idle)
        if least > limit:
            return least
        for name in sorted(idle, key=used_s.__getitem__):
            if total <= limit:
                break
            for path in files[name]:
                path.unlink(missing_ok=True)
            total -= sizes[name]
        return 0


_rooms: dict[Path, Room] = {}
_making = threading.Lock()


def room_at(path: Path) -> Room:
    """The one `Room` that this process has of a folder.

    Raises:
        DataError: the folder cannot be used.
    """
    with _making:
        if path not in _rooms:
            _rooms[path] = Room(path)
        return _rooms[path]


def _forget() -> None:
    """A child has none of the locks of its parent."""
    global _making
    _making = threading.Lock()
    _rooms.clear()


os.register_at_fork(after_in_child=_forget)

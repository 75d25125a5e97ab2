"""What is known of each trial, in one small file a trial: the sweep's only memory.

`SWEEP/trials/0007/trial.json` is written whole by the sweep's driver whenever something becomes
known. The same command reads these files again: rungs and search go on from them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import (
    Place,
    insist,
    make_folder,
    reaching,
    read_bytes,
    told,
    write_whole,
)

State = Literal["running", "finished", "pruned", "diverged", "failed"]
ENDED = ("finished", "pruned", "diverged")
"""What the same command does not try again."""


@dataclass(frozen=True)
class Look:
    """The target at a step.

    Attributes:
        step: Steps done.
        target: The higher the better.
        at_s: Seconds of sweeping until then, over all starts of the sweep.
        trained_s: Seconds of the trial's worker in all since it last began, looks included.
        looked_s: Seconds of these that were looks.
    """

    step: int
    target: float
    at_s: float
    trained_s: float
    looked_s: float


@dataclass(frozen=True)
class Record:
    """A trial.

    Attributes:
        number: Its place in the sweep.
        point: What is other than in the base settings, by dotted key.
        state: How it stands or how it ended.
        looks: By step.
        began_s: Seconds of sweeping until its first start.
        ended_s: The same until its end.
        deaths: How often its processes died.
        cause: Why it diverged or failed.
    """

    number: int
    point: dict[str, Any]
    state: State = "running"
    looks: tuple[Look, ...] = ()
    began_s: float = 0.0
    ended_s: float | None = None
    deaths: int = 0
    cause: str = ""

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.number:04d}"

    @property
    def until_s(self) -> float:
        """Seconds of sweeping until its end, or until what is known of it last."""
        last = self.looks[-1].at_s if self.looks else 0.0
        return max(self.began_s, last) if self.ended_s is None else self.ended_s

    @property
    def reached(self) -> int:
        """The step of its last look, or 0."""
        return self.looks[-1].step if self.looks else 0

    @property
    def target(self) -> float | None:
        """The target at its last look."""
        return self.looks[-1].target if self.looks else None

    def at(self, step: int) -> float | None:
        """The target at a step."""
        return next((look.target for look in self.looks if look.step == step), None)

    def seen(self, look: Look) -> Record:
        """With one more look; a step that was done again counts as it was the last time.

        A look that is only told again keeps its time.
        """
        if any(replace(look, at_s=one.at_s) == one for one in self.looks):
            return self
        kept = [one for one in self.looks if one.step != look.step]
        return replace(self, looks=tuple(sorted([*kept, look], key=lambda one: one.step)))


@dataclass
class Records:
    """The trials of a sweep's folder."""

    folder: Place
    by_number: dict[int, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Place) -> Records:
        """What is there.

        Raises:
            DataError: a file is damaged or cannot be read.
        """
        records = cls(folder)
        try:
            with reaching(folder):
                places = list(folder.iterdir()) if folder.is_dir() else []
            for place in sorted(places, key=str):
                record = _read(place / "trial.json")
                if record:
                    records.by_number[record.number] = record
        except OSError as error:
            raise DataError(
                f"{folder}: the trials cannot be read ({told(error)}); mend your access to them."
            ) from None
        return records

    def write(self, record: Record) -> None:
        """Keep a record and write it.

        Raises:
            OSError: it cannot be written; it is kept.
        """
        self.by_number[record.number] = record
        folder = self.folder / record.name
        make_folder(folder)
        text = json.dumps(asdict(record), indent=1) + "\n"
        insist(folder, lambda: write_whole(folder / "trial.json", text.encode()), None)

    def all(self) -> list[Record]:
        """By number."""
        return [self.by_number[number] for number in sorted(self.by_number)]

    def elapsed_s(self) -> float:
        """Seconds of sweeping that are behind what is recorded."""
        return max((record.until_s for record in self.all()), default=0.0)


def best(records: list[Record]) -> Record | None:
    """The trial that ran to its end with the highest target."""
    finished = [r for r in records if r.state == "finished" and r.target is not None]
    return max(finished, key=lambda record: record.target or 0.0, default=None)


def looks_share(records: list[Record]) -> float:
    """The share of the workers' time that went into looks."""
    last = [record.looks[-1] for record in records if record.looks]
    trained_s = sum(look.trained_s for look in last)
    return sum(look.looked_s for look in last) / trained_s if trained_s else 0.0


def _read(path: Place) -> Record | None:
    try:
        tree = json.loads(read_bytes(path))
        return Record(**{**tree, "looks": tuple(Look(**look) for look in tree["looks"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{path}: the record of a trial is damaged; remove that trial's folder and run the "
            "same command again."
        ) from None

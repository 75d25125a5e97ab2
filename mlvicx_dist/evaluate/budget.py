"""What each method is given: as many images as the reference sees, or as much time of training."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.errors import DataError, DivergenceError
from mlvicx_dist.evaluate.methods import Method
from mlvicx_dist.storage import Place, is_local, write_whole
from mlvicx_dist.train.launch import pretrain, writing
from mlvicx_dist.train.left import left_json
from mlvicx_dist.train.runlog import read_rows

STEPS, EVERY, IGNORED = 24, 4, 2
"""A method's rate is the median of the rows of so many steps, without the first rows."""
FILE = "rates.json"


class Rate(NamedTuple):
    """Seconds of a step of a method, and of the reference in the same session."""

    step_s: float
    reference_step_s: float


@dataclass(frozen=True)
class Measured:
    """What `measured` found.

    Attributes:
        rates: By method; those that diverged have none.
        diverged: How, by method.
        stopped_by: The signal that stopped it, or 0.
    """

    rates: dict[str, Rate]
    diverged: dict[str, str]
    stopped_by: int = 0


def equal_time(total: int, rates: Mapping[str, Rate]) -> dict[str, int]:
    """The steps of each method that take as long as all of the reference's.

    Args:
        total: Steps of the reference.
        rates: By method.
    """
    # What is a rounding short of a step is one.
    return {
        name: max(math.floor(total * rate.reference_step_s / rate.step_s + 1e-9), 1)
        for name, rate in rates.items()
    }


def seconds_a_step(rows: Sequence[Mapping[str, float]], batch_size: int) -> float:
    """The median of a run's log rows, the first of which warm up."""
    return statistics.median(batch_size / row["images_per_s"] for row in rows[IGNORED:])


def measured(folder: Place, methods: Sequence[Method], reference: Method, seed: int) -> Measured:
    """The rates of methods, by a short run of each, one after the other.

    A run trains as the comparison's own will, on the same workers and shards; the time of
    checkpoints is not in it. What an earlier start has measured is kept in `rates.json`. Where a
    method is not in it the reference is measured again too: the machine may have other work now.

    Raises:
        DivergenceError: the reference diverged, so that there is no time to share.
    """
    known = read_rates(folder)
    diverged: dict[str, str] = {}
    new = [m for m in methods if m.name not in known and m.name != reference.name]
    if new or reference.name not in known:
        try:
            stopped, reference_s = _step_s(folder, reference, seed)
        except DivergenceError as error:
            raise DivergenceError(
                f"methods.{reference.name}: the reference diverged in the measured steps, so that "
                f"no time is known to give the others ({str(error).rstrip('.')}); change it, and "
                "give the comparison another name."
            ) from None
        if stopped:
            return Measured(known, diverged, stopped)
        # Its length is that of the settings, whatever a step takes.
        known.setdefault(reference.name, Rate(reference_s, reference_s))
        _write(folder, known)
    for method in new:
        try:
            stopped, step_s = _step_s(folder, method, seed)
        except DivergenceError as error:
            diverged[method.name] = str(error)
            continue
        if stopped:
            return Measured(known, diverged, stopped)
        known[method.name] = Rate(step_s, reference_s)
        _write(folder, known)
    return Measured({m.name: known[m.name] for m in methods if m.name in known}, diverged)


def _step_s(folder: Place, method: Method, seed: int) -> tuple[int, float]:
    """The signal that stopped it or 0, and the seconds of a step."""
    with _emptied(folder / "rates"):
        config = _short(method.at(seed, str(folder / "rates"), STEPS))
        outcome = pretrain(config)
        if outcome.stopped_by:
            return outcome.stopped_by, 0.0
        rows = read_rows(outcome.run_dir / "metrics.jsonl")
        return 0, seconds_a_step(rows, config.train.batch_size)


@contextmanager
def _emptied(folder: Place) -> Iterator[None]:
    """Without what a process that was killed left there, and without what is left there now."""
    assert is_local(folder)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Place, rates: Mapping[str, Rate]) -> None:
    tree = {name: rate._asdict() for name, rate in rates.items()}
    with writing(folder, "storage_path"):
        write_whole(folder / FILE, (json.dumps(tree, indent=1) + "\n").encode())


def read_rates(folder: Place) -> dict[str, Rate]:
    """The rates that are known in a comparison's folder.

    Raises:
        DataError: the file is damaged.
    """
    path, remedy = folder / FILE, "restore the file, or give the comparison another name"
    try:
        return {
            name: Rate(float(one["step_s"]), float(one["reference_step_s"]))
            for name, one in (left_json(path, remedy=remedy) or {}).items()
        }
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path}: the measured rates are damaged; {remedy}.") from None


def _short(config: PretrainConfig) -> PretrainConfig:
    tree = to_tree(config)
    # Nobody looks for a run that measures time, nor for its samples.
    tree["run"] |= {"track": {}, "samples_path": None}
    tree["train"]["log_every_steps"] = EVERY
    tree["checkpoint"] |= {"every_s": 1e9, "every_steps": None, "export_every": None}
    return PretrainConfig.model_validate(tree)

"""What each method is given: as many images as the reference sees, or as much time of training."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress

from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.methods import Method
from mlvicx_dist.storage import Place, is_local, read_bytes, write_whole
from mlvicx_dist.train.launch import pretrain
from mlvicx_dist.train.runlog import read_rows

STEPS, EVERY, IGNORED = 24, 4, 2
"""A method's rate is the median of the rows of so many steps, without the first rows."""
FILE = "rates.json"


def equal_time(total: int, seconds: Mapping[str, float], reference: str) -> dict[str, int]:
    """The steps of each method that take as long as all of the reference's.

    Args:
        total: Steps of the reference.
        seconds: Of a step, by method.
        reference: Its name.
    """
    budget_s = total * seconds[reference]
    # What is a rounding short of a step is one.
    return {name: max(math.floor(budget_s / s + 1e-9), 1) for name, s in seconds.items()}


def seconds_a_step(rows: Sequence[Mapping[str, float]], batch_size: int) -> float:
    """The median of a run's log rows, the first of which warm up."""
    return statistics.median(batch_size / row["images_per_s"] for row in rows[IGNORED:])


def measured(folder: Place, methods: Sequence[Method], seed: int) -> tuple[int, dict[str, float]]:
    """Seconds of a step of each method, by a short run of each, one after the other.

    A run trains as the comparison's own will, on the same workers and shards; the time of
    checkpoints is not in it. What an earlier start has measured is kept in `rates.json`.

    Returns:
        The signal that stopped it, or 0, and the seconds by name.
    """
    known = read_rates(folder)
    for method in methods:
        if method.name in known:
            continue
        config = _short(method.at(seed, str(folder / "rates"), STEPS))
        outcome = pretrain(config)
        if outcome.stopped_by:
            return outcome.stopped_by, known
        rows = read_rows(outcome.run_dir / "metrics.jsonl")
        known[method.name] = seconds_a_step(rows, config.train.batch_size)
        write_whole(folder / FILE, (json.dumps(known, indent=1) + "\n").encode())
        if is_local(folder):
            shutil.rmtree(folder / "rates", ignore_errors=True)
    return 0, {method.name: known[method.name] for method in methods}


def read_rates(folder: Place) -> dict[str, float]:
    """The rates that are known in a comparison's folder.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / FILE
    with suppress(FileNotFoundError):
        try:
            return {str(k): float(v) for k, v in json.loads(read_bytes(path)).items()}
        except (ValueError, AttributeError, TypeError):
            raise DataError(
                f"{path}: the measured rates are damaged; restore the file, or give the comparison "
                "another name."
            ) from None
    return {}


def _short(config: PretrainConfig) -> PretrainConfig:
    tree = to_tree(config)
    tree["train"]["log_every_steps"] = EVERY
    tree["checkpoint"] |= {"every_s": 1e9, "every_steps": None, "export_every": None}
    return PretrainConfig.model_validate(tree)

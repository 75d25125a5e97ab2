"""The folder of a comparison: its files, and what they say so far.

`compare.yaml` (resolved settings), `tasks/` (what is known of the test images), `runs/` (each a
run), `scores/TASK/RUN.npz`, `diverged.json`, `comparison.json`, `comparison.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mlvicx_dist.config import SUPERVISED, CompareConfig
from mlvicx_dist.evaluate.budget import read_rates
from mlvicx_dist.evaluate.compare_table import markdown
from mlvicx_dist.evaluate.differences import judged
from mlvicx_dist.evaluate.methods import Method, methods_of
from mlvicx_dist.evaluate.task import Scores, read_images, read_scores
from mlvicx_dist.progress import say
from mlvicx_dist.storage import Place, write_whole
from mlvicx_dist.train.launch import writing
from mlvicx_dist.train.left import left_json, left_settings
from mlvicx_dist.train.runlog import read_rows

SETTINGS, RESULT, TABLE = "compare.yaml", "comparison.json", "comparison.md"
DIVERGED = "diverged.json"


def scores_path(folder: Place, task: str, run: str) -> Place:
    """Where the scores of a run lie."""
    return folder / "scores" / task / f"{run}.npz"


def images_path(folder: Place, task: str) -> Place:
    """Where it lies what is known of a task's images."""
    return folder / "tasks" / f"{task}.npz"


def read_diverged(folder: Place) -> dict[str, str]:
    """Runs that diverged, and how; they are not tried again.

    Raises:
        DataError: the file is damaged.
    """
    known = left_json(folder / DIVERGED, remedy="restore the file, or remove it to try them again")
    return {str(run): str(cause) for run, cause in (known or {}).items()}


def write_diverged(folder: Place, cause: str, *runs: str) -> None:
    """Write down that runs diverged."""
    say(f"{', '.join(runs)} diverged: {cause}")
    known = read_diverged(folder) | dict.fromkeys(runs, cause)
    with writing(folder, "storage_path"):
        write_whole(folder / DIVERGED, (json.dumps(known, indent=1) + "\n").encode())


def write_found(folder: Place, config: CompareConfig) -> dict[str, Any]:
    """Write what is found so far, and answer with it."""
    result = found(folder, config)
    with writing(folder, "storage_path"):
        write_whole(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
        write_whole(folder / TABLE, ("\n".join(markdown(result)).rstrip() + "\n").encode())
    return result


def opened(folder: Place) -> CompareConfig:
    """The settings of a comparison's folder.

    Raises:
        DataError: they cannot be read.
    """
    return left_settings(CompareConfig, folder / SETTINGS)


def found(folder: Place, config: CompareConfig) -> dict[str, Any]:
    """What a comparison's files say, finished or not, as JSON values.

    Returns:
        `name`, `reference`, `seeds`, `budget`, `confidence` of the intervals; `methods` by name
        with `changes`, `labels`, the splits whose labels its encoder learns, and `steps`, `images`
        seen and seconds of training of each seed's run; `tasks`
        by name, see `judged`; `missing`, runs that are in no figure, and why.
    """
    methods = methods_of(config)
    reference = next(method for method in methods if method.name == config.first)
    # What learned labels has what the others have not.
    baselines = [
        m.name
        for m in methods
        if m.floor or m.settings.method not in (reference.settings.method, SUPERVISED)
    ]
    tasks = {}
    for task in config.tasks:
        images = read_images(images_path(folder, task.name))
        by_method = {m.name: _by_seed(folder, task.name, m, config) for m in methods}
        present = {name: by_seed for name, by_seed in by_method.items() if by_seed}
        if images is not None and present:
            tasks[task.name] = judged(
                present,
                images,
                task,
                reference=config.first,
                baselines=[name for name in baselines if name != config.first],
            )
    rates = read_rates(folder) if config.budget == "time" else {}
    return {
        "name": config.name,
        "reference": config.first,
        "seeds": config.seeds,
        "budget": config.budget,
        "confidence": {task.name: task.bootstrap.confidence for task in config.tasks},
        "methods": {
            m.name: _about(folder, m, config, rates[m.name].step_s if m.name in rates else None)
            for m in methods
        },
        "tasks": tasks,
        "missing": dict(_missing(folder, methods, config)),
    }


def _by_seed(folder: Place, task: str, method: Method, config: CompareConfig) -> dict[int, Scores]:
    """The scores of a method by seed; those of raw pixels are one for all seeds."""
    known: dict[str, Scores | None] = {}
    for seed in config.seeds:
        run = method.run(seed)
        if run not in known:
            known[run] = read_scores(scores_path(folder, task, run))
    return {seed: one for seed in config.seeds if (one := known[method.run(seed)]) is not None}


def _about(
    folder: Place, method: Method, config: CompareConfig, rate_s: float | None
) -> dict[str, Any]:
    runs = {}
    if not method.floor:
        for seed in config.seeds:
            if rows := read_rows(folder / "runs" / method.run(seed) / "metrics.jsonl"):
                step = int(rows[-1]["step"])
                runs[str(seed)] = {
                    "steps": step,
                    "images": step * config.pretrain.train.batch_size,
                    "trained_s": round(rows[-1]["time_s"], 1),
                }
    return {
        "changes": method.changes,
        "floor": method.floor,
        "labels": _learned(method),
        "init_from": not method.floor and method.settings.train.init_from is not None,
        "runs": runs,
        "measured_s_a_step": rate_s,
    }


def _learned(method: Method) -> list[str]:
    """The splits whose labels a method's encoder learns."""
    if method.floor or method.settings.method != SUPERVISED:
        return []
    return list(method.settings.loss.label_splits)


def _missing(
    folder: Place, methods: list[Method], config: CompareConfig
) -> Iterator[tuple[str, str]]:
    """Runs that some task has no scores of, and why."""
    diverged = read_diverged(folder)
    for method in methods:
        for seed in config.seeds:
            run = method.run(seed)
            if run in diverged:
                yield run, f"diverged: {diverged[run]}"
            elif any(not scores_path(folder, t.name, run).exists() for t in config.tasks):
                yield run, "not trained and judged yet"

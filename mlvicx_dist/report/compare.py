"""What a comparison's report shows."""

from __future__ import annotations

from typing import Any

import yaml

from mlvicx_dist.config import METHODS, CompareConfig, Task, to_tree
from mlvicx_dist.errors import UserError
from mlvicx_dist.evaluate.compare_table import missing, tables
from mlvicx_dist.evaluate.comparison import found, images_path, opened, scores_path
from mlvicx_dist.evaluate.methods import Method, methods_of
from mlvicx_dist.evaluate.task import read_images, read_scores
from mlvicx_dist.report import compare_charts
from mlvicx_dist.report.charts import Chart
from mlvicx_dist.report.contact import for_page
from mlvicx_dist.report.context_maps import context_maps
from mlvicx_dist.storage import Place
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.train.weights import load_encoder

CONTEXT_IMAGES = 4


def of_comparison(folder: Place) -> dict[str, Any]:
    """The values of a comparison's page.

    Raises:
        DataError: its settings or files cannot be read.
    """
    config = opened(folder)
    methods = methods_of(config)
    result = found(folder, config)
    context, no_context = _context(folder, methods, config)
    groups = list(dict.fromkeys(g for one in result["tasks"].values() for g in one["subgroups"]))
    return {
        "folder": folder,
        "config": config,
        "result": result,
        "tables": tables(result, groups),
        "missing": list(missing(result)),
        "tasks": [
            {
                "name": task.name,
                "charts": compare_charts.of_task(result["tasks"][task.name], config.first),
                "planes": _planes(folder, task, methods, config),
            }
            for task in config.tasks
            if task.name in result["tasks"]
        ],
        "context": context,
        "no_context": no_context,
        "changes": {m.name: _changes(m, config) for m in methods},
        "settings": yaml.safe_dump(to_tree(config), sort_keys=False),
    }


def _changes(method: Method, config: CompareConfig) -> str:
    """What a method is, in words."""
    changed = [f"{k}: {v}" for k, v in method.changes.items() if k != "method"]
    if method.floor == "pixels":
        return "ridge regression on 24 x 24 pixels"
    words = METHODS[method.settings.method]
    if method.floor:
        words = "the encoder at the weights that its seed gives it"
    return "; ".join([words, *changed])


def _planes(folder: Place, task: Task, methods: list[Method], config: CompareConfig) -> list[Chart]:
    """A map of each method's embeddings, of the first seed that was judged."""
    images = read_images(images_path(folder, task.name))
    charts = []
    for method in methods:
        for seed in config.seeds:
            scores = read_scores(scores_path(folder, task.name, method.run(seed)))
            if images and scores:
                charts.append(compare_charts.of_plane(method.run(seed), scores, images))
                break
    return charts


def _context(
    folder: Place, methods: list[Method], config: CompareConfig
) -> tuple[list[dict[str, str]], list[str]]:
    """The context maps of each run that has context and is trained, and why some are not there."""
    task = config.tasks[0]
    found, missing = [], []
    for method in methods:
        if method.floor or not method.settings.model.context:
            continue
        run = method.run(config.seeds[0])
        if not (folder / "runs" / run).exists():
            continue
        try:
            encoder = load_encoder(folder / "runs" / run)
            picture = context_maps(
                encoder,
                task.data.shards,
                task.data.test,
                count=CONTEXT_IMAGES,
                cache=cache_of(task.data),
            )
        except UserError as error:
            missing.append(str(error))
            continue
        if picture:
            words = (
                f"Test images, a row each, and the spatial gate of each level of {run} over them"
            )
            found.append(for_page(picture, caption=run, alt=words))
    return found, missing

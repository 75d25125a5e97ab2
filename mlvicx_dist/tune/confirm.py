"""The last word of a sweep: the best configuration and the unchanged one, both trained anew.

A sweep's best target is the largest of many noisy numbers, so it flatters. Here both configurations
get the same fresh seeds, and are compared on the validation patients that no trial was judged on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from mlvicx_dist.config import Bootstrap, SweepConfig
from mlvicx_dist.errors import TrainingError
from mlvicx_dist.evaluate.embed import Embeddings, embed_samples
from mlvicx_dist.evaluate.metrics import bootstrap_auroc, over_classes
from mlvicx_dist.evaluate.probe import fit_probe, knn_scores, mean_auroc
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.storage import Place, write_whole
from mlvicx_dist.train.checkpoint import load_encoder
from mlvicx_dist.train.launch import writing
from mlvicx_dist.train.metrics import effective_rank
from mlvicx_dist.tune.records import Record, remove_checkpoints
from mlvicx_dist.tune.runner import run_tune
from mlvicx_dist.tune.space import Space
from mlvicx_dist.tune.target import choose, common_labels, judged_shards

SIDES = ("best", "default")


@dataclass(frozen=True)
class Confirmed:
    """The comparison.

    Attributes:
        kind: Of the target.
        trial: The best trial's number.
        seeds: The fresh seeds.
        values: By side, `best` and `default`: the target of each seed on the patients held back.
        difference: Mean of best minus mean of default.
        low: The interval's lower end; None with one seed, which tells nothing of its spread.
        high: Its upper end.
        confidence: Of the interval.
        images: Held back.
        patients: Held back.
    """

    kind: str
    trial: int
    seeds: list[int]
    values: dict[str, list[float]]
    difference: float
    low: float | None
    high: float | None
    confidence: float
    images: int
    patients: int

    def line(self) -> str:
        """The comparison in a sentence."""
        best, default = (float(np.mean(self.values[side])) for side in SIDES)
        within = (
            f" [{self.low:+.4f}, {self.high:+.4f}]" if self.low is not None else ", no interval"
        )
        return (
            f"Best against default, {len(self.seeds)} fresh seeds each, on {self.images} images of "
            f"{self.patients} validation patients that no trial was judged on: {best:.4f} against "
            f"{default:.4f}, difference {self.difference:+.4f}{within}."
        )


def confirm(
    config: SweepConfig,
    space: Space,
    leader: Record,
    folder: Place,
    *,
    at_once: int,
    say: Callable[[str], None],
) -> Confirmed | None:
    """Train both configurations with fresh seeds and compare them; written to `confirm.json`.

    What an earlier start has trained is not trained again.

    Args:
        config: The settings.
        space: Of the sweep.
        leader: The best trial.
        folder: Of the sweep.
        at_once: How many runs at a time.
        say: Called with what is done next.

    Returns:
        The comparison; None where no seeds are asked for.

    Raises:
        TrainingError: a run could not be finished.
    """
    from ray import tune

    seeds = [space.base.train.seed + 1 + k for k in range(config.confirm.seeds)]
    if not seeds:
        return None
    runs = folder / "confirm"
    # Another best trial, once there are more trials, has runs of its own.
    sides = {"best": (f"trial-{leader.name}", leader.point), "default": ("default", {})}
    trees: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for side, (name, point) in sides.items():
        for seed in seeds:
            tree = space.settings(point, name=f"{name}-seed-{seed}", storage_path=str(runs))
            tree["train"]["seed"] = seed
            trees[side].append(tree)
    every = [tree for side in sides for tree in trees[side]]
    say(f"training the best and the default configuration anew, {len(seeds)} seeds each")
    results = run_tune(
        {"settings": tune.grid_search(every), "target": None},
        samples=1,
        at_once=at_once,
        max_failures=config.trials.max_failures,
    )
    for result in results:
        metrics = result.metrics or {}
        cause = metrics.get("failed") or metrics.get("diverged") or result.error
        if cause:
            raise TrainingError(
                f"{runs}: the comparison of best and default could not be made, since a run ended "
                f"with: {str(cause).strip().splitlines()[-1].rstrip('.')}; run the same command "
                "again, or set confirm.seeds=0 to go without."
            )
    encoders = {
        side: [load_encoder(runs / t["run"]["name"]) for t in trees[side]] for side in sides
    }
    confirmed = compared(config, leader.number, seeds, encoders)
    with writing(folder, "storage_path"):
        write_whole(
            folder / "confirm.json", (json.dumps(asdict(confirmed), indent=1) + "\n").encode()
        )
    for tree in every:
        # The exports stay.
        remove_checkpoints(runs / tree["run"]["name"])
    return confirmed


def compared(
    config: SweepConfig, number: int, seeds: list[int], encoders: Mapping[str, Sequence[Encoder]]
) -> Confirmed:
    """The targets of both sides' encoders on the patients held back, and their difference."""
    settings = config.target
    every = [encoder for side in SIDES for encoder in encoders[side]]
    held = _embedded(config, every, settings.val, held_back=True)
    patients = held.patients()
    draws: np.ndarray | None = None
    if settings.kind == "effective_rank":
        values = [effective_rank(torch.from_numpy(x)) for x in held.features]
    else:
        train = _embedded(config, every, settings.train, held_back=None)
        judged = _embedded(config, every, settings.val, held_back=False)
        parts = {"training": train, "judged": judged, "held-back": held}
        labels = common_labels(settings, {name: part.about for name, part in parts.items()})
        values, drawn = [], []
        for x, y, z in zip(train.features, judged.features, held.features, strict=True):
            if settings.kind == "knn":
                scores = knn_scores(x, labels[0], z, settings=settings.knn)
            else:
                probe = fit_probe(x, labels[0], validation=(y, labels[1]), settings=settings.probe)
                scores = probe.scores(z)
            values.append(mean_auroc(scores, labels[2]))
            areas = bootstrap_auroc(
                scores,
                labels[2],
                patients,
                draws=config.confirm.bootstrap.draws,
                seed=config.confirm.bootstrap.seed,
            )
            drawn.append(over_classes(areas))
        draws = np.array(drawn)
    k = len(seeds)
    sides = {"best": values[:k], "default": values[k:]}
    low, high = interval(sides, draws, config.confirm.bootstrap)
    return Confirmed(
        settings.kind,
        number,
        seeds,
        sides,
        float(np.mean(sides["best"]) - np.mean(sides["default"])),
        low,
        high,
        config.confirm.bootstrap.confidence,
        len(patients),
        len(np.unique(patients)),
    )


def interval(
    values: Mapping[str, Sequence[float]], draws: np.ndarray | None, settings: Bootstrap
) -> tuple[float | None, float | None]:
    """An interval for the difference of the two sides' means, over seeds and patients.

    The variance is that of the seeds' means, from their spread, plus that over patients of the
    difference of the means, from paired resampling; Student's quantile with the seeds' degrees of
    freedom, which few seeds make wide.

    Args:
        values: By side, one value a seed; k each.
        draws: The same under resampled patients, [2 k, R], best first; None: seeds alone count.
        settings: The confidence.
    """
    k = len(values["best"])
    if k < 2:
        return None, None
    difference = float(np.mean(values["best"]) - np.mean(values["default"]))
    variance = sum(float(np.var(values[side], ddof=1)) / k for side in SIDES)
    if draws is not None:
        variance += float(np.nanvar(draws[:k].mean(0) - draws[k:].mean(0), ddof=1))
    reach = float(stdtrit(2 * (k - 1), (1 + settings.confidence) / 2)) * math.sqrt(variance)
    return difference - reach, difference + reach


def _embedded(
    config: SweepConfig, encoders: Sequence[Encoder], split: str, *, held_back: bool | None
) -> Embeddings:
    settings, base = config.target, config.pretrain
    shards = judged_shards(settings, base, split)
    chosen = choose(shards, settings, held_back=held_back, most=settings.images)
    return embed_samples(
        encoders,
        shards,
        [sample for sample, _ in chosen],
        size_px=base.views.image_size_px,
        batch_size=settings.batch_size,
        loader_workers=base.data.loader_workers,
        use_gpu=False,
    )

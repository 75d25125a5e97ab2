"""The last word of a sweep: the best configuration and the unchanged one, both trained anew.

A sweep's best target is the largest of many noisy numbers, so it flatters. Here both configurations
get the same fresh seeds, and are compared on the validation patients that no trial was judged on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ray import tune
from ray.tune import Callback
from scipy.special import stdtrit

from mlvicx_dist.config import Bootstrap, SweepConfig
from mlvicx_dist.errors import TrainingError, last_line
from mlvicx_dist.evaluate.embed import Show, embed_samples
from mlvicx_dist.evaluate.metrics import bootstrap_areas, over_classes
from mlvicx_dist.evaluate.probe import fit_probe, knn_scores, mean_auroc
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.progress import Progress, progress, say
from mlvicx_dist.storage import Place, read_bytes, write_whole
from mlvicx_dist.train.checkpoint import remove_checkpoints
from mlvicx_dist.train.launch import writing
from mlvicx_dist.train.metrics import effective_rank
from mlvicx_dist.train.weights import load_encoder
from mlvicx_dist.tune.plan import Plan
from mlvicx_dist.tune.records import Record
from mlvicx_dist.tune.runner import Stop, run_tune
from mlvicx_dist.tune.target import Chosen, chosen_parts, common_labels

SIDES = ("best", "default")
FILE = "confirm.json"
DIVERGED = "a run diverged: "


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


def confirm(plan: Plan, leader: Record, stop: Stop, *, at_once: int) -> Confirmed | None:
    """Train both configurations with fresh seeds and compare them; written to `confirm.json`.

    What an earlier start has trained or compared is not done again.

    Args:
        plan: The sweep.
        leader: Its best trial.
        stop: Ends the training.
        at_once: How many runs at a time.

    Returns:
        The comparison; None where no seeds are asked for, it was stopped, or a side diverged.

    Raises:
        TrainingError: a run could not be finished.
    """
    config, base = plan.config, plan.space.base
    seeds = [base.train.seed + 1 + k for k in range(config.confirm.seeds)]
    known = _known(plan.folder / FILE)
    asked = (leader.number, seeds, config.confirm.bootstrap.confidence)
    if not seeds or (known and (known.trial, known.seeds, known.confidence) == asked):
        return known if seeds else None
    runs = plan.folder / "confirm"
    # Another best trial, once there are more trials, has runs of its own.
    sides = {"best": (f"trial-{leader.name}", leader.point), "default": ("default", {})}
    trees: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for side, (name, point) in sides.items():
        for seed in seeds:
            run = f"{name}-seed-{seed}"
            tree = plan.space.settings(point, name=run, storage_path=str(runs))
            tree["train"]["seed"] = seed
            trees[side].append(tree)
    every = [tree for side in sides for tree in trees[side]]
    causes = _train(plan, every, stop, at_once=at_once)
    if stop.asked:
        return None
    if causes:
        words = f"best and default cannot be compared, since {causes[0].rstrip('.')}"
        if not causes[0].startswith(DIVERGED):
            raise TrainingError(
                f"{runs}: {words}; run the same command again, or set confirm.seeds=0."
            )
        say(f"{words}.")
        return None
    encoders = {
        side: [load_encoder(runs / tree["run"]["name"]) for tree in trees[side]] for side in sides
    }
    confirmed = compared(config, leader.number, seeds, encoders)
    with writing(plan.folder, "storage_path"):
        text = json.dumps(asdict(confirmed), indent=1) + "\n"
        write_whole(plan.folder / FILE, text.encode())
    for tree in every:
        # The exports stay.
        remove_checkpoints(runs / tree["run"]["name"])
    return confirmed


def _train(plan: Plan, trees: Sequence[dict[str, Any]], stop: Stop, *, at_once: int) -> list[str]:
    """Run trainings to their end; why some of them did not come to it."""
    with progress("training best and default anew", len(trees), "runs") as bar:
        results = run_tune(
            {"settings": tune.grid_search(list(trees)), "target": None},
            stop=stop,
            samples=1,
            at_once=at_once,
            max_failures=plan.config.trials.max_failures,
            callbacks=[_Count(bar)],
        )
    causes = []
    for result in results:
        metrics = result.metrics or {}
        if result.error:
            causes.append(last_line(result.error))
        elif "cause" in metrics:
            diverged = DIVERGED if metrics["state"] == "diverged" else ""
            causes.append(diverged + str(metrics["cause"]))
        elif metrics.get("step") != plan.total:
            causes.append("a run did not come to its end")
    return causes


class _Count(Callback):
    """Counts runs that ended."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks to a file that nobody reads.
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One more."""
        self._bar.advance()


def compared(
    config: SweepConfig, number: int, seeds: list[int], encoders: Mapping[str, Sequence[Encoder]]
) -> Confirmed:
    """The targets of both sides' encoders on the patients held back, and their difference."""
    settings = config.target
    every = [encoder for side in SIDES for encoder in encoders[side]]
    parts = chosen_parts(settings, config.pretrain, held_back=True)
    held = [one for _, one in parts["held back"][1]]
    patients = np.array([f"{one['source']}/{one['patient']}" for one in held])
    features = {name: _embedded(config, every, part) for name, part in parts.items()}
    draws: np.ndarray | None = None
    if settings.kind == "effective_rank":
        values = [effective_rank(torch.from_numpy(x)) for x in features["held back"]]
    else:
        labels = common_labels(settings, parts)
        values, drawn = [], []
        for x, y, z in zip(*features.values(), strict=True):
            if settings.kind == "knn":
                scores = knn_scores(x, labels[0], z, settings=settings.knn)
            else:
                probe = fit_probe(x, labels[0], validation=(y, labels[1]), settings=settings.probe)
                scores = probe.scores(z)
            values.append(mean_auroc(scores, labels[2]))
            areas = bootstrap_areas(
                scores,
                labels[2],
                patients,
                draws=config.confirm.bootstrap.draws,
                seed=config.confirm.bootstrap.seed,
            )
            drawn.append(over_classes(areas.auroc))
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
        len(held),
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


def _embedded(config: SweepConfig, encoders: Sequence[Encoder], part: Chosen) -> list[np.ndarray]:
    """The embeddings of chosen images by each encoder, at the size that it was pretrained at."""
    shards, chosen = part
    features: dict[int, np.ndarray] = {}
    for size_px in {encoder.image_size_px for encoder in encoders}:
        places = [k for k, encoder in enumerate(encoders) if encoder.image_size_px == size_px]
        show = Show(size_px, config.target.batch_size, config.pretrain.data.loader_workers)
        found = embed_samples(
            [encoders[k] for k in places], shards, [sample for sample, _ in chosen], show
        )
        features |= dict(zip(places, found, strict=True))
    return [features[k] for k in range(len(encoders))]


def _known(path: Place) -> Confirmed | None:
    """What an earlier start has found; None where nothing whole is there."""
    try:
        return Confirmed(**json.loads(read_bytes(path)))
    except (OSError, ValueError, TypeError):
        return None

"""The whole encoder trained on the labels with a linear head, by a group of Ray Train.

It ends by the validation split alone, and the weights of the best epoch are what is judged: the
test images are scored when all is chosen, and their labels never reach a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mlvicx_dist.config import EvaluateConfig, FineTune, Train, Views, parse_config, to_tree
from mlvicx_dist.errors import DataError, DivergenceError
from mlvicx_dist.evaluate.embed import Show, embed_samples
from mlvicx_dist.evaluate.paired import compare
from mlvicx_dist.evaluate.parts import Parts
from mlvicx_dist.evaluate.probe import mean_auroc
from mlvicx_dist.model.encoder import Encoder, untrained
from mlvicx_dist.objective.batch_norm import convert_batch_norm
from mlvicx_dist.objective.global_batch import ddp_scale
from mlvicx_dist.objective.labels import label_loss
from mlvicx_dist.progress import progress
from mlvicx_dist.session import scratch
from mlvicx_dist.storage import Place, place
from mlvicx_dist.stream.augment import photometrics
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.stream.loader import Batch, Steps, batches
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.optim import learning_rate, make_optimizer
from mlvicx_dist.train.step import Member, wrap
from mlvicx_dist.train.weights import load_encoder

BLUR_PX = 3
"""Of a blur that is off."""


@dataclass(frozen=True)
class Labelled:
    """The images of a split and their labels, [n, K], 0, 1 or NaN."""

    shards: ShardSet
    labels: np.ndarray


@dataclass(frozen=True)
class Tuned:
    """The model with the weights of its best epoch, and the validation AUROC of each epoch."""

    model: Classifier
    validation_auroc: list[float]

    @property
    def best(self) -> int:
        """The epoch whose weights these are, from 1."""
        return int(np.argmax(self.validation_auroc)) + 1


class Classifier(nn.Module):
    """An encoder and a linear head: images to logits, [B, 1, H, W] -> [B, K]."""

    def __init__(self, encoder: Encoder, classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(encoder.features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images as `Encoder` takes them."""
        logits: torch.Tensor = self.head(self.encoder(images))
        return logits


def check_fine_tune(settings: EvaluateConfig, tune: FineTune) -> None:
    """See before other work that the training split and the machine or cluster are large enough.

    Raises:
        DataError: the batch is larger than the training split, or a folder lacks a split.
        ResourceError: there is no room for the workers.
    """
    from mlvicx_dist.train.group import check_room

    split = settings.data.train
    # As the workers open them.
    for other in (settings.data.val, settings.data.test):
        ShardSet.open(settings.data.shards, splits=[other])
    images = len(ShardSet.open(settings.data.shards, splits=[split]))
    if tune.batch_size > images:
        raise DataError(
            f"fine_tune.batch_size is {tune.batch_size}, but the split '{split}' has {images} "
            "images; lower it."
        )
    check_room(tune.workers)


def fine_tune(
    weights: Place,
    parts: Parts,
    settings: EvaluateConfig,
    tune: FineTune,
    *,
    seed: int,
    size_px: int,
) -> dict[str, Any]:
    """Fine-tune the pretrained encoder and the untrained one alike, and compare them.

    Args:
        weights: Of the pretrained encoder, where all nodes see them.
        parts: The splits and classes.
        settings: Shards and bootstrap.
        tune: The training.
        seed: Of the untrained encoder's weights.
        size_px: The size that images are shown at.

    Returns:
        `auroc`, `auprc` and `undefined_draws` as `compare` has them; `epochs` {encoder: {"best",
        "validation_auroc" of each}}.

    Raises:
        UserError: there are fewer cores than workers, nothing is heard of them, or the training
            diverges.
    """
    from mlvicx_dist.train.group import cluster, fitted, trainer

    # Workers start in another folder.
    tree, kept = to_tree(settings), cache_of(settings.data).folder
    tree["data"]["cache_dir"] = str(kept) if kept else None
    plan = {
        "settings": tree,
        "shards": [str(place(folder)) for folder in settings.data.shards],
        "weights": str(place(weights)),
        "seed": seed,
        "size_px": size_px,
        "train_labels": parts.train.labels,
        "val_labels": parts.val.labels,
    }
    with cluster(tune.workers), scratch("fine-tune") as folder:
        channel = Path(folder) / "rows.jsonl"
        group = trainer(fine_tune_worker, plan, tune.workers, channel, folder, resumes=False)
        with progress("fine-tuning", 2 * tune.epochs, "epochs") as bar:

            def show(row: dict[str, Any]) -> None:
                for words in row.get("said", ()):
                    bar.say(words)
                if "encoder" in row:
                    area = f"{row['encoder']}, validation AUROC {row['validation_auroc']:.3f}"
                    bar.advance(1, area)

            found = fitted(
                group,
                "The encoder could not be fine-tuned",
                channel=channel,
                show=show,
                wait_s=tune.workers.wait_s,
            )
    scores = {name: one.pop("scores") for name, one in found.items()}
    test = parts.test
    judged = compare(scores, test.labels, test.patients, parts.classes, settings.bootstrap)
    return {**judged, "epochs": found}


def fine_tune_worker(plan: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune both encoders as one worker of a group.

    Args:
        plan: `settings`, `shards`, `weights`, `seed`, `size_px`, `train_labels`, `val_labels` and
            `guard`, as the driver wrote them.

    Returns:
        By encoder the logits of the test images, `scores` [n, K], `best` and `validation_auroc`.
    """
    from mlvicx_dist.train.rows import telling
    from mlvicx_dist.train.worker import member_of

    settings = parse_config(plan["settings"], "the evaluation's settings")
    assert isinstance(settings, EvaluateConfig)
    assert settings.fine_tune is not None
    member, data = member_of(settings.fine_tune.workers), settings.data
    if member.device.type == "cuda":
        torch.cuda.set_device(member.device)
    train, val, test = (
        ShardSet.open(plan["shards"], splits=[split], cache=cache_of(data))
        for split in (data.train, data.val, data.test)
    )
    encoder = load_encoder(plan["weights"])
    found, done = {}, 0
    starts = {"pretrained": encoder, "untrained": untrained(encoder, plan["seed"])}
    with telling(plan["guard"], member.rank) as tell:
        for name, start in starts.items():

            def report(area: float, name: str = name) -> None:
                nonlocal done
                done += 1
                tell({"step": done, "encoder": name, "validation_auroc": area})

            look = Look(member, plan["size_px"], data.loader_workers)
            tuned = train_classifier(
                start,
                Labelled(train, plan["train_labels"]),
                Labelled(val, plan["val_labels"]),
                settings.fine_tune,
                look,
                report=report,
            )
            found[name] = {
                "scores": look(tuned.model, test, settings.fine_tune),
                "best": tuned.best,
                "validation_auroc": tuned.validation_auroc,
            }
    return found


@dataclass(frozen=True)
class Look:
    """How this worker sees whole images, each of them once in the group."""

    member: Member
    size_px: int
    loader_workers: int

    def __call__(self, model: nn.Module, shards: ShardSet, tune: FineTune) -> np.ndarray:
        """The outputs for all images, of all workers, float32 [n, K]; the model is in eval mode."""
        group = self.member.world_size
        own = np.array_split(np.arange(len(shards)), group)[self.member.rank]
        outputs: np.ndarray | None = None
        if len(own):
            use_gpu = self.member.device.type == "cuda"
            show = Show(self.size_px, tune.batch_size, self.loader_workers, use_gpu)
            outputs = embed_samples([model], shards, own.tolist(), show)[0]
        if group == 1:
            assert outputs is not None
            return outputs
        parts: list[np.ndarray | None] = [None] * group
        dist.all_gather_object(parts, outputs)
        return np.concatenate([part for part in parts if part is not None])


def train_classifier(
    encoder: Encoder,
    train: Labelled,
    val: Labelled,
    tune: FineTune,
    look: Look,
    *,
    report: Callable[[float], None] = lambda area: None,
) -> Tuned:
    """Train until the validation AUROC has not risen for `patience_epochs`; the best epoch stays.

    Args:
        encoder: Where it starts; it is trained in place.
        train: What is learned, in random crops.
        val: What is looked at after each epoch, whole.
        tune: The settings.
        look: This worker's place in the group.
        report: Called on every rank with the validation AUROC of each epoch.

    Raises:
        DivergenceError: the outputs are not finite.
    """
    member = look.member
    model = Classifier(encoder, train.labels.shape[1], tune.seed)
    if member.world_size > 1 or member.device.type == "cpu":
        convert_batch_norm(model, member.device)
    model.to(member.device)
    rates = _rates(tune)
    optimizer = make_optimizer(model, rates)
    wrapped = wrap(model, member, rates)
    steps = Steps(
        train.shards,
        _views(tune, look.size_px),
        batch=tune.batch_size,
        seed=tune.seed,
        rank=member.rank,
        world_size=member.world_size,
        count=1,
    )
    labels = torch.from_numpy(train.labels)
    areas: list[float] = []
    best: dict[str, torch.Tensor] = {}
    stream = batches(
        steps,
        start=0,
        stop=tune.epochs * steps.steps_per_epoch,
        workers=look.loader_workers,
        pin_memory=member.device.type == "cuda",
    )
    # A stream that is left early ends its processes here.
    with closing(stream):
        for batch in stream:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    batch.step, settings=rates, steps_per_epoch=steps.steps_per_epoch
                )
            _learn(wrapped.train(), optimizer, batch, labels[batch.samples], tune, member)
            if (batch.step + 1) % steps.steps_per_epoch:
                continue
            areas.append(_area(look(model, val.shards, tune), val.labels, len(areas) + 1))
            if areas[-1] > max(areas[:-1], default=-1.0):
                best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            report(areas[-1])
            if len(areas) - 1 - int(np.argmax(areas)) >= tune.patience_epochs:
                break
    model.load_state_dict(best)
    return Tuned(model, areas)


def _learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    labels: torch.Tensor,
    tune: FineTune,
    member: Member,
) -> None:
    """One step of the optimizer."""
    images = photometrics(batch.images[0].to(member.device), batch.table[0], kernel_px=BLUR_PX)
    with torch.autocast(member.device.type, torch.bfloat16, enabled=tune.precision == "bf16"):
        logits = model(images)
    loss = label_loss(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    (loss * ddp_scale()).backward()
    optimizer.step()


def _area(scores: np.ndarray, labels: np.ndarray, epoch: int) -> float:
    """The mean AUROC of an epoch, the same on every rank."""
    if not np.isfinite(scores).all():
        raise DivergenceError(
            f"fine_tune: the outputs are not finite after epoch {epoch}; lower "
            "fine_tune.learning_rate_per_256 or raise fine_tune.warmup_epochs."
        )
    return mean_auroc(scores, labels)


def _rates(tune: FineTune) -> Train:
    """What the optimizer and its schedule read."""
    return Train(
        batch_size=tune.batch_size,
        epochs=tune.epochs,
        optimizer="adamw",
        learning_rate_per_256=tune.learning_rate_per_256,
        weight_decay=tune.weight_decay,
        warmup_epochs=tune.warmup_epochs,
    )


def _views(tune: FineTune, size_px: int) -> Views:
    """Mild crops: what a finding is told by stays in them."""
    return Views(
        image_size_px=size_px,
        crop_scale=tune.crop_scale,
        flip_p=tune.flip_p,
        brightness=tune.brightness,
        contrast=tune.contrast,
        blur_p=(0.0, 0.0),
        blur_kernel_px=BLUR_PX,
        solarise_p=(0.0, 0.0),
    )

"""`kind: pretrain`: data, views, model, loss, optimisation, workers, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mlvicx_dist.config.base import Cached, Count, Fraction, Name, NonNegative, Positive, Settings
from mlvicx_dist.config.methods import LOSS_KEYS, METHODS, MODEL_KEYS, SUPERVISED, Method

MAY_VARY = re.compile(
    r"^(loss|model|views)\.|"
    r"^train\.(optimizer|learning_rate_per_256|weight_decay|warmup_epochs|cosine_over|precision|"
    r"gradients)$"
)
"""What makes two runs other than each other, yet leaves a step of one the step of another."""
Precision = Literal["float32", "bf16"]
NUMBER_BYTES: dict[Precision, int] = {"float32": 4, "bf16": 2}
PREDICTOR_WIDTH = 512
"""SimSiam's own (Chen and He 2021, section 3)."""


class ShardFolder(Settings):
    """A folder of shards and its weight."""

    path: str
    """A folder, or a URL (s3://, gs://, http(s)://)."""
    weight: Positive = 1.0
    """How densely it is sampled, relative to the largest weight."""


class PretrainData(Cached):
    """Which images are trained on."""

    shards: list[ShardFolder] = Field(min_length=1)
    splits: list[str] = Field(default=["train"], min_length=1)
    """The splits that are read of each folder."""
    loader_workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes a training worker; 0 loads in the training process."""


class Views(Settings):
    """The two views; a pair of numbers is (view 1, view 2) or (low, high)."""

    image_size_px: Annotated[int, Field(ge=16, le=2048)] = 224
    """The side of a view."""
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Low and high share of the image's area that a crop takes."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Low and high width of a crop over its height."""
    flip_p: Fraction = 0.5
    """How often a view is mirrored, left for right."""
    jitter_p: Fraction = 0.8
    """How often brightness and contrast are changed, in random order."""
    brightness: Fraction = 0.4
    """The most that brightness changes: factors of 1 - this to 1 + this."""
    contrast: Fraction = 0.4
    """The most that contrast changes, likewise."""
    blur_p: tuple[Fraction, Fraction] = (1.0, 0.1)
    """How often view 1 and view 2 are blurred."""
    blur_kernel_px: Annotated[int, Field(ge=1)] = 23
    """The width of the Gaussian kernel; odd, less than twice `image_size_px`."""
    blur_sigma_px: tuple[Positive, Positive] = (0.1, 2.0)
    """Low and high standard deviation of the Gaussian."""
    solarise_p: tuple[Fraction, Fraction] = (0.0, 0.2)
    """How often view 1 and view 2 are solarised: what is 128 or brighter is inverted."""

    @model_validator(mode="after")
    def _ordered(self) -> Views:
        for name in ("crop_scale", "crop_ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if low > high or low <= 0:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high")
        if self.blur_kernel_px % 2 == 0 or self.blur_kernel_px >= 2 * self.image_size_px:
            raise ValueError("blur_kernel_px must be odd and less than twice image_size_px")
        return self


class LocalHead(Settings):
    """From level maps to local vectors."""

    fusion: Literal["sum", "per_level"] = "sum"
    """Whether the levels are summed to one local vector or each has its own."""
    resize_px: Count = 64
    """The side that every level's map is resized to; a multiple of `pool`."""
    channels: Count = 512
    """The channels that every level's 1x1 convolution ends in."""
    pool: Count = 4
    """The side of the average-pooled map, in places."""

    @model_validator(mode="after")
    def _divides(self) -> LocalHead:
        if self.resize_px % self.pool:
            raise ValueError("resize_px must be a multiple of pool")
        return self


class Projector(Settings):
    """Linear, batch norm, ReLU, …, linear and, with `last_norm`, a batch norm at the end."""

    width: Count = 4096
    """Features of each layer."""
    layers: Annotated[int, Field(ge=1, le=8)] = 3
    """How many linear layers."""
    last_norm: bool = False
    """Whether a batch norm ends it, as published; the variance hinge is then about zero."""


class Model(Settings):
    """Backbone, context bottlenecks and heads."""

    backbone: str = "resnet18"
    """A convolutional model of timm."""
    channels: Literal[1, 3] = 1
    """Of the input: 1 is grey, 3 the same repeated, with ImageNet's mean and deviation."""
    init: Literal["random", "imagenet"] = "random"
    """The backbone's weights at the start; `imagenet` needs timm's file or a network."""
    levels: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"
    """The levels that are gated and read by the local head, by number from 0, or all of them."""
    level_convs: Literal["trained", "frozen"] = "trained"
    """Whether the levels' 1x1 convolutions learn; the published code never trained them."""
    context: bool = True
    """Whether the chosen levels have a context bottleneck."""
    local: LocalHead = LocalHead()
    projector: Projector = Projector()
    predictor_width: Count | None = None
    """Hidden width of SimSiam's predictor on the global embedding; None: there is none."""
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    """What supervised training learns; None: every class of the shards. It has no projector."""

    @model_validator(mode="after")
    def _levels(self) -> Model:
        if self.levels != "all" and len(set(self.levels)) != len(self.levels):
            raise ValueError("levels must name each level once")
        if len(set(self.classes or ())) != len(self.classes or ()):
            raise ValueError("classes must name each class once")
        return self


class VicWeights(Settings):
    """Coefficients of one VIC term; variance is the mean of the two hinges."""

    invariance: NonNegative = 25.0
    """Of the mean squared difference of the two views."""
    variance: NonNegative = 25.0
    """Of the hinge on each feature's standard deviation."""
    covariance: NonNegative = 1.0
    """Of the squared covariances of different features."""


class Loss(Settings):
    """L = VIC(global) + lambda_local * VIC(local); of several local vectors the weighted mean."""

    global_: VicWeights = Field(default=VicWeights(), alias="global")
    local: VicWeights = VicWeights()
    lambda_local: NonNegative = 1.0
    """The factor of the local term."""
    level_weights: dict[Annotated[int, Field(ge=0)], NonNegative] = Field(default={})
    """Factors of the levels' own terms, where they have one (`per_level`); 1 where none is given.

    The mean divides by the number of levels, not by the sum of the weights.
    """
    redundancy: NonNegative = 5e-3
    """Barlow Twins: the factor of what is off the diagonal."""
    temperature: Positive = 0.1
    """SimCLR: what the cosines are divided by."""
    label_splits: list[str] = Field(default=["train"], min_length=1)
    """Supervised: the splits whose labels are read; those of the others are masked."""


class Train(Settings):
    """The optimisation; `batch_size` is the global batch."""

    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images a step of the whole group."""
    epochs: Count = 300
    """The length of the run."""
    steps: Count | None = None
    """The length of the run and its schedule in steps, in place of `epochs`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the weights, the order of samples and the views."""
    optimizer: Literal["lars", "adamw"] = "lars"
    """LARS in its published form, or AdamW."""
    learning_rate_per_256: Positive = 0.2
    """The learning rate is this times batch_size / 256."""
    weight_decay: NonNegative = 1e-6
    """Of parameters of two or more dimensions."""
    warmup_epochs: NonNegative = 10.0
    """Epochs in which the learning rate rises from 0 to its peak."""
    cosine_over: Literal["after_warmup", "all_steps"] = "after_warmup"
    """Whether the cosine fills what is left after the warm-up, or is as long as the run."""
    precision: Precision = "float32"
    """Of forward and backward; the loss is float32 at least."""
    gradients: Precision = "float32"
    """In which gradients are all-reduced; in bf16 half as many bytes, rounded before the sum."""
    gather_rows: bool = False
    """Exchange rows, not gradients, of the projectors' wide layers: the same sums, fewer bytes.
    Layers whose rows are more than a quarter of their weights, and one worker, do as without it."""
    recompute: bool = False
    """Keep only the level maps for backward and compute the rest again: less memory, more time."""
    deterministic: bool = False
    """Whether the same command gives the same bits, at the same number of workers."""
    init_from: str | None = None
    """A checkpoint, export or run whose weights this run starts from."""
    log_every_steps: Count = 10
    """Steps from one row of metrics to the next."""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        return self.steps or self.epochs * steps_per_epoch


class Workers(Settings):
    """The Ray Train worker group."""

    num: Count = 1
    """How many workers share the batch."""
    min: Count | None = None
    """The least that a group may shrink to when nodes go; None: it waits for all."""
    cpus_per_worker: Count = 1
    """Cores of each."""
    use_gpu: bool = False
    """Whether each has a GPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often in a row workers may die without a step further than the time before."""
    resize_after_s: Positive = 60.0
    """With `min`: a group of fewer than `num` grows when there was room for this long."""
    start_timeout_s: Positive = 120.0
    """How long Ray waits for a group's places before it tries again; with `min` 12 at most."""
    wait_s: Positive = 86400.0
    """How long a run waits for workers, or hears nothing of them, before it ends."""
    collective_timeout_s: Positive = 600.0
    """How long a worker waits for another one before the group is started anew."""

    @model_validator(mode="after")
    def _bounds(self) -> Workers:
        if self.min is not None and self.min > self.num:
            raise ValueError("min must not be more than num")
        return self


class Checkpoints(Settings):
    """When the state is saved and how much of it is kept."""

    every_s: Positive = 600.0
    """The time from one checkpoint to the next."""
    every_steps: Count | None = None
    """Steps from one checkpoint to the next, besides; None: the time alone decides."""
    keep: Count = 3
    """How many of the newest stay."""
    export_every: Count | None = None
    """Every so many checkpoints the encoder is exported too; always at the end."""


class Track(Settings):
    """Where rank 0 sends the rows of metrics.jsonl besides; None: nowhere."""

    mlflow: str | None = None
    """The URI of a tracking server or database: https://…, sqlite:////folder/mlflow.db."""
    wandb: Name | None = None
    """A project of Weights & Biases."""

    @model_validator(mode="after")
    def _address(self) -> Track:
        if self.mlflow is None:
            return self
        if not re.match(r"https?://.|(postgresql|mysql|mssql)\S*://.|sqlite:////.", self.mlflow):
            raise ValueError(
                f"mlflow is '{self.mlflow}', but must be the URI of a tracking server or database, "
                "such as https://mlflow.example.org or sqlite:////folder/mlflow.db"
            )
        if "@" in self.mlflow:
            raise ValueError(
                "mlflow has a user in its URI, which would stand in the run's folder; give "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return self


class Run(Settings):
    """Where a run lives: `storage_path/name/`."""

    name: Name
    """The run's folder below `storage_path`; the same name goes on with the same run."""
    storage_path: str = "runs"
    """A folder that all workers see, or a URL (s3://, gs://)."""
    samples_path: str | None = None
    """A folder into which every rank writes which samples it trained on at each step."""
    track: Track = Track()


class PretrainConfig(Settings):
    """`kind: pretrain`.

    A `method` other than mlvicx has the global projector alone, or none (supervised): where the
    settings do not say so, it takes the levels and the context off, and gives SimSiam its
    predictor. What they say of heads that it has not is left out.
    """

    kind: Literal["pretrain"]
    method: Method = "mlvicx"
    """MLVICX, or a baseline through the same loop."""
    run: Run
    data: PretrainData
    views: Views = Views()
    model: Model = Model()
    loss: Loss = Loss()
    train: Train = Train()
    workers: Workers = Workers()
    checkpoint: Checkpoints = Checkpoints()

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, tree: Any) -> Any:
        method = tree.get("method", "mlvicx") if isinstance(tree, dict) else None
        if not isinstance(method, str) or method == "mlvicx" or method not in METHODS:
            return tree
        model = tree.get("model", {})
        if not isinstance(model, dict):
            return tree
        implied: dict[str, Any] = {"levels": [], "context": False}
        if method == "simsiam":
            implied["predictor_width"] = PREDICTOR_WIDTH
        heads = {"local", "level_convs", "projector"} - set(MODEL_KEYS[method])
        return {**tree, "model": implied | {k: v for k, v in model.items() if k not in heads}}

    @model_validator(mode="after")
    def _method(self) -> PretrainConfig:
        if self.method != "mlvicx" and (self.model.levels or self.model.context):
            raise ValueError(
                f"method {self.method} has no levels and no context: set model.levels=[] and "
                "model.context=false, or leave both out"
            )
        if (self.model.predictor_width is not None) != (self.method == "simsiam"):
            raise ValueError(
                "model.predictor_width belongs to method simsiam, which needs it: leave it out"
            )
        if self.method == SUPERVISED:
            unread = [name for name in self.loss.label_splits if name not in self.data.splits]
            if unread:
                raise ValueError(
                    f"loss.label_splits names '{unread[0]}', but data.splits, whose images are "
                    "trained on, does not: make the two agree"
                )
        elif self.model.classes:
            raise ValueError("model.classes belongs to method supervised: leave it out")
        # Not which keys were given: the settings of a run are written with all of them.
        usual = Loss()
        for name, field in Loss.model_fields.items():
            key = field.alias or name
            if key not in LOSS_KEYS[self.method] and getattr(self.loss, name) != getattr(
                usual, name
            ):
                raise ValueError(
                    f"loss.{key} has no effect with method {self.method}: leave it out"
                )
        return self

    @model_validator(mode="after")
    def _weights(self) -> PretrainConfig:
        weighted = self.loss.level_weights
        if weighted and self.model.local.fusion != "per_level":
            raise ValueError(
                "loss.level_weights needs model.local.fusion: per_level, since a sum of levels has "
                "one term"
            )
        off = set(weighted) - set(weighted if self.model.levels == "all" else self.model.levels)
        if off:
            raise ValueError(f"loss.level_weights names level {min(off)}, which is not on")
        return self

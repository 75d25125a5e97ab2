"""`kind: evaluate`: a frozen encoder judged by a probe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlvicx_dist.config.base import Cached, Count, Fraction, Name, NonNegative, Positive, Settings
from mlvicx_dist.config.pretrain import Workers


class EvaluateData(Cached):
    """The labelled images: the probe learns on `train`, is tuned on `val`, is judged on `test`."""

    shards: list[str] = Field(min_length=1)
    """Folders of shards, or URLs."""
    train: str = "train"
    """The split that probes learn from."""
    val: str = "val"
    """The split that chooses penalties, epochs and thresholds."""
    test: str = "test"
    """The split that is judged."""
    loader_workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes; 0 loads in the process itself."""

    @model_validator(mode="after")
    def _unseen(self) -> EvaluateData:
        if self.test in (self.train, self.val):
            raise ValueError("test must be a split of its own: its images choose nothing")
        if self.train == self.val:
            raise ValueError("val must be a split of its own: it chooses what train has learned")
        return self


class Embedding(Settings):
    """How the frozen encoder is run."""

    image_size_px: Annotated[int, Field(ge=16, le=2048)] | None = None
    """None: the size that the encoder was pretrained at."""
    batch_size: Count = 64
    """Images a forward pass."""
    use_gpu: bool = False
    """Whether the encoder runs on a GPU."""


class Probe(Settings):
    """Multi-label logistic regression on standardised embeddings."""

    l2: list[Positive] = Field(default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2], min_length=1)
    """Penalties tried; the one with the best mean AUROC on the validation split is taken."""
    max_iterations: Count = 200
    """The most steps of the fit."""


class Knn(Settings):
    """Cosine nearest neighbours."""

    neighbours: Count = 20
    """How many of the nearest training images vote."""


class Bootstrap(Settings):
    """Patient-clustered bootstrap."""

    draws: Annotated[int, Field(ge=100)] = 1000
    """How often patients are resampled."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """The coverage of the intervals."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""


class FewLabels(Settings):
    """Probes that learn from a share of the training patients."""

    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[0.01, 0.05, 0.1, 0.3, 1.0], min_length=1
    )
    """The shares of the training patients."""
    draws: Annotated[int, Field(ge=5)] = 5
    """How often each share is drawn."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""


class FineTune(Settings):
    """The whole encoder and a linear head trained on the labels, by a group of Ray Train."""

    epochs: Count = 30
    """The most epochs."""
    patience_epochs: Count = 5
    """It ends when the validation images' mean AUROC has not risen for so many."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Of the whole group."""
    learning_rate_per_256: Positive = 1e-3
    """AdamW's learning rate is this times batch_size / 256."""
    weight_decay: NonNegative = 1e-2
    """AdamW's."""
    warmup_epochs: NonNegative = 1.0
    """Epochs in which the learning rate rises from 0."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of forward and backward."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the head, the order of the images and their crops."""
    crop_scale: tuple[Fraction, Fraction] = (0.6, 1.0)
    """Low and high share of the image's area that a crop takes."""
    flip_p: Fraction = 0.5
    """How often an image is mirrored, left for right."""
    brightness: Fraction = 0.1
    """The most that brightness changes: factors of 1 - this to 1 + this."""
    contrast: Fraction = 0.1
    """The most that contrast changes, likewise."""
    workers: Workers = Workers()
    """The group does not grow. It is heard of once an epoch: `wait_s` must be longer than one."""

    @model_validator(mode="after")
    def _possible(self) -> FineTune:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError("crop_scale must be [low, high] with 0 < low <= high")
        if self.workers.resize_after_s != Workers().resize_after_s:
            raise ValueError(
                "workers.resize_after_s: a fine-tuning keeps no checkpoint, so its group does not "
                "grow: leave it out"
            )
        if self.workers.num > self.batch_size:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be shared by workers.num = "
                f"{self.workers.num}: lower workers.num"
            )
        return self


class Segment(Settings):
    """A small U-Net decoder on the encoder's levels, for shards with masks."""

    epochs: Count = 30
    """The most epochs."""
    patience_epochs: Count = 5
    """It ends when the Dice of the validation images has not risen for so many."""
    batch_size: Count = 16
    """Images a step."""
    learning_rate: Positive = 1e-3
    """AdamW's."""
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 32
    """Channels of the decoder."""
    train_encoder: bool = False
    """Whether the encoder's weights learn too; its batch norm's statistics stay."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the decoder and the order of the images."""


class EvaluateConfig(Settings):
    """`kind: evaluate`."""

    kind: Literal["evaluate"]
    name: Name
    """What the result is called: NAME.json."""
    data: EvaluateData
    folds: Annotated[int, Field(ge=3)] | None = None
    """How many folds the patients of all three splits are dealt into, for few labelled images: each
    image is judged by a probe that learned from the other folds, its penalty chosen by leaving each
    of them out in turn. None: the splits count as they are."""
    classes: list[str] | None = None
    """None: every class of the shards."""
    no_finding: bool = False
    """Whether `No Finding` is a class too: an image that has none of the shards' classes."""
    embedding: Embedding = Embedding()
    probe: Probe = Probe()
    knn: Knn = Knn()
    bootstrap: Bootstrap = Bootstrap()
    subgroups: bool = True
    """Whether sexes, views and age bands are judged each by itself."""
    age_bands: list[Annotated[int, Field(ge=1, le=89)]] = Field(default=[18, 40, 65])
    """The ages in years at which a band begins, after the first."""
    few_labels: FewLabels | None = None
    """None: none; `{}`: with the defaults, 21 probes an encoder."""
    fine_tune: FineTune | None = None
    """None: none; `{}`: with the defaults, both encoders."""
    segment: Segment | None = None
    """None: none; `{}`: with the defaults, both encoders."""
    localise: bool = False
    """Whether the context's maps are held against the boxes of the shards."""
    overlap: bool = True
    """Whether the pretraining shards are searched for the test images; reads what each tells."""

    @model_validator(mode="after")
    def _judged_by_splits(self) -> EvaluateConfig:
        for key in ("few_labels", "fine_tune", "segment", "localise"):
            if self.folds and getattr(self, key):
                raise ValueError(
                    f"{key} needs the splits, which folds do away with: leave one of them out, or "
                    "make two evaluations of them"
                )
        return self

    @model_validator(mode="after")
    def _rising(self) -> EvaluateConfig:
        if sorted(set(self.age_bands)) != self.age_bands:
            raise ValueError("age_bands must rise")
        return self

"""`kind: evaluate`: a frozen encoder judged by a probe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlvicx_dist.config.base import Count, Name, Positive, Settings


class EvaluateData(Settings):
    """The labelled images: the probe learns on `train`, is tuned on `val`, is judged on `test`."""

    shards: list[str] = Field(min_length=1)
    train: str = "train"
    val: str = "val"
    test: str = "test"
    loader_workers: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _unseen(self) -> EvaluateData:
        if self.test in (self.train, self.val):
            raise ValueError("test must be a split of its own: its images choose nothing")
        return self


class Embedding(Settings):
    """How the frozen encoder is run."""

    image_size_px: Annotated[int, Field(ge=16, le=2048)] | None = None
    """None: the size that the encoder was pretrained at."""
    batch_size: Count = 64
    use_gpu: bool = False


class Probe(Settings):
    """Multi-label logistic regression on standardised embeddings."""

    l2: list[Positive] = Field(default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0], min_length=1)
    """Penalties tried; the one with the best mean AUROC on the validation split is taken."""
    max_iterations: Count = 200


class Knn(Settings):
    """Cosine nearest neighbours."""

    neighbours: Count = 20


class Bootstrap(Settings):
    """Patient-clustered bootstrap."""

    draws: Annotated[int, Field(ge=100)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    seed: Annotated[int, Field(ge=0)] = 0


class FewLabels(Settings):
    """Probes that learn from a share of the training patients."""

    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[0.01, 0.05, 0.1, 0.3, 1.0], min_length=1
    )
    draws: Annotated[int, Field(ge=5)] = 5
    seed: Annotated[int, Field(ge=0)] = 0


class EvaluateConfig(Settings):
    """`kind: evaluate`."""

    kind: Literal["evaluate"]
    name: Name
    data: EvaluateData
    classes: list[str] | None = None
    """None: every class of the shards."""
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
    overlap: bool = True
    """Whether the pretraining shards are searched for the test images; reads what each tells."""

    @model_validator(mode="after")
    def _rising(self) -> EvaluateConfig:
        if sorted(set(self.age_bands)) != self.age_bands:
            raise ValueError("age_bands must rise")
        return self

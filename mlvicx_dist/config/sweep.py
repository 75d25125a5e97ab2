"""`kind: sweep`: trials of a pretraining over a space of its settings, judged by a probe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mlvicx_dist.config.base import Count, Name, Positive, Settings
from mlvicx_dist.config.evaluate import Bootstrap, Knn, Probe
from mlvicx_dist.config.pretrain import PretrainConfig, Run


class Pretraining(PretrainConfig):
    """A pretraining as in `kind: pretrain`; what a trial is called and where it lies is ours."""

    kind: Literal["pretrain"] = "pretrain"
    run: Run = Run(name="trial")


class Dimension(Settings):
    """Where one setting is looked for: exactly one of these."""

    log_uniform: tuple[Positive, Positive] | None = None
    """Low and high end of a range that is even in the logarithm."""
    uniform: tuple[float, float] | None = None
    """Low and high end of an even range."""
    choice: list[Any] | None = None
    """Values, of any type that the setting takes."""

    @model_validator(mode="after")
    def _one(self) -> Dimension:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log_uniform, uniform and choice")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice must name at least one value")
            if len({repr(value) for value in self.choice}) != len(self.choice):
                raise ValueError("choice must name each value once")
            return self
        low, high = getattr(self, given[0])
        if low >= high:
            raise ValueError(f"{given[0]} must be [low, high] with low < high")
        return self

    def ends(self) -> list[Any]:
        """The values of a choice, or the low and the high end of a range."""
        return list(self.choice or self.log_uniform or self.uniform or ())


class WarmStart(Settings):
    """An earlier sweep whose best configurations are tried first."""

    sweep: str
    """The folder of the earlier sweep."""
    trials: Count = 3
    """How many of its best are tried."""


class Search(Settings):
    """How configurations are found."""

    by: Literal["random", "grid", "optuna"] = "random"
    """At random, all of a grid of choices, or by Optuna's TPE."""
    trials: Count | None = None
    """None: 24, or in a grid all of it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the configurations: with a trial's number it decides them."""
    warm_start: WarmStart | None = None


class Asha(Settings):
    """Asynchronous successive halving: at each rung the best 1 / `reduction` go on."""

    grace_steps: Count | None = None
    """Steps before the first rung; None: a ninth of the run, at least twice the warm-up."""
    reduction: Annotated[float, Field(gt=1, le=16)] = 3.0
    """One in how many goes on; the next rung comes after so many times the steps."""


def _no_test(*splits: str) -> None:
    """A sweep chooses by what it sees: the test split must stay unseen."""
    for name in splits:
        if name.casefold().startswith("test"):
            raise ValueError(f"'{name}' is a test split, which a sweep must not see; leave it out")


class Target(Settings):
    """What trials are compared by, on images of the validation split; never the loss."""

    kind: Literal["probe", "knn", "effective_rank"] = "probe"
    """Mean AUROC of a linear probe or of nearest neighbours; or, without labels, RankMe."""
    shards: list[str] | None = Field(default=None, min_length=1)
    """None: those of the pretraining."""
    train: str = "train"
    """The split that the probe learns from."""
    val: str = "val"
    """The split that trials are judged on."""
    classes: list[str] | None = Field(default=None, min_length=1)
    """None: every class with both labels in both splits."""
    every_steps: Count = 200
    """Steps from one look to the next."""
    images: Annotated[int, Field(ge=16)] = 2000
    """The most images of each split that a look embeds; which ones is the same in every trial."""
    held_back: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The share of validation patients that no trial is judged on: the last word is theirs."""
    batch_size: Count = 64
    """Images a forward pass."""
    probe: Probe = Probe(l2=[1e-3, 1e-2, 1e-1, 1.0], max_iterations=100)
    knn: Knn = Knn()

    @model_validator(mode="after")
    def _splits(self) -> Target:
        _no_test(self.train, self.val)
        if self.train == self.val:
            raise ValueError("train and val must be two splits")
        return self


class Trials(Settings):
    """How trials are run."""

    concurrent: Count | None = None
    """How many at once; None: as many as the cluster has room for."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often a trial whose processes died goes on from its newest checkpoint."""


class Confirm(Settings):
    """The best configuration against the one without changes, both trained anew."""

    seeds: Annotated[int, Field(ge=0, le=100)] = 3
    """Fresh seeds of each; 0: no comparison is made."""
    bootstrap: Bootstrap = Bootstrap()


class SweepConfig(Settings):
    """`kind: sweep`."""

    kind: Literal["sweep"]
    name: Name
    """The sweep's folder below `storage_path`; the same name goes on with it."""
    storage_path: str = "sweeps"
    """A folder that all nodes see, or a URL (s3://, gs://)."""
    pretrain: Pretraining
    """What all trials share."""
    space: dict[str, Dimension] = Field(min_length=1)
    """What is varied: a dotted setting of `pretrain` each."""
    search: Search = Search()
    asha: Asha | None = Asha()
    """None: every trial runs to its end."""
    target: Target = Target()
    trials: Trials = Trials()
    confirm: Confirm = Confirm()

    @model_validator(mode="after")
    def _read(self) -> SweepConfig:
        if self.search.by == "grid" and self.search.warm_start:
            raise ValueError(
                "search.warm_start has no effect with search.by: grid, which tries its own points: "
                "leave it out"
            )
        if self.target.kind == "effective_rank" and self.target.classes:
            raise ValueError(
                "target.classes has no effect with target.kind: effective_rank, which reads no "
                "labels: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _unseen(self) -> SweepConfig:
        _no_test(*self.pretrain.data.splits)
        if self.target.val in self.pretrain.data.splits:
            raise ValueError(
                f"pretrain.data.splits names '{self.target.val}', whose images judge the trials "
                "and must not train them; leave it out"
            )
        return self

"""`kind: compare`: methods times seeds, pretrained alike and judged by the same tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mlvicx_dist.config.base import Count, Name, Settings
from mlvicx_dist.config.evaluate import EvaluateConfig, Knn
from mlvicx_dist.config.keys import flat
from mlvicx_dist.config.methods import METHODS
from mlvicx_dist.config.pretrain import MAY_VARY
from mlvicx_dist.config.sweep import Pretraining
from mlvicx_dist.errors import nearest

UNTRAINED, PIXELS = "untrained", "pixels"
FLOORS = (UNTRAINED, PIXELS)
"""What a comparison knows besides the methods of a pretraining: neither is trained."""


class Task(EvaluateConfig):
    """An evaluation as in `kind: evaluate`, of which a comparison has the probes alone."""

    kind: Literal["evaluate"] = "evaluate"

    @model_validator(mode="after")
    def _probes(self) -> Task:
        # Not whether it was given: the settings of a comparison are written with all of them.
        if self.knn != Knn():
            raise ValueError(
                "knn is no part of a comparison, which judges frozen encoders by probes: leave it "
                "out, and give it to mlvicx evaluate for each run"
            )
        for key in ("fine_tune", "segment", "localise"):
            if getattr(self, key):
                raise ValueError(
                    f"{key} is no part of a comparison, which judges frozen encoders by probes: "
                    "leave it out, and give it to mlvicx evaluate for each run"
                )
        return self


class CompareConfig(Settings):
    """`kind: compare`.

    A method is a mapping from dotted settings of `pretrain` to values. One that is called as a
    method is, such as `vicreg`, is that method; `untrained` is the encoder at the weights that the
    seed gives it, `pixels` is ridge regression on 24 x 24 pixels.
    """

    kind: Literal["compare"]
    name: Name
    """The comparison's folder below `storage_path`; the same name goes on with it."""
    storage_path: str = "comparisons"
    """A folder that all nodes see."""
    pretrain: Pretraining
    """What all methods share."""
    methods: dict[Name, dict[str, Any]] = Field(min_length=1)
    """The methods by name, each with its changes of `pretrain`."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(default=[0, 1, 2], min_length=1)
    """Every method is trained once with each."""
    reference: str | None = None
    """The method that the others are compared with; None: the first."""
    budget: Literal["images", "time"] = "images"
    """What every method is given alike: the reference's images, or its time of training."""
    at_once: Count = 1
    """How many pretrainings run at a time."""
    tasks: list[Task] = Field(min_length=1)
    """What the encoders are judged by."""

    @field_validator("methods", mode="after")
    @classmethod
    def _methods(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: _named(name, flat(changes)) for name, changes in methods.items()}

    @model_validator(mode="after")
    def _once(self) -> CompareConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds names one twice; the same seed again is no further evidence")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("two tasks have one name; give each its own")
        return self

    @model_validator(mode="after")
    def _reference(self) -> CompareConfig:
        if self.first not in self.methods:
            raise ValueError(
                f"reference is '{self.first}', which is no method here"
                f"{nearest(self.first, self.methods)}; the methods are {', '.join(self.methods)}"
            )
        if self.budget == "time" and self.methods[self.first].get("method") in FLOORS:
            raise ValueError(
                f"budget: time needs a reference that is trained, and {self.first} is not; "
                "name another one as reference"
            )
        return self

    @property
    def first(self) -> str:
        """The reference's name."""
        return self.reference or next(iter(self.methods))


def _named(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes of a method, with the method that its name means, if all of them are allowed."""
    known = (*METHODS, *FLOORS)
    if name in known:
        if changes.setdefault("method", name) != name:
            raise ValueError(
                f"{name} is given the method {changes['method']}; call it by another name"
            )
    method = changes.get("method")
    if method is not None and method not in known:
        raise ValueError(
            f"{name}.method is {method!r}, but must be one of {', '.join(known)}"
            f"{nearest(str(method), known)}"
        )
    for key in changes:
        if key == "method" or key == "train.init_from":
            continue
        if not MAY_VARY.match(key) or key == "views.image_size_px":
            raise ValueError(
                f"{name} changes {key}, but all methods share data, image size, batch, length and "
                "seeds; it may change method, model.*, loss.*, the other views.*, train.init_from, "
                "train.optimizer, train.learning_rate_per_256, train.weight_decay, "
                "train.warmup_epochs, train.cosine_over, train.precision and train.gradients"
            )
        if method == PIXELS or (method == UNTRAINED and key.split(".")[0] in ("loss", "views")):
            raise ValueError(f"{name} changes {key}, which has no effect on {method}; leave it out")
    return changes

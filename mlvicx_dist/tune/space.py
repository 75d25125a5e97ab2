"""The space of a sweep: which settings are looked for, where, and what one point of it means.

A point is a flat mapping from dotted keys to values. What has no effect is not in it: a weight of a
level that is off or has no term of its own, and without any level all that is local.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from mlvicx_dist.config import (
    MAY_VARY,
    Dimension,
    PretrainConfig,
    SweepConfig,
    flat,
    parse_config,
    set_key,
    to_tree,
)
from mlvicx_dist.errors import ConfigError, nearest

Point = Mapping[str, Any]

LOCAL = re.compile(r"^(loss\.local\.|loss\.lambda_local$|loss\.level_weights\.|model\.local\.)")
LEVEL_WEIGHT = re.compile(r"^loss\.level_weights\.(\d+)$")
FUSION, LEVELS = "model.local.fusion", "model.levels"


@dataclass(frozen=True)
class Space:
    """The dimensions of a sweep over its base settings.

    Attributes:
        base: The settings of a trial with nothing changed.
        dimensions: By dotted key; those that others depend on come first.
    """

    base: PretrainConfig
    dimensions: Mapping[str, Dimension]

    def settings(
        self, point: Point, *, name: str = "trial", storage_path: str = "."
    ) -> dict[str, Any]:
        """The whole settings of a point, as a tree.

        Args:
            point: Dotted keys and values.
            name: What its run is called.
            storage_path: Where its run lies.
        """
        tree = to_tree(self.base)
        for key, value in point.items():
            set_key(tree, key, value, where=f"space.{key}")
        tree["run"] |= {"name": name, "storage_path": storage_path}
        return tree

    def config(self, point: Point, **run: str) -> PretrainConfig:
        """The checked settings of a point, see `settings`.

        Raises:
            ConfigError: they are not allowed together.
        """
        config = parse_config(self.settings(point, **run), "space")
        assert isinstance(config, PretrainConfig)
        return config

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """The point of an Optuna trial: it is asked for what has an effect and nothing else."""
        point: dict[str, Any] = {}
        for key, dimension in self.dimensions.items():
            if self._has_effect(key, point):
                if dimension.choice is not None:
                    text = trial.suggest_categorical(key, [coded(v) for v in dimension.choice])
                    point[key] = json.loads(text)
                else:
                    log = dimension.log_uniform is not None
                    point[key] = trial.suggest_float(key, *dimension.ends(), log=log)
        return point

    def parameters(self, point: Point) -> dict[str, Any]:
        """A point as Optuna has it: choices as text."""
        return {
            key: coded(value) if self.dimensions[key].choice is not None else value
            for key, value in point.items()
        }

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The dimensions as Optuna has them."""
        return {key: _distribution(dimension) for key, dimension in self.dimensions.items()}

    def grid(self) -> list[dict[str, Any]]:
        """Every point of a space of choices, each once.

        Raises:
            ConfigError: a dimension is not a choice.
        """
        for key, dimension in self.dimensions.items():
            if dimension.choice is None:
                raise ConfigError(
                    f"space.{key}: a grid needs a choice of values; give it as choice: [...], or "
                    "set search.by to random or optuna."
                )
        points: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*(d.choice or [] for d in self.dimensions.values())):
            point: dict[str, Any] = {}
            for key, value in zip(self.dimensions, values, strict=True):
                if self._has_effect(key, point):
                    point[key] = value
            points.setdefault(coded(point), point)
        return list(points.values())

    def admits(self, point: Point) -> bool:
        """Whether a point, such as one of another sweep, lies in this space."""
        for key, value in point.items():
            dimension = self.dimensions.get(key)
            if dimension is None:
                return False
            if dimension.choice is not None:
                if value not in dimension.choice:
                    return False
                continue
            low, high = dimension.ends()
            if not isinstance(value, int | float) or not low <= value <= high:
                return False
        return True

    def _has_effect(self, key: str, point: Point) -> bool:
        levels = point.get(LEVELS, self.base.model.levels)
        if LOCAL.match(key) and not levels:
            return False
        match = LEVEL_WEIGHT.match(key)
        fusion = point.get(FUSION, self.base.model.local.fusion)
        return not match or (fusion == "per_level" and _is_on(int(match[1]), levels))

    def level_weights(self) -> Iterator[tuple[str, float, Any]]:
        """For each end of each weight of a level: its key, its value and a level set that has it.

        Raises:
            ConfigError: no such level set, or no terms of levels, are ever tried.
        """
        for key, dimension in self.dimensions.items():
            match = LEVEL_WEIGHT.match(key)
            if not match:
                continue
            if "per_level" not in self._tried(FUSION, self.base.model.local.fusion):
                raise ConfigError(
                    f"space.{key}: levels have terms of their own only where model.local.fusion is "
                    "per_level, which this space never tries; add it or leave the weight out."
                )
            sets = self._tried(LEVELS, self.base.model.levels)
            having = [levels for levels in sets if _is_on(int(match[1]), levels)]
            if not having:
                raise ConfigError(
                    f"space.{key}: level {match[1]} is in none of the level sets; add it to one or "
                    "leave the weight out."
                )
            for value in dimension.ends():
                yield key, value, having[0]

    def _tried(self, key: str, base: Any) -> list[Any]:
        return self.dimensions[key].choice or [] if key in self.dimensions else [base]


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if dimension.choice is not None:
        return optuna.distributions.CategoricalDistribution([coded(v) for v in dimension.choice])
    low, high = dimension.ends()
    log = dimension.log_uniform is not None
    return optuna.distributions.FloatDistribution(low, high, log=log)


def new_study() -> optuna.Study:
    """An empty study of Optuna's, whose targets are the better the higher; it says nothing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize")


def coded(value: Any) -> str:
    """A value of YAML as text, the same text for the same value."""
    return json.dumps(value, sort_keys=True)


def open_space(config: SweepConfig) -> Space:
    """The space of a sweep, every key and every end of it checked against the settings.

    Raises:
        ConfigError: a key does not exist or may not vary, a value is not allowed, or a weight is
            of a level that is never on.
    """
    # What others depend on is drawn first.
    keys = sorted(
        config.space,
        key=lambda key: (key != LEVELS, key != FUSION, bool(LEVEL_WEIGHT.match(key))),
    )
    for shorter, longer in itertools.permutations(keys, 2):
        if longer.startswith(shorter + "."):
            raise ConfigError(
                f"space.{longer}: space.{shorter} already sets what is below it; leave one out."
            )
    space = Space(config.pretrain, {key: config.space[key] for key in keys})
    allowed = list(flat(to_tree(config.pretrain)))
    for key, dimension in space.dimensions.items():
        if LEVEL_WEIGHT.match(key):
            continue
        if key not in allowed:
            raise ConfigError(
                f"space.{key}: there is no such setting{nearest(key, allowed)}; name one of a "
                "pretraining, such as loss.lambda_local."
            )
        if not MAY_VARY.match(key):
            raise ConfigError(
                f"space.{key}: trials must be alike in it to be compared; vary settings below "
                "loss, model and views, the optimizer's or the precision."
            )
        for value in [*dimension.ends(), *_between(dimension)]:
            _check_value(space, key, value)
    # Raises where a weight can have no effect.
    list(space.level_weights())
    return space


def _between(dimension: Dimension) -> list[float]:
    """A number inside of a range that is not whole: a setting that counts does not take it."""
    if dimension.choice is not None:
        return []
    low, high = dimension.ends()
    return [low + (high - low) / math.pi]


def _is_on(level: int, levels: Any) -> bool:
    return levels == "all" or level in levels


def _check_value(space: Space, key: str, value: Any) -> None:
    """One value alone, where the others are the base's; what a level weight needs is left open."""
    bare = space.base.model_copy(
        update={"loss": space.base.loss.model_copy(update={"level_weights": {}})}
    )
    try:
        Space(bare, {}).config({key: value})
    except ConfigError as error:
        words = str(error).removeprefix("space: ")
        whole = "; give whole numbers as choice: [...]" if "integer" in words else ""
        raise ConfigError(
            f"space.{key}: {value!r} cannot be tried, since {words.rstrip('.')}{whole}."
        ) from None


def described(point: Point) -> str:
    """A point in a few words."""
    return ", ".join(f"{short(key, point)} {worded(value)}" for key, value in point.items())


def worded(value: Any) -> str:
    """A value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else coded(value).strip('"')


def short(key: str, keys: Iterable[str]) -> str:
    """The shortest end of a dotted key that tells it from the other keys, and is no bare number."""
    parts = key.split(".")
    tails = (".".join(parts[-count:]) for count in range(1, len(parts)))
    others = [f".{other}" for other in keys if other != key]
    named = (tail for tail in tails if not tail.isdigit())
    return next((t for t in named if not any(o.endswith(f".{t}") for o in others)), key)

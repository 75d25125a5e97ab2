"""The methods of a comparison: one pretraining, and what each method changes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlvicx_dist.config import (
    FLOORS,
    LOSS_KEYS,
    MODEL_KEYS,
    PIXELS,
    CompareConfig,
    PretrainConfig,
    parse_config,
    set_key,
    to_tree,
)


@dataclass(frozen=True)
class Method:
    """A method of a comparison.

    Attributes:
        name: What the comparison calls it.
        floor: `untrained` or `pixels`; None: it is trained.
        changes: What is other than in the common settings, by dotted key.
        settings: Of its pretraining, or of the encoder that is not trained.
    """

    name: str
    floor: str | None
    changes: dict[str, Any]
    settings: PretrainConfig

    def run(self, seed: int) -> str:
        """What its run of a seed is called; raw pixels have no seed."""
        return self.name if self.floor == PIXELS else f"{self.name}-seed-{seed}"

    def at(self, seed: int, storage_path: str, steps: int | None = None) -> PretrainConfig:
        """The settings of its run of a seed.

        Args:
            seed: Of weights, order and views.
            storage_path: Where the run lies.
            steps: Its length; None: that of the common settings.
        """
        tree = to_tree(self.settings)
        tree["run"] |= {"name": self.run(seed), "storage_path": storage_path}
        tree["train"]["seed"] = seed
        if steps is not None:
            tree["train"]["steps"] = steps
        return PretrainConfig.model_validate(tree)


def methods_of(config: CompareConfig) -> list[Method]:
    """Every method with its settings.

    Raises:
        ConfigError: a method's changes are not allowed; names it.
    """
    return [_method(config, name, dict(changes)) for name, changes in config.methods.items()]


def _method(config: CompareConfig, name: str, changes: dict[str, Any]) -> Method:
    base = config.pretrain
    chosen = changes.pop("method", base.method)
    floor = chosen if chosen in FLOORS else None
    method = base.method if floor else chosen
    tree = to_tree(base)
    if method != base.method:
        tree["method"] = method
        for section, keys in (("model", MODEL_KEYS), ("loss", LOSS_KEYS)):
            both = set(keys[base.method]) & set(keys[method])
            tree[section] = {k: v for k, v in tree[section].items() if k in both}
    where = f"methods.{name}"
    for key, value in changes.items():
        set_key(tree, key, value, where=where)
    settings = parse_config(tree, where)
    assert isinstance(settings, PretrainConfig)
    return Method(name, floor, {"method": chosen, **changes}, settings)

"""Settings by dotted keys, such as `train.epochs` or `data.shards.0.path`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlvicx_dist.errors import ConfigError


def flat(tree: Mapping[str, Any], *, lists: bool = False, prefix: str = "") -> dict[str, Any]:
    """The values of nested settings by their dotted keys; what is empty is a value.

    Args:
        tree: The settings.
        lists: Whether the items of a list have keys of their own, by their places.
        prefix: Of every key.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if lists and isinstance(value, list) and value:
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            found |= flat(value, lists=lists, prefix=f"{name}.")
        else:
            found[name] = value
    return found


def set_key(tree: dict[str, Any], dotted: str, value: Any, *, where: str) -> None:
    """Set one dotted key in a tree of settings; keys above it that are not there are made.

    Raises:
        ConfigError: the way leads through a value, or past the end of a list; begins with `where`.
    """
    *parents, last = dotted.split(".")
    node: Any = tree
    for key in parents:
        if isinstance(node, list):
            node = node[_index(node, key, where)]
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{where}: '{key}' is a value, so it has no key below it.")
    if isinstance(node, list):
        node[_index(node, last, where)] = value
    else:
        node[last] = value


def _index(items: list[Any], key: str, where: str) -> int:
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    raise ConfigError(
        f"{where}: '{key}' is no place in a list of {len(items)}; use 0 to {len(items) - 1}."
    )

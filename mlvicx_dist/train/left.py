"""What a run, a sweep or a comparison left in its folder, for those who read it later."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from mlvicx_dist.config import (
    CompareConfig,
    PretrainConfig,
    Settings,
    SweepConfig,
    parse_config,
    parse_yaml,
)
from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.storage import Place, read_bytes, told

C = TypeVar("C", PretrainConfig, SweepConfig, CompareConfig)
SETTINGS_OF: dict[type[Settings], tuple[str, str]] = {
    PretrainConfig: ("run", "restore the file"),
    SweepConfig: ("sweep", "run the sweep's command again, which writes them"),
    CompareConfig: ("comparison", "run the comparison's command again, which writes them"),
}
"""Whose they are, and what to do where they are damaged."""


def left_settings(kind: type[C], path: Place) -> C:
    """The settings that a command wrote into its folder.

    Raises:
        FileNotFoundError: there are none.
        DataError: they cannot be read, or are of another kind.
    """
    whose, remedy = SETTINGS_OF[kind]
    text, why = _read(path), "another kind of file"
    try:
        tree = parse_yaml(text, str(path))
        config = parse_config(tree, str(path)) if isinstance(tree, dict) else None
        if isinstance(config, kind):
            return config
    except ConfigError as error:
        why = str(error).rstrip(".")
    raise DataError(f"{path}: the {whose}'s settings cannot be read ({why}); {remedy}.")


def left_text(path: Place, *, patience_s: float | None = None) -> str:
    """The text of a file; nothing where there is none.

    Args:
        path: Of the file.
        patience_s: How long a store that fails is asked again; None: three times in all.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return _read(path, patience_s)
    except FileNotFoundError:
        return ""


def left_json(path: Place, *, remedy: str) -> dict[str, Any] | None:
    """The object of a JSON file; None where there is no file.

    Args:
        path: Of the file.
        remedy: What to do where it is damaged, as the end of a sentence.

    Raises:
        DataError: it is damaged or cannot be read.
    """
    try:
        found = json.loads(_read(path))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: the file is damaged; {remedy}.")
    return found


def _read(path: Place, patience_s: float | None = None) -> str:
    try:
        return read_bytes(path, patience_s=patience_s).decode(errors="replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"{path}: the file cannot be read ({told(error)}); mend your access to it."
        ) from None

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
from mlvicx_dist.storage import Place, reaching, read_bytes, told

C = TypeVar("C", PretrainConfig, SweepConfig, CompareConfig)
KINDS: dict[type[Settings], str] = {
    PretrainConfig: "run",
    SweepConfig: "sweep",
    CompareConfig: "comparison",
}


def left_settings(kind: type[C], path: Place) -> C:
    """The settings that a command wrote into its folder.

    Raises:
        DataError: they cannot be read, or are of another kind.
    """
    try:
        with reaching(path):
            text = read_bytes(path).decode()
        config = parse_config(parse_yaml(text, str(path)), str(path))
        if isinstance(config, kind):
            return config
        why = "another kind of file"
    except (OSError, ValueError, AttributeError, ConfigError) as error:
        why = told(error) if isinstance(error, OSError) else str(error)
    raise DataError(
        f"{path}: the {KINDS[kind]}'s settings cannot be read ({why.rstrip('.')}); run the "
        f"{KINDS[kind]}'s command again, which writes them."
    )


def left_text(path: Place) -> str:
    """The text of a file; nothing where there is none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with reaching(path):
            return read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DataError(
            f"{path}: the file cannot be read ({told(error)}); mend your access to it."
        ) from None


def left_json(path: Place, *, remedy: str) -> Any:
    """The value of a JSON file; None where there is none.

    Args:
        path: Of the file.
        remedy: What to do where it is damaged, as the end of a sentence.

    Raises:
        DataError: it is damaged or cannot be read.
    """
    text = left_text(path)
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise DataError(f"{path}: the file is damaged; {remedy}.") from None

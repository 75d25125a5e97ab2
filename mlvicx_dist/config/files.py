"""Settings files: YAML plus dotted overrides to a frozen model, or one sentence of what is wrong.

The sentence names the file, the key and the way out.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mlvicx_dist.config.base import Settings
from mlvicx_dist.config.compare import CompareConfig
from mlvicx_dist.config.evaluate import EvaluateConfig
from mlvicx_dist.config.keys import set_key
from mlvicx_dist.config.pretrain import PretrainConfig
from mlvicx_dist.config.sweep import SweepConfig
from mlvicx_dist.errors import ConfigError, nearest

Config = PretrainConfig | EvaluateConfig | SweepConfig | CompareConfig
C = TypeVar("C", PretrainConfig, EvaluateConfig, SweepConfig, CompareConfig)
KINDS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "compare": CompareConfig,
}


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers and truths are YAML 1.2's; a key may stand only once.

    `1e-6` is a float, `010` is ten, `1:30` and `yes` are texts.
    """


OURS = (":float", ":int", ":bool")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(OURS)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is a word", problem_mark=key.start_mark)
        if key.value in seen:
            raise ConfigError(
                f"{key.start_mark.name}, line {key.start_mark.line + 1}: the key '{key.value}' "
                "stands twice; remove one of the two."
            )
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; `name` says in an error where it came from."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    # What a tag or a date cannot hold is a plain error of Python's.
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise ConfigError(f"{where}: {problem}; correct the YAML there.") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the settings file at `path`, apply `overrides` ("a.b=c") and check every key.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or a value is not allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"{path}: the settings file cannot be read ({reason}); give the path of a YAML file "
            "such as those in configs/."
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a settings file is a mapping of keys; begin it with 'kind: pretrain'."
        )
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], name: str) -> Config:
    """Check a tree of settings; `name` says in an error where it came from."""
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise ConfigError(
            f"{name}: the key 'kind' is {kind!r}, but must be one of {', '.join(KINDS)}{hint}."
        )
    try:
        return KINDS[kind].model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error, name, KINDS[kind])) from None


def load_as(kind: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """`load_config` for a command that needs one kind of file."""
    config = load_config(path, overrides)
    if not isinstance(config, kind):
        raise ConfigError(
            f"{path}: the key 'kind' is {config.kind!r}, but this command takes "
            f"'kind: {get_args(kind.model_fields['kind'].annotation)[0]}'; give such a file."
        )
    return config


def to_tree(config: BaseModel) -> dict[str, Any]:
    """The settings as plain JSON values, with the keys that the YAML has."""
    return config.model_dump(mode="json", by_alias=True)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key, such as `train.epochs=5` or `data.shards.0.path=x`, in the tree."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override}: give it as key.key=value, as in train.epochs=10.")
    set_key(tree, dotted, parse_yaml(text, f"--set {dotted}"), where=f"--set {override}")


def _sentence(error: ValidationError, name: str, root: type[Settings]) -> str:
    """The first thing that pydantic found, as one sentence."""
    # The members of a union each complain; a wrong key says more than a wrong value.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # Of a key that does not exist the last part is the user's own word, whatever it looks like.
    own = len(first["loc"]) - 1 if first["type"] == "extra_forbidden" else None
    parts = [
        part
        for place, part in enumerate(first["loc"])
        if place == own or not (isinstance(part, str) and _is_branch(part))
    ]
    key = ".".join(str(part) for part in parts)
    if first["type"] == "extra_forbidden":
        known = _keys_below(root, parts[:-1])
        hint = nearest(str(parts[-1]), known) or f"; the keys there are {', '.join(known)}"
        return f"{name}: the key '{key}' does not exist{hint}."
    if first["type"] == "missing":
        return f"{name}: the key '{key}' is missing; add it."
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{name}: in '{key}', {message}." if key else f"{name}: {message}."
    given = first["input"]
    # Of a few lines that name each other the whole text could be endless.
    if isinstance(given, dict | list) and len(reprlib.repr(given)) > 60:
        given = type(given).__name__
    expected = _expected(root, parts) or message
    return f"{name}: the key '{key}' is {given!r}, but {expected}."


def _is_branch(part: str) -> bool:
    """Whether pydantic added this to a location to say which member of a union it tried."""
    return any(mark in part for mark in ("[", "literal", "constrained")) or part in (
        "int",
        "str",
        "float",
        "tuple",
        "list",
    )


def _expected(root: type[Settings], parts: Sequence[int | str]) -> str | None:
    """What a key with a short list of allowed values allows, where it has one."""
    model = _model_at(root, parts[:-1])
    if model is None or not parts:
        return None
    for field_name, field in model.model_fields.items():
        if (field.alias or field_name) != parts[-1]:
            continue
        if field_name == "levels":
            return "should be 'all' or a list of level numbers such as [1, 2, 3]"
        values = [v for v in get_args(field.annotation) if isinstance(v, str | int)]
        if values:
            return f"must be one of {', '.join(str(v) for v in values)}"
    return None


def _keys_below(root: type[Settings], parts: Sequence[int | str]) -> list[str]:
    model = _model_at(root, parts)
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _model_at(root: type[Settings], parts: Sequence[int | str]) -> type[Settings] | None:
    """The settings class that a location leads to."""
    model: Any = root
    chosen = False
    for part in parts:
        # The place in a list, or the key of a mapping, leads to what is in it.
        if isinstance(part, int) or chosen:
            chosen = False
            continue
        for name, field in model.model_fields.items():
            if (field.alias or name) == part:
                candidates = [field.annotation, *get_args(field.annotation)]
                chosen = get_origin(field.annotation) is dict
                model = next(
                    (c for c in candidates if isinstance(c, type) and issubclass(c, Settings)),
                    None,
                )
                break
        else:
            return None
        if model is None:
            return None
    return model

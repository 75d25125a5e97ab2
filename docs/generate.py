"""Write configuration.md and cli.md from what the settings and the parsers say of themselves.

python docs/generate.py
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import runpy
import textwrap
import types
from collections.abc import Container, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlvicx_dist import cli
from mlvicx_dist.config import Config, Settings
from mlvicx_dist.config.files import KINDS
from mlvicx_dist.ingest.command import build_parser

DOCS = Path(__file__).parent
MADE = "<!-- Made by docs/generate.py from the code: change it there, then `make docs`. -->"
UNITS = {
    "s": "seconds",
    "px": "pixels",
    "gb": "GB",
    "steps": "steps",
    "epochs": "epochs",
    "p": "probability",
}
WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    Any: "any value",
    bool: "`true`, `false`",
}
SIGNS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


@cache
def pages() -> dict[Path, str]:
    """The pages that are made, with their text."""
    return {
        DOCS / "configuration.md": _configuration(),
        DOCS / "cli.md": _command_line(),
    }


# --- settings


def _configuration() -> str:
    kinds = "\n".join(
        line
        for kind, model in KINDS.items()
        for line in ["", f"## kind: {kind}", "", *_kind(model)]
    )
    return f"""{MADE}

# Configuration reference

A settings file is YAML and begins with its `kind`; [configs/](../configs) has some of each to start
from. `--set KEY=VALUE` changes a key on the command line: a key as below, with the place in a list
for N, as in `--set data.shards.0.path=shards/mine`. A run's folder keeps the settings with every
default written out.
{kinds}
"""


def _kind(model: type[Settings]) -> Iterator[str]:
    """A kind of file: what it is, a table of its own keys, and one of each section."""
    about = inspect.getdoc(model) or ""
    yield from about.split("\n\n")[1:]
    yield ""
    yield from _table(_rows(model, sections=False))
    for name, field in model.model_fields.items():
        section = _section(get_type_hints(model)[name])
        if section and not _is_kind(section):
            key = field.alias or name
            yield from ["", f"### {key}", "", _meaning(model, name, section), ""]
            given = field.default if isinstance(field.default, Settings) else None
            yield from _table(_rows(section, f"{_inside(model, name, key)}.", given))


def _table(rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield "| key | value | unit | default | meaning |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _rows(
    model: type[Settings], prefix: str = "", given: Settings | None = None, *, sections: bool = True
) -> Iterator[tuple[str, ...]]:
    """Key, value, unit, default and meaning of each setting, and of those below it."""
    hints = get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        section = _section(hints[name])
        default = field.default if given is None else getattr(given, name)
        value, unit = _value(hints[name], field), UNITS.get(name.rsplit("_", 1)[-1], "")
        if section and _is_kind(section):
            kind = get_args(section.model_fields["kind"].annotation)[0]
            value = f"as [kind: {kind}](#kind-{kind})"
        if section is None or sections or _is_kind(section):
            yield f"`{key}`", value, unit, _shown(default), _meaning(model, name, section)
        if section and sections and not _is_kind(section):
            below = default if isinstance(default, Settings) else None
            yield from _rows(section, f"{_inside(model, name, key)}.", below)


def _is_kind(section: type[Settings]) -> bool:
    return issubclass(section, get_args(Config))


def _section(hint: Any) -> type[Settings] | None:
    """The settings class in an annotation, where there is one."""
    if isinstance(hint, type) and issubclass(hint, Settings):
        return hint
    return next(filter(None, map(_section, get_args(hint))), None)


def _inside(model: type[Settings], name: str, key: str) -> str:
    """The key of what a setting holds: the place in a list, or a name in a mapping, comes first."""
    kind = get_origin(get_type_hints(model)[name])
    return f"{key}{ {list: '.N', dict: '.SETTING'}.get(kind, '') }"


def _meaning(model: type[Settings], name: str, section: type[Settings] | None) -> str:
    """What the section says of itself, and the docstring below the field.

    Raises:
        ValueError: there is neither.
    """
    told = [inspect.getdoc(section) or ""] if section else []
    owner = next(c for c in model.__mro__ if name in inspect.get_annotations(c))
    told += _below_fields(owner).get(name, [])
    if not told and name != "kind":
        raise ValueError(f"{model.__name__}.{name} has no docstring below it; write one.")
    return re.sub(r"\bNone\b", "`null`", " ".join(" ".join(told).split()))


@cache
def _below_fields(model: type[Settings]) -> dict[str, list[str]]:
    """The docstrings below the fields of a class, by field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0].body
    return {
        field.target.id: [below.value.value]
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def _value(hint: Any, field: FieldInfo) -> str:
    filled = any(isinstance(mark, annotated_types.MinLen) for mark in field.metadata)
    return _allowed(hint) + (", not empty" if filled else "")


def _allowed(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _bounded(_allowed(parts[0]), parts[1:])
    if kind is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if kind in (Union, types.UnionType):
        return " or ".join("`null`" if part is type(None) else _allowed(part) for part in parts)
    if kind is list:
        return f"list of {_many(parts[0])}"
    if kind is tuple:
        return f"pair of {_many(parts[0])}"
    if kind is dict:
        return f"mapping of {_many(parts[0])} to {_many(parts[1])}"
    return WORDS.get(hint) or "section"


def _many(hint: Any) -> str:
    return re.sub(
        r"^(whole number|number|text|name|section|mapping|any value)", r"\1s", _allowed(hint)
    )


def _bounded(word: str, marks: tuple[Any, ...]) -> str:
    """A word such as `number`, with the limits that pydantic holds it to."""
    limits = []
    for mark in (m for outer in marks for m in getattr(outer, "metadata", [outer])):
        if type(mark) in SIGNS:
            name, sign = SIGNS[type(mark)]
            limit = getattr(mark, name)
            limits.append(f"{sign} {f'2^{limit.bit_length() - 1}' if limit > 2**31 else limit}")
        elif isinstance(mark, annotated_types.MultipleOf):
            limits.append(f"a multiple of {mark.multiple_of}")
        elif getattr(mark, "pattern", None):
            word = "name (letters, digits, `.`, `_`, `-`)"
    return " ".join([word, " and ".join(limits)]).strip()


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "**required**"
    if isinstance(default, Settings):
        return ""
    if isinstance(default, str):
        return f"`{default}`"
    return f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


# --- the command line


def _command_line() -> str:
    ours = [_command(f"mlvicx {name}", one) for name, one in command_parsers().items()]
    shared = build_parser("", lambda parser: None)
    those = {action.dest for action in shared._actions}
    scripts = []
    for path in sorted((DOCS.parent / "sharding").glob("*.py")):
        scripts.append(_command(f"python sharding/{path.name}", script_parser(path), those))
    return f"""{MADE}

# CLI reference

`mlvicx X` and `python -m mlvicx_dist X` are the same. Every command and script takes `--help`, and
`--json`, which prints one JSON document on stdout and nothing else there. Exit codes: 0 done, 1
failed, 2 your error in one sentence on stderr, 3 too many files refused; 128 and the signal's
number where a signal ended it.

{chr(10).join(ours)}
## Sharding scripts

Each has the options of its source, and after them those of all.

{chr(10).join(scripts)}
### Of all sharding scripts

{_arguments(shared)}
"""


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """What each command of `mlvicx` understands."""
    actions = cli.build_parser()._actions
    return next(a.choices for a in actions if isinstance(a, argparse._SubParsersAction))


def script_parser(path: Path) -> argparse.ArgumentParser:
    """What a script of sharding/ understands."""
    script = runpy.run_path(str(path))
    return build_parser(script["__doc__"], script["add_arguments"])


def _command(name: str, parser: argparse.ArgumentParser, those: Container[str] = ()) -> str:
    """A section for a command, without its arguments of these names."""
    level = "##" if name.startswith("mlvicx") else "###"
    about = (parser.description or "").split("\n\n")[0]
    return f"{level} {name}\n\n{about}\n\n{_arguments(parser, those)}\n"


def _arguments(parser: argparse.ArgumentParser, those: Container[str] = ()) -> str:
    rows = [
        f"| {_argument(action)} | {_told(action)} |"
        for action in parser._actions
        if action.dest not in ("help", "json") and action.dest not in those
    ]
    return "\n".join(["| argument | meaning |", "|---|---|", *rows])


def _argument(action: argparse.Action) -> str:
    """`CONFIG`, or `--out OUT`, as it is typed."""
    choices = f"{{{','.join(action.choices)}}}" if action.choices else None
    value = choices or action.metavar or action.dest.upper()
    if not action.option_strings:
        return f"`{ {'?': f'[{value}]', '+': f'{value} …'}.get(action.nargs, value) }`"
    return f"`{' '.join([action.option_strings[-1], *([] if action.nargs == 0 else [value])])}`"


def _told(action: argparse.Action) -> str:
    text = (action.help or "") % vars(action)
    return f"{text} (required)" if action.required and action.option_strings else text


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")

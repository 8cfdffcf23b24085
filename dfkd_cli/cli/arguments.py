"""Flags made from configuration fields, and list-valued flags that take any number of values."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Set
from typing import Annotated, Any

import typer

from dfkd_cli.config import hints, is_list, options, strip_none

_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")


def flag(name: str) -> str:
    """``batch_size`` as ``--batch-size``."""
    return "--" + name.replace("_", "-")


def list_flags(classes: Iterable[type]) -> set[str]:
    """The flags of these configuration classes that take any number of values."""
    return {flag(name) for cls in classes for name, kind in hints(cls).items() if is_list(kind)}


def expand(tokens: list[str], lists: Set[str], pairs: Set[str] = frozenset({"--set"})) -> list[str]:
    """``--beta 1.0 -0.1`` as ``--beta=1.0 --beta=-0.1``, which is what the parser knows.

    Args:
        tokens: The command's arguments.
        lists: Flags that take every following value up to the next flag.
        pairs: Flags that take every following ``KEY=VALUE``.
    """
    expanded: list[str] = []
    current, has_value = None, False  # the list flag being filled, and whether it has a value yet
    for position, token in enumerate(tokens):
        if token == "--":
            return expanded + tokens[position:]
        name, equals, _ = token.partition("=")
        if not _is_value(token):
            current, has_value = name if name in lists or name in pairs else None, bool(equals)
            followed = position + 1 < len(tokens) and _is_value(tokens[position + 1])
            if current is None or equals or not followed:  # without any value the parser says so
                expanded.append(token)
        elif current in lists or (current in pairs and (equals or not has_value)):
            expanded.append(f"{current}={token}")
            has_value = True
        else:
            current = None
            expanded.append(token)
    return expanded


def _is_value(token: str) -> bool:
    return not token.startswith("-") or bool(_NUMBER.match(token))


def values_of(tokens: list[str], name: str) -> list[str]:
    """Every value given to a flag in expanded or plain tokens, without parsing the rest."""
    values = []
    for position, token in enumerate(tokens):
        if token == name and position + 1 < len(tokens):
            values.append(tokens[position + 1])
        elif token.startswith(name + "="):
            values.append(token.partition("=")[2])
    return values


def parameters(cls: type, panel: str) -> dict[str, inspect.Parameter]:
    """The fields of a configuration class as optional Typer parameters.

    Values stay strings here: the configuration checks them, so flags, ``--set`` and recipes err alike.
    """
    arguments = {}
    for field in dataclasses.fields(cls):
        kind, _ = strip_none(hints(cls)[field.name])
        decls = [flag(field.name)]
        annotation: Any
        if kind is bool:
            decls, annotation = [f"{flag(field.name)}/--no-{field.name.replace('_', '-')}"], bool | None
        else:
            annotation = list[str] | None if is_list(kind) else str | None
        default = "" if field.default in (None, dataclasses.MISSING) else _shown(field.default)
        traits = options(cls)[field.name]
        text = traits.get("help", "") + (f" (default: {default})" if default else "")
        if "argument" in traits:
            info = typer.Argument(metavar=traits["argument"], help=text, show_default=False)
        else:
            metavar = None if kind is bool else _metavar(kind)
            info = typer.Option(*decls, help=text, metavar=metavar, show_default=False, rich_help_panel=panel)
        arguments[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, info]
        )
    return arguments


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _metavar(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        item = _metavar(args[0])
        return f"{item} ..." if args[-1] is Ellipsis else " ".join([item] * len(args))
    if origin is typing.Literal:
        return "|".join(map(str, args))
    words = {int: "INT", float: "FLOAT", str: "TEXT"}
    if kind not in words:
        raise TypeError(f"{kind}: an option is a number, bool, str, Literal, a tuple of these, or one of them | None")
    return words[kind]

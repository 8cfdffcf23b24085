"""Records: the JSON documents and tables of artifacts, checked against what is declared of them as they are read.

Whoever writes a record declares it as a ``TypedDict``. What is read has every key that is declared, unless as
``NotRequired``, each with a value of the declared type: finite numbers, ``Between`` bounds where they are so
``Annotated``. Other keys may hold anything that is not large beyond reason. So nobody who uses a record checks it.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar, is_typeddict

from dfkd_cli.config import is_bounded
from dfkd_cli.errors import ArtifactError
from dfkd_cli.options import MOST_IMAGES

Record = TypeVar("Record")


class Hashed(TypedDict):
    """Something of which only the hash is read."""

    sha256: str


class Between(NamedTuple):
    """The bounds of a number, both included, as ``Annotated[float, Between(0, 1)]``."""

    low: float
    high: float


Check = Callable[[Any], None]

REMAKE = "make it again, or copy it again"
Count = Annotated[int, Between(1, MOST_IMAGES)]  # of images, or of what makes them
Classes = Annotated[int, Between(1, 10**6)]
Side = Annotated[int, Between(1, 2**13)]  # channels or pixels of an image
ImageShape = tuple[Side, Side, Side]

_MOST_BYTES = 2**30  # a document takes several times its size in memory
_MOST_VALUES = 10**7  # of what is not declared
_LARGEST = 2.0**128
_COLUMN = re.compile(r"[\w./ +-]+")


class _Wrong(Exception):
    """A value that is not as declared; ``keys`` lead to it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.keys: list[str] = []
        self.what = what


def read_json(path: Path, declared: type[Record], hint: str = REMAKE) -> Record:
    """Read a JSON object.

    Args:
        path: The file.
        declared: A ``TypedDict``, or ``dict[str, ...]``.
        hint: What to do where it is damaged.

    Raises:
        ArtifactError: The file is missing, no JSON object, of another kind or version, or not as declared.
    """
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path} is damaged: not readable as JSON", hint) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is damaged: not a JSON object", hint)
    if is_typeddict(declared):
        _check_version(value, declared, path, hint)
    try:
        _check(typing.cast("Hashable", declared))(value)
    except _Wrong as wrong:
        raise ArtifactError(f"{path} is damaged: {'.'.join(wrong.keys)} {wrong.what}", hint) from None
    return typing.cast("Record", value)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, each with the same columns; fields may be empty.

    Raises:
        ArtifactError: The file is missing or no such table.
    """
    try:
        table = csv.DictReader(_read(path).decode().splitlines(), strict=True)
        columns, rows = table.fieldnames or (), list(table)
    except (UnicodeDecodeError, csv.Error):
        columns, rows = ("",), []
    whole = all(None not in row and None not in row.values() for row in rows)
    if not whole or len({*columns}) != len(columns) or not all(map(_COLUMN.fullmatch, columns)):
        raise ArtifactError(f"{path} is damaged: not a table", REMAKE)
    return rows


def _read(path: Path) -> bytes:
    """A file's content; what is no file, a pipe for instance, is none."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file", REMAKE)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ArtifactError(f"{path} is damaged: too large for a record", REMAKE)
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: not readable ({error.strerror})", REMAKE) from None


def _check_version(value: dict[str, Any], declared: Any, path: Path, hint: str) -> None:
    """Kind and schema come first: of what is another kind, or newer, nothing else is known."""
    said = {key: typing.get_args(_hints(declared)[key][0]) for key in ("kind", "schema") if key in _hints(declared)}
    kind = said.get("kind", (path.stem,))[0]
    if value.get("kind", kind) != kind:
        raise ArtifactError(f"{path.parent}: holds {reprlib.repr(value['kind'])}, not {kind!r}", hint)
    for schema in said.get("schema", ()):
        if type(found := value.get("schema", schema)) is int and found != schema:
            hint = "update dfkd" if found > schema else "make it again"
            raise ArtifactError(f"{path.parent}: {kind} schema {found}, this version reads schema {schema}", hint)


@functools.cache
def _hints(declared: type) -> dict[str, tuple[Any, bool]]:
    """The declared type of every key, and whether it must be there."""
    hints = typing.get_type_hints(declared, include_extras=True)
    free = {key: typing.get_origin(hint) is NotRequired for key, hint in hints.items()}
    return {key: (typing.get_args(hint)[0] if free[key] else hint, not free[key]) for key, hint in hints.items()}


@functools.cache
def _check(declared: Hashable) -> Check:
    """What raises :class:`_Wrong` for a value that is not as declared."""
    origin, args = typing.get_origin(declared), typing.get_args(declared)
    if declared in _SCALARS:
        return _accept(*_SCALARS[declared])
    if is_typeddict(declared):
        return _keys({key: (_check(hint), needed) for key, (hint, needed) in _hints(declared).items()})
    if origin is Annotated:
        (fits, what), bounds = _SCALARS[args[0]], args[1]
        return _accept(
            lambda value: fits(value) and bounds.low <= value <= bounds.high,
            f"{what} from {bounds.low:,} to {bounds.high:,}",
        )
    if origin is Literal:
        return _accept(lambda value: value in args and type(value) is type(args[0]), " or ".join(map(repr, args)))
    if origin in (typing.Union, types.UnionType):
        inner = _check(next(arg for arg in args if arg is not types.NoneType))
        return lambda value: None if value is None else inner(value)
    if origin is tuple and args[-1] is not Ellipsis:
        return _items([_check(arg) for arg in args], len(args))
    if origin in (list, tuple):
        return _items([_check(args[0])])
    assert origin is dict
    return _keys({}, _check(args[1]))


def _accept(fits: Callable[[Any], bool], wanted: str) -> Check:
    def check(value: Any) -> None:
        if not fits(value):
            raise _Wrong(f"is {reprlib.repr(value)}, not {wanted}")

    return check


def _items(checks: list[Check], length: int | None = None) -> Check:
    """A list of that length: each item has its check, or all have the same one."""
    wanted = "a list" if length is None else f"a list of {length}"

    def check(value: Any) -> None:
        if not isinstance(value, list) or len(value) != (length or len(value)):
            raise _Wrong(f"is {reprlib.repr(value)}, not {wanted}")
        index = 0
        try:
            for index, item in enumerate(value):
                checks[index if length else 0](item)
        except _Wrong as wrong:
            wrong.keys.insert(0, str(index))
            raise

    return check


def _keys(checks: dict[str, tuple[Check, bool]], others: Check | None = None) -> Check:
    """A mapping: some keys have a check of their own, and must be there or need not."""
    others = others or _check(Any)

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise _Wrong(f"is {reprlib.repr(value)}, not a mapping")
        key = ""
        try:
            for key, (_, needed) in checks.items():
                if needed and key not in value:
                    raise _Wrong("is missing")
            for key, item in value.items():
                checks.get(key, (others, False))[0](item)
        except _Wrong as wrong:
            wrong.keys.insert(0, key)
            raise

    return check


_SCALARS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    Any: (lambda value: is_bounded(value, _MOST_VALUES), "of a size that a record has"),
    int: (lambda value: type(value) is int and abs(value) < _LARGEST, "a whole number"),
    float: (lambda value: type(value) in (int, float) and abs(value) < _LARGEST, "a finite number"),
    str: (lambda value: isinstance(value, str), "text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
}


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """A column's numbers, NaN where it is empty; ValueError where it holds anything else."""
    numbers = [float(row[name] or "nan") for row in rows]
    if any(map(math.isinf, numbers)):
        raise ValueError(name)
    return numbers

"""Typed configuration: dataclass fields are the one description of every flag, key, default and check.

A configuration class is a frozen dataclass whose fields are made with :func:`option`. The same fields give the
command line its flags (``bn_scale`` is ``--bn-scale``), recipes their keys, and help its text.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from dfkd_cli.errors import ConfigError, did_you_mean

MOST = 3.4e38  # of a number: float32 holds it
MOST_YAML = 2**18  # characters of a recipe


def option(
    default: Any = dataclasses.MISSING,
    help: str | None = None,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    volatile: bool | None = None,
    rehearsal: int | None = None,
    argument: str | None = None,
    typed: bool | None = None,
    parent: bool | None = None,
) -> Any:
    """A configuration field. What a subclass restates, as a default alone or with more, keeps all else that it was.

    Args:
        default: The default value; without one the field is required.
        help: One line for ``--help``: meaning and unit.
        low: Inclusive lower bound of every number in the value.
        above: Exclusive lower bound.
        high: Inclusive upper bound.
        volatile: The value does not change the result (a device, a logger): it may differ when a run continues.
        rehearsal: The value is a length: work grows with it, and ``--dry-run`` takes no more than this.
        argument: What help calls the value, which is typed without a flag.
        typed: The value destroys or permits something: only the command line may say it, no recipe.
        parent: The value names what is read: the hash of that decides the result, the name does not.
    """
    traits = {
        "help": help, "low": low, "above": above, "high": high, "volatile": volatile, "rehearsal": rehearsal,
        "argument": argument, "typed": typed, "parent": parent,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata={k: v for k, v in traits.items() if v is not None})


@functools.cache
def options(cls: type) -> Mapping[str, Mapping[str, Any]]:
    """What :func:`option` said of every field of a configuration class, in it and in its bases."""
    said: dict[str, dict[str, Any]] = {}
    for base in reversed(cls.__mro__):  # in the order in which dataclasses take fields
        for field in getattr(base, "__dataclass_fields__", {}).values():
            said[field.name] = said.get(field.name, {}) | field.metadata
    return said


@functools.cache
def hints(cls: type) -> Mapping[str, Any]:
    """The resolved type of every field of a configuration class."""
    types_of = typing.get_type_hints(cls)
    return {field.name: types_of[field.name] for field in dataclasses.fields(cls)}


def defaults(cls: type) -> dict[str, Any]:
    """The fields of a configuration class that have a default, with it as :func:`plain` gives values."""
    return _plain({f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING})


def strip_none(annotation: Any) -> tuple[Any, bool]:
    """``X | None`` as ``(X, True)``, anything else as ``(annotation, False)``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return inner[0], True
    return annotation, False


def is_list(annotation: Any) -> bool:
    """Whether the type takes any number of values."""
    return typing.get_origin(strip_none(annotation)[0]) is tuple


def convert(value: Any, annotation: Any, where: str) -> Any:
    """Turn a YAML or command-line value into the declared type, or raise :class:`ConfigError` naming ``where``.

    YAML reads ``1e-3`` as a string and ``off`` as False; the declared type decides, so neither surprises.
    """
    annotation, optional = strip_none(annotation)
    if value is None or (isinstance(value, str) and optional and value.lower() in ("none", "null")):
        if optional:
            return None
        raise ConfigError(f"{where}: needs a value")
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        if isinstance(value, str):
            value = items_of(value, spaces=args[0] is not str, where=where)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ConfigError(f"{where}: needs {len(args)} values, got {len(items)}")
        if not items:
            raise ConfigError(f"{where}: needs at least one value")
        return tuple(convert(item, args[0] if args[-1] is Ellipsis else args[i], where) for i, item in enumerate(items))
    if origin is Literal:
        if value is False and "off" in args:  # YAML's idea of the bare word `off`
            value = "off"
        if str(value) not in args:
            raise ConfigError(f"{where}: {value!r} is not a choice", did_you_mean(str(value), args))
        return str(value)
    if isinstance(value, (list, tuple, dict)):
        raise ConfigError(f"{where}: needs one {annotation.__name__}, got {value!r}")
    if annotation is bool:
        words = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif annotation is str:
        if "\0" in str(value):
            raise ConfigError(f"{where}: {value!r} has a NUL character in it")
        return str(value)
    elif not isinstance(value, bool):
        number = _number(value)
        if annotation is float and number is not None:
            return float(number)
        if annotation is int and number is not None and number == int(number):
            return int(number)
    kind = {"int": "whole number", "float": "number", "bool": "yes or no"}[annotation.__name__]
    raise ConfigError(f"{where}: {value!r} is not a {kind}")


def _number(value: Any) -> int | float | None:
    """A finite number, exact where it is whole, or None."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            number = kind(str(value))
            if math.isfinite(float(number)):
                return number
    return None


def items_of(text: str, *, spaces: bool, where: str) -> list[Any]:
    """The items of ``[a, b]``, ``a,b`` or, unless they are words, ``a b``."""
    if text.strip().startswith("["):
        try:
            return list(_load(text))
        except (ConfigError, TypeError):
            raise ConfigError(f"{where}: {text!r} is not a list") from None
    return text.replace(",", " ").split() if spaces else [item.strip() for item in text.split(",")]


def build(cls: type, values: Mapping[str, Any], labels: Mapping[str, str] = types.MappingProxyType({})) -> Any:
    """Make a checked configuration object from plain values.

    Args:
        cls: A configuration class.
        values: Plain values by field name; missing fields take their default.
        labels: What messages call a field, e.g. ``--num-images``; its name by default.

    Raises:
        ConfigError: An unknown key, a value of the wrong type or out of range, a required key without a value.
    """
    types_of = hints(cls)
    converted = {}
    for key, value in values.items():
        if key not in types_of:
            raise ConfigError(f"{key}: unknown key", did_you_mean(key, types_of))
        converted[key] = convert(value, types_of[key], labels.get(key, key))
    for field in dataclasses.fields(cls):
        if field.name not in converted and field.default is dataclasses.MISSING:
            raise ConfigError(f"{field.name}: needs a value", f"give --{field.name.replace('_', '-')}")
        value, label = converted.get(field.name, field.default), labels.get(field.name, field.name)
        _check_range(options(cls)[field.name], value, label)
    return cls(**converted)


def _check_range(traits: Mapping[str, Any], value: Any, label: str) -> None:
    low, above, high = (traits.get(bound) for bound in ("low", "above", "high"))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        wish = ""
        if low is not None and number < low:
            wish = f"at least {low}"
        elif above is not None and number <= above:
            wish = f"above {above}"
        elif high is not None and number > high:
            wish = f"at most {high}"
        elif isinstance(number, float) and abs(number) > MOST:
            wish = f"within {MOST:g}"
        if wish:
            raise ConfigError(f"{label}: {number} is out of range, it must be {wish}")


def shortened(config: Any) -> Any:
    """The configuration object with all lengths cut to what a rehearsal takes. What 0 turns off stays off."""
    cls: type = type(config)
    lengths = {name: traits["rehearsal"] for name, traits in options(cls).items() if "rehearsal" in traits}
    values = {name: getattr(config, name) for name in lengths}
    # None is no limit, or one that another length gives.
    return dataclasses.replace(config, **{n: m if values[n] is None else min(values[n], m) for n, m in lengths.items()})


def plain(config: Any) -> dict[str, Any]:
    """A configuration object as plain YAML and JSON values."""
    return _plain(dataclasses.asdict(config))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """YAML where the same key twice is an error instead of a silent choice."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[str, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise yaml.constructor.ConstructorError(
                None, None, "no merge keys (<<): write them out", key_node.start_mark
            )
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _number_of(kind: str) -> Any:
    def construct(loader: _UniqueKeys, node: yaml.ScalarNode) -> Any:
        if len(node.value) > 100:  # PyYAML takes minutes for long ones
            raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
        if ":" in node.value or (kind == "int" and re.match(r"[+-]?0[0-9_]", node.value)):
            what = f"{node.value} would be read to base {60 if ':' in node.value else 8}: write a decimal number"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return getattr(loader, f"construct_yaml_{kind}")(node)

    return construct


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _number_of("int"))
_UniqueKeys.add_constructor("tag:yaml.org,2002:float", _number_of("float"))
_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Read a YAML mapping with plain values only."""
    return copy.deepcopy(_parsed(text, where))


@functools.lru_cache(maxsize=1000)  # more than there are recipes: read in turn, fewer would keep none
def _parsed(text: str, where: str) -> dict[str, Any]:
    """The grids read the same few recipes hundreds of times."""
    try:
        values = _load(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a mapping of keys to values")
    return values


def _load(text: str) -> Any:
    """The plain values of a YAML document. PyYAML takes seconds for a megabyte, and follows any nesting."""
    if len(text) > MOST_YAML:
        raise ConfigError(f"longer than {MOST_YAML:,} characters")
    try:
        values = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(str(error)) from None
    except Exception as error:  # what a tag or a number does not fit, and deep nesting, can raise anything
        raise ConfigError(f"a value of it is none ({type(error).__name__})") from None
    if not is_bounded(values, len(text) + 1000):
        raise ConfigError("nested too deep, a number too long, or too much repeated by aliases")
    return values


def is_bounded(value: Any, most: int, depth: int = 32) -> bool:
    """Whether plain values are no more, those that YAML repeats counted each time, nor deeper nested, and not huge."""
    level = [value]
    for _ in range(depth):
        if any(isinstance(item, int) and item.bit_length() > 128 for item in level):
            return False
        parts = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = list(itertools.islice(itertools.chain.from_iterable(parts), most + 1))
        most -= len(level)
        if not level or most < 0:
            return most >= 0
    return False


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as block YAML, keys in the given order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)

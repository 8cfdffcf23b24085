"""Records: every value is as declared or the file and the key are named; what is large beyond reason ends at once."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from dfkd_cli.artifacts.records import Between, Hashed, read_json, read_table
from dfkd_cli.config import parse_yaml
from dfkd_cli.errors import ArtifactError, ConfigError


class Example(TypedDict):
    kind: Literal["example"]
    schema: Literal[2]
    count: Annotated[int, Between(1, 10)]
    rate: float
    shape: tuple[int, int]
    names: NotRequired[list[str] | None]
    parts: list[Hashed]
    more: dict[str, float]


WHOLE = {"kind": "example", "schema": 2, "count": 3, "rate": 1, "shape": [1, 2], "parts": [{"sha256": "a"}], "more": {}}


def read(tmp_path, text: str) -> dict[str, Any]:
    (tmp_path / "record.json").write_text(text)
    return dict(read_json(tmp_path / "record.json", Example))


@pytest.mark.parametrize("more", [{}, {"names": None}, {"names": ["a"]}, {"unknown": [{"a": 1}]}, {"more": {"a": 1}}])
def test_what_is_declared_is_read_as_it_is(tmp_path, more):
    assert read(tmp_path, json.dumps(WHOLE | more)) == WHOLE | more


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": "3"}, "count is '3', not a whole number from 1 to 10"),
        ({"count": 0}, "count is 0"),
        ({"count": True}, "count is True"),
        ({"count": 10**12}, "count is 1000000000000"),
        ({"rate": "fast"}, "rate is 'fast', not a finite number"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"shape": [1]}, r"shape is \[1\], not a list of 2"),
        ({"shape": [1, None]}, "shape.1 is None"),
        ({"names": [["a"]]}, r"names.0 is \['a'\], not text"),
        ({"parts": [{"sha256": "a"}, {}]}, "parts.1.sha256 is missing"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"more": {"a": "b"}}, "more.a is 'b'"),
        ({"kind": "other"}, "holds 'other', not 'example'"),
        ({"schema": 3}, "example schema 3, this version reads schema 2 -- update dfkd"),
        ({"schema": 1}, "example schema 1, this version reads schema 2 -- make it again"),
        ({"schema": "2"}, "schema is '2', not 2"),
    ],
)
def test_what_is_not_as_declared_is_named(tmp_path, values, words):
    with pytest.raises(ArtifactError, match=words):
        read(tmp_path, json.dumps(WHOLE | values))


@pytest.mark.parametrize("nesting", [100, 100_000])
def test_documents_beyond_reason(tmp_path, nesting):
    whole = json.dumps(WHOLE)[:-1]
    for value in ("[" * nesting + "]" * nesting, "9" * 5000, "9" * 100):
        with pytest.raises(ArtifactError, match=r"record\.json is damaged"):
            read(tmp_path, f'{whole}, "unknown": {value}}}')


BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 25))
NUMBERS = {
    "long": "9" * 5000,
    "hexadecimal": "0x" + "f" * 50_000,
    "sexagesimal": "1:" * 50_000 + "1",
    "float": "1" * 500 + ".0",
}


@pytest.mark.parametrize(
    "text",
    [BOMB, "a: &a [*a]", "a: " + "[" * 5000, "a: " + "[" * 40 + "]" * 40, "a: !!timestamp b", "a: " + "b" * 2**18,
     *(f"a: {number}" for number in NUMBERS.values())],
    ids=["aliases", "itself", "open", "deep", "tag", "long", *NUMBERS],
)  # fmt: skip
def test_recipes_beyond_reason(text):
    with pytest.raises(ConfigError, match=r"r\.yaml: not readable as YAML"):
        parse_yaml(text, "r.yaml")


def test_an_alias_is_welcome():
    assert parse_yaml("a: &a [1, 2]\nb: *a", "r.yaml") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "table", [b"round\n1,2\n", b"a,b\n1\n", b"a,a\n1,2\n", b"$\\bad{$\n1\n", b"a\n\xff\n", b'a\n"\n']
)
def test_tables_that_are_none(tmp_path, table):
    (tmp_path / "metrics.csv").write_bytes(table)
    with pytest.raises(ArtifactError, match=r"metrics.csv is damaged: not a table"):
        read_table(tmp_path / "metrics.csv")


def test_a_table(tmp_path):
    (tmp_path / "metrics.csv").write_text("round,a/b c\n0,1.5\n1,\n")
    assert read_table(tmp_path / "metrics.csv") == [{"round": "0", "a/b c": "1.5"}, {"round": "1", "a/b c": ""}]

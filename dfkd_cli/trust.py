"""Whose word a name is: which code may run, and where the paths lie that a recipe or an artifact names."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dfkd_cli import catalog
from dfkd_cli.errors import ArtifactError
from dfkd_cli.spec import Spec

RECORDS = ("run.json", "model.json", "manifest.json")  # any of them makes an artifact of the directory that holds it
CONFIG = "config.yaml"  # what every artifact calls its recipe
# The keys of settings that name models or images, which may lie at a URL.
READ = ("teacher", "student", "students", "assistants", "model", "metadata", "transfer_set", "paths", "path",
        "calibrate", "check", "unlabelled")  # fmt: skip
# The keys of recipes that name what is read.
PATHS = (*READ, "weights", "dataset", "data_dir", "recipe")


@dataclasses.dataclass(frozen=True)
class Code:
    """Which code may run: what the user named, or also what an artifact names.

    Attributes:
        typed: Every word of the command line, and of the user's own recipes.
        artifacts: Whether artifacts may name code: ``--allow-code``.
        folder: Where the user says that the Python files lie which they name.
    """

    typed: frozenset[str] = frozenset()
    artifacts: bool = False
    folder: str | None = None

    def may_run(self, spec: str) -> bool:
        """Whether the code that a SPEC names, seen from here, may run: did the user type this SPEC?"""
        return self.artifacts or spec in self.typed or Spec.read(spec).rest in self.typed

    def check(self, spec: str) -> None:
        """Raise :class:`ArtifactError` where a SPEC names code that may not run."""
        if Spec.read(spec).is_code and not self.may_run(spec):
            raise ArtifactError(f"{spec}: this model is code, which is not run", "pass --allow-code if you trust it")

    def locate(self, spec: str, directory: Path) -> str:
        """Where the Python file lies that a model directory names: where the user says, in it, beside it, or here."""
        if Spec.read(spec).file is None:
            return spec
        return placed(spec, [*([Path(self.folder)] if self.folder else []), directory, directory.parent])


def of_artifact(recipe: Path) -> bool:
    """Whether a recipe is an artifact's word, not the user's: it is called as theirs are, or lies in one."""
    homes = {*recipe.absolute().parents, *recipe.resolve().parents}
    return recipe.name == CONFIG or any((home / record).is_file() for home in homes for record in RECORDS)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file. Of the relative paths in it those are found that lie beside it.

    What an artifact recorded was typed beside the artifact, as a rule.
    """
    folders = [path.parent, path.parent.parent] if of_artifact(path) else [path.parent]
    values: dict[str, Any] = _placed(catalog.read_recipe(path), folders)
    return values


def typed_words(recipe: Path, values: Any) -> frozenset[str]:
    """What the user says in a recipe and in those that it names: nothing where the recipe is an artifact's word."""
    if of_artifact(recipe):
        return frozenset()
    own = frozenset(words(values))
    named = [Path(word) for word in own if Path(word).suffix in catalog.RECIPES and os.path.isfile(word)]
    return own.union(*(words(read_recipe(path)) for path in named if not of_artifact(path)))


def words(values: Any) -> Iterator[str]:
    """Every text among plain values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from words(value)


def each_read(value: Any, change: Callable[[str], str], key: str = "", above: str = "") -> Any:
    """Plain values with every text changed that names a model or images; a teacher may stand under its name."""
    if isinstance(value, dict):
        return {name: each_read(inner, change, name, key) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(each_read(inner, change, key, above) for inner in value)
    return change(value) if isinstance(value, str) and (key in READ or above == "teachers") else value


def placed(name: str, folders: Iterable[Path]) -> str:
    """A relative path, or the SPEC of a Python file, in the first of the folders that has it; ``~`` is the user's home.

    As it is where none has, where it means the same from here, and where it is the name of something built in.
    """
    spec = Spec.read(name)
    if spec.rest.startswith("~"):
        return spec.bits + os.path.expanduser(spec.rest)
    path = spec.file or Path(spec.rest)
    if not spec.rest or path.is_absolute():
        return name
    place = next((folder / path for folder in folders if os.path.exists(folder / path)), path)
    if place == path or (os.path.exists(path) and os.path.samefile(path, place)) or catalog.is_built_in(spec.rest):
        return name
    return f"{spec.bits}{place}" + (f":{spec.name}" if spec.file else "")


def _placed(value: Any, folders: list[Path], key: str = "", above: str = "") -> Any:
    """The value of a key with the paths in it placed; a teacher's path may stand under its name in ``teachers``."""
    if isinstance(value, dict):
        return {name: _placed(inner, folders, name, key) for name, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, folders, key, above) for inner in value]
    reads = key in PATHS or above == "teachers"
    if key == "recipe":
        reads = Path(str(value)).suffix in catalog.RECIPES
    if reads and isinstance(value, datetime.date):  # as YAML reads a name like 2024-05-01
        value = str(value)
    return placed(value, folders) if reads and isinstance(value, str) else value

"""What a module of the package defines, read off its text: importing torch takes seconds, reading takes none."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
# Modules that are imported where a definition draws on them. None of them imports torch.
_LIGHT = {
    *sys.stdlib_module_names,
    *(f"{__package__}.{name}" for name in ("catalog", "config", "errors", "options", "synthesis_options")),
}


class Module:
    """A module as text.

    Args:
        path: Its file.
        text: What of the file is read.

    Attributes:
        doc: The docstring.
        names: The statement that defines or imports each name.
        classes: The names of its classes, in the order of the text.
    """

    def __init__(self, path: Path, text: str) -> None:
        tree = ast.parse(text, str(path))
        self.path, self.doc = path, ast.get_docstring(tree) or ""
        self.names = {name: statement for statement in tree.body for name in _bound(statement)}
        self.classes = [name for name, statement in self.names.items() if isinstance(statement, ast.ClassDef)]
        self._undefined, self._values = dict(self.names), dict[str, Any](__name__=__name__)
        self.traits = functools.cache(self._traits)

    def value(self, name: str) -> Any:
        """What a name stands for, after running nothing but its definition and what that draws on.

        Raises:
            NameError: No such name, or only importing the module would give it.
        """
        self._define(name)
        if name not in self._values:
            raise NameError(f"{self.path}: only importing the module would give {name!r}", name=name)
        return self._values[name]

    def _define(self, name: str) -> None:
        statement = self._undefined.pop(name, None)
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            with contextlib.suppress(NameError):  # it may be for a function that is not called here
                self._values[name] = _imported(statement, name)
        elif statement is not None:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    self._define(node.id)
            code = compile(ast.Module([statement], []), str(self.path), "exec", annotations.compiler_flag)
            try:
                exec(code, self._values)
            except NameError as error:
                hint = f"{name!r} draws on {error.name!r}, which only importing the module would give"
                raise NameError(f"{self.path}: {hint}", name=error.name) from None
            if dataclasses.is_dataclass(value := self._values[name]) and isinstance(value, type):
                # Its type hints are strings: resolve them while the names are at hand.
                value.__annotations__ = inspect.get_annotations(value, globals=self._values, eval_str=True)

    def _traits(self, name: str) -> type:
        """A class with nothing but its literal attributes, such as ``kind = "images"``, and its bases in the package.

        What is no class of the package is ``object``.
        """
        statement = self.names.get(name)
        if isinstance(statement, ast.ImportFrom) and (source := _in_package(statement.module or "")):
            return source.traits(_alias(statement, name).name)
        if not isinstance(statement, ast.ClassDef):
            return object
        bases = [self._base(node) for node in statement.bases]
        literals, _ = _attributes(statement)
        return type(name, tuple(base for base in bases if base is not object), literals)

    def computed(self, name: str) -> set[str]:
        """The attributes that a class of the module itself gives, and not as literals."""
        statement = self.names[name]
        return _attributes(statement)[1] if isinstance(statement, ast.ClassDef) else set()

    def _base(self, node: ast.expr) -> type:
        """A base class, written as its name or as ``module.name``."""
        match node:
            case ast.Name(name):
                return self.traits(name)
            case ast.Attribute(ast.Name(module), name):
                statement = self.names.get(module)
                if isinstance(statement, (ast.Import, ast.ImportFrom)) and (source := _module(statement, module)):
                    return source.traits(name)
        return object


@functools.cache
def read(path: Path) -> Module:
    """The module in a file."""
    return Module(path, path.read_text(encoding="utf-8"))


def _attributes(statement: ast.ClassDef) -> tuple[dict[str, Any], set[str]]:
    """What a class assigns: literals by name, and the names of all else."""
    literals, others = dict[str, Any](), set[str]()
    for attribute in statement.body:
        if isinstance(attribute, (ast.Assign, ast.AnnAssign)) and attribute.value is not None:
            names = list(_bound(attribute))
            try:
                literals |= dict.fromkeys(names, ast.literal_eval(attribute.value))
            except (ValueError, TypeError):
                others |= {*names}
    return literals, others


def _module(statement: ast.Import | ast.ImportFrom, name: str) -> Module | None:
    """The module of the package that an import brings under this name, or None."""
    parts = statement.module if isinstance(statement, ast.ImportFrom) else None, _alias(statement, name).name
    return _in_package(".".join(part for part in parts if part))


def _in_package(dotted: str) -> Module | None:
    """A module of the package by its whole name, or None."""
    root, *parts = dotted.split(".")
    stem = PACKAGE.joinpath(*parts)
    path = next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None)
    return read(path) if root == __package__ and path is not None else None


def _imported(statement: ast.Import | ast.ImportFrom, name: str) -> Any:
    """What an import gives, or :class:`NameError` where that is not to be imported here."""
    alias = _alias(statement, name)
    module = alias.name if isinstance(statement, ast.Import) else statement.module or ""
    if not {module, module.partition(".")[0]}.isdisjoint(_LIGHT):
        imported = importlib.import_module(module)
        return imported if isinstance(statement, ast.Import) else getattr(imported, alias.name)
    if isinstance(statement, ast.ImportFrom) and (source := _in_package(statement.module or "")):
        return source.value(alias.name)
    raise NameError(f"{module} is not imported for its definitions", name=name)


def _alias(statement: ast.Import | ast.ImportFrom, name: str) -> ast.alias:
    return next(alias for alias in statement.names if name in (alias.asname, alias.name))


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return []

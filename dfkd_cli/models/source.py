"""What of Python files belongs to a function: the rest may change, and the function is the same."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

SETTINGS = (".json", ".yaml", ".yml", ".toml", ".ini", ".cfg")  # kinds of files that code reads its settings from
LARGE = 2**16  # bytes that no file of settings has


def beside(file: Path, name: str) -> list[tuple[str, str]]:
    """What a function of a file uses of other files of its author's: texts by what they are, wherever all of them lie.

    These are modules beside the file, in the working directory or in packages there, as far as what is used imports
    them by name, and small files of settings beside any of them that are named in a text of their own.

    Args:
        file: The file.
        name: Such as ``build``.
    """
    found = set[tuple[str, str]]()
    folders = (file.parent, Path())
    todo, seen = [(file, name)], set[tuple[Path, str]]()
    while todo:
        place, wanted = todo.pop()
        if (place, wanted) in seen:
            continue
        seen.add((place, wanted))
        text = text_of(place)
        part = used(text, wanted) if wanted else text
        if place != file:
            found.add((f"{place.stem}:{wanted}", part))
        with contextlib.suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(part)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(SETTINGS):
                    with contextlib.suppress(OSError, ValueError):  # a text that is no name
                        if (named := place.parent / node.value).stat().st_size < LARGE:
                            found.add((node.value, text_of(named)))
                elif isinstance(node, (ast.Import, ast.ImportFrom)):
                    todo += _imported(node, place, folders)
    return sorted(found)


def _imported(node: ast.Import | ast.ImportFrom, place: Path, folders: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """The files that a statement imports from folders, and which of their names: all of them where that is empty."""
    if isinstance(node, ast.Import):
        wanted = [(alias.name, "") for alias in node.names]
    else:
        module = node.module or ""
        folders = (place.parents[node.level - 1],) if 0 < node.level <= len(place.parents) else folders
        inner = [f"{module}.{alias.name}".strip(".") for alias in node.names]
        wanted = [(module, "" if alias.name == "*" else alias.name) for alias in node.names if module or node.level]
        wanted += [(name, "") for name in inner]
    for name, of in wanted:
        path = Path(*name.split("."))
        places = (folder / option for folder in folders for option in (path.with_suffix(".py"), path / "__init__.py"))
        if name and (found := next((option for option in places if option.is_file()), None)):
            yield found, of


def text_of(file: Path) -> str:
    """What is in a file, whatever its bytes."""
    return file.read_bytes().decode("utf-8", errors="replace")


def used(text: str, name: str) -> str:
    """The statements of a file that define a name, and all that these use.

    So are those that may do anything when the file is imported. Left out are what only defines other names, the block
    of ``__name__ == "__main__"``, and comments between statements. Of code in other files see :func:`beside`.

    Args:
        text: The whole file, which is returned where it cannot be parsed or does not define the name by a statement.
        name: Such as ``build``.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return text
    defined = [_defined(statement) for statement in statements]
    wanted, chosen = {name}, set[int]()
    if not any(name in names for names in defined if names is not None):
        return text
    while more := {i for i, names in enumerate(defined) if names is None or names & wanted} - chosen:
        chosen |= more
        wanted |= {node.id for i in more for node in ast.walk(statements[i]) if isinstance(node, ast.Name)}
    lines = text.splitlines()
    return "\n".join(line.rstrip() for i in sorted(chosen) for line in lines[slice(*_extent(statements[i]))])


def _defined(statement: ast.stmt) -> set[str] | None:
    """The names that a statement defines and that is all it does; None where it may do anything."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return None if statement.decorator_list else {statement.name}  # it may be put on a list
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        names = {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        return None if "*" in names else names
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return set()  # a docstring
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'":
        return set()
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        calls = any(isinstance(node, ast.Call) for node in ast.walk(statement))
        return names if len(names) == len(targets) and not calls else None
    return None


def _extent(statement: ast.stmt) -> tuple[int, int | None]:
    """The lines of a statement, decorators among them: from, to."""
    decorators = getattr(statement, "decorator_list", [])
    return min(node.lineno for node in (statement, *decorators)) - 1, statement.end_lineno

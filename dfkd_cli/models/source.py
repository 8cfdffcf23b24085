"""What of a Python file belongs to a function in it: the rest may change, and the function is the same."""

from __future__ import annotations

import ast


def used(text: str, name: str) -> str:
    """The statements of a file that define a name, and all that these use.

    So are those that may do anything when the file is imported. Left out are what only defines other names, the block
    of ``__name__ == "__main__"``, and comments between statements. Code of other files is not looked into.

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
        return {statement.name}
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

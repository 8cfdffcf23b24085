"""What the package's files may be: of a size to read at once, importing one way only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dfkd_cli

PACKAGE = Path(dfkd_cli.__file__).parent
FILES = {path: ".".join((*path.relative_to(PACKAGE.parent).parts[:-1], path.stem)) for path in PACKAGE.rglob("*.py")}
# Each layer may import those before it, and what stands in its own folder. Single modules are named by themselves.
LAYERS = (
    {"errors", "seeds", "spec", "urls"},
    {"config", "processes", "streams", "tables", "ui", "unimported"},
    {"options", "workers"},
    {"ray_tasks"},
    {"catalog", "synthesis_options"},
    {"trust"},
    {"settings"},
    {"artifacts"},
    {"models", "rounds"},
    {"data", "report"},
    {"objectives"},
    {"regimes", "synthesizers"},
    {"stages"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """The modules and names of the package that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("dfkd_cli.") and "__version__" not in name}


@pytest.mark.parametrize("path", FILES, ids=FILES.get)
def test_a_file_imports_downwards_and_can_be_read_at_once(path):
    own = FILES[path].split(".")[1]
    for name in imports(path):
        other = name.split(".")[1]
        assert other == own or RANK[other] < RANK.get(own, len(RANK)), name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_imports_go_in_a_circle():
    edges = {name: set() for name in FILES.values()}
    for path, name in FILES.items():
        for target in imports(path):
            edges[name] |= {module for module in (target, target.rpartition(".")[0]) if module in edges}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        for name in leaves:
            del edges[name]
    assert not edges

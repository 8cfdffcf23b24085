"""What there is to choose from, read off the source files as text: listing and ``--help`` never import torch.

A method is one file in ``synthesizers/``, ``objectives/`` or ``regimes/``. Its name is the file's name in kebab-case,
its paper and summary come from the module docstring, its flags from its ``Config`` class, its ``kind`` and ``needs``
(and the ``default_weight`` of an objective) from the class that does the work. There is no list to edit elsewhere.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from dfkd_cli.config import parse_yaml
from dfkd_cli.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).parent
COMMANDS = ("train-teacher", "collect-metadata", "synthesize", "distill", "evaluate", "compare")
# Modules that a Config class may draw on: none of them imports torch.
_TORCH_FREE = ("__future__", "dataclasses", "typing", "dfkd_cli.config", "dfkd_cli.settings")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing to choose: a synthesizer, an objective, a training regime."""

    name: str
    package: str
    kind: str
    needs: tuple[str, ...]
    paper: str
    summary: str
    doc: str
    class_name: str
    config: type
    weight: float  # of an objective that is chosen without one: its paper's

    def load(self) -> type:
        """Import the file and return the class that does the work."""
        module = importlib.import_module(f"dfkd_cli.{self.package}.{self.name.replace('-', '_')}")
        return getattr(module, self.class_name)

    def item(self) -> dict[str, Any]:
        """The entry as ``ls --json`` prints it."""
        return {k: getattr(self, k) for k in ("name", "kind", "paper", "summary")} | {"needs": list(self.needs)}


@functools.cache
def entries(package: str) -> dict[str, Entry]:
    """Every method of a package, by public name."""
    found = (_read(path, package) for path in sorted((PACKAGE / package).glob("*.py")))
    return {entry.name: entry for entry in found if entry is not None}


def find(package: str, name: str, what: str) -> Entry:
    """The method of that name, or :class:`ConfigError` naming the closest one."""
    known = entries(package)
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}", did_you_mean(name, known))
    return known[name]


def _read(path: Path, package: str) -> Entry | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if "Config" not in classes:
        return None  # the package's own base classes
    doc = ast.get_docstring(tree) or ""
    worker, traits = next((name, traits) for name, node in classes.items() if "kind" in (traits := _constants(node)))
    return Entry(
        name=path.stem.replace("_", "-"),
        package=package,
        kind=traits["kind"],
        needs=tuple(traits.get("needs", ())),
        paper=_paper(doc),
        summary=doc.partition("\n")[0].rstrip("."),
        doc=doc,
        class_name=worker,
        config=_config_class(tree, classes["Config"], path),
        weight=traits.get("default_weight", 1.0),
    )


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """The literal class attributes, e.g. ``kind = "images"``."""
    found = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            continue
        if isinstance(target, ast.Name):
            with contextlib.suppress(ValueError):
                found[target.id] = ast.literal_eval(value)
    return found


def _config_class(tree: ast.Module, node: ast.ClassDef, path: Path) -> type:
    """Run only the torch-free imports and the ``Config`` class of a method file."""
    imports = [s for s in tree.body if isinstance(s, ast.ImportFrom) and s.module in _TORCH_FREE]
    imports.sort(key=lambda s: s.module != "__future__")
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(ast.Module([*imports, node], []), str(path), "exec"), namespace)
    config = namespace["Config"]
    # Type hints are strings under `from __future__ import annotations`: resolve them while the namespace is at hand.
    config.__annotations__ = inspect.get_annotations(config, globals=namespace, eval_str=True)
    return config


def _literal(tree: ast.Module, name: str) -> Any:
    """A module-level constant, or None."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(value)
    return None


def _paper(doc: str) -> str:
    found = re.search(r"(arXiv|doi)[: ]\s*(\d[\w./()-]*\w)", doc)
    return f"{found.group(1)}:{found.group(2)}" if found else ""


def models() -> list[dict[str, Any]]:
    """The built-in architectures: every file in ``models/`` with a literal ``NAMES`` is a family."""
    items = []
    for path in sorted((PACKAGE / "models").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree) or ""
        facts = {"kind": path.stem.replace("_", "-"), "needs": [], "paper": _paper(doc)}
        summary = doc.partition("\n")[0].rstrip(".")
        items += [{"name": name, **facts, "summary": summary} for name in _literal(tree, "NAMES") or ()]
    return items


def datasets() -> list[dict[str, Any]]:
    """The named datasets."""
    return [
        {"name": name, "kind": "dataset", "needs": [], "paper": "", "summary": summary}
        for name, summary in _literal(ast.parse((PACKAGE / "data" / "datasets.py").read_text()), "DATASETS").items()
    ]


# -- recipes ----------------------------------------------------------------------------------------------------------


def recipes_directory() -> Path:
    """The recipes of this installation: inside the package when installed, beside it in a checkout."""
    inside = PACKAGE / "_recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


@functools.cache
def recipes() -> dict[str, Path]:
    """Recipe files by ``<command>/<name>``."""
    root = recipes_directory()
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(root.glob("*/*.yaml"))}


def find_recipe(name: str, command: str | None = None) -> Path:
    """A recipe by name (for a command), by ``<command>/<name>``, or by the path of a YAML file."""
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise ConfigError(f"no recipe file {name}", "check the path, or list the built-in ones: dfkd ls recipes")
        return Path(name)
    known = recipes()
    matches = [
        key for key in known if key == name or (key.endswith(f"/{name}") and command in (None, key.split("/")[0]))
    ]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        raise ConfigError(f"recipe {name!r} is ambiguous", f"choose from: {', '.join(matches)}")
    elsewhere = [key.split("/")[0] for key in known if key.endswith(f"/{name}")]
    if elsewhere:
        raise ConfigError(f"{name} is a recipe for {' and '.join(elsewhere)}, not for {command}")
    names = [key.split("/")[1] if command else key for key in known if command in (None, key.split("/")[0])]
    raise ConfigError(f"unknown recipe {name!r}", did_you_mean(name, names))


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file, its head ``about`` included."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a readable recipe") from None


def recipe_items() -> list[dict[str, Any]]:
    """The recipes as ``ls --json`` prints them."""
    items = []
    for key, path in recipes().items():
        about = read_recipe(path).get("about", {})
        items.append(
            {
                "name": key,
                "kind": key.split("/")[0],
                "needs": about.get("needs", []),
                "paper": about.get("paper", ""),
                "summary": ": ".join(about[key] for key in ("claim", "summary") if key in about),
            }
        )
    return items

"""What there is to choose from, read off the source files as text: listing and ``--help`` never import torch.

A method is one file in ``synthesizers/``, ``objectives/`` or ``regimes/``. Its name is the file's name in kebab-case,
its paper and summary come from the module docstring, its flags from its ``Config`` class, its ``kind`` and ``needs``
(and the ``default_weight`` of an objective) from the class that does the work, or that class's bases.

A command is one file in ``stages/``. Its name is the file's name, its help the module docstring, its flags come from
its ``Inputs`` class, all else is in its ``COMMAND``, which stands at the head of the file, and ``run`` does the work:

    def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]

There is no list to edit elsewhere. Whoever asks about commands asks :func:`commands` and :func:`command`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dfkd_cli.config import MOST_YAML, parse_yaml
from dfkd_cli.errors import ConfigError, did_you_mean
from dfkd_cli.unimported import PACKAGE, Module, read
from dfkd_cli.urls import take_credentials

RECIPES = (".yaml", ".yml")  # how a recipe's file is told from a recipe's name

# The part of a command's file that is read: up to the end of its record.
_HEAD = re.compile(r".*?^COMMAND\b.*?(?=^[\w@#]|\Z)", re.MULTILINE | re.DOTALL)

UNTRAINED = "devices", "num_nodes", "precision", "logger"  # what means nothing to a command that optimises nothing

# -- commands ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """Something that a command lets its user choose by name, such as the method or the objectives.

    Attributes:
        flag: The flag that chooses; ``method`` is the one that every command with a choice has.
        package: The folder of the package whose files can be chosen.
        default: The name that is chosen where the user gives none; None where the user must give one.
        several: Whether any number can be chosen, each with a weight.
        beside: The choice exists only where the chosen method lists this among its ``needs``; None for always.
    """

    flag: str
    package: str
    default: str | None = None
    several: bool = False
    beside: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What a file in ``stages/`` says of its command, in ``COMMAND``.

    Attributes:
        position: Commands stand in the help by this number.
        examples: Command lines that work in a directory where those of the commands before have.
        next: The command line that follows.
        out: The directory that is written where ``--out`` names none, called after what it holds; None where nothing
            is written then.
        choices: What is chosen by name.
        shared: Whether several devices and machines can share the work.
        sections: Keys of a recipe that are no options and reach ``Settings.sections`` as they are.
        copies: Whether URLs reach it as copies of what lies there; else as they are typed.
        ignores: What every other command can be told of how it runs, and would mean nothing to this one. Without a
            ``device`` it needs no torch.
        name: What the user types. The file's name.
        help: What the command does, in paragraphs, the first of one line. The file's docstring.
    """

    position: int
    examples: tuple[str, ...]
    next: str
    out: str | None = None
    choices: tuple[Choice, ...] = ()
    shared: bool = False
    sections: tuple[str, ...] = ()
    copies: bool = True
    ignores: tuple[str, ...] = ()
    name: str = ""
    help: str = ""

    @property
    def inputs(self) -> type:
        """The configuration class of what the command reads and how."""
        head = _heads()[self.name]
        with _reading(head.path):
            return head.value("Inputs")

    def data_free(self, inputs: Any) -> bool:
        """Whether no dataset may be opened with these inputs: as ``data_free`` in the file says, which few have."""
        head = _heads()[self.name]
        return "data_free" in head.names and head.value("data_free")(inputs)

    def load(self) -> Callable[..., dict[str, Any]]:
        """Import the file and return ``run``, which does the work."""
        return importlib.import_module(f"dfkd_cli.stages.{self.name.replace('-', '_')}").run


@functools.cache
def commands() -> dict[str, Command]:
    """Every command by name, in the order of the help."""
    records = []
    for name, head in _heads().items():
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in head.doc.split("\n\n"))
        with _reading(head.path):
            records.append(dataclasses.replace(head.value("COMMAND"), name=name, help=text))
    return {record.name: record for record in sorted(records, key=lambda record: record.position)}


def command(name: str) -> Command:
    """The command of that name, which exists."""
    return commands()[name]


@functools.cache
def _heads() -> dict[str, Module]:
    """The heads of the files of commands, by the commands' names."""
    heads = {}
    for path in sorted((PACKAGE / "stages").glob("*.py")):
        if head := _HEAD.match(path.read_text(encoding="utf-8")):
            with _reading(path):
                heads[_public(path)] = Module(path, head.group())
    return heads


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read, also to who uses another one."""
    try:
        yield
    except Exception as error:
        what = f"reading {path.relative_to(PACKAGE)}: {str(error).removeprefix(f'{path}: ')}"
        raise ConfigError(what, "mend this file of the package; DFKD_DEBUG=1 shows where") from error


def _public(path: Path) -> str:
    """The name of what is in a file."""
    return path.stem.replace("_", "-")


# -- methods -----------------------------------------------------------------------------------------------------------


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
        return _item(self.name, self.kind, self.summary, self.paper, self.needs)


def _item(name: str, kind: str, summary: str, paper: str = "", needs: Sequence[str] = ()) -> dict[str, Any]:
    """A row of ``ls``."""
    return {"name": name, "kind": kind, "needs": list(needs), "paper": paper, "summary": summary}


NEEDS = {  # what methods of each package can need
    "synthesizers": {"attention", "batchnorm", "metadata", "student"},
    "objectives": {"batchnorm", "labels", "logits", "targets"},
    "regimes": {"answers", "labels", "network", "objective", "teacher"},
}


@functools.cache
def entries(package: str) -> dict[str, Entry]:
    """Every method of a package, by public name."""
    found = {}
    for path in sorted((PACKAGE / package).glob("*.py")):
        with _reading(path):
            if entry := _read(path, package):
                found[entry.name] = entry
    return found


def find(package: str, name: str, what: str) -> Entry:
    """The method of that name, or :class:`ConfigError` naming the closest one."""
    choices = entries(package)
    if name not in choices:
        raise ConfigError(f"unknown {what} {name!r}", did_you_mean(name, choices))
    return choices[name]


def _read(path: Path, package: str) -> Entry | None:
    module = read(path)
    if "Config" not in module.names:
        return None  # the package's own base classes
    # Of several classes the last: those before it are its bases.
    workers = [name for name in module.classes if hasattr(module.traits(name), "kind")]
    if not workers:
        raise TypeError(f"{path}: no class in it has a literal `kind`, or a base of the package that has one")
    traits: Any = module.traits(worker := workers[-1])
    needs, words = getattr(traits, "needs", ()), NEEDS[package]
    if not isinstance(needs, tuple) or not words.issuperset(needs):
        raise TypeError(f"{path}: {worker}.needs is {needs!r}, and no tuple of {', '.join(sorted(words))}")
    if computed := sorted(module.computed(worker) & {"kind", "needs", "default_weight"}):
        raise TypeError(f"{path}: write {', '.join(computed)} of {worker} as literals: they are read without being run")
    return Entry(
        name=_public(path),
        package=package,
        kind=traits.kind,
        needs=needs,
        paper=_paper(module.doc),
        summary=_summary(module.doc),
        doc=module.doc,
        class_name=worker,
        config=module.value("Config"),
        weight=getattr(traits, "default_weight", 1.0),
    )


def _paper(doc: str) -> str:
    match = re.search(r"(arXiv|doi)[: ]\s*(\d[\w./()-]*\w)", doc)
    return f"{match.group(1)}:{match.group(2)}" if match else ""


def _summary(doc: str) -> str:
    return doc.partition("\n")[0].rstrip(".")


@functools.cache
def models() -> list[dict[str, Any]]:
    """The built-in architectures: every file in ``models/`` with ``NAMES`` is a family."""
    items = []
    for path in sorted((PACKAGE / "models").glob("*.py")):
        with _reading(path):
            module = read(path)
            if "NAMES" in module.names:
                about = _public(path), _summary(module.doc), _paper(module.doc)
                items += [_item(name, *about) for name in module.value("NAMES")]
    return items


def stands_for(pattern: str, name: str) -> bool:
    """Whether a name in a list of models, such as ``wrn-<depth>-<width>``, stands for this one."""
    return re.fullmatch(re.sub(r"<\w+>", r"[0-9]+", pattern), name) is not None


def listed(name: str) -> str:
    """How the list of models has a built-in architecture of that name, or :class:`ConfigError`."""
    known = [item["name"] for item in models()]
    for pattern in known:
        if stands_for(pattern, name):
            return pattern
    if "/" in name:
        raise ConfigError(f"{name}: no such directory", "give a model directory, or a SPEC")
    hint = f"{did_you_mean(name, known)}; or torchvision:NAME, timm:NAME, FILE.py:factory, a model directory"
    raise ConfigError(f"{name}: unknown model", hint)


def is_built_in(name: str) -> bool:
    """Whether an architecture or a dataset is called so, whatever a file or directory of that name is."""
    return any(stands_for(item["name"], name) for item in [*models(), *datasets()])


def datasets() -> list[dict[str, Any]]:
    """The named datasets."""
    names = read(PACKAGE / "data" / "datasets.py").value("DATASETS")
    return [_item(name, "dataset", summary) for name, summary in names.items()]


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
    if Path(name).suffix in RECIPES:
        if not Path(name).is_file():
            raise ConfigError(f"no recipe file {name}", "check the path, or list the built-in ones: dfkd ls recipes")
        return Path(name)
    paths = recipes()
    matches = [
        key for key in paths if key == name or (key.endswith(f"/{name}") and command in (None, key.split("/")[0]))
    ]
    if len(matches) == 1:
        return paths[matches[0]]
    if matches:
        raise ConfigError(f"recipe {name!r} is ambiguous", f"choose from: {', '.join(matches)}")
    elsewhere = [key.split("/")[0] for key in paths if key.endswith(f"/{name}")]
    if elsewhere:
        raise ConfigError(f"{name} is a recipe for {' and '.join(elsewhere)}, not for {command}")
    names = [key.split("/")[1] if command else key for key in paths if command in (None, key.split("/")[0])]
    raise ConfigError(f"unknown recipe {name!r}", did_you_mean(name, names, "dfkd ls recipes lists them"))


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file, its head ``about`` included."""
    try:
        with path.open(encoding="utf-8") as file:
            return parse_yaml(take_credentials(file.read(MOST_YAML + 1)), str(path))
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a readable recipe") from None


def recipe_items() -> list[dict[str, Any]]:
    """The recipes as ``ls --json`` prints them."""
    items = []
    for key, path in recipes().items():
        about = read_recipe(path).get("about", {})
        summary = ": ".join(about[word] for word in ("claim", "summary") if word in about)
        items.append(_item(key, key.split("/")[0], summary, about.get("paper", ""), about.get("needs", ())))
    return items

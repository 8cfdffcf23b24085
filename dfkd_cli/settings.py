"""What one command was told: method defaults, a recipe, ``--set`` and typed flags, in that order of precedence."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_cli import catalog, config, trust
from dfkd_cli.errors import ConfigError, did_you_mean
from dfkd_cli.options import FOREIGN, Run
from dfkd_cli.spec import Spec
from dfkd_cli.trust import Code
from dfkd_cli.urls import named

# Of what is said in two ways the later word counts: it makes the other one be unsaid.
INSTEAD = (("num_images", "images_per_class"), ("images_per_class", "num_images"), ("epochs", "steps"))
LOG = logging.getLogger(__name__)
ABOUT = "summary", "claim", "paper", "needs", "published"  # what the head of a recipe may say
TYPED, ASSIGNED = "--", "--set "  # where typed flags come from, and what ``--set`` says


class Layer(NamedTuple):
    """What one source says."""

    source: str  # a prefix for messages; empty for what the program itself says
    values: Mapping[str, Any]
    typed: frozenset[str] = frozenset()  # the user's own words among the values, which may name code


@dataclasses.dataclass(frozen=True)
class Component:
    """A chosen method or objective with its configuration; ``weight`` multiplies an objective's loss."""

    entry: catalog.Entry
    config: Any
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a command was told, defaults filled in.

    Attributes:
        command: Its name.
        run: How it runs.
        inputs: What it reads and how, as its ``Inputs`` say.
        components: What was chosen, by flag.
        sections: What a recipe says beside its options, such as the pipelines of a grid; None where it says nothing.
        code: Which code may run.
        typed: The options of ``run`` and ``inputs`` that flags or ``--set`` say, perhaps what they are by default.
    """

    command: str
    run: Run
    inputs: Any
    components: dict[str, tuple[Component, ...]]
    sections: Mapping[str, Any]
    code: Code = dataclasses.field(default_factory=Code)
    typed: frozenset[str] = frozenset()

    @property
    def method(self) -> Component:
        """The synthesizer or training regime."""
        return self.components["method"][0]

    @property
    def out(self) -> Path:
        """The directory that the command writes, if it writes one: ``--out``, or the command's own."""
        return Path(self.run.out or catalog.command(self.command).out or "")

    def plain(self, *, volatile: bool = True) -> dict[str, Any]:
        """Plain values that give the same settings when read as a recipe.

        Args:
            volatile: Whether to include what may differ when a run continues. A grid may: its runs have identities of
                their own.
        """
        values: dict[str, Any] = {"command": self.command}
        for choice in catalog.command(self.command).choices:
            chosen = self.components[choice.flag]
            if choice.several:
                values[choice.flag] = {c.entry.name: {"weight": c.weight} | config.plain(c.config) for c in chosen}
            else:
                values |= {choice.flag: chosen[0].entry.name} | config.plain(chosen[0].config)
        for section in (self.inputs, self.run):
            cls: type = type(section)
            traits = config.options(cls)
            values |= {k: v for k, v in config.plain(section).items() if volatile or not traits[k].get("volatile")}
        values |= {name: section for name, section in self.sections.items() if volatile and section is not None}
        return named(values)

    def completed(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What an older version recorded, with the defaults of settings that it did not know.

        A setting that is added must have the default that changes nothing.
        """
        choices = catalog.command(self.command).choices
        components = [(choice, self.components[choice.flag]) for choice in choices]
        methods = [chosen[0].config for choice, chosen in components if not choice.several]
        sections = [*methods, self.inputs, self.run]
        completed = {name: value for section in sections for name, value in config.defaults(type(section)).items()}
        completed |= identity
        for choice, chosen in components:
            if choice.several and isinstance(values := identity.get(choice.flag), dict):
                defaults = {c.entry.name: config.defaults(type(c.config)) for c in chosen}
                completed[choice.flag] = {name: defaults.get(name, {}) | values[name] for name in values}
        return completed

    def replace(self, **changes: Any) -> Settings:
        """The same settings with some inputs changed."""
        return dataclasses.replace(self, inputs=dataclasses.replace(self.inputs, **changes))

    def shortened(self) -> Settings:
        """The same settings with all lengths cut to what a rehearsal takes."""
        components = {
            flag: tuple(dataclasses.replace(c, config=config.shortened(c.config)) for c in chosen)
            for flag, chosen in self.components.items()
        }
        return dataclasses.replace(self, inputs=config.shortened(self.inputs), components=components)

    def each_read(self, change: Callable[[str], str]) -> Settings:
        """The same settings with every text changed that says what is read."""
        components = {
            flag: tuple(dataclasses.replace(c, config=_changed(c.config, change)) for c in chosen)
            for flag, chosen in self.components.items()
        }
        sections = trust.each_read(self.sections, change)
        return dataclasses.replace(self, inputs=_changed(self.inputs, change), components=components, sections=sections)


def _changed(section: Any, change: Callable[[str], str]) -> Any:
    """A configuration object with every text in it changed."""
    return dataclasses.replace(section, **trust.each_read(vars(section), change))


def resolve(command: str, sources: Sequence[tuple[Any, ...]]) -> Settings:
    """Merge what sources say, :class:`Layer` each, lowest precedence first.

    A key that several sections know (``temperature`` of two objectives) reaches all of them;
    ``objective.NAME.key`` reaches one and wins over the short form within the same layer.

    Raises:
        ConfigError: Unknown key, bad value, or a recipe for another command.
    """
    layers = [Layer(*source) for source in sources]
    record, chosen = catalog.command(command), choose(command, layers)
    types: dict[tuple[str, ...], type] = {("inputs",): record.inputs, ("run",): Run}
    types |= {(flag, entry.name): entry.config for flag, picked in chosen.items() for entry, _ in picked}
    values: dict[tuple[str, ...], dict[str, Any]] = {key: {} for key in types}
    labels: dict[tuple[str, ...], dict[str, str]] = {key: {} for key in types}
    fields = {key: config.hints(cls) for key, cls in types.items()}
    sections: dict[str, Any] = dict.fromkeys(record.sections)
    weights = {(c.flag, entry.name, "weight") for c in record.choices if c.several for entry, _ in chosen[c.flag]}
    for source, layer, _ in layers:
        sections |= {name: layer[name] for name in record.sections if name in layer}
        if "teacher" in layer and _places(layer["teacher"]) != _places(values["inputs",].get("teacher")):
            of_another = {name for name in FOREIGN if values["inputs",].pop(name, None) is not None}
            if source == TYPED and (unsaid := sorted(of_another - layer.keys())) and not _says_itself(layer["teacher"]):
                LOG.warning("--teacher: the recipe speaks of another, so not of its %s", ", ".join(unsaid))
        said = {key.removeprefix("inputs.") for key in layer}
        for one, other in INSTEAD:
            own = source in (TYPED, ASSIGNED)  # what a run has recorded has a value for both
            if own and (other, one) in INSTEAD and layer.get(one) and layer.get(other):
                names = [name.replace("_", "-") if source == TYPED else name for name in (one, other)]
                raise ConfigError(f"{source}{f' and {source}'.join(names)} are two words on one thing", "give one")
            if one in said and other not in said:
                values["inputs",].pop(other, None)
        flat = _flatten(layer, chosen, weights)
        for path, value in sorted(flat.items(), key=lambda item: len(item[0])):  # short forms first: specifics win
            if path[0] in record.sections and len(path) == 1:
                continue
            targets = [key for key in fields if (path[:-1] in ((), key)) and path[-1] in fields[key]]
            if not targets:
                if len(path) == 3 and path[0] in chosen and path[:2] not in types:
                    names = [entry.name for entry, _ in chosen[path[0]]]
                    what = f"{source}{'.'.join(path)}: {path[0]} {path[1]} is not chosen"
                    raise ConfigError(what, did_you_mean(path[1], names) if names else "leave it out")
                keys = {name for names in fields.values() for name in names} | {c.flag for c in record.choices}
                raise ConfigError(f"{source}{'.'.join(path)}: unknown key", did_you_mean(path[-1], keys))
            for key in targets:
                if key == ("run",) and source and path[-1] in record.ignores:
                    _must_be_default(source, path[-1], value, command)
                if source not in ("", TYPED, ASSIGNED) and config.options(types[key])[path[-1]].get("typed"):
                    _refuse(source, path, value, config.defaults(types[key])[path[-1]])
                values[key][path[-1]] = value
                labels[key][path[-1]] = source + (path[-1].replace("_", "-") if source == TYPED else path[-1])
    built = {key: config.build(cls, values[key], labels[key]) for key, cls in types.items()}
    components = {
        flag: tuple(Component(entry, built[flag, entry.name], weight) for entry, weight in picked)
        for flag, picked in chosen.items()
    }
    run: Run = built["run",]
    code = Code(frozenset().union(*(layer.typed for layer in layers)), run.allow_code, run.code_dir)
    sayings = [*labels["run",].items(), *labels["inputs",].items()]
    typed = {name for name, label in sayings if label.startswith((TYPED, ASSIGNED))}
    return Settings(command, run, built["inputs",], components, sections, code, frozenset(typed))


def _places(teacher: Any) -> list[str]:
    """A teacher, or several, told apart however their paths are written."""
    names = [] if teacher is None else map(str, teacher) if isinstance(teacher, (list, tuple)) else [str(teacher)]
    return [f"{spec.bits}{os.path.realpath(spec.source or spec.rest)}:{spec.name}" for spec in map(Spec.read, names)]


def _says_itself(teacher: Any) -> bool:
    """Whether a teacher, or each of several, is a directory, which says what it is."""
    return all(Path(name).is_dir() for name in ([teacher] if isinstance(teacher, str) else teacher))


def _must_be_default(source: str, name: str, value: Any, command: str) -> None:
    """Refuse what means nothing to a command; its records have it too, with its default."""
    kind, default = config.hints(Run)[name], config.defaults(Run)[name]
    if config.convert(value, kind, source + name) != default:
        raise ConfigError(f"{source}{name}: means nothing to {command}", "leave it out")


def _refuse(source: str, path: tuple[str, ...], value: Any, default: Any) -> None:
    """Refuse what only the command line may say, unless it says no, or what holds in any case."""
    if value not in (None, False, "false", "no", "off", "none", default):
        flag = "--" + path[-1].replace("_", "-")
        raise ConfigError(f"{source}no recipe may say {flag}", f"leave it out, and type {flag}")


def choose(command: str, layers: list[Layer]) -> dict[str, list[tuple[catalog.Entry, float]]]:
    """The methods and objectives that the layers name, the last layer's word counting."""
    chosen: dict[str, list[tuple[catalog.Entry, float]]] = {}
    for choice in catalog.command(command).choices:
        flag, package = choice.flag, choice.package
        if choice.beside is not None and choice.beside not in (method := chosen["method"][0][0]).needs:
            if any(layer.get(flag) for source, layer, _ in layers if source == TYPED):
                raise ConfigError(f"--method {method.name} takes no --{flag}", "leave it out")
            chosen[flag] = []
            continue
        naming = max((index for index, (_, layer, _) in enumerate(layers) if layer.get(flag)), default=None)
        named = choice.default if naming is None else layers[naming].values[flag]
        if named is None:
            methods = ", ".join(catalog.entries(package))
            raise ConfigError(f"{command} needs a --{flag}", f"choose from: {methods}")
        picked = {name: (catalog.find(package, name, flag), weight) for name, weight in _named(named, choice)}
        weights = {}
        for name, (entry, said) in picked.items():
            weights[name] = entry.weight if said is None else said
            label = f"{flag}.{name}.weight"
            later = layers if said is None else layers[naming:]
            for source, layer, _ in later if choice.several else ():  # `--set objective.NAME.weight=2`
                weights[name] = config.convert(layer.get(label, weights[name]), float, source + label)
        for name, weight in weights.items():
            if weight < 0:
                raise ConfigError(f"{flag} {name}: its weight {weight:g} is below 0", "it would learn the opposite")
        chosen[flag] = [(picked[name][0], weight) for name, weight in weights.items()]
    return chosen


def _named(named: Any, choice: catalog.Choice) -> list[tuple[str, float | None]]:
    """``zskd``, ``["response=0.9", "at"]`` or ``{response: {weight: 0.9}}`` as names with the weights that they say."""
    if isinstance(named, str) and choice.several:  # of `--set`
        named = config.items_of(named, spaces=False, where=choice.flag)
    if isinstance(named, Mapping):
        pairs = [(n, v.get("weight") if isinstance(v, Mapping) else v) for n, v in named.items()]
    else:
        items = named if isinstance(named, (list, tuple)) else [named]
        pairs = [(n, w if equals else None) for n, equals, w in (str(item).partition("=") for item in items)]
        names = [name for name, _ in set(pairs)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"{choice.flag}: {', '.join(sorted(twice))} has two weights", "give it once")
    if not choice.several and len(pairs) != 1:
        raise ConfigError(f"{choice.flag}: needs one name, got {named!r}")
    return [(str(n), None if w is None else config.convert(w, float, f"{choice.flag} {n}")) for n, w in pairs]


def _flatten(
    layer: Mapping[str, Any], chosen: Mapping[str, Any], weights: Collection[tuple[str, ...]]
) -> dict[tuple[str, ...], Any]:
    """The layer's values by path, without its head, the choices themselves and their weights."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in layer.items():
        if key in ("about", "command"):
            continue
        if key in chosen:
            if isinstance(value, Mapping):
                picked = {entry.name for entry, _ in chosen[key]}  # another choice takes none of the recipe's keys
                for name, inner in value.items():
                    if isinstance(inner, Mapping) and name in picked:
                        flat |= {(key, name, k): v for k, v in inner.items() if k != "weight"}
            continue
        path = tuple(key.split("."))
        if path not in weights:
            flat[path] = value
    return flat


def recipe_layer(name: str, command: str) -> Layer:
    """The values of a recipe.

    Raises:
        ConfigError: No such recipe, or one for another command.
    """
    path = catalog.find_recipe(name, command)
    values = trust.read_recipe(path)
    if values.get("command", command) != command:
        raise ConfigError(f"{path} is a recipe for {values['command']}, not for {command}")
    if not trust.of_artifact(path):  # a record of an earlier version is read as it is
        about = values.get("about") or {}
        for key in about if isinstance(about, Mapping) else [about]:
            if key not in ABOUT:
                raise ConfigError(f"{path}: about.{key}: unknown key", did_you_mean(str(key), ABOUT))
    return Layer(f"{path}: ", values, trust.typed_words(path, values))


def typed_layer(values: Mapping[str, Any]) -> Layer:
    """What flags say."""
    return Layer(TYPED, values, frozenset(trust.words(dict(values))))


def assigned_layer(items: list[str]) -> Layer:
    """What ``--set KEY=VALUE ...`` says."""
    pairs = assignments(items)
    inside = [config.items_of(value, spaces=False, where=key) for key, value in pairs.items()]  # of lists
    return Layer(ASSIGNED, pairs, frozenset(trust.words([*pairs.values(), *inside])))


def assignments(items: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` strings as a mapping, split at the first ``=``."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: must be KEY=VALUE")
        path, dot, name = key.rpartition(".")
        pairs[path + dot + name.replace("-", "_")] = value
    return pairs

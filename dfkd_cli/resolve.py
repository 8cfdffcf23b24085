"""Method defaults, a recipe, ``--set`` and typed flags, in that order of precedence, as one checked configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfkd_cli import catalog, config
from dfkd_cli.errors import ConfigError, did_you_mean
from dfkd_cli.settings import CHOICES, FOREIGN, INPUTS, OUT, Run

TYPED = "--"  # where typed flags come from
Layer = tuple[str, Mapping[str, Any]]  # where the values come from (a prefix for messages), and the values


@dataclasses.dataclass(frozen=True)
class Component:
    """A chosen method or objective with its configuration; ``weight`` multiplies an objective's loss."""

    entry: catalog.Entry
    config: Any
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a command was told, defaults filled in."""

    command: str
    run: Run
    inputs: Any
    components: dict[str, tuple[Component, ...]]
    grid: Mapping[str, Any] | None = None  # the pipelines of a compare recipe
    about: Mapping[str, Any] | None = None  # and its head: published numbers stand there

    @property
    def method(self) -> Component:
        """The synthesizer or training regime."""
        return self.components["method"][0]

    @property
    def out(self) -> Path:
        """The directory that the command writes; ``evaluate`` writes one only where it is named."""
        return Path(self.run.out or OUT[self.command])

    def plain(self, *, volatile: bool = True) -> dict[str, Any]:
        """Plain values that give the same settings when read as a recipe.

        Args:
            volatile: Whether to include what may differ when a run continues. A grid may: its runs have identities of
                their own.
        """
        values: dict[str, Any] = {"command": self.command}
        for flag, chosen in self.components.items():
            if flag == "method":
                values |= {"method": chosen[0].entry.name} | config.plain(chosen[0].config)
            else:
                values[flag] = {c.entry.name: {"weight": c.weight} | config.plain(c.config) for c in chosen}
        for section in (self.inputs, self.run):
            dropped = {f.name for f in dataclasses.fields(section) if f.metadata.get("volatile") and not volatile}
            values |= {k: v for k, v in config.plain(section).items() if k not in dropped}
        for name, section in (("about", self.about), ("grid", self.grid)):
            if section is not None and volatile:
                values[name] = dict(section)
        return values

    def completed(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What an older version recorded, with the defaults of settings that it did not know.

        A setting that is added must have the default that changes nothing.
        """
        methods = self.components.get("method", ())
        sections = [*(type(method.config) for method in methods), type(self.inputs), type(self.run)]
        known = {name: value for section in sections for name, value in _plain_defaults(section).items()}
        completed = known | dict(identity)
        for flag, chosen in self.components.items():
            if flag != "method" and isinstance(identity.get(flag), dict):
                defaults = {c.entry.name: _plain_defaults(type(c.config)) for c in chosen}
                completed[flag] = {name: defaults.get(name, {}) | values for name, values in identity[flag].items()}
        return completed

    def replace(self, **changes: Any) -> Settings:
        """The same settings with some inputs changed."""
        return dataclasses.replace(self, inputs=dataclasses.replace(self.inputs, **changes))


def resolve(command: str, layers: list[Layer]) -> Settings:
    """Merge layers, lowest precedence first.

    A key that several sections know (``temperature`` of two objectives) reaches all of them;
    ``objective.NAME.key`` reaches one and wins over the short form within the same layer.

    Raises:
        ConfigError: Unknown key, bad value, or a recipe for another command.
    """
    chosen = choose(command, layers)
    types: dict[tuple[str, ...], type] = {("inputs",): INPUTS[command], ("run",): Run}
    types |= {(flag, entry.name): entry.config for flag, picked in chosen.items() for entry, _ in picked}
    values: dict[tuple[str, ...], dict[str, Any]] = {key: {} for key in types}
    labels: dict[tuple[str, ...], dict[str, str]] = {key: {} for key in types}
    fields = {key: config.hints(cls) for key, cls in types.items()}
    grid = about = None
    for source, layer in layers:
        if command == "compare":
            about = layer.get("about", about)
        if "teacher" in layer and layer["teacher"] != values["inputs",].get("teacher"):
            for name in FOREIGN:  # what was said of another teacher
                values["inputs",].pop(name, None)
        flat = _flatten(layer, chosen)
        for path, value in sorted(flat.items(), key=lambda item: len(item[0])):  # short forms first: specifics win
            if path == ("grid",) and command == "compare":
                grid = value
                continue
            targets = [key for key in fields if (path[:-1] in ((), key)) and path[-1] in fields[key]]
            if not targets:
                known = {name for names in fields.values() for name in names} | {
                    flag for flag, *_ in CHOICES.get(command, ())
                }
                raise ConfigError(f"{source}{'.'.join(path)}: unknown key", did_you_mean(path[-1], known))
            for key in targets:
                values[key][path[-1]] = value
                labels[key][path[-1]] = source + (path[-1].replace("_", "-") if source == TYPED else path[-1])
    built = {key: config.build(cls, values[key], labels[key]) for key, cls in types.items()}
    components = {
        flag: tuple(Component(entry, built[flag, entry.name], weight) for entry, weight in picked)
        for flag, picked in chosen.items()
    }
    return Settings(command, built["run",], built["inputs",], components, grid, about)


def choose(command: str, layers: list[Layer]) -> dict[str, list[tuple[catalog.Entry, float]]]:
    """The methods and objectives that the layers name, the last layer's word counting."""
    chosen: dict[str, list[tuple[catalog.Entry, float]]] = {}
    for flag, package, default in CHOICES.get(command, ()):
        if flag == "objective" and "teacher" not in chosen["method"][0][0].needs:
            if any(layer.get(flag) for source, layer in layers if source == TYPED):
                name = chosen["method"][0][0].name
                raise ConfigError(f"--method {name} has no teacher to learn from", f"leave out --{flag}")
            chosen[flag] = []
            continue
        named = next((layer[flag] for _, layer in reversed(layers) if layer.get(flag)), default)
        if named is None:
            known = ", ".join(catalog.entries(package))
            raise ConfigError(f"{command} needs a --{flag}", f"choose from: {known}")
        picked = {name: (catalog.find(package, name, flag), weight) for name, weight in _named(named, flag)}
        weights = {name: entry.weight if weight is None else weight for name, (entry, weight) in picked.items()}
        for source, layer in layers:  # `--set objective.NAME.weight=2`
            for name in weights:
                label = f"{flag}.{name}.weight"
                weights[name] = config.convert(layer.get(label, weights[name]), float, source + label)
        for name, weight in weights.items():
            if weight < 0:
                raise ConfigError(f"{flag} {name}: its weight {weight:g} is below 0", "it would learn the opposite")
        chosen[flag] = [(picked[name][0], weight) for name, weight in weights.items()]
    return chosen


def _named(named: Any, flag: str) -> list[tuple[str, float | None]]:
    """``zskd``, ``["response=0.9", "at"]`` or ``{response: {weight: 0.9}}`` as names with the weights that they say."""
    if isinstance(named, Mapping):
        pairs = [(n, v.get("weight") if isinstance(v, Mapping) else v) for n, v in named.items()]
    else:
        items = named if isinstance(named, (list, tuple)) else [named]
        pairs = [(n, w or None) for n, _, w in (str(item).partition("=") for item in items)]
    if flag == "method" and len(pairs) != 1:
        raise ConfigError(f"{flag}: needs one name, got {named!r}")
    return [(str(n), None if w is None else config.convert(w, float, f"{flag} {n}")) for n, w in pairs]


def _flatten(layer: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """The layer's values by path, without its head and without the choices themselves."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in layer.items():
        if key in ("about", "command"):
            continue
        if key in chosen:
            if isinstance(value, Mapping):
                picked = {
                    entry.name for entry, _ in chosen[key]
                }  # another choice than the recipe's takes none of its keys
                for name, inner in value.items():
                    if isinstance(inner, Mapping) and name in picked:
                        flat |= {(key, name, k): v for k, v in inner.items() if k != "weight"}
            continue
        path = tuple(key.split("."))
        if path[0] not in chosen or path[-1] != "weight":
            flat[path] = value
    return flat


def recipe_layer(name: str, command: str) -> Layer:
    """The values of a recipe.

    Raises:
        ConfigError: No such recipe, or one for another command.
    """
    path = catalog.find_recipe(name, command)
    values = catalog.read_recipe(path)
    if values.get("command", command) != command:
        raise ConfigError(f"{path} is a recipe for {values['command']}, not for {command}")
    if values.pop("allow_code", False):
        raise ConfigError(f"{path}: no recipe may allow code to be run", "leave it out, and type --allow-code")
    return f"{path}: ", values


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


def _plain_defaults(section: type) -> dict[str, Any]:
    """The defaults of a configuration class, as :meth:`Settings.plain` has them."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in config.defaults(section).items()
    }

"""From a model SPEC to a network: built-in, torchvision, timm, or the user's own code."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dfkd_cli import models
from dfkd_cli.artifacts.files import digest, sha256_file
from dfkd_cli.catalog import listed, stands_for
from dfkd_cli.errors import ArtifactError, ConfigError, did_you_mean
from dfkd_cli.models.adapter import Habits, adapt, logits_in, watch
from dfkd_cli.models.quantized import quantize
from dfkd_cli.models.source import beside, text_of, used
from dfkd_cli.models.weights import require_tensors, state_of
from dfkd_cli.spec import LIBRARIES, Spec

Size = tuple[int, int, int]


Load = Callable[[nn.Module], None]


def build(
    spec: str, num_classes: int, input_size: Size, allow_code: bool = False, load: Load | None = None
) -> nn.Module:
    """A network that turns normalised images (B, C, H, W) into logits (B, K).

    Args:
        spec: A built-in name, ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory`` or ``./file.py:factory``.
            A factory is called with those of the arguments ``num_classes`` and ``input_size`` that it has.
            Each with ``w4a8:`` before it: with 4 bits for weights and 8 for activations, 2 to 8 of either.
        num_classes: Number of logits K.
        input_size: Images (C, H, W).
        allow_code: Whether ``spec`` may name code to import. The user's own words may, a stranger's artifact may not.
        load: What puts its weights into it; without, it is freshly initialised.

    Raises:
        ConfigError: The name is unknown, or the network cannot be built or run for these images.
        ArtifactError: Code was named but is not allowed, the network's output is not (B, K), or that of weights is not
            finite.
    """
    read = Spec.read(spec)
    if read.bits:
        net = build(read.rest, num_classes, input_size, allow_code)
        weights, activations = map(int, read.bits[1:-1].split("a"))
        if not (2 <= weights <= 8 and 2 <= activations <= 8):
            raise ConfigError(
                f"{spec}: {read.bits[:-1]} is not a pair of widths from 2 to 8", "e.g. w8a8, w4a8 or w4a4"
            )
        quantize(net, weights, activations, input_size, read.rest)
        if load is not None:
            load(net)
        return net
    if read.source in LIBRARIES:
        net = {"torchvision": _torchvision, "timm": _timm}[read.source](read.name, num_classes, input_size)
    elif not read.is_code:
        net = _families()[listed(spec)](spec, num_classes, input_size)
    elif allow_code:
        net = _user_code(spec, num_classes, input_size).float()  # as pixels are
    else:
        raise ArtifactError(f"{spec}: this model is code, which is not run", "pass --allow-code if you trust it")
    shown = "x".join(map(str, input_size))

    def run() -> Habits:
        with _as_config_error(f"{spec}: cannot run on {shown} images", _of_run):
            return watch(net, input_size)

    if load is not None:
        _load(net, load, run)
    habits = run()
    adapt(net, spec, num_classes, habits)
    if load is not None and not logits_in(habits.outputs[False]).isfinite().all():
        raise ArtifactError(f"{spec}: with these weights its answers are not finite", "take an earlier file of weights")
    require_tensors(net)
    return net


def _load(net: nn.Module, load: Load, run: Callable[[], Any]) -> None:
    """Put weights into a network before it runs: what it makes of those that it has then, it may keep.

    Of some networks parts come into being when they run.
    """
    before = state_of(net)
    try:
        if not any(map(is_lazy, before.values())):
            load(net)
            return
        run()
    except ArtifactError:
        run()
        if state_of(net).keys() == before.keys():
            raise
    load(net)


@contextlib.contextmanager
def _as_config_error(message: str, hint: str | Callable[[Exception], str] = "") -> Iterator[None]:
    """Turn any failure of foreign code into one line; the hint may depend on what it is."""
    try:
        yield
    except Exception as error:  # foreign code can raise anything
        hint = hint if isinstance(hint, str) else hint(error)
        raise ConfigError(f"{message}: {type(error).__name__}: {str(error)[:300]}", hint) from error


@functools.cache
def _families() -> dict[str, Callable[[str, int, Size], nn.Module]]:
    """The ``build`` function of every built-in name, as the family files declare them."""
    names = [info.name for info in pkgutil.iter_modules(models.__path__)]
    files = [importlib.import_module(f"{models.__name__}.{name}") for name in names]
    return {name: file.build for file in files for name in getattr(file, "NAMES", ())}


def family(name: str) -> Callable[[str, int, Size], nn.Module] | None:
    """What builds a built-in name, or None where it is none."""
    for pattern, build_one in _families().items():
        if stands_for(pattern, name):
            return build_one
    return None


def code_hashes(spec: str) -> list[str]:
    """What stands for the code that a SPEC names, and then what did so for earlier versions; nothing of a library's.

    It is the function and all that it uses in its file and in others beside it. Earlier it was what it uses in its
    file, and before that the whole file; in a module it was nothing.

    Raises:
        ArtifactError: There is no such file.
    """
    read = Spec.read(spec)
    file = read.file
    if file is not None and not file.is_file():
        raise ArtifactError(f"no file {file}", "check the SPEC")
    module = Path(f"{read.source.replace('.', '/')}.py")
    if file is None and not (read.is_code and read.name and module.is_file()):
        return []
    place, factory = file or module, read.name.partition(".")[0]
    own, others = used(text_of(place), factory), beside(place, factory)
    if file is None:
        return [digest([own, others])]
    return [*([digest([own, others])] if others else []), digest(own), sha256_file(file)]


def _torchvision(name: str, num_classes: int, input_size: Size) -> nn.Module:
    import torchvision.models as zoo

    if name not in (names := zoo.list_models(module=zoo)):  # this module: classifiers only
        raise ConfigError(f"torchvision:{name}: unknown model", _closest("torchvision", name, names))
    # With auxiliary classifiers these two would have more weights; they also warn about their initialisation.
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": input_size[1]}  # its position embedding has the image's size
    with _as_config_error(f"torchvision:{name}: cannot be built"):
        return zoo.get_model(name, weights=None, num_classes=num_classes, **options)


def _timm(name: str, num_classes: int, input_size: Size) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"timm:{name}: timm is not installed", "pip install 'dfkd[timm]'") from None

    if not timm.is_model(name):
        raise ConfigError(f"timm:{name}: unknown model", _closest("timm", name, timm.list_models()))
    channels, *image = input_size
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    with _as_config_error(f"timm:{name}: cannot be built"):
        facts = timm.get_pretrained_cfg(name)
        if facts is not None and facts.fixed_input_size:  # e.g. ViT, whose position embedding has the image's size
            options["img_size"] = tuple(image)
        return timm.create_model(name, pretrained=False, **options)


def _closest(source: str, name: str, names: list[str]) -> str:
    """A hint for a catalogue that is too long to be listed."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    return f"closest names: {', '.join(f'{source}:{other}' for other in close)}"


def load_code(spec: str) -> Callable[..., Any]:
    """The function or class that a SPEC names in a file or an importable module.

    Raises:
        ConfigError: There is none, or importing it fails.
    """
    source, name, file = (read := Spec.read(spec)).source, read.name, read.file
    if file is not None and not file.is_file():
        raise ConfigError(
            f"{spec}: no such file {source}", "check the SPEC; where an artifact's files lie, say with --code-dir"
        )
    with _foreign(spec, "imported", functools.partial(_of_import, spec)):
        module = _import_file(file) if file is not None else importlib.import_module(source)
    found: Any = module
    for part in name.split("."):  # as of a function in a class
        found = getattr(found, part, None)
    if not callable(found):
        theirs = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ConfigError(f"{spec}: no function {name} in {source}", did_you_mean(name, theirs) if theirs else "")
    made: Callable[..., Any] = found
    return made


def _of_run(error: Exception) -> str:
    """A hint for a network that cannot run."""
    text = str(error).lower()
    if isinstance(error, TypeError) and "missing" in text:
        return "it gets images alone: give what else its forward takes a default"
    if "cuda" in text or "nvidia" in text:
        return "leave .cuda() and devices out of it: it is put where it is to run"
    if any(kind in text for kind in ("dtype", "bfloat16", "half", "double")):
        return "it is run in float32: leave other types out of it"
    if isinstance(error, AssertionError):
        return "it is tried on noise with mean 0 and std 1, two at a time: check --input-size, or what it asserts"
    return "check --input-size; --debug shows where"


def _of_call(error: Exception) -> str:
    """A hint for a factory that fails."""
    if isinstance(error, OSError):
        return "build it without weights that have to be fetched, or are elsewhere: --weights brings them"
    return "it can be called with nothing, num_classes or input_size, which is given as (channels, height, width)"


def _of_import(spec: str, error: Exception) -> str:
    """A hint for what a file cannot import."""
    if isinstance(error, ModuleNotFoundError):
        return "modules are looked for beside the file, here, and in the directories that PYTHONPATH names"
    if not isinstance(error, ImportError) or "no known parent package" not in str(error):
        return ""
    read = Spec.read(spec)
    path, root = Path(read.source).resolve(), Path.cwd()
    if path.parent == root or not path.is_relative_to(root):
        root = path.parent.parent
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    return f"name it as a package: {module}:{read.name}" + ("" if root == Path.cwd() else f", in {root}")


def _user_code(spec: str, num_classes: int, input_size: Size) -> nn.Module:
    """Call the factory of a SPEC with those of the two arguments that it declares."""
    make = load_code(spec)
    if isinstance(make, nn.Module):
        hint = "name a function that returns it, such as def build(): return Net()"
        raise ConfigError(f"{spec}: is a network, not a function that makes one", hint)
    with _foreign(spec, "called", _of_call):
        declared = inspect.signature(make).parameters
        offered = {"num_classes": num_classes, "input_size": input_size}
        named = {key: value for key, value in offered.items() if key in declared}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in declared.values()):
            named["num_classes"] = num_classes  # as torchvision's factories pass it on
        net = make(**named)
    if not isinstance(net, nn.Module) or isinstance(net, torch.jit.ScriptModule):
        raise ConfigError(
            f"{spec}: returned {type(net).__name__}", "the factory must return a torch.nn.Module in Python"
        )
    return net


@contextlib.contextmanager
def _foreign(spec: str, when: str, hint: str | Callable[[Exception], str]) -> Iterator[None]:
    """Run a user's code as a script's: it sees no arguments of this program's, and does not end it.

    The type of new tensors, the number of threads and the working directory are afterwards as they were, and neither is
    a warning an error that was none before, nor is logging off.
    """
    words, source, here = sys.argv, Spec.read(spec).source, os.getcwd()
    floats, threads = torch.get_default_dtype(), torch.get_num_threads()
    filters, disabled = list(warnings.filters), logging.root.manager.disable
    sys.argv = [source]
    try:
        with _as_config_error(f"{spec}: failed", hint), _beside(source):
            yield
    except SystemExit as error:
        main = 'put what parses arguments under if __name__ == "__main__"'
        mend = main if when == "imported" else "parse no arguments in it, and raise errors instead"
        raise ConfigError(f"{spec}: ends the program when it is {when}: {error.code}", mend) from error
    finally:
        sys.argv = words
        torch.set_default_dtype(floats)
        torch.set_num_threads(threads)
        os.chdir(here)
        logging.disable(disabled)
        for added in [entry for entry in warnings.filters if entry[0] == "error" and entry not in filters]:
            cast("list[Any]", warnings.filters).remove(added)


def _beside(source: str) -> AbstractContextManager[None]:
    """As for a script and `python -m`, modules beside the file and in the working directory can be imported."""
    return _importable(*([Path(source).parent] if source.endswith(".py") else []), Path())


_USER = "_dfkd_user_"  # what modules from users' files are called
# By folders in which they are looked for, the modules that users' code has imported from there.
_imported: dict[tuple[str, ...], dict[str, ModuleType]] = {}


@contextlib.contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Modules in the folders can be imported, and stand for none of the same name that other folders gave."""
    entries = tuple(dict.fromkeys(str(folder.resolve()) for folder in folders))
    for modules in _imported.values():
        for name in modules:
            sys.modules.pop(name, None)
    own = _imported.setdefault(entries, {})
    sys.modules.update(own)
    before = set(sys.modules)
    sys.path[:0] = entries
    try:
        yield
    finally:
        for entry in entries:
            with contextlib.suppress(ValueError):  # it may have removed it itself
                sys.path.remove(entry)
        added = {k: module for k, module in sys.modules.items() if k not in before and not k.startswith(_USER)}
        roots = {name for name, module in added.items() if "." not in name and _homes(module) & {*entries}}
        own.update({name: module for name, module in added.items() if name.partition(".")[0] in roots | {*own}})


def _homes(module: ModuleType) -> set[str]:
    """The folders in which a module's file or directory lies."""
    places = [*getattr(module, "__path__", ())] or [getattr(module, "__file__", None) or ""]
    return {str(Path(place).parent) for place in places}


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{_USER}{path.stem}_{digest(str(path.resolve()))[:12]}", path)
    assert spec is not None and spec.loader is not None  # as for every path that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module

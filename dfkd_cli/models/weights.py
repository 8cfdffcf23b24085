"""Weights from files made elsewhere, whatever lies around them there, without ever running code from them."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dfkd_cli.artifacts.pickles import LOADED, Unread, read_foreign, refuse_code
from dfkd_cli.errors import ArtifactError, ConfigError, did_you_mean, some
from dfkd_cli.models.classifier import is_batch_norm

LOG = logging.getLogger(__name__)
_PREFERRED = ("state_dict", "model_state_dict", "model", "net", "weights", "teacher")  # of what fits equally well
_AUXILIARY = re.compile(r"aux", re.IGNORECASE)  # heads that only help in training, as of Inception
_COUNTS = re.compile(r"(.*\.)?total_(ops|params)")  # buffers that thop leaves in every layer whose cost it counted
_UNCOUNTED = "num_batches_tracked"  # inference does not use it; files from before PyTorch 0.4.1 lack it
_STATISTICS = ("running_mean", "running_var")
_WHOLE_NUMBERS = ("zero_point", "_packed_params._packed_params")
_LEFT_OUT = "torch.save({k: v for k, v in state.items() if k in net.state_dict()}, NEW)"
_JOINED = "torch.save({k: v for file in FILES for k, v in %s.items()}, NEW)"
_READ_BY = {".safetensors": "safetensors.torch.load_file(file)"}
_LISTED = 3  # keys named in a message
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])(?=\.)")  # torchvision's names before PyTorch 0.4
# What PyTorch wraps parts of a network in when it compiles them, shares them out or forgets their activations.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NORMED = re.compile(r".*(_g|_v|_orig|_u)|.*\bparametrizations\..*")
_PART = re.compile(r"-\d+-of-\d+\.")
_DEPTH = 20  # containers within containers that a file may have


@dataclass(frozen=True)
class _Entry:
    """What a file has at the end of a path: a tensor, or what was not read; and the path of the mapping it is in."""

    value: Tensor | Unread
    container: str


def load_weights(net: nn.Module, file: Path, key: str | None = None) -> None:
    """Copy the weights in ``file`` into ``net``; every one must have its place.

    Reads safetensors, and what ``torch.save`` wrote as far as it holds plain tensors. Of all that is in the file, the
    container and the prefix of its keys are taken under which most of the network's own keys are found.

    Args:
        net: The network.
        file: The file; its name does not matter.
        key: Where in the file they are, such as ``ema``, instead.

    Raises:
        ConfigError: There is nothing under ``key``, or the state of ``net`` is more than tensors.
        ArtifactError: The file is missing, damaged, carries code, has weights that are not finite or no dense floats,
            or does not fit ``net``, which is then unchanged.
    """
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file")
    content = _read(file)
    entries = dict(_entries(content))
    if not any(isinstance(entry.value, Tensor) for entry in entries.values()):
        _refuse_code({"": _Entry(content, "")} if isinstance(content, Unread) else entries, file)
        keys = f"keys {some(map(str, content))}" if isinstance(content, Mapping) and content else None
        raise ArtifactError(
            f"{file}: holds no state_dict, found {keys or type(content).__name__}", "save net.state_dict()"
        )
    if key is not None:
        within = {path.removeprefix(f"{key}."): e for path, e in entries.items() if path.startswith(f"{key}.")}
        if not within:
            raise ConfigError(f"--weights-key {key}: not in {file}", did_you_mean(key, _outermost(entries)))
        entries = within
    require_tensors(net)
    expected = state_of(net)
    found = _fitting(entries, expected, file)
    _check_kinds(found, net, file)
    state = _check_fit(found, net, file)
    if bad := not_finite(state, net):
        hint = "the training that made them failed; take an earlier file"
        raise ArtifactError(f"{file}: not finite: {some(bad)}", hint)
    # Strictness is checked above, in fewer words; what a network's own method takes is not known.
    nn.Module.load_state_dict(net, _of_versions(state, expected), strict=False)


def _of_versions(state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> OrderedDict[str, Tensor]:
    """A state of the same versions of layers as another, which some layers ask for; or of none, as in old files."""
    made: Any = OrderedDict(state)
    made._metadata = getattr(like, "_metadata", OrderedDict())
    return made


def _read(file: Path) -> Any:
    if file.name.endswith(".index.json"):
        raise ArtifactError(f"{file}: names several files of weights", _joining(file.with_suffix("").with_suffix("")))
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":  # after the length of the header
        try:
            return safetensors.torch.load(file.read_bytes())  # its own reader takes no name that is not UTF-8
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: not readable as safetensors: {error}", "the file is damaged") from None
    return read_foreign(file)


def _refuse_code(entries: Mapping[str, _Entry], file: Path) -> None:
    """Refuse entries, by their paths, that are of some class, with a hint how weights are got out of these."""
    unread = {path: entry.value for path, entry in entries.items() if isinstance(entry.value, Unread)}
    networks = sorted((path for path, value in unread.items() if value.network), key=lambda path: _rank(f"{path}."))
    arrays = [path for path, value in unread.items() if value.array]
    mixed = {entry.container for entry in entries.values() if isinstance(entry.value, Tensor)}
    besides = [path for path in unread if entries[path].container in mixed]
    weights = None
    if networks:
        parent = entries[path := networks[0]].container
        keys = _subscripts(parent) + (f'["{path.removeprefix(f"{parent}.")}"]' if path else "")
        weights = f"{LOADED}{keys}.state_dict()"
    elif arrays:
        found = f"{LOADED}{_subscripts(entries[arrays[0]].container)}"
        weights = f"{{k: torch.as_tensor(v) for k, v in {found}.items()}}"
    elif besides:
        found = f"{LOADED}{_subscripts(entries[besides[0]].container)}"
        weights = f"{{k: v for k, v in {found}.items() if torch.is_tensor(v)}}"
    if unread:
        refuse_code([value.name for value in unread.values()], file, weights)


def _subscripts(container: str) -> str:
    """What in Python takes a container out of what it lies in, by its path."""
    return "".join(f'["{key}"]' for key in container.split(".") if key)


def _entries(content: Any) -> Iterator[tuple[str, _Entry]]:
    """Every entry in mappings within mappings, by its path: the keys, joined by dots. No mapping is read twice."""
    seen = set()
    todo = [("", 0, content)]
    while todo:
        container, depth, mapping = todo.pop(0)
        if not isinstance(mapping, Mapping) or id(mapping) in seen or depth > _DEPTH:
            continue
        seen.add(id(mapping))
        for key, value in mapping.items():
            path = f"{container}.{key}" if container else key
            if isinstance(key, str) and isinstance(value, Tensor | Unread):
                yield path, _Entry(value, container)
            elif isinstance(key, str):  # those of optimisers are numbers
                todo.append((path, depth + 1, value))


def _outermost(paths: Iterable[str]) -> list[str]:
    """The first parts of paths."""
    return list(dict.fromkeys(path.partition(".")[0] for path in paths))


def _prefixes(path: str) -> Iterator[str]:
    """What the path of a tensor may begin with before the name of the weight: nothing, or up to one of its dots."""
    return (path[:end] for end in [0, *(dot.end() for dot in re.finditer(r"\.", path))])


def _fitting(entries: Mapping[str, _Entry], expected: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under that prefix of the paths in a file which finds most keys of the network, by those keys.

    The network's keys may have a prefix themselves that the file lacks. What lies beside them in the same containers
    and has their prefix belongs to them.
    """
    unwrapped = {_WRAPPER.sub("", path): entry for path, entry in entries.items()}
    if len(unwrapped) == len(entries) and not any(map(_WRAPPER.search, expected)):
        entries = unwrapped
    fits: Counter[tuple[str, str]] = Counter()
    lackings = list(_shared_prefixes(expected))
    for path, entry in entries.items():
        for prefix in _prefixes(path):
            for lacking in lackings:
                value = expected.get(lacking + path[len(prefix) :])
                if value is not None and isinstance(entry.value, Tensor):
                    fits[prefix, lacking] += 1 + (value.shape == entry.value.shape)
    if not fits:
        fits[list(_shared_prefixes(entries))[-1], ""] = 0
    best = [pair for pair, count in fits.items() if count == max(fits.values())]
    prefix, lacking = min(best, key=lambda pair: (len(pair[1]), _rank(pair[0])))  # of equals, the first in the file

    def sources(pair: tuple[str, str]) -> dict[str, str]:
        """Which entry each of the network's weights would come from."""
        named = {pair[1] + path[len(pair[0]) :]: path for path in entries if path.startswith(pair[0])}
        return {key: path for key, path in named.items() if key in expected}

    if others := list(dict.fromkeys(pair[0] for pair in best if sources(pair) != sources((prefix, lacking)))):
        choices = some(other[:-1] or "the outermost" for other in others)
        LOG.warning("%s: took %s; %s would fit too: --weights-key", file, prefix[:-1] or "the outermost", choices)
    taken = {lacking + path[len(prefix) :]: entry for path, entry in entries.items() if path.startswith(prefix)}
    homes = {entry.container for key, entry in taken.items() if key in expected}
    beside = [key for key, entry in taken.items() if entry.container in homes or not homes]
    _refuse_code({prefix + key.removeprefix(lacking): taken[key] for key in beside}, file)
    return {key: tensor for key in beside if isinstance(tensor := taken[key].value, Tensor)}


def _rank(prefix: str) -> tuple[int, ...]:
    ranks = {name: index for index, name in enumerate(_PREFERRED)}
    return tuple(ranks.get(part, len(ranks)) for part in prefix.removesuffix(".").split("."))


def _shared_prefixes(keys: Iterable[str]) -> Iterator[str]:
    """The prefixes that all keys have, from none to the longest."""
    keys = list(keys)
    return (prefix for prefix in _prefixes(keys[0] if keys else "") if all(key.startswith(prefix) for key in keys))


def _check_fit(state: dict[str, Tensor], net: nn.Module, file: Path) -> dict[str, Tensor]:
    """What fits, in place of names that layers had before by those that they have.

    Refuses what does not; leaves out auxiliary heads and counts that the network does not have, and says so.
    """
    expected = state_of(net)
    # Tied weights are one tensor under several keys, of which a file may have one.
    there = {_place(expected[key]) for key in state if key in expected}
    missing = [
        key for key, value in expected.items()
        if key not in state and not key.endswith(_UNCOUNTED) and _place(value) not in there
    ]  # fmt: skip
    if auxiliary := [key for key in state if key not in expected and _AUXILIARY.match(key)]:
        LOG.warning("%s: auxiliary heads are left out: %s", file, some(_outermost(auxiliary)))
    if counts := [key for key in state if key not in expected and _COUNTS.fullmatch(key)]:
        LOG.warning("%s: counts of operations and parameters are left out: %s", file, some(counts))
    left_out = {*auxiliary, *counts}
    state = {key: value for key, value in state.items() if key not in left_out}
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    beside = [_beside(key, expected[key], {other: state[other] for other in unexpected}) for key in missing[:_LISTED]]
    problems = {"missing": [*beside, *missing[_LISTED:]], "unexpected": unexpected, "wrong shape": shapes}
    diff = [f"{title} {some(keys)}" for title, keys in problems.items() if keys]
    renamed = _renamed(state, net) if diff else state
    if renamed is None:
        hint = "check the model SPEC, the number of classes and the input size"
        # All that the model needs is there, and what else there is belongs to none of its parts: it is no deeper one.
        apart = [name for name in _outermost(unexpected) if name not in _outermost(expected) and not name.isdigit()]
        if not (missing or shapes) and apart == _outermost(unexpected):
            hint = f"where they are no layers of the model, leave them out: {_LEFT_OUT}"
        elif not (unexpected or shapes) and all(key.endswith(_STATISTICS) for key in missing):
            hint = "the statistics of BatchNorm are buffers: save net.state_dict(), not the parameters alone"
        elif any(key.endswith(_WHOLE_NUMBERS) for key in unexpected):
            hint = "they are of a quantized network: give those that it was made from"
        elif any(key.endswith("_mask") and key.removesuffix("mask") + "orig" in unexpected for key in unexpected):
            hint = "they are of a pruned network: torch.nn.utils.prune.remove(layer, name) of each layer before saving"
        elif any(map(_NORMED.fullmatch, unexpected)):
            hint = "saved with weight or spectral norm: build the model with the same, or remove it before saving"
        elif _PART.search(file.name):
            hint = _joining(file)
        raise ArtifactError(f"{file}: the weights do not fit the model: {'; '.join(diff)}", hint)
    return renamed


def _joining(file: Path) -> str:
    """What makes one file of weights out of several like this."""
    return f"join the several files: {_JOINED % _READ_BY.get(file.suffix, 'torch.load(file, weights_only=True)')}"


def _renamed(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor] | None:
    """The state of a copy of the network that has taken one with other names, as far as its layers know these."""
    state = {_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    for like in (None, state_of(net)):
        with contextlib.suppress(Exception):  # it cannot be copied, does not fit, or code of its own fails
            twin = copy.deepcopy(net)
            nn.Module.load_state_dict(twin, _of_versions(state, like))
            return dict(state_of(twin))
    return None


def _beside(key: str, value: Tensor, others: Mapping[str, Tensor]) -> str:
    """A key that the file lacks, its shape, and what in the file is most like it."""
    alike = {other: tensor for other, tensor in others.items() if tensor.shape == value.shape} or others
    near = difflib.get_close_matches(key, alike, n=1, cutoff=0.0)
    shown = f"{key} {tuple(value.shape)}"
    return f"{shown} (nearest there: {near[0]} {tuple(others[near[0]].shape)})" if near else shown


def _place(value: Tensor) -> tuple[Any, ...]:
    """Tells tensors apart that do not share their memory; empty ones are all apart."""
    return value.data_ptr() or id(value), value.shape, value.stride()


def _check_kinds(state: Mapping[str, Tensor], net: nn.Module, file: Path) -> None:
    """Refuse what is no network's weights as it is: sparse, without values, whole numbers, or complex for real ones."""
    expected, parameters = state_of(net), dict(net.named_parameters(remove_duplicate=False))

    def fits(key: str, value: Tensor) -> bool:
        whole = key in parameters and fractional(parameters[key]) and not fractional(value)
        return plain(value) and not whole and value.is_complex() <= expected[key].is_complex()

    def fractional(value: Tensor) -> bool:
        return value.is_floating_point() or value.is_complex()

    odd = [
        f"{key} ({value.device.type}, {value.layout}, {value.dtype})".replace("torch.", "")
        for key, value in state.items() if key in expected and not fits(key, value)
    ]  # fmt: skip
    if odd:
        raise ArtifactError(f"{file}: not weights as they are: {some(odd)}", "save them dense, in floating point")


def plain(value: Any) -> bool:
    """Whether a value in a state is a dense tensor that has its values, as safetensors can store."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """What a network holds, by the names that PyTorch gives it, whatever its own ``state_dict`` may do."""
    return nn.Module.state_dict(net)


def require_tensors(net: nn.Module) -> None:
    """Check that a network's state can be stored, before it is trained.

    Raises:
        ConfigError: There is more in it than dense tensors.
    """
    state = state_of(net).items()
    if others := [key for key, value in state if not plain(value) or value.dtype == torch.complex128]:
        what = f"{type(net).__name__}: its state is more than dense tensors that can be stored: {some(others)}"
        hint = "keep it in buffers, complex numbers as complex64, or out of the state_dict: without get_extra_state"
        raise ConfigError(what, hint)


def not_finite(state: Mapping[str, Tensor], net: nn.Module) -> list[str]:
    """Of a network's state, the keys of parameters and of BatchNorm's statistics that are not finite.

    Nor is the square root of a variance below 0. Other buffers may hold anything: infinity as masks do, NaN where
    nothing has been seen yet.
    """
    vital = {key for key, _ in net.named_parameters(remove_duplicate=False)}
    variances = set()
    for path, layer in net.named_modules(remove_duplicate=False):
        if is_batch_norm(layer):
            vital |= {f"{path}.{name}" if path else name for name, _ in layer.named_buffers(recurse=False)}
            variances.add(f"{path}.running_var" if path else "running_var")

    def wide(value: Tensor) -> Tensor:
        return value.to(torch.complex64) if value.is_complex() else value.float()

    bad = [key for key, value in state.items() if key in vital and not wide(value).isfinite().all()]
    return bad + [f"{key} (below 0)" for key, value in state.items() if key in variances and (wide(value) < 0).any()]

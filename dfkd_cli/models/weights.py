"""Weights from files made elsewhere, without ever running code from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dfkd_cli.errors import ArtifactError, ConfigError

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, torch.compile, LightningModule
_REFUSALS = ("GLOBAL ", "TorchScript")  # in torch.load's messages about code; damaged files fail in other words
_LISTED = 3  # keys named in a message


def load_weights(net: nn.Module, file: Path) -> None:
    """Copy the weights in ``file`` into ``net``; every one must have its place.

    Reads ``.safetensors``, and ``.pt``, ``.pth``, ``.ckpt`` as far as they hold plain tensors. Common wrappers around
    the state dict and prefixes of its keys are removed.

    Raises:
        ConfigError: The file type is unknown.
        ArtifactError: The file is missing, damaged, carries code, or does not fit ``net``, which is then unchanged.
    """
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        content = _read_safetensors(file)
    elif file.suffix in (".pt", ".pth", ".ckpt"):
        content = _read_pickle(file)
    else:
        raise ConfigError(f"{file}: unknown type of weights", "give a .safetensors, .pt, .pth or .ckpt file")
    expected = net.state_dict()
    state = _without_prefix(_unwrap(content, file), expected)
    _check_fit(state, expected, file)
    net.load_state_dict(state, strict=False)  # strictness is checked above, with shorter messages


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(file.read_bytes())  # its own reader takes no name that is not UTF-8
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: not readable as safetensors: {error}", "the file is damaged") from None


def _read_pickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        if any(words in str(error) for words in _REFUSALS):
            raise ArtifactError(
                f"{file}: carries code, which is never run", "save the state_dict alone, best as .safetensors"
            ) from None
        raise ArtifactError(f"{file}: not readable as PyTorch weights", "damaged, or another type of file") from None


def _unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    is_mapping = isinstance(content, Mapping) and len(content) > 0
    if is_mapping and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return dict(content)
    what = f"keys {_some(map(str, content))}" if is_mapping else type(content).__name__
    raise ArtifactError(f"{file}: holds no state_dict, found {what}", "save net.state_dict()")


def _without_prefix(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the state as it is and with ever more prefixes removed, the first that fits ``expected`` best."""
    candidates = [state]
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in candidates[-1])), None):
        candidates.append({key.removeprefix(prefix): value for key, value in candidates[-1].items()})
    return max(candidates, key=lambda candidate: len(candidate.keys() & expected.keys()))


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> None:
    # Files from before PyTorch 0.4.1 lack this counter, which inference does not use.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    diff = [f"{title} {_some(keys)}" for title, keys in
            (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)) if keys]  # fmt: skip
    if diff:
        raise ArtifactError(
            f"{file}: the weights do not fit the model: {'; '.join(diff)}",
            "check the model SPEC, the number of classes and the input size",
        )


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more

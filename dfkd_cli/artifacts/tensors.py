"""Files of tensors that vouch for themselves: they are read before any record has their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dfkd_cli.artifacts.files import write_atomic
from dfkd_cli.errors import ArtifactError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, with a hash of their contents."""
    own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(own, {"sha256": _hash(own)}))


def read_tensors(path: Path, hint: str = "") -> dict[str, Tensor]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        ArtifactError: It is missing or damaged, and ``hint`` says what to do.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors, facts = {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata() or {}
        whole = facts.get("sha256") == _hash(tensors)
    except (OSError, SafetensorError, TypeError) as error:  # NumPy does not know the type
        raise ArtifactError(f"{path}: cannot be read: {error}", hint) from error
    if not whole:
        raise ArtifactError(f"{path} is damaged: its sha256 is not the recorded one", hint)
    return tensors


def _hash(tensors: Mapping[str, Tensor]) -> str:
    contents = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        contents.update(f"{name} {tensor.dtype} {[*tensor.shape]} ".encode())
        contents.update(tensor.numpy().tobytes())
    return contents.hexdigest()

"""Metadata directories: what the layers of a teacher answer to its training images, as statistics of each class.

``metadata.json`` names the layers, their shapes and the sha256 of ``metadata.safetensors``, which has ``NAME.mean`` and
``NAME.std`` (K, D) of every layer and ``covariance`` (K, U, U) of the units of the last layers taken together; all
are float32 statistics of the population. No image is in it, but it was made from images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dfkd_cli.artifacts.files import sha256_file, write_atomic, write_json
from dfkd_cli.artifacts.integrity import check_finished, intact
from dfkd_cli.artifacts.records import Between, Hashed, read_json
from dfkd_cli.errors import ArtifactError

RECORD = "metadata.json"
TENSORS = "metadata.safetensors"
REMAKE = "make it again: dfkd collect-metadata --overwrite"


class Layer(TypedDict):
    """A layer, its shape and whether it is ``joint``."""

    name: str
    shape: list[Annotated[int, Between(1, 10**9)]]
    joint: bool


class MetadataRecord(TypedDict):
    """``metadata.json``."""

    schema: Literal[1]
    kind: Literal["metadata"]
    teacher: Hashed
    temperature: float
    counts: list[Annotated[int, Between(0, 10**9)]]
    layers: list[Layer]
    tensors: Hashed


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer gives, by class.

    Attributes:
        shape: Of its output for one image; D units in all.
        mean, std: (K, D).
        joint: Whether its units are among those of the covariance.
    """

    shape: tuple[int, ...]
    mean: Tensor
    std: Tensor
    joint: bool


@dataclass(frozen=True)
class Metadata:
    """Activation statistics of a teacher.

    Attributes:
        layers: By name, in the order they run; the last gives the logits, which are divided by ``temperature``.
        covariance: (K, U, U) of the units of the layers that are ``joint``, in the same order.
        counts: Images of each class; the statistics of a class without any are zeros.
        temperature: See ``layers``.
    """

    layers: Mapping[str, LayerStatistics]
    covariance: Tensor
    counts: Sequence[int]
    temperature: float

    @property
    def joint(self) -> tuple[str, ...]:
        """The layers of the covariance."""
        return tuple(name for name, layer in self.layers.items() if layer.joint)

    def block(self, names: Sequence[str]) -> Tensor:
        """The covariance (K, U', U') of some layers that follow one another."""
        ends = torch.tensor([0, *(self.layers[name].mean.shape[1] for name in self.joint)]).cumsum(0)
        start, stop = ends[self.joint.index(names[0])], ends[self.joint.index(names[-1]) + 1]
        return self.covariance[:, start:stop, start:stop]


def write_metadata(directory: Path, metadata: Metadata, origin: Mapping[str, Any]) -> list[Path]:
    """Write a metadata directory, its record last. Returns the files.

    Args:
        directory: Where to.
        metadata: The statistics.
        origin: What they are of, for the record: ``teacher`` with its ``sha256``, ``dataset``.
    """
    tensors = {"covariance": metadata.covariance}
    for name, layer in metadata.layers.items():
        tensors |= {f"{name}.mean": layer.mean, f"{name}.std": layer.std}
    sha256 = write_atomic(directory / TENSORS, safetensors.torch.save(tensors))
    record = {
        "schema": 1,
        "kind": "metadata",
        **origin,
        "temperature": metadata.temperature,
        "counts": list(metadata.counts),
        "layers": [
            {"name": name, "shape": list(layer.shape), "joint": layer.joint} for name, layer in metadata.layers.items()
        ],
        "tensors": {"file": TENSORS, "sha256": sha256},
    }
    write_json(directory / RECORD, record)
    return [directory / TENSORS, directory / RECORD]


def read_metadata(directory: Path, teacher: str) -> tuple[Metadata, str]:
    """Read and check a metadata directory. Returns the statistics and the hash that stands for them.

    Args:
        directory: Where it is.
        teacher: The hash of the teacher that it must be of.

    Raises:
        ArtifactError: Missing, damaged, or of another teacher.
    """
    path, tensors = directory / RECORD, directory / TENSORS
    if not path.is_file():
        check_finished(directory)
        raise ArtifactError(f"no metadata at {directory}", "make it: dfkd collect-metadata")
    record = read_json(intact(path, hint=REMAKE), MetadataRecord, REMAKE)
    if record["teacher"]["sha256"] != teacher:
        raise ArtifactError(f"{directory} is of another teacher", "give the --teacher it was collected from")
    intact(tensors, record["tensors"]["sha256"], REMAKE)
    try:
        return _metadata(record, safetensors.torch.load(tensors.read_bytes())), sha256_file(path)
    except (KeyError, ValueError, SafetensorError):
        raise ArtifactError(f"{directory}: the metadata is damaged", REMAKE) from None


def _metadata(record: MetadataRecord, tensors: Mapping[str, Tensor]) -> Metadata:
    layers = {
        row["name"]: LayerStatistics(
            tuple(row["shape"]), tensors[f"{row['name']}.mean"], tensors[f"{row['name']}.std"], row["joint"]
        )
        for row in record["layers"]
    }
    metadata = Metadata(layers, tensors["covariance"], tuple(record["counts"]), float(record["temperature"]))
    classes, units = len(metadata.counts), sum(layers[name].mean.shape[1] for name in metadata.joint)
    expected = [(classes, math.prod(layer.shape)) for layer in layers.values() for _ in range(2)]
    shapes = [tuple(tensor.shape) for layer in layers.values() for tensor in (layer.mean, layer.std)]
    if not layers or shapes != expected or tuple(metadata.covariance.shape) != (classes, units, units):
        raise ValueError("shapes")
    return metadata

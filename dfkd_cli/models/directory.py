"""A model directory: ``model.safetensors`` with the weights, ``model.json`` with all that is needed to use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dfkd_cli.artifacts.files import digest, read_json, sha256_file, write_atomic, write_json
from dfkd_cli.errors import ArtifactError, ConfigError, RunFailed
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.registry import build
from dfkd_cli.models.weights import load_weights
from dfkd_cli.trust import Code

SCHEMA = 1
RECORD = "model.json"
WEIGHTS = "model.safetensors"


def identity(record: dict[str, Any]) -> str:
    """The hash that stands for a model: its weights and how they are used."""
    used = {key: record[key] for key in ("spec", "num_classes", "input_size", "mean", "std")}
    return digest([record["weights"]["sha256"], used])


def save_weights(path: Path, net: nn.Module) -> str:
    """Write a network's weights as safetensors. Returns their sha256.

    Raises:
        RunFailed: They are not finite. Buffers may hold infinity, as masks do.
    """
    # Copies of their own: safetensors refuses tensors that share memory, such as tied weights.
    state = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in net.state_dict().items()
    }
    if not all(p.isfinite().all() for p in net.parameters()) or any(b.isnan().any() for b in net.buffers()):
        raise RunFailed(
            f"{path}: the weights are not finite",
            "lower --lr, or --student-lr of a student in the loop; with --overwrite",
        )
    return write_atomic(path, safetensors.torch.save(state))


def save_model(directory: Path, classifier: Classifier, *, metrics: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Write a model directory. Returns its :func:`identity`.

    The record is written last: a directory with a readable record is complete.
    """
    sha256 = save_weights(directory / WEIGHTS, classifier.net)
    record = {
        "schema": SCHEMA,
        "kind": "model",
        **dataclasses.asdict(classifier.info),
        "weights": {"file": WEIGHTS, "sha256": sha256},
        "metrics": metrics,
        "provenance": provenance,
    }
    write_json(directory / RECORD, record)
    return identity(record)


def load_model(
    directory: Path, allow_code: bool = False, code: Code | None = None
) -> tuple[Classifier, dict[str, Any]]:
    """Read and check a model directory. Returns the classifier on the CPU, and the record in ``model.json``.

    The global random state is left alone.

    Args:
        directory: What to read.
        allow_code: Whether it may name code, which is run. A file is looked for in the directory, beside it, and here.
        code: Which code may run; by default any or none, as ``allow_code`` says.

    Raises:
        ArtifactError: The directory is missing, damaged, from a newer version, or names code without ``allow_code``.
    """
    record = read_record(directory)
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise ArtifactError(f"{weights}: no such file", "the model directory is incomplete; make it again")
    try:
        info = read_info(record)
        intact = sha256_file(weights) == record["weights"]["sha256"]
    except (KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{directory / RECORD}: not a model record: {error}", "make the model again") from None
    if not intact:
        raise ArtifactError(f"{weights}: damaged, its sha256 is not the recorded one", "make or copy the model again")
    try:
        with torch.random.fork_rng(devices=[]):
            code = code or Code(artifacts=allow_code)
            spec = code.locate(info.spec, directory)
            net = build(spec, info.num_classes, info.input_size, code.may_run(spec))
    except ConfigError as error:  # not the user's words but the directory's
        raise ArtifactError(f"{directory}: {error.message}", error.hint) from error
    load_weights(net, weights)
    return Classifier(net, info), record


def read_record(directory: Path) -> dict[str, Any]:
    """``model.json``.

    Raises:
        ArtifactError: It is missing, or of another kind or version.
    """
    if directory.is_file():
        raise ArtifactError(f"{directory}: a file, not a model directory", "give weights with --weights FILE")
    if not (directory / RECORD).is_file():
        what = "no model.json in it" if directory.is_dir() else "no such directory"
        raise ArtifactError(f"{directory}: {what}", "`dfkd train-teacher` and `dfkd distill` make model directories")
    record = read_json(directory / RECORD)
    if record.get("kind") != "model":
        raise ArtifactError(f"{directory}: holds {record.get('kind')!r}, not a model")
    if not isinstance(record.get("provenance", {}), dict):
        raise ArtifactError(f"{directory / RECORD}: its provenance is damaged", "make the model again")
    if record.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{directory}: model schema {record.get('schema')!r}, this version reads {SCHEMA}", "update dfkd"
        )
    return record


def read_info(record: Mapping[str, Any]) -> ModelInfo:
    """What a record in JSON says about a network, or about the input of one."""
    classes = record.get("classes")
    return ModelInfo(
        spec=str(record["spec"]),
        num_classes=record["num_classes"],
        input_size=tuple(record["input_size"]),
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        classes=None if classes is None else tuple(classes),
    )

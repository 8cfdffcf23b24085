"""A model directory: ``model.safetensors`` with the weights, ``model.json`` with all that is needed to use them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import safetensors.torch
import torch
from torch import nn

from dfkd_cli.artifacts.files import digest, write_atomic, write_json
from dfkd_cli.artifacts.integrity import check_finished, intact
from dfkd_cli.artifacts.records import Classes, Count, Hashed, ImageShape, read_json
from dfkd_cli.errors import ArtifactError, ConfigError, RunFailed
from dfkd_cli.models.classifier import Classifier, ModelInfo, in_mode
from dfkd_cli.models.registry import build, code_hashes, family
from dfkd_cli.models.weights import load_weights, not_finite, state_of
from dfkd_cli.spec import Spec
from dfkd_cli.trust import Code

SCHEMA = 1
RECORD = "model.json"
WEIGHTS = "model.safetensors"
FILES = RECORD, WEIGHTS


class Input(TypedDict):
    """What a network is and what it expects: :class:`~dfkd_cli.models.classifier.ModelInfo`."""

    spec: str
    num_classes: Classes
    input_size: ImageShape
    mean: list[float]
    std: list[float]
    classes: NotRequired[list[str] | None]


class Provenance(TypedDict):
    """Where a model comes from."""

    command: NotRequired[str]
    dataset: NotRequired[str | None]
    data_free: NotRequired[bool]
    uses: NotRequired[list[str]]
    seed: NotRequired[int]
    teacher: NotRequired[str]
    line: NotRequired[list[str]]
    num_images: NotRequired[Count]
    config: NotRequired[dict[str, Any]]


class ModelRecord(Input):
    """``model.json``."""

    schema: Literal[1]
    kind: Literal["model"]
    weights: Hashed
    code: NotRequired[str]
    metrics: NotRequired[dict[str, Any]]
    provenance: NotRequired[Provenance]


def identity(record: Mapping[str, Any]) -> str:
    """The hash that stands for a model: its weights and how they are used."""
    used = {key: record[key] for key in ("spec", "num_classes", "input_size", "mean", "std")}
    return digest([record["weights"]["sha256"], used])


def save_weights(path: Path, net: nn.Module) -> str:
    """Write a network's weights as safetensors, as they are in training. Returns their sha256.

    Some networks merge weights for evaluation, and would do so again with what was merged.

    Raises:
        RunFailed: They are not finite: :func:`~dfkd_cli.models.weights.not_finite`.
    """
    with in_mode(net, training=True):
        # Copies of their own: safetensors refuses tensors that share memory, such as tied weights.
        state = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in state_of(net).items()
        }
    if not_finite(state, net):
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
        **_code(classifier.info.spec),
        "metrics": metrics,
        "provenance": provenance,
    }
    write_json(directory / RECORD, record)
    return identity(record)


def _code(spec: str) -> dict[str, str]:
    """What stands for the user's code that makes a network, where there is any; its file may be gone by now."""
    with contextlib.suppress(ArtifactError):
        if known := code_hashes(spec):
            return {"code": known[0]}
    return {}


def changed_code(record: Mapping[str, Any], spec: str) -> str | None:
    """What stands for the code of a model, at the SPEC where it lies, if it is not the code that it was made with."""
    now = code_hashes(spec)
    return now[0] if now and record.get("code", now[0]) not in now else None


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
    info = read_info(record, directory / RECORD)
    hint = "the model directory is incomplete; make or copy the model again"
    weights = intact(directory / WEIGHTS, record["weights"]["sha256"], hint)
    try:
        _check_size(info, weights)
        with torch.random.fork_rng(devices=[]):
            code = code or Code(artifacts=allow_code)
            spec = code.locate(info.spec, directory)
            net = build(
                spec, info.num_classes, info.input_size, code.may_run(spec), lambda net: load_weights(net, weights)
            )
    except ConfigError as error:  # not the user's words but the directory's
        raise ArtifactError(f"{directory}: {error.message}", error.hint) from error
    return Classifier(net, info), record


def _check_size(info: ModelInfo, weights: Path) -> None:
    """A record can say any size: what is beyond that of its weights is seen before it takes any memory."""
    plain = Spec.read(info.spec).rest
    build_one = family(plain)
    if build_one is not None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            net = build_one(plain, info.num_classes, info.input_size)
        if sum(tensor.nbytes for tensor in net.state_dict().values()) > 10 * weights.stat().st_size + 2**28:
            raise ArtifactError(
                f"{weights}: the weights do not fit the model: {info.num_classes} classes of images "
                f"{info.input_size} need far more of them",
                "make or copy the model again",
            )


def read_record(directory: Path) -> dict[str, Any]:
    """``model.json``.

    Raises:
        ArtifactError: It is missing, or of another kind or version.
    """
    if directory.is_file():
        raise ArtifactError(f"{directory}: a file, not a model directory", "give weights with --weights FILE")
    if not (directory / RECORD).is_file():
        check_finished(directory)
        what = "no model.json in it" if directory.is_dir() else "no such directory"
        raise ArtifactError(f"{directory}: {what}", "`dfkd train-teacher` and `dfkd distill` make model directories")
    return dict(read_json(intact(directory / RECORD), ModelRecord))


def read_info(record: Mapping[str, Any], file: Path) -> ModelInfo:
    """What the record in a file says about a network, or about the input of one.

    Raises:
        ArtifactError: The values do not fit each other.
    """
    fields = {field.name: record.get(field.name) for field in dataclasses.fields(ModelInfo)}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return ModelInfo(**values)
    except ConfigError as error:
        raise ArtifactError(f"{file} is damaged: {error.message}", "make the model again") from None

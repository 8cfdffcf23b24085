"""Measure models on test images, or images on a teacher.

Reads model or shard directories, folders of images, datasets by name, real:N, noise:N; writes results.json when --out
is given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dfkd_cli.artifacts.files import read_json, write_json
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.catalog import Command
from dfkd_cli.config import option
from dfkd_cli.data import datasets
from dfkd_cli.data.datasets import Dataset
from dfkd_cli.data.sources import RealSource
from dfkd_cli.errors import ArtifactError, ConfigError, GateNotMet
from dfkd_cli.models.directory import RECORD
from dfkd_cli.resolve import Settings
from dfkd_cli.settings import FOREIGN, ForeignModel
from dfkd_cli.stages.inputs import LoadedModel, TransferSet, is_images, load_teacher, open_images, pick_device
from dfkd_cli.stages.measures import cost, examine, finite, share
from dfkd_cli.stages.shard_measures import measure_images, measure_shards
from dfkd_cli.stages.training import rehearse
from dfkd_cli.ui import VERBOSE, Progress, Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs(ForeignModel):
    """What is read, and how."""

    # Volatile: what decides the result is what the paths hold, by hash.
    paths: tuple[str, ...] | None = option(
        None, "model or shard directories, other images", volatile=True, argument="PATH ..."
    )
    teacher: str | None = option(None, "teacher to compare with (default: teacher/)")
    dataset: str | None = option(None, "dataset to test on (default: the teacher's)")
    data_dir: str | None = option(None, "where datasets lie", volatile=True)
    batch_size: int = option(500, "images per forward pass", low=1, rehearsal=2, volatile=True)
    min_top1: float | None = option(
        None, "gate: exit 5 when top-1 accuracy is below (0 to 1)", low=0, high=1, volatile=True
    )


COMMAND = Command(
    position=50,
    examples=("dfkd evaluate", "dfkd evaluate student/ --min-top1 0.97", "dfkd evaluate shards/ noise:1000 real"),
    next="dfkd compare student/",
)


TEACHER, STUDENT = "teacher", "student"  # what is evaluated when nothing is named
RESULTS = "results.json"
DIVERGENCE = "bn_divergence"


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Measure what the paths hold, in float32; the teacher and the student when there are none."""
    if dry_run:
        return rehearse(settings, open_subjects, terminal)
    subjects = open_subjects(settings, terminal)
    artifacts = {}
    if settings.run.out is None:
        results = measure(subjects, terminal)
    else:
        directory = RunDirectory(Path(settings.run.out), settings, _parents(subjects), {})
        file = directory.path / RESULTS
        if directory.claim():
            directory.say_complete(terminal)
            results = read_json(file)["results"]
        else:
            with directory.guard():
                results = measure(subjects, terminal)
                write_json(file, {"schema": 1, "results": results})
                directory.finish([file], _headline(subjects, results))
        artifacts = {"results": str(file)}
    # Images are ranked by their divergence from the teacher's training data, smallest first.
    ranked = sorted(results, key=lambda result: (result.get(DIVERGENCE) is None, result.get(DIVERGENCE)))
    for kinds, columns in TABLES.items():
        if rows := [result for result in ranked if result["kind"] in kinds]:
            terminal.answer(_table(rows, columns))
    if terminal.verbosity >= VERBOSE and (rows := [r for r in ranked if r.get("bn_divergence_layers")]):
        terminal.answer(_layers(rows))
    answer = {"artifacts": artifacts, "metrics": _headline(subjects, results), "results": results}
    _check_gate(answer, settings.inputs.min_top1)
    return answer


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Exam:
    """A model, and the test images and device it is measured on."""

    model: LoadedModel
    dataset: Dataset
    device: torch.device
    batch_size: int

    @functools.cached_property
    def outcome(self) -> tuple[dict[str, Any], Tensor]:
        """Measures and answers of :func:`examine`; taken once, however many students are compared with a teacher."""
        source = RealSource(self.dataset)
        return examine(self.model.classifier, source, self.dataset.classes, self.device, self.batch_size)


@dataclass(eq=False)
class ModelSubject:
    """A model to measure; ``teacher`` has the same test images."""

    path: str
    exam: Exam
    teacher: Exam | None

    @property
    def is_teacher(self) -> bool:
        """Whether this is the teacher itself."""
        return self.teacher is not None and self.teacher.model.sha256 == self.exam.model.sha256

    @property
    def parents(self) -> list[dict[str, Any]]:
        """What is read, as a run records it."""
        teacher = [] if self.teacher is None else [self.teacher.model.parent("teacher")]
        return [*teacher, self.exam.model.parent("model"), *datasets.contents(self.exam.dataset.name)]

    def _as_teacher(self, given: Tensor) -> Tensor:
        """Answers (N,), each as the class of the same name is counted by the teacher."""
        own, theirs = self.exam.dataset.classes, self.teacher.dataset.classes if self.teacher else ()
        return torch.tensor([theirs.index(name) for name in own])[given] if set(own) == set(theirs) else given

    def measure(self) -> dict[str, Any]:
        """One entry of the results."""
        model, (measures, given) = self.exam.model.classifier, self.exam.outcome
        costs = cost(model, self.exam.device)
        model.cpu()  # many models are measured, one after the other
        return {
            "path": self.path,
            "kind": "model",
            "spec": model.info.spec,
            "uses": self.exam.model.record.get("provenance", {}).get("uses", []),
            "dataset": self.exam.dataset.name,
            "count": len(self.exam.dataset),
            **measures,
            "agreement": None if self.teacher is None else share(self._as_teacher(given) == self.teacher.outcome[1]),
            **costs,
            "device": self.exam.device.type,
        }


@dataclass(eq=False)
class ShardSubject:
    """Shards to measure; ``teacher`` is the one they were made from."""

    is_teacher: ClassVar[bool] = False
    path: str
    reader: ShardReader
    teacher: LoadedModel | None
    device: torch.device
    batch_size: int

    @property
    def parents(self) -> list[dict[str, Any]]:
        """What is read, as a run records it."""
        teacher = [] if self.teacher is None else [self.teacher.parent("teacher")]
        return [*teacher, {"role": "shards", "path": self.path, "sha256": self.reader.sha256}]

    def measure(self) -> dict[str, Any]:
        """One entry of the results."""
        teacher = None if self.teacher is None else self.teacher.classifier
        manifest = self.reader.manifest
        facts = {
            "path": self.path,
            "kind": "shards",
            "method": manifest.get("method"),
            "uses": manifest.get("uses", []),
        }
        return facts | measure_shards(self.reader, teacher, self.device, self.batch_size)


@dataclass(eq=False)
class ImagesSubject:
    """Any other images, shown to a teacher."""

    is_teacher: ClassVar[bool] = False
    path: str
    images: TransferSet
    teacher: LoadedModel
    device: torch.device
    batch_size: int

    @property
    def parents(self) -> list[dict[str, Any]]:
        """What is read, as a run records it."""
        return [self.teacher.parent("teacher"), self.images.parent]

    def measure(self) -> dict[str, Any]:
        """One entry of the results."""
        measures = measure_images(self.images.source, self.teacher.classifier, self.device, self.batch_size)
        return {"path": self.path, "kind": "images", "uses": list(self.images.uses), **measures}


Subject = ModelSubject | ShardSubject | ImagesSubject


def measure(subjects: list[Subject], terminal: Terminal) -> list[dict[str, Any]]:
    """The results, one per subject, in values that JSON has."""
    progress, results = Progress(terminal, "evaluate", "paths", len(subjects)), []
    try:
        for subject in subjects:
            results.append(finite(subject.measure()))
            progress.update(len(results))
            if results[-1].get("logits_ok") is False:
                terminal.say(f"{subject.path}: the stored logits are not what the teacher answers to the stored images")
    finally:
        progress.close()
    return results


def _parents(subjects: list[Subject]) -> list[dict[str, Any]]:
    parents = []
    for parent in (parent for subject in subjects for parent in subject.parents):
        if parent not in parents:
            parents.append(parent)
    return parents


def _headline(subjects: list[Subject], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the first subject that is not the teacher itself."""
    pairs = zip(subjects, results, strict=True)
    first = next((result for subject, result in pairs if not subject.is_teacher), results[0])
    return {name: value for name, value in first.items() if value is None or isinstance(value, (int, float))}


def _check_gate(answer: dict[str, Any], least: float | None) -> None:
    if least is None:
        return
    below = [f"{r['path']} {r['top1']:.6g}" for r in answer["results"] if r["kind"] == "model" and r["top1"] < least]
    if below:
        raise GateNotMet(f"top-1 is below {least:.6g}: {', '.join(below)}", answer=answer)


# -- what is read ------------------------------------------------------------------------------------------------------


def open_subjects(settings: Settings, terminal: Terminal) -> list[Subject]:
    """Open everything that will be measured, and check that it fits together.

    Raises:
        ArtifactError: Missing, damaged, neither models nor images, or of another number of classes than the dataset.
        ConfigError: The device is not there, no dataset or teacher is known, or there is nothing to apply the gate to.
    """
    inputs, opener = settings.inputs, _Opener(settings)
    paths = inputs.paths or opener.default_paths()
    if not paths:
        raise ArtifactError("nothing to evaluate: no student/ and no teacher/ here", "dfkd evaluate PATH ...")
    subjects = [opener.open(path) for path in paths]
    if inputs.min_top1 is not None and not any(isinstance(subject, ModelSubject) for subject in subjects):
        raise ConfigError("--min-top1 needs a model, these are images", "dfkd evaluate student/ --min-top1 X")
    if opener.orphans:
        terminal.say(f"{', '.join(opener.orphans)}: not compared with the teacher, it is not here -- give --teacher")
    return subjects


class _Opener:
    """Opens paths; the teacher and each set of test images are read once.

    Attributes:
        orphans: Paths that record a teacher which is not at hand.
    """

    def __init__(self, settings: Settings) -> None:
        self.inputs, self.allow_code, self.seed = settings.inputs, settings.run.allow_code, settings.run.seed
        self.device = pick_device(settings.run.device)
        self.orphans: list[str] = []
        self.teacher: LoadedModel | None = None
        if self.inputs.teacher is not None or Path(TEACHER, RECORD).is_file():
            self.teacher = self._load(self.inputs.teacher or TEACHER, asked=True)
        self.test_images = functools.cache(
            functools.partial(datasets.load, split="test", data_dir=self.inputs.data_dir)
        )
        self.teacher_exams: dict[str, Exam] = {}

    def _load(self, path: str, asked: bool = False) -> LoadedModel:
        """A model; what the user says of a foreign teacher's file is about the one that was ``asked`` for."""
        inputs = dataclasses.replace(self.inputs, teacher=path, **({} if asked else dict.fromkeys(FOREIGN)))
        return load_teacher(inputs, self.allow_code)

    def default_paths(self) -> list[str]:
        """The teacher, then the student, where they are."""
        teacher = [] if self.teacher is None else [self.teacher.path]
        return [*teacher, STUDENT] if Path(STUDENT).exists() else teacher

    def open(self, path: str) -> Subject:
        """Open one path."""
        if self.teacher is not None and path == self.teacher.path:
            return self._model(path, self.teacher)
        if Path(path, MANIFEST).is_file():
            return self._shards(path)
        if Path(path, RECORD).is_file():
            return self._model(path, self._load(path))
        if is_images(path):
            return self._images(path)
        found = "neither a model directory nor a shard directory" if Path(path).exists() else "no such directory"
        raise ArtifactError(f"{path}: {found}", "give a directory that dfkd train-teacher, synthesize or distill made")

    def _model(self, path: str, model: LoadedModel) -> ModelSubject:
        teacher = self._matching(path, model.record.get("provenance", {}).get("teacher"), model.sha256)
        known = [self.inputs.dataset, teacher and teacher.dataset, model.dataset]
        dataset = next((name for name in known if name is not None), None)
        if dataset is None:
            raise ConfigError(f"{path}: its record names no dataset to test on", "give --dataset NAME or DIR")
        if teacher is None:
            return ModelSubject(path, self._exam(model, dataset), None)
        if dataset not in self.teacher_exams:
            self.teacher_exams[dataset] = self._exam(teacher, dataset)
        reference = self.teacher_exams[dataset]
        return ModelSubject(path, reference if model is teacher else self._exam(model, dataset), reference)

    def _exam(self, model: LoadedModel, dataset: str) -> Exam:
        info = model.classifier.info
        images = self.test_images(dataset, image_shape=info.input_size).labelled_for(info, model.path)
        return Exam(model, images, self.device, self.inputs.batch_size)

    def _shards(self, path: str) -> ShardSubject | ImagesSubject:
        reader = ShardReader(Path(path))
        teacher = self._matching(path, reader.teacher)
        if teacher is not None and teacher.sha256 != reader.teacher:
            return self._images(path)  # what another teacher answered to them is not the question
        return ShardSubject(path, reader, teacher, self.device, self.inputs.batch_size)

    def _images(self, path: str) -> ImagesSubject:
        if self.teacher is None:
            raise ConfigError(
                f"{path}: neither model nor shards, and images are measured with a teacher", "give --teacher"
            )
        images = open_images(path, self.teacher, self.inputs.data_dir, self.seed)
        return ImagesSubject(path, images, self.teacher, self.device, self.inputs.batch_size)

    def _matching(self, path: str, recorded: str | None, own: str | None = None) -> LoadedModel | None:
        """The teacher to compare with: the one that was asked for, or ``teacher/`` where its hash is on record."""
        if self.teacher is not None and (self.inputs.teacher is not None or self.teacher.sha256 in (recorded, own)):
            return self.teacher
        if recorded is not None:
            self.orphans.append(path)
        return None


# -- what is shown -----------------------------------------------------------------------------------------------------

Column = tuple[str, str, Callable[[Any], str]]  # heading, key of a result, how its value is shown


TABLES: dict[tuple[str, ...], list[Column]] = {  # by the kinds of results
    ("model",): [
        ("MODEL", "path", str),
        ("TOP-1", "top1", "{:.2%}".format),
        ("TOP-5", "top5", "{:.2%}".format),
        ("NLL", "nll", "{:.4f}".format),
        ("ECE", "ece", "{:.2%}".format),
        ("AGREEMENT", "agreement", "{:.2%}".format),
        ("PARAMS", "parameters", "{:,}".format),
        ("MACS", "macs", "{:,}".format),
        ("LATENCY", "latency_ms", "{:.2f} ms".format),
        ("USES", "uses", " ".join),
    ],
    ("shards", "images"): [
        ("SET", "path", str),
        ("IMAGES", "count", "{:,}".format),
        ("CONFIDENCE", "confidence", "{:.3f}".format),
        ("BALANCE", "class_balance", "{:.3f}".format),
        ("TARGET MATCH", "target_match", "{:.2%}".format),
        ("DIVERSITY", "diversity", "{:.3f}".format),
        ("BN DISTANCE", "bn_distance", "{:.3f}".format),
        ("BN DIVERGENCE", DIVERGENCE, "{:.4g}".format),
        ("USES", "uses", " ".join),
    ],
}


def _table(results: list[dict[str, Any]], columns: list[Column]) -> Table:
    """What was measured; a column in which no result has anything is left out."""
    table = Table(box=None, header_style="bold")
    columns = [column for column in columns if any(result[column[1]] not in (None, []) for result in results)]
    for heading, key, _ in columns:
        path = key == "path"
        table.add_column(heading, justify="left" if path else "right", no_wrap=not path, overflow="fold")
    for result in results:
        table.add_row(*(Text("-" if result[key] in (None, []) else show(result[key])) for _, key, show in columns))
    return table


def _layers(results: list[dict[str, Any]]) -> Table:
    """The divergence of every set in each BatchNorm layer."""
    table = Table(box=None, header_style="bold")
    table.add_column("BN DIVERGENCE")
    for result in results:
        table.add_column(Text(result["path"]), justify="right", overflow="fold")
    for layer in results[0]["bn_divergence_layers"]:
        table.add_row(layer, *(f"{result['bn_divergence_layers'][layer]:.4g}" for result in results))
    return table

"""Measure models on test images, or images on a teacher.

Reads model or shard directories, folders of images, datasets by name, real:N, noise:N; writes results.json when --out
is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from rich.table import Table
from rich.text import Text

from dfkd_cli.artifacts.files import write_json
from dfkd_cli.artifacts.integrity import check_foreign
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.catalog import Command
from dfkd_cli.config import option
from dfkd_cli.data import datasets
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.directory import RECORD
from dfkd_cli.models.exported import RECORD as EXPORT
from dfkd_cli.models.names import LoadedModel, ModelDirectory, locate, made_by_dfkd
from dfkd_cli.options import ForeignModel
from dfkd_cli.report.entries import find_teacher
from dfkd_cli.settings import Settings
from dfkd_cli.stages.inputs import is_images, open_images, pick_device
from dfkd_cli.stages.measures import Examiner, check_gate, finite
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
    teacher: str | None = option(None, "teacher to compare with (default: the one that is on record)")
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


class Results(TypedDict):
    """``results.json``."""

    results: list[dict[str, Any]]


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Measure what the paths hold, in float32; the teacher and the student when there are none."""
    if dry_run:
        return rehearse(settings, prepare, terminal)
    evaluations = prepare(settings, terminal)
    artifacts = {}
    if settings.run.out is None:
        results = measure(evaluations, terminal)
    else:
        directory = RunDirectory(Path(settings.run.out), settings, _parents(evaluations), {})
        file = directory.path / RESULTS
        if directory.claim():
            directory.say_complete(terminal)
            results = read_json(file, Results)["results"]
        else:
            with directory.guard():
                results = measure(evaluations, terminal)
                write_json(file, {"schema": 1, "results": results})
                directory.finish([file], _headline(evaluations, results))
        artifacts = {"results": str(file)}
    # Images are ranked by their divergence from the teacher's training data, smallest first.
    ranked = sorted(results, key=lambda result: (result.get(DIVERGENCE) is None, result.get(DIVERGENCE)))
    for kinds, columns in TABLES.items():
        if rows := [result for result in ranked if result["kind"] in kinds]:
            terminal.answer(_table(rows, columns))
    if terminal.verbosity >= VERBOSE and (rows := [r for r in ranked if r.get("bn_divergence_layers")]):
        terminal.answer(_layers(rows))
    answer = {"artifacts": artifacts, "metrics": _headline(evaluations, results), "results": results}
    check_gate([(r["path"], r["top1"]) for r in results if r["kind"] == "model"], settings.inputs.min_top1, answer)
    return answer


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What is to be measured of a path; everything is open.

    Attributes:
        facts: What its entry of the results begins with, its ``path`` and ``kind`` among them.
        parents: What is read, as a run records it.
        measure: The rest of the entry.
        is_teacher: Whether it is the teacher itself.
    """

    facts: dict[str, Any]
    parents: list[dict[str, Any]]
    measure: Callable[[], dict[str, Any]]
    is_teacher: bool = False


def measure(evaluations: list[Evaluation], terminal: Terminal) -> list[dict[str, Any]]:
    """The results, one per evaluation, in values that JSON has."""
    progress, results = Progress(terminal, "evaluate", "paths", len(evaluations)), []
    try:
        for evaluation in evaluations:
            results.append(finite(evaluation.facts | evaluation.measure()))
            progress.update(len(results))
            if results[-1].get("logits_ok") is False:
                path = evaluation.facts["path"]
                terminal.say(f"{path}: the stored logits are not what the teacher answers to the stored images")
    finally:
        progress.close()
    return results


def _parents(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    parents = [parent for evaluation in evaluations for parent in evaluation.parents]
    return [parent for index, parent in enumerate(parents) if parent not in parents[:index]]


def _headline(evaluations: list[Evaluation], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the first result that is not the teacher's own."""
    pairs = zip(evaluations, results, strict=True)
    first = next((result for evaluation, result in pairs if not evaluation.is_teacher), results[0])
    return {name: value for name, value in first.items() if value is None or isinstance(value, (int, float))}


# -- what is read ------------------------------------------------------------------------------------------------------


def prepare(settings: Settings, terminal: Terminal) -> list[Evaluation]:
    """Open everything that will be measured, and check that it fits together.

    Raises:
        ArtifactError: Missing, damaged, neither models nor images, or of another number of classes than the dataset.
        ConfigError: The device is not there, no dataset or teacher is known, or there is nothing to apply the gate to.
    """
    opener = _Opener(settings, terminal)
    if not opener.paths:
        raise ArtifactError("nothing to evaluate: no student/ and no teacher/ here", "dfkd evaluate PATH ...")
    evaluations = [opener.open(path) for path in opener.paths]
    if settings.inputs.min_top1 is not None and not any(e.facts["kind"] == "model" for e in evaluations):
        raise ConfigError("--min-top1 needs a model, these are images", "dfkd evaluate student/ --min-top1 X")
    if opener.orphans:
        terminal.say(f"{', '.join(opener.orphans)}: not compared with the teacher, it is not here -- give --teacher")
    if opener.examiner.caveat:
        terminal.say(opener.examiner.caveat)
    return evaluations


class _Opener:
    """Opens paths; every model is read once.

    Attributes:
        paths: What is evaluated: the paths that were named, else the teacher and the student, where they are.
        orphans: Paths that record a teacher which is not to be found.
    """

    def __init__(self, settings: Settings, terminal: Terminal) -> None:
        inputs, self.terminal = settings.inputs, terminal
        self.inputs, self.code, self.seed = inputs, settings.code, settings.run.seed
        self.examiner = Examiner(pick_device(settings.run.device), inputs.data_dir, inputs.batch_size)
        self.passes = self.examiner.device, inputs.batch_size  # how images are shown to a model
        self.orphans: list[str] = []
        self.teacher: LoadedModel | None = None
        if inputs.teacher is not None or Path(TEACHER, RECORD).is_file():
            self.teacher = locate(inputs.teacher or TEACHER, inputs).open(self.code)
        self.models = {} if self.teacher is None else {self.teacher.path: self.teacher}
        self.paths = inputs.paths or [*self.models, *([STUDENT] if Path(STUDENT).exists() else [])]
        for path in self.paths:
            if path not in self.models and any(Path(path, record).is_file() for record in (RECORD, EXPORT)):
                self.models[path] = made_by_dfkd(path).open(self.code)

    def open(self, path: str) -> Evaluation:
        """Open one path."""
        if path in self.models:
            return self._model(path, self.models[path])
        if Path(path, MANIFEST).is_file():
            return self._shards(path)
        if is_images(path):
            check_foreign(Path(path))
            return self._images(path)
        what = "neither a model directory nor a shard directory" if Path(path).exists() else "no such directory"
        raise ArtifactError(f"{path}: {what}", "give a directory that dfkd train-teacher, synthesize or distill made")

    def _model(self, path: str, model: LoadedModel) -> Evaluation:
        teacher = self._teacher_of(path, model.provenance.get("teacher"), model.sha256)
        teachers = [] if teacher is None else [teacher]
        names: list[str | None] = [self.inputs.dataset, *(m.dataset for m in (*teachers, model))]
        dataset = next((name for name in names if name is not None), None)
        if dataset is None:
            raise ConfigError(f"{path}: its record names no dataset to test on", "give --dataset NAME or DIR")
        *_, images = [self.examiner.images(dataset, m.classifier.info, m.path) for m in (*teachers, model)]
        spec, uses = model.classifier.info.spec, model.provenance.get("uses", [])
        facts = {"path": path, "kind": "model", "spec": spec, "uses": uses, "dataset": dataset}
        facts |= {"count": len(images), "device": self.examiner.device.type}
        parents = [*(m.parent("teacher") for m in teachers), model.parent("model"), *datasets.contents(dataset)]
        measure = functools.partial(self.examiner.measure, model, teacher, dataset)
        return Evaluation(facts, parents, measure, teacher is not None and teacher.sha256 == model.sha256)

    def _shards(self, path: str) -> Evaluation:
        reader = ShardReader(Path(path))
        teacher = self._teacher_of(path, reader.teacher)
        if teacher is not None and teacher.sha256 != reader.teacher:
            return self._images(path)  # what another teacher answered to them is not the question
        method, uses = reader.manifest.get("method"), reader.manifest.get("uses", [])
        parents = [] if teacher is None else [teacher.parent("teacher")]
        parents.append({"role": "shards", "path": path, "sha256": reader.sha256})
        classifier = None if teacher is None else teacher.classifier
        measure = functools.partial(measure_shards, reader, classifier, *self.passes)
        return Evaluation({"path": path, "kind": "shards", "method": method, "uses": uses}, parents, measure)

    def _images(self, path: str) -> Evaluation:
        if self.teacher is None:
            raise ConfigError(
                f"{path}: neither model nor shards, and images are measured with a teacher", "give --teacher"
            )
        shown, classifier = open_images(path, self.teacher, self.inputs.data_dir, self.seed), self.teacher.classifier
        parents = [self.teacher.parent("teacher"), shown.parent]
        measure = functools.partial(measure_images, shown.source, classifier, *self.passes)
        return Evaluation({"path": path, "kind": "images", "uses": list(shown.uses)}, parents, measure)

    def _teacher_of(self, path: str, recorded: str | None, own: str | None = None) -> LoadedModel | None:
        """The teacher to compare with: the one that was asked for, else the one on record, wherever it is found.

        A model that is ``teacher/`` itself, by its ``own`` hash, is compared with that.
        """
        if self.teacher is not None and (self.inputs.teacher is not None or self.teacher.sha256 in (recorded, own)):
            return self.teacher
        if recorded is None:
            return None
        for model in self.models.values():
            if model.sha256 == recorded:
                return model
        try:
            place = find_teacher(Path(path), recorded)
            if place is not None:
                return self.models.setdefault(str(place), ModelDirectory(str(place)).open(self.code))
            self.orphans.append(path)
        except ArtifactError as error:  # nobody asked for this teacher
            self.terminal.say(f"{path}: not compared with its teacher, which cannot be read: {error}")
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

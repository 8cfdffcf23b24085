"""Measure models on test images, or images on a teacher.

Reads model or shard directories, folders of images, datasets by name, real:N, noise:N; writes results.json, and with
--line line.png, when --out is given. Of images: the teacher's answers, variety, and how far they are from what its
BatchNorm layers recorded in training (bn_divergence, arXiv:1912.01274, the mean KL divergence of Gaussians: low is
alike); of shards that another teacher made, how often this one gives the class that they were made for. Without test
images, --unlabelled compares models with their teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from dfkd_cli.artifacts.files import write_atomic, write_json
from dfkd_cli.artifacts.integrity import check_foreign
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.catalog import Command
from dfkd_cli.config import option
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import ANSWERS
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.directory import RECORD
from dfkd_cli.models.exported import RECORD as EXPORT
from dfkd_cli.models.names import LoadedModel, ModelDirectory, locate, made_by_dfkd
from dfkd_cli.options import SeenTeacher
from dfkd_cli.report import evaluation
from dfkd_cli.report.places import find_teacher
from dfkd_cli.settings import Settings
from dfkd_cli.stages.inputs import TransferSet, balanced, is_images, open_images, pick_device
from dfkd_cli.stages.lines import End, line, pairs
from dfkd_cli.stages.measures import CPU, Examiner, check_gate, finite
from dfkd_cli.stages.shard_measures import measure_images, measure_shards
from dfkd_cli.stages.sharpness import require_hessian, sharpness
from dfkd_cli.stages.training import rehearse
from dfkd_cli.ui import VERBOSE, Progress, Terminal
from dfkd_cli.urls import named


@dataclass(frozen=True, kw_only=True)
class Inputs(SeenTeacher):
    """What is read, and how."""

    # Volatile: what decides the result is what the paths hold, by hash.
    paths: tuple[str, ...] | None = option(
        None, "model or shard directories, other images", volatile=True, argument="PATH ..."
    )
    teacher: str | None = option(None, "teacher to compare with (default: the one that is on record)")
    dataset: str | None = option(None, "dataset to test on (default: the teacher's)")
    data_dir: str | None = option(None, "where datasets lie", volatile=True)
    unlabelled: tuple[str, ...] | None = option(
        None, "images without labels on which models are compared with the teacher too: transfer sets, folders"
    )
    batch_size: int = option(500, "images per forward pass", low=1, rehearsal=2, volatile=True)
    sharpness: bool = option(False, "of models also the largest eigenvalue of the Hessian of the loss")
    line: bool = option(
        False, "also loss and top-1 on the straight line between the weights of each two models of one architecture"
    )
    train_images: int = option(
        1000, "images whose loss is meant by --sharpness and --line: of the training set, balanced over the classes",
        low=2, rehearsal=2,
    )  # fmt: skip
    min_top1: float | None = option(
        None, "gate: exit 5 when top-1 accuracy is below (0 to 1)", low=0, high=1, volatile=True
    )
    min_agreement: float | None = option(
        None, "gate: exit 5 when agreement on any --unlabelled is below (0 to 1)", low=0, high=1, volatile=True
    )


COMMAND = Command(
    position=50,
    examples=(
        "dfkd evaluate",
        "dfkd evaluate student/ --min-top1 0.97",
        "dfkd evaluate shards/ noise:1000 real",
        "dfkd evaluate student/ --unlabelled shards/ --min-agreement 0.9",
        "dfkd evaluate teacher/ student/ --sharpness",
    ),
    next="dfkd compare student/",
)


TEACHER, STUDENT = "teacher", "student"  # what is evaluated when nothing is named
RESULTS, LINE = "results.json", "line.png"
DIVERGENCE, AGREEMENTS = "bn_divergence", "agreement_on"


class Results(TypedDict):
    """``results.json``."""

    results: list[dict[str, Any]]
    lines: NotRequired[list[dict[str, Any]]]


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Measure what the paths hold, in float32; the teacher and the student when there are none."""
    if dry_run:
        return rehearse(settings, prepare, terminal)
    plan = prepare(settings, terminal)
    artifacts = {}
    if settings.run.out is None:
        found = measure(plan, terminal)
    else:
        directory = RunDirectory(Path(settings.run.out), settings, _parents(plan.evaluations), {})
        file, picture = directory.path / RESULTS, directory.path / LINE
        artifacts = {"results": str(file), **({"line": str(picture)} if plan.lines else {})}
        if directory.claim():
            directory.say_complete(terminal)
            found = read_json(file, Results)
        else:
            with directory.guard():
                found = measure(plan, terminal)
                write_json(file, {"schema": 1, **found})
                if plan.lines:
                    from dfkd_cli.report import charts  # loads matplotlib

                    write_atomic(picture, charts.lines(found["lines"]))
                directory.finish([*map(Path, artifacts.values())], _headline(plan.evaluations, found["results"]))
    results, lines = found["results"], found.get("lines", [])
    # Images are ranked by their divergence from the teacher's training data, smallest first.
    ranked = sorted(results, key=lambda result: (result.get(DIVERGENCE) is None, result.get(DIVERGENCE)))
    for kinds, columns in evaluation.tables(settings.inputs.unlabelled or ()).items():
        if rows := [result for result in ranked if result["kind"] in kinds]:
            terminal.answer(evaluation.rows(rows, columns))
    if lines:
        terminal.answer(evaluation.rows(lines, evaluation.BETWEEN))
    if terminal.verbosity >= VERBOSE and (rows := [r for r in ranked if r.get("bn_divergence_layers")]):
        terminal.answer(evaluation.layers(rows))
    answer = {"artifacts": artifacts, "metrics": _headline(plan.evaluations, results), "results": results}
    answer |= {"lines": lines} if lines else {}
    models = [result for result in results if result["kind"] == "model"]
    check_gate([(r["path"], r["top1"]) for r in models if "top1" in r], settings.inputs.min_top1, answer)
    agreed = [(f"{r['path']} on {on}", share) for r in models for on, share in r.get(AGREEMENTS, {}).items()]
    check_gate(agreed, settings.inputs.min_agreement, answer, "agreement")
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


@dataclass(frozen=True)
class Plan:
    """All that is to be measured.

    Attributes:
        evaluations: Of each path.
        lines: Those between models; of each what its entry begins with, and the rest.
    """

    evaluations: list[Evaluation]
    lines: list[Evaluation]


def measure(plan: Plan, terminal: Terminal) -> Results:
    """The results, one per evaluation, in values that JSON has."""
    found: list[dict[str, Any]] = []
    progress = Progress(terminal, "evaluate", "paths", len(plan.evaluations) + len(plan.lines))
    try:
        for each in (*plan.evaluations, *plan.lines):
            found.append(finite(named(each.facts | each.measure())))
            progress.update(len(found))
            path, products = each.facts["path"], found[-1].get("sharpness_products")
            if found[-1].get("logits_ok") is False:
                terminal.say(f"{path}: the stored logits are not what the teacher answers to the stored images")
            if products and found[-1]["sharpness"] is None:
                terminal.say(f"{path}: its sharpness is not found, or not finite, after {products} Hessian products")
    finally:
        progress.close()
    results: Results = {"results": found[: len(plan.evaluations)]}
    return results | {"lines": found[len(plan.evaluations) :]} if plan.lines else results


def _parents(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    parents = [parent for evaluation in evaluations for parent in evaluation.parents]
    return [parent for index, parent in enumerate(parents) if parent not in parents[:index]]


def _headline(evaluations: list[Evaluation], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the first result that is not the teacher's own."""
    pairs = zip(evaluations, results, strict=True)
    first = next((result for evaluation, result in pairs if not evaluation.is_teacher), results[0])
    return {name: value for name, value in first.items() if value is None or isinstance(value, (int, float))}


# -- what is read ------------------------------------------------------------------------------------------------------


def prepare(settings: Settings, terminal: Terminal) -> Plan:
    """Open everything that will be measured, and check that it fits together.

    Raises:
        ArtifactError: Missing, damaged, neither models nor images, of another number of classes than the dataset, or
            without the derivatives that are wanted.
        ConfigError: The device is not there, no dataset or teacher is known, or there is nothing to apply a flag to.
    """
    inputs = settings.inputs
    opener = _Opener(settings, terminal)
    if not opener.paths:
        raise ArtifactError("nothing to evaluate: no student/ and no teacher/ here", "dfkd evaluate PATH ...")
    evaluations = [opener.open(path) for path in opener.paths]
    for flag, wanted in (
        ("min-top1", inputs.min_top1 is not None),
        ("min-agreement", inputs.min_agreement is not None),
        ("unlabelled", inputs.unlabelled),
        ("sharpness", inputs.sharpness),
        ("line", inputs.line),
    ):
        if wanted and not any(e.facts["kind"] == "model" for e in evaluations):
            raise ConfigError(f"--{flag} needs a model, these are images", f"dfkd evaluate student/ --{flag}")
    if inputs.min_agreement is not None and not inputs.unlabelled:
        raise ConfigError("--min-agreement: on which images?", "give --unlabelled")
    if opener.orphans:
        terminal.say(f"{', '.join(opener.orphans)}: not compared with the teacher, it is not here -- give --teacher")
    if opener.examiner.caveat:
        terminal.say(opener.examiner.caveat)
    loss = " and ".join(flag for flag in ("sharpness", "line") if getattr(inputs, flag))
    for dataset in dict.fromkeys(end.dataset for end in opener.ends):
        terminal.say(f"{loss}: of the loss on {inputs.train_images:,} training images of {dataset}")
    lines = [opener.line(*pair) for pair in pairs(opener.ends)] if inputs.line else []
    return Plan(evaluations, lines)


class _Opener:
    """Opens paths; every model is read once.

    Attributes:
        paths: What is evaluated: the paths that were named, else the teacher and the student, where they are.
        orphans: Paths that record a teacher which is not to be found.
        ends: The models so far that are shown training images, too.
    """

    def __init__(self, settings: Settings, terminal: Terminal) -> None:
        inputs, self.terminal = settings.inputs, terminal
        self.inputs, self.code, self.seed = inputs, settings.code, settings.run.seed
        self.examiner = Examiner(pick_device(settings.run.device), inputs.data_dir, inputs.batch_size)
        self.passes = self.examiner.device, inputs.batch_size  # how images are shown to a model
        self.where = inputs.data_dir, self.seed  # images come from
        self.sets: dict[str, TransferSet] = {}  # those without labels
        self.orphans: list[str] = []
        self.ends: list[End] = []
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
        raise ArtifactError(f"{path}: {what}", "give a directory that dfkd made, or a network of your own as --teacher")

    def _model(self, path: str, model: LoadedModel) -> Evaluation:
        _, *line = model.ancestry
        teacher = self._teacher_of(path, line, model.sha256)
        teachers = [] if teacher is None else [teacher]
        names: list[str | None] = [self.inputs.dataset, *(m.dataset for m in (*teachers, model))]
        dataset = next((name for name in names if name is not None), None)
        labels = [flag for flag in ("min_top1", "sharpness", "line") if getattr(self.inputs, flag)]
        if dataset is None and (labels or not self.inputs.unlabelled):
            hint = "give --dataset NAME or DIR, or without labels --unlabelled"
            raise ConfigError(f"{path}: its record names no dataset to test on", hint)
        spec, uses = model.classifier.info.spec, model.provenance.get("uses", [])
        facts = {"path": path, "kind": "model", "spec": spec, "uses": uses, "dataset": dataset}
        facts |= {"device": self.examiner.device.type}
        parents = [*(m.parent("teacher") for m in teachers), model.parent("model")]
        if dataset is not None:
            *_, images = [self.examiner.images(dataset, m.classifier.info, m.path) for m in (*teachers, model)]
            facts["count"], parents = len(images), [*parents, *datasets.contents(dataset)]
        shown = [(name, self._unlabelled(name, path, teacher)) for name in self.inputs.unlabelled or ()]
        parents += [opened.parent for _, opened in shown]
        measure = functools.partial(self._measure, model, teacher, dataset, shown)
        if dataset is not None and (self.inputs.sharpness or self.inputs.line):
            facts["train_images"] = self.inputs.train_images
            self.ends.append(self._end(path, model, dataset))
        if self.inputs.sharpness:
            require_hessian(model, self.ends[-1].images)
            measure = functools.partial(self._with_sharpness, measure, self.ends[-1])
        return Evaluation(facts, parents, measure, teacher is not None and teacher.sha256 == model.sha256)

    def _measure(
        self,
        model: LoadedModel,
        teacher: LoadedModel | None,
        dataset: str | None,
        shown: Sequence[tuple[str, TransferSet]],
    ) -> dict[str, Any]:
        """The measures of a model on test images, where there are any, and on those that have no labels."""
        measures = self.examiner.measure(model, teacher, dataset)
        if teacher is not None and shown:
            agreed = {name: self.examiner.agreement(model, teacher, name, opened.source) for name, opened in shown}
            measures[AGREEMENTS] = agreed
        return measures

    def _unlabelled(self, name: str, path: str, teacher: LoadedModel | None) -> TransferSet:
        """Images without labels, which are shown to a model and its teacher; each set is opened once."""
        if teacher is None:
            raise ConfigError(f"--unlabelled {name}: {path} has no teacher that is known here", "give --teacher")
        if name not in self.sets:
            self.sets[name] = open_images(name, teacher, *self.where)
        return self.sets[name]

    def _end(self, path: str, model: LoadedModel, dataset: str) -> End:
        """A model with the training images that it is shown, on the CPU."""
        images = self.examiner.images(dataset, model.classifier.info, path, "train")
        return End(model, dataset, balanced(images, self.inputs.train_images, self.seed).all().to(CPU))

    def _with_sharpness(self, measure: Callable[[], dict[str, Any]], end: End) -> dict[str, Any]:
        device, batch_size = self.passes
        measures, classifier = measure(), end.model.classifier
        found = sharpness(classifier.to(device), end.images.to(device), batch_size, self.seed)
        classifier.cpu()
        return measures | found

    def line(self, first: End, second: End) -> Evaluation:
        """The line between two models."""
        paths = first.model.path, second.model.path
        facts = {"path": " -> ".join(paths), "from": paths[0], "to": paths[1], "dataset": first.dataset}
        facts |= {"train_images": self.inputs.train_images}
        return Evaluation(facts, [], functools.partial(line, first, second, *self.passes))

    def _shards(self, path: str) -> Evaluation:
        reader = ShardReader(Path(path))
        teacher = self._teacher_of(path, [reader.teacher])
        if teacher is not None and teacher.sha256 != reader.teacher:
            info, names = teacher.classifier.info, reader.manifest.get("classes")
            same = info.num_classes == reader.num_classes and (
                not names or not info.classes or [*info.classes] == names
            )
            return self._images(path, ANSWERS if same else ())  # which its own answers are beside
        method, uses = reader.manifest.get("method"), reader.manifest.get("uses", [])
        parents = [] if teacher is None else [teacher.parent("teacher")]
        parents.append({"role": "shards", "path": path, "sha256": reader.sha256})
        classifier = None if teacher is None else teacher.classifier
        measure = functools.partial(measure_shards, reader, classifier, *self.passes)
        return Evaluation({"path": path, "kind": "shards", "method": method, "uses": uses}, parents, measure)

    def _images(self, path: str, wanted: Collection[str] = ()) -> Evaluation:
        if self.teacher is None:
            raise ConfigError(
                f"{path}: neither model nor shards, and images are measured with a teacher", "give --teacher"
            )
        shown, classifier = open_images(path, self.teacher, *self.where, wanted), self.teacher.classifier
        parents = [self.teacher.parent("teacher"), shown.parent]
        measure = functools.partial(measure_images, shown.source, classifier, *self.passes)
        return Evaluation({"path": path, "kind": "images", "uses": list(shown.uses)}, parents, measure)

    def _teacher_of(self, path: str, line: Sequence[str], own: str | None = None) -> LoadedModel | None:
        """The teacher to compare with: the one that was asked for, else the one on record, wherever it is found.

        The ``line`` of those on record is the teacher, that one's teacher and so on; the nearest that is found counts.
        A model that is ``teacher/`` itself, by its ``own`` hash, is compared with that.
        """
        if self.teacher is not None and (self.inputs.teacher is not None or self.teacher.sha256 == own):
            return self.teacher
        known = {model.sha256: model for model in reversed(self.models.values())}
        for sha256 in line:
            if sha256 in known:
                return known[sha256]
            try:
                if (place := find_teacher(Path(path), sha256)) is not None:
                    return self.models.setdefault(str(place), ModelDirectory(str(place)).open(self.code))
            except ArtifactError as error:  # nobody asked for this teacher
                self.terminal.say(f"{path}: not compared with its teacher, which cannot be read: {error}")
                return None
        if line:
            self.orphans.append(path)
        return None

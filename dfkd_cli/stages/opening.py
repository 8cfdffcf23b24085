"""Opens what is evaluated: models with their teachers, shards and images, each as what is to be measured of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.integrity import check_foreign
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.config import defaults
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import ANSWERS
from dfkd_cli.errors import ArtifactError, ConfigError, DfkdError
from dfkd_cli.models.directory import RECORD
from dfkd_cli.models.exported import RECORD as EXPORT
from dfkd_cli.models.names import LoadedModel, ModelDirectory, locate, made_by_dfkd
from dfkd_cli.report.places import find_teacher, judged_by
from dfkd_cli.settings import Settings
from dfkd_cli.stages.inputs import TransferSet, balanced, is_images, open_images, pick_device
from dfkd_cli.stages.lines import End, line
from dfkd_cli.stages.measures import CPU, Examiner
from dfkd_cli.stages.shard_measures import measure_images, measure_shards
from dfkd_cli.stages.sharpness import require_hessian, sharpness
from dfkd_cli.ui import Terminal

TEACHER, STUDENT = "teacher", "student"  # what is evaluated when nothing is named
AGREEMENTS = "agreement_on"


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


class Opener:
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
        # Without labels, by name and teacher, who says what `real` is.
        self.sets: dict[tuple[str, str], TransferSet] = {}
        self.contents = functools.cache(datasets.contents)  # once for all models
        self.orphans: list[str] = []
        self.ends: list[End] = []
        self.teacher: LoadedModel | None = None
        if inputs.teacher is not None or Path(TEACHER, RECORD).is_file():
            asked = inputs.teacher is not None or not inputs.paths or TEACHER in map(os.path.normpath, inputs.paths)
            try:
                self.teacher = locate(inputs.teacher or TEACHER, inputs).open(self.code)
            except DfkdError as error:
                if asked:
                    raise
                self.terminal.say(f"nothing is compared with {TEACHER}/, which cannot be read: {error}")
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
        teacher = self._teacher_of(path, judged_by(line, model.record), model.sha256)
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
            facts["count"], parents = len(images), [*parents, *self.contents(dataset, self.inputs.data_dir)]
        shown = [(name, self._unlabelled(name, model, teacher)) for name in self.inputs.unlabelled or ()]
        parents += [opened.parent for _, opened in shown]
        measure = functools.partial(self._measure, model, teacher, dataset, shown)
        if dataset is not None and (self.inputs.sharpness or self.inputs.line):
            self.ends.append(self._end(path, model, dataset))
            facts["train_images"] = len(self.ends[-1].images.pixels)
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

    def _unlabelled(self, name: str, model: LoadedModel, teacher: LoadedModel | None) -> TransferSet:
        """Images without labels, which are shown to a model and its teacher; each set is opened once for a teacher."""
        if teacher is None:
            raise ConfigError(f"--unlabelled {name}: {model.path} has no teacher that is known here", "give --teacher")
        key, takes = (name, teacher.sha256), model.classifier.info.input_size
        if key not in self.sets:
            self.sets[key] = open_images(name, teacher, *self.where)
        if (shape := self.sets[key].source.shape) != takes:
            what = f"--unlabelled {name}: its teacher is shown images of {shape}, {model.path} takes {takes}"
            raise ArtifactError(what, "leave out --unlabelled, or give a --teacher that takes the same")
        return self.sets[key]

    def _end(self, path: str, model: LoadedModel, dataset: str) -> End:
        """A model with the training images that it is shown, on the CPU: all, where the default is more."""
        images, count = self.examiner.images(dataset, model.classifier.info, path, "train"), self.inputs.train_images
        if len(images) < count:
            if count != defaults(type(self.inputs))["train_images"]:
                what = f"--train-images {count}: dataset {dataset} has {len(images)} training images"
                raise ConfigError(what, f"choose 2 to {len(images)}")
            count = len(images)
        return End(model, dataset, balanced(images, count, self.seed).all().to(CPU))

    def _with_sharpness(self, measure: Callable[[], dict[str, Any]], end: End) -> dict[str, Any]:
        device, batch_size = self.passes
        measures, classifier = measure(), end.model.classifier
        found = sharpness(classifier.to(device), end.images.to(device), batch_size, self.seed)
        classifier.cpu()
        return measures | found

    def line(self, first: End, second: End) -> Evaluation:
        """The line between two models."""
        paths = first.model.path, second.model.path
        facts: dict[str, Any] = {"path": " -> ".join(paths), "from": paths[0], "to": paths[1], "dataset": first.dataset}
        facts |= {"train_images": len(first.images.pixels)}
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
        facts = {"path": path, "kind": "shards", "method": method, "uses": uses}
        return Evaluation(facts | {"teacher": None if teacher is None else teacher.path}, parents, measure)

    def _images(self, path: str, wanted: Collection[str] = ()) -> Evaluation:
        if self.teacher is None:
            raise ConfigError(
                f"{path}: neither model nor shards, and images are measured with a teacher", "give --teacher"
            )
        shown, classifier = open_images(path, self.teacher, *self.where, wanted), self.teacher.classifier
        parents = [self.teacher.parent("teacher"), shown.parent]
        measure = functools.partial(measure_images, shown.source, classifier, *self.passes)
        facts = {"path": path, "kind": "images", "uses": list(shown.uses), "teacher": self.teacher.path}
        return Evaluation(facts, parents, measure)

    def _teacher_of(self, path: str, line: Sequence[str], own: str | None = None) -> LoadedModel | None:
        """The teacher to compare with: the one that was asked for, else the one on record, wherever it is found.

        The ``line`` of those on record is the teacher, that one's teacher and so on; the nearest that is found counts.
        A model that is ``teacher/`` itself, by its ``own`` hash, is compared with that.
        """
        if self.teacher is not None and (self.inputs.teacher is not None or self.teacher.sha256 == own):
            return self.teacher
        known = {model.sha256: model for model in reversed(self.models.values())}
        beside = [path, *(known[sha256].path for sha256 in line if sha256 in known)]
        for sha256 in line:
            if sha256 in known:
                return known[sha256]
            try:
                if place := next(filter(None, (find_teacher(Path(child), sha256) for child in beside)), None):
                    return self.models.setdefault(str(place), ModelDirectory(str(place)).open(self.code))
            except ArtifactError as error:  # nobody asked for this teacher
                self.terminal.say(f"{path}: not compared with its teacher, which cannot be read: {error}")
                return None
        if line:
            self.orphans.append(path)
        return None

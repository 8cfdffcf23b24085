"""Which models may be ranked together: those of one teacher, tested on one dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.names import ForeignWeights, ModelDirectory
from dfkd_cli.report.entries import Model, read_model
from dfkd_cli.report.places import find_teacher, judged_by
from dfkd_cli.trust import Code


@dataclass
class Section:
    """One ranking.

    Attributes:
        dataset: The test images.
        name: What a grid with several teachers calls this one; empty elsewhere.
        teachers: By hash; several only where every row is repeated with a teacher per seed.
        members: Students, and baselines that had no teacher.
        measured_against: Each student's teacher, by the student's path; of a student's student the first of them all.
    """

    dataset: str
    name: str = ""
    teachers: dict[str, Model] = field(default_factory=dict)
    members: list[Model] = field(default_factory=list)
    measured_against: dict[Path, Model] = field(default_factory=dict)

    @property
    def models(self) -> list[Model]:
        """All of them, teachers first."""
        return [*self.teachers.values(), *self.members]

    def teacher_of(self, model: Model) -> Model:
        """The teacher that a model is measured against: a teacher itself, a baseline the first."""
        if model.sha256 in self.teachers:
            return model
        return self.measured_against.get(model.path) or next(iter(self.teachers.values()))


def arrange(models: Sequence[Model], dataset: str | None, code: Code, judge: Model | None = None) -> list[Section]:
    """The sections of a comparison, in the order of the models.

    Args:
        models: Everything to compare. A teacher that is not among them is looked for where its students say.
        dataset: What to test on; by default what each teacher was tested on.
        code: Which code may run.
        judge: The one of them that students outside of grids are measured against, whoever taught them.

    Raises:
        ArtifactError: A student's teacher is not to be found.
        ConfigError: Nobody says what to test on.
    """
    sections: dict[str, Section] = {}
    teacher_hashes = {model.teacher for model in models}
    by_hash = {model.sha256: model for model in reversed(models)}
    for model in models:  # what students of older versions record of a foreign one
        for sha256 in model.location.hashes if isinstance(model.location, ForeignWeights) else ():
            by_hash.setdefault(sha256, model)
    for model in models:
        if model.teacher is not None and not model.is_grid_teacher and not _is(model, judge):
            teacher = _teacher_of(model, by_hash, code) if judge is None or model.group is not None else judge
            if teacher is None and model.sha256 in teacher_hashes:
                continue  # here as a teacher, whoever taught it
            if teacher is None:
                raise ArtifactError(
                    f"{model.path}: its teacher (sha256 {model.teacher[:12]}...) is not to be found",
                    "give it too: dfkd compare TEACHER STUDENT, or with --teacher",
                )
            section = _section(sections, model, teacher, dataset)
            section.members.append(model)
            section.measured_against[model.path] = teacher
    taught = [*sections.values()]
    for model in models:
        placed = any(model.sha256 in section.teachers for section in sections.values())
        if (model.teacher is None or model.is_grid_teacher or _is(model, judge)) and not placed:
            if model.part:
                fitting = [s for s in sections.values() if any(model.origin == other.origin for other in s.models)]
            else:
                fitting = [section for section in taught if model.group is None and _fits(model, section, dataset)]
            if len(fitting) == 1:
                fitting[0].members.append(model)
            else:
                _section(sections, model, model, dataset)
    return [*sections.values()]


def _is(model: Model, judge: Model | None) -> bool:
    """Whether a model is the judge, and no row of a grid that is the same one."""
    return judge is not None and model.group is None and model.sha256 == judge.sha256


def _section(sections: dict[str, Section], model: Model, teacher: Model, dataset: str | None) -> Section:
    """The section of a model and its teacher, which is made where there is none: a grid's own, else by the teacher."""
    keys = (key for key, section in sections.items() if teacher.sha256 in section.teachers)
    key = next(keys, teacher.sha256) if model.group is None else model.group
    section = sections.setdefault(key, Section(_dataset_of(teacher, dataset), model.group or ""))
    section.teachers[teacher.sha256] = teacher
    return section


def _teacher_of(student: Model, by_hash: dict[str, Model], code: Code) -> Model | None:
    """Whom a student is measured against: its teacher or, of a student's student, that one's and so on.

    The nearest one counts that is among the known models, by hash, or where the student says, or in ``teacher/``: then
    it is known as well. A grid has one ranking, and so has a chain: none of their own students heads another.
    """
    beside = [student.path, *(by_hash[sha256].path for sha256 in student.line if sha256 in by_hash)]
    for sha256 in judged_by(student.line, student.record):
        places = (find_teacher(child, sha256) for child in beside if sha256 not in by_hash)
        if place := next(filter(None, places), None):
            by_hash[sha256] = read_model(ModelDirectory(str(place)), code)
        teacher = by_hash.get(sha256)
        if teacher is not None and teacher.row is None and (teacher.chain is None or teacher.chain != student.chain):
            return teacher
    return None


def _fits(baseline: Model, section: Section, dataset: str | None) -> bool:
    """Whether a model without a teacher can stand beside the students of one."""
    teachers = list(section.teachers.values())
    same_images = baseline.record["input_size"] == teachers[0].record["input_size"]
    return len(teachers) == 1 and same_images and (dataset or baseline.provenance.get("dataset")) == section.dataset


def _dataset_of(model: Model, dataset: str | None) -> str:
    name = model.provenance.get("dataset") if dataset is None else dataset
    if name is None:
        raise ConfigError(f"{model.path}: its record names no dataset to test on", "give --dataset")
    return name

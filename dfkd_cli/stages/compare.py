"""Put finished directories side by side, or run a grid of pipelines.

Reads model and shard directories, and of a comparison what its grid has made so far; writes comparison/ with
results.json, table.md and report.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd_cli.artifacts.files import read_json, write_atomic, write_json
from dfkd_cli.artifacts.run import RunDirectory, check_free
from dfkd_cli.artifacts.shards import MANIFEST
from dfkd_cli.catalog import Command
from dfkd_cli.config import option
from dfkd_cli.data import datasets
from dfkd_cli.data.datasets import Dataset
from dfkd_cli.data.sources import RealSource
from dfkd_cli.errors import ArtifactError, ConfigError, GateNotMet, RunFailed
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.directory import load_model, read_info
from dfkd_cli.report import html, table
from dfkd_cli.report.entries import Model, ShardSet, read_model, read_run, read_shards
from dfkd_cli.report.results import rows
from dfkd_cli.report.sections import Section, arrange
from dfkd_cli.resolve import Settings, recipe_layer, resolve
from dfkd_cli.settings import ForeignModel
from dfkd_cli.stages.grid.commands import Grid, PlannedRun, qualified
from dfkd_cli.stages.grid.planner import plan
from dfkd_cli.stages.grid.scheduler import run_grid
from dfkd_cli.stages.inputs import load_teacher, pick_device
from dfkd_cli.stages.measures import cost, examine, finite, share, top1
from dfkd_cli.stages.snapshots import SNAPSHOTS, look_back
from dfkd_cli.ui import Progress, Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs(ForeignModel):
    """What is read, and how."""

    paths: tuple[str, ...] | None = option(
        None, "model, shard or comparison directories", volatile=True, argument="PATH ..."
    )
    # Volatile: a grid may grow in its directory, and its own hash counts.
    rows: tuple[str, ...] | None = option(
        None, "of a grid only these rows, ROW or TEACHER/ROW, and what they are made from", volatile=True
    )
    teacher: str | None = option(None, "teacher: model directory or SPEC (default: the one each student records)")
    dataset: str | None = option(None, "dataset to test on (default: the teacher's)")
    data_dir: str | None = option(None, "where datasets lie", volatile=True)
    fail_below: float | None = option(
        None, "gate: exit 5 when any student's top-1 is below (0 to 1)", low=0, high=1, volatile=True
    )


COMMAND = Command(
    position=60,
    out="comparison",
    sections=("about", "grid"),
    examples=("dfkd compare student/", "dfkd compare --recipe digits --out grid/", "dfkd compare grid/ --out so-far/"),
    next="open comparison/report.html",
)


RESULTS, TABLE, REPORT, MEASUREMENTS = "results.json", "table.md", "report.html", "measurements.json"


@dataclasses.dataclass
class Subjects:
    """What is compared.

    Attributes:
        models: Model directories, those of the grid first.
        shards: Shard directories that were named by themselves.
        foreign: The classifier of a teacher without a directory, by hash.
    """

    models: list[Model] = dataclasses.field(default_factory=list)
    shards: list[ShardSet] = dataclasses.field(default_factory=list)
    foreign: dict[str, Classifier] = dataclasses.field(default_factory=dict)

    def load(self, model: Model, allow_code: bool) -> Classifier:
        """A model's classifier."""
        return self.foreign.get(model.sha256) or load_model(model.path, allow_code)[0]


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Compare what ``paths`` hold and what the grid makes. Both are only read.

    A grid may have changed since ``--out`` was made, as long as no run that is there would be another one: new rows are
    run, the others are kept.
    """
    out = settings.out
    if settings.sections["grid"] is not None and settings.run.seed:
        raise ConfigError(f"--seed {settings.run.seed}: the grid has seeds of its own", "change grid.seeds")
    if settings.sections["grid"] is None and settings.inputs.rows is not None:
        raise ConfigError("--rows: there is no grid to choose rows of", "give --recipe with a grid, or leave it out")
    grid = None if settings.sections["grid"] is None else plan(settings, out)
    subjects = _open(settings, grid, terminal)
    sections = _arrange(subjects, settings)  # what does not fit is found before anything is written
    check_free(out, settings)
    for step in () if grid is None or settings.run.overwrite else grid.runs:
        check_free(step.out, step.settings)
    if settings.inputs.rows is not None:
        terminal.say("only the rows that --rows names are shown; without it all are, and those are not run again")
    if dry_run:
        return _rehearse(subjects, grid, terminal)
    facts = {} if grid is None else {"grid": grid.sha256}
    directory = RunDirectory(out, settings, _parents(subjects, sections), facts)
    if directory.claim():
        directory.say_complete(terminal)
        results = read_json(out / RESULTS)
        _show(results, terminal)
    else:
        with directory.guard():
            failed = [] if grid is None else run_grid(grid, terminal, directory.save, settings.run.devices)
            if grid is not None:
                lost = {(f["teacher"], f["row"], f["seed"]) for f in failed}
                made = [step for step in grid.runs if (step.teacher, step.row, step.seed) not in lost]
                subjects.models[:0] = _models(made, settings.run.allow_code)
            sections = _arrange(subjects, settings)
            results = _results(subjects, sections, failed, directory, terminal)
            write_atomic(out / TABLE, table.markdown(results).encode())
            write_atomic(out / REPORT, html.page(results).encode())
            write_json(out / RESULTS, results)
            _show(results, terminal)
            if failed:  # unfinished, so that the same command tries again
                names = ", ".join(dict.fromkeys(qualified(f["teacher"], f["row"]) for f in failed))
                raise RunFailed(f"failed: {names}", f"see {out / TABLE}; the same command tries again")
            directory.finish([out / RESULTS, out / TABLE, out / REPORT], _best(results))
    artifacts = {"comparison": str(out), "results": str(out / RESULTS), "report": str(out / REPORT)}
    answer = {"artifacts": artifacts, "metrics": _best(results), "sections": results["sections"]}
    _check_gate(answer, settings.inputs.fail_below)
    return answer


# -- what is compared --------------------------------------------------------------------------------------------------


def _open(settings: Settings, grid: Grid | None, terminal: Terminal) -> Subjects:
    """Read the directories that were given.

    Raises:
        ConfigError: No model was given.
        ArtifactError: Missing, unfinished or damaged.
    """
    inputs, allow_code = settings.inputs, settings.run.allow_code
    subjects = Subjects()
    paths = {Path(name).resolve(): Path(name) for name in inputs.paths or ()}.values()
    comparisons = [path for path in paths if read_run(path).get("command") == "compare"]
    for path in paths:
        if path in comparisons:
            found = _so_far(path, subjects, allow_code, terminal)
            if grid is not None or len(comparisons) > 1:  # each has rankings of its own
                found = [replace(model, group=qualified(str(path), model.group or "").rstrip("/")) for model in found]
            subjects.models += found
        elif (path / MANIFEST).is_file():
            subjects.shards.append(read_shards(path))
        else:
            subjects.models.append(read_model(path, allow_code))
    if grid is not None:
        for group, name in grid.given.items():
            subjects.models.append(replace(_teacher(name, settings, subjects), group=group))
    elif inputs.teacher is not None:
        subjects.models.append(_teacher(inputs.teacher, settings, subjects))
    if grid is None and not subjects.models:
        raise ConfigError("no models to compare", "give directories (dfkd compare student/) or a grid (--recipe NAME)")
    return subjects


def _so_far(path: Path, subjects: Subjects, allow_code: bool, terminal: Terminal) -> list[Model]:
    """What a comparison's grid has made until now, under the names of its rows. It may be running meanwhile.

    Raises:
        ArtifactError: A comparison without a grid makes nothing.
    """
    settings = resolve("compare", [recipe_layer(str(path / "config.yaml"), "compare")])
    if settings.sections["grid"] is None:
        raise ArtifactError(f"{path}: a comparison without a grid", "give the directories that it compares")
    grid = plan(settings, path)
    finished = [step for step in grid.runs if read_run(step.out).get("status") == "done"]
    terminal.say(f"{path}: {len(finished)} of {len(grid.runs)} steps are finished")
    given = [replace(_teacher(name, settings, subjects), group=group) for group, name in grid.given.items()]
    return [*given, *_models(finished, allow_code)]


def _teacher(name: str, settings: Settings, subjects: Subjects) -> Model:
    """A teacher that was there before: a model directory, or a SPEC with ``--weights``."""
    if Path(name).is_dir():
        return read_model(Path(name), settings.run.allow_code)
    teacher = load_teacher(replace(settings.inputs, teacher=name), settings.run.allow_code)
    subjects.foreign[teacher.sha256] = teacher.classifier
    record = dataclasses.asdict(teacher.classifier.info) | {"provenance": {}}
    return Model(Path(name), teacher.sha256, teacher.classifier.num_parameters, record)


def _models(steps: Sequence[PlannedRun], allow_code: bool) -> list[Model]:
    """The models that commands of a grid have made."""
    models = []
    for step in steps:
        if step.model is not None:
            place: dict[str, Any] = {"row": step.row or None, "series": step.series, "group": step.teacher}
            model = read_model(step.model, allow_code)
            models.append(replace(model, **place, published=step.published))
    return models


def _arrange(subjects: Subjects, settings: Settings) -> list[Section]:
    return arrange(subjects.models, settings.inputs.dataset, settings.run.allow_code)


def _parents(subjects: Subjects, sections: Sequence[Section]) -> list[dict[str, Any]]:
    """What decides the result, by hash; a grid's runs have identities of their own."""
    found = [{"role": "model", "path": str(m.path), "sha256": m.sha256} for m in subjects.models]
    found += [{"role": "shards", "path": str(s.path), "sha256": s.sha256} for s in subjects.shards]
    return found + [content for section in sections for content in datasets.contents(section.dataset)]


def _rehearse(subjects: Subjects, grid: Grid | None, terminal: Terminal) -> dict[str, Any]:
    """``--dry-run``: everything was read and checked; say what would be done."""
    steps = [] if grid is None else grid.runs
    lines = [step.describe() for step in steps] + [f"compare {model.path}" for model in subjects.models]
    terminal.answer("\n".join(lines))
    what = "everything fits" if grid is None else f"{len(steps)} commands, well-formed; their data was not looked for"
    terminal.say(f"dry run: {what}; nothing was written")
    planned = [
        {
            **{key: getattr(step, key) for key in ("teacher", "row", "seed")},
            "out": str(step.out),
            "model": None if step.model is None else str(step.model),
            "config": step.settings.plain(),
        }
        for step in steps
    ]
    return {"dry_run": True, "plan": planned, "models": [str(model.path) for model in subjects.models]}


# -- what is measured --------------------------------------------------------------------------------------------------


def _results(
    subjects: Subjects,
    sections: Sequence[Section],
    failed: Sequence[Mapping[str, Any]],
    directory: RunDirectory,
    terminal: Terminal,
) -> dict[str, Any]:
    """``results.json``. A grid is the first section, or the first ones where it has several teachers."""
    settings = directory.settings
    device = pick_device(settings.run.device)
    progress = Progress(terminal, "compare", "models", sum(len(section.models) for section in sections))
    meter = Meter(directory.path / MEASUREMENTS, subjects, device, settings.run.allow_code, progress)
    blocks: list[dict[str, Any]] = []
    lost: dict[str, list[Mapping[str, Any]]] = {}
    for failure in failed:
        lost.setdefault(failure["teacher"], []).append(failure)
    for section in sections:
        test = _test_images(section, settings.inputs.data_dir)
        images = " ".join([test.name, *(content["sha256"] for content in datasets.contents(test.name))])
        measured = {
            model.path: meter.measure(model, section.teacher_of(model), test, images) for model in section.models
        }
        facts = {"teacher": section.name, "dataset": section.dataset, "test_images": len(test)}
        made = {"rows": rows(section, measured), "failed": lost.pop(section.name, [])}
        blocks.append({**facts, "classes": list(test.classes), **made})
    progress.close()
    directory.save()
    galleries = {s.sha256: s.facts() for s in [*(s for m in subjects.models for s in m.shards), *subjects.shards]}
    return {
        "schema": 1,
        "argv": directory.record["argv"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": directory.record["versions"],
        "started": directory.record["started"],
        "seconds": directory.record["seconds"],
        "sections": blocks,
        "shards": list(galleries.values()),
    }


def _test_images(section: Section, data_dir: str | None) -> Dataset:
    first, *others = section.models
    info = read_info(first.record)
    test = datasets.load(section.dataset, "test", data_dir=data_dir, image_shape=info.input_size)
    test = test.labelled_for(info, str(first.path))
    for model in others:
        if test.labelled_for(read_info(model.record), str(model.path)) is not test:
            raise ArtifactError(f"{model.path} counts its classes in another order than {first.path}", "leave it out")
    return test


@dataclasses.dataclass
class Meter:
    """Measures every model with the same code, once: a continued run takes the numbers from ``file``."""

    file: Path
    subjects: Subjects
    device: torch.device
    allow_code: bool
    progress: Progress

    def __post_init__(self) -> None:
        self.known = read_json(self.file) if self.file.exists() else {}
        self.given: dict[str, Tensor] = {}  # the classes (N,) that each teacher gives
        self.costs: dict[Any, dict[str, Any]] = {}  # of each architecture: repeats over seeds cost the same
        self.done = 0

    def measure(self, model: Model, teacher: Model, test: Dataset, images: str) -> dict[str, Any]:
        """What is measured of a model on images that ``images`` stands for, its agreement with the teacher included."""
        key = f"{model.sha256} {teacher.sha256} {images}"
        if key not in self.known:
            measures, classes = self._examine(model, test)
            teacher_key = f"{teacher.sha256} {images}"
            if teacher_key not in self.given:
                self.given[teacher_key] = classes if model is teacher else self._examine(teacher, test)[1]
            measures["agreement"] = share(classes == self.given[teacher_key])
            measures["snapshots"] = self._look_back(model, test)
            self.known[key] = measures
            write_json(self.file, self.known)
        self.done += 1
        self.progress.update(self.done)
        return self.known[key]

    def _look_back(self, model: Model, test: Dataset) -> list[dict[str, Any]]:
        """Top-1 of the model at each round that it kept, ``{"round": ..., "top1": ...}``."""
        if not (model.path / SNAPSHOTS).is_dir():
            return []
        classifier = self.subjects.load(model, self.allow_code).to(self.device)
        rounds = look_back(model.path, classifier)
        return [{"round": index, "top1": top1(classifier, RealSource(test))} for index in rounds]

    def _examine(self, model: Model, test: Dataset) -> tuple[dict[str, Any], Tensor]:
        classifier = self.subjects.load(model, self.allow_code)
        measures, classes = examine(classifier, RealSource(test), test.classes, self.device)
        info = classifier.info
        architecture = (info.spec, info.num_classes, info.input_size)
        if architecture not in self.costs:
            self.costs[architecture] = cost(classifier, self.device)
        return finite(measures | self.costs[architecture]), classes


# -- what is said about it ---------------------------------------------------------------------------------------------


def _show(results: Mapping[str, Any], terminal: Terminal) -> None:
    for section in results["sections"]:
        terminal.answer(table.headline(section))
        width = terminal.out.width if terminal.out.is_terminal else None
        terminal.answer(table.terminal_table(section, width))
        if (sizes := table.terminal_by_size(section)) is not None:
            terminal.answer(sizes)
        for line in table.failures(section):
            terminal.answer(line)


def _students(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of students, each with the name of its teacher."""
    sections = results["sections"]
    return [(section["teacher"], row) for section in sections for row in section["rows"] if row["role"] == "student"]


def _best(results: Mapping[str, Any]) -> dict[str, Any]:
    """The student with the smallest gap."""
    students = _students(results)
    if not students:
        return {}
    teacher, row = max(students, key=lambda student: student[1]["gap"]["mean"])
    return {"best": qualified(teacher, row["label"]), "top1": row["top1"]["mean"], "gap": row["gap"]["mean"]}


def _check_gate(answer: Mapping[str, Any], least: float | None) -> None:
    """Raise :class:`GateNotMet` when a single student is below."""
    if least is not None and not _students(answer):
        raise ConfigError("--fail-below: there is no student to pass it", "give a student, or leave it out")
    below = [
        f"{run['path']} {run['measures']['top1']:.6g}"
        for _, row in _students(answer)
        for run in row["runs"]
        if least is not None and run["measures"]["top1"] < least
    ]
    if below:
        raise GateNotMet(f"top-1 is below {least:.6g}: {', '.join(below)}", answer=answer)

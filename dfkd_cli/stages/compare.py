"""Put finished directories side by side, or run a grid of pipelines.

Reads model and shard directories, and of a comparison what its grid has made so far; writes comparison/ with
results.json, table.md and report.html.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dfkd_cli.artifacts.copies import on_this_machine
from dfkd_cli.artifacts.files import utf8, write_atomic, write_json, write_text
from dfkd_cli.artifacts.integrity import intact, read_run
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.artifacts.run import RunDirectory, begun, check_free
from dfkd_cli.artifacts.shards import MANIFEST
from dfkd_cli.catalog import UNTRAINED, Command
from dfkd_cli.config import defaults, option
from dfkd_cli.data import datasets
from dfkd_cli.errors import ArtifactError, ConfigError, RunFailed
from dfkd_cli.models.directory import read_info
from dfkd_cli.models.names import locate
from dfkd_cli.options import Run, SeenTeacher
from dfkd_cli.report import html, table
from dfkd_cli.report.entries import Model, ShardSet, read_model, read_models, read_shards
from dfkd_cli.report.results import rows
from dfkd_cli.report.sections import Section, arrange
from dfkd_cli.settings import Layer, Settings, recipe_layer, resolve
from dfkd_cli.stages.grid.commands import Grid, PlannedRun, qualified
from dfkd_cli.stages.grid.estimate import estimate
from dfkd_cli.stages.grid.planner import plan
from dfkd_cli.stages.grid.scheduler import launcher, run_grid
from dfkd_cli.stages.grid.script import script
from dfkd_cli.stages.inputs import pick_device
from dfkd_cli.stages.measures import Examiner, check_gate
from dfkd_cli.stages.meter import Meter
from dfkd_cli.trust import CONFIG, Code
from dfkd_cli.ui import Progress, Terminal
from dfkd_cli.urls import named


@dataclass(frozen=True, kw_only=True)
class Inputs(SeenTeacher):
    """What is read, and how."""

    paths: tuple[str, ...] | None = option(
        None, "model, shard or comparison directories", volatile=True, argument="PATH ..."
    )
    # Volatile: a grid may grow in its directory, and its own hash counts.
    rows: tuple[str, ...] | None = option(
        None, "of a grid only these rows, ROW or TEACHER/ROW, and what they are made from", volatile=True
    )
    engine: Literal["local", "ray"] = option(
        "local",
        "where a grid's commands run: here, or on a Ray cluster, as many at a time as it has room for",
        volatile=True,
        typed=True,
    )
    address: str | None = option(
        None,
        "the Ray cluster, HOST:PORT (default: RAY_ADDRESS; the one of this machine; or it is started here)",
        volatile=True,
        typed=True,
    )
    gpus_per_run: float = option(
        0,
        "GPUs of each command on Ray, of 0.5 two share one; it takes as many CPUs as --threads (1)",
        low=0,
        volatile=True,
        typed=True,
    )
    estimate: bool = option(
        False,
        "with --dry-run: time rounds of each command here, and say how long the grid takes",
        volatile=True,
        typed=True,
    )
    script: str | None = option(
        None, "with --dry-run: write a script of SLURM jobs (sh FILE)", volatile=True, typed=True
    )
    teacher: str | None = option(
        None, "teacher: model directory or SPEC (default: the one each student records)", parent=True
    )
    dataset: str | None = option(None, "dataset to test on (default: the teacher's)")
    data_dir: str | None = option(None, "where datasets lie", volatile=True)
    batch_size: int = option(500, "images per forward pass of what is measured", low=1, rehearsal=2, volatile=True)
    fail_below: float | None = option(
        None, "gate: exit 5 when any student's top-1 is below (0 to 1)", low=0, high=1, volatile=True
    )


COMMAND = Command(
    position=60,
    out="comparison",
    ignores=("num_nodes",),
    sections=("about", "grid"),
    examples=("dfkd compare student/", "dfkd compare --recipe digits --out grid/", "dfkd compare grid/ --out so-far/"),
    next="open comparison/report.html",
)


RESULTS, TABLE, REPORT = "results.json", "table.md", "report.html"


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Compare what ``paths`` hold and what the grid makes. Both are only read.

    A grid may have changed since ``--out`` was made, as long as no run that is there would be another one: new rows are
    run, the others are kept.
    """
    out = settings.out
    _check_asked(settings, dry_run)
    engine = launcher(settings)
    grid = None if settings.sections["grid"] is None else plan(settings, out)
    models, shards, judge = _open(settings, grid, terminal)
    # What does not fit is found before anything is written.
    sections = arrange(models, settings.inputs.dataset, settings.code, judge)
    check_free(out, settings)
    contents = functools.cache(_contents)
    if grid is not None and not settings.run.overwrite:
        for planned in grid.runs:
            named = (getattr(planned.settings.inputs, name, None) for name in ("dataset", "data_dir"))
            _check_own(grid, planned, contents(*named))
    if settings.inputs.rows is not None:
        terminal.say("only the rows that --rows names are shown; without it all are, and those are not run again")
    facts: dict[str, Any] = {"judge": judge and judge.sha256} if grid is None else {"grid": grid.sha256}
    facts |= {} if grid is None else {"unmade": sum(not grid.made(run) for run in grid.runs)}
    if grid is not None and (tested := contents(settings.inputs.dataset, settings.inputs.data_dir)):
        facts["dataset_sha256"] = tested[0]["sha256"]  # a grid may have made no model yet that is tested on it
    of_sections, where = dict.fromkeys(section.dataset for section in sections), settings.inputs.data_dir
    parents = _parents(models, shards) + [content for name in of_sections for content in datasets.contents(name, where)]
    directory = RunDirectory(out, settings, parents, facts)
    if dry_run:
        return _rehearse(directory, models, grid, terminal)
    if directory.claim():
        directory.say_complete(terminal)
        results = read_json(out / RESULTS, dict[str, Any])
        for part in table.for_terminal(results):
            terminal.answer(part)
    else:
        with directory.guard():
            failed: list[dict[str, Any]] = []
            if grid is not None:
                failed, lost = run_grid(grid, engine, terminal, directory.save)
                models[:0] = _models([run for run in _finished(grid) if run.out not in lost], settings.code)
            sections = arrange(models, settings.inputs.dataset, settings.code, judge)
            results = _results(models, shards, sections, failed, directory, terminal)
            write_text(out / TABLE, table.markdown(results))
            write_text(out / REPORT, html.page(results))
            write_json(out / RESULTS, results)
            for part in table.for_terminal(results):
                terminal.answer(part)
            if failed:  # unfinished, so that the same command tries again
                names = ", ".join(dict.fromkeys(qualified(f["teacher"], f["row"]) for f in failed))
                hint = f"see {out / TABLE}; the same command tries again"
                raise RunFailed(f"failed: {names}", hint, _answer(out, results))
            directory.record |= {"unmade": 0} if grid is not None else {}
            directory.finish([out / RESULTS, out / TABLE, out / REPORT], _best(results))
    answer = _answer(out, results)
    _check_gate(answer, settings.inputs.fail_below)
    return answer


def _answer(out: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    artifacts = {"comparison": str(out), "results": str(out / RESULTS), "report": str(out / REPORT)}
    return {"artifacts": artifacts, "metrics": _best(results), "sections": results["sections"]}


# -- what is compared --------------------------------------------------------------------------------------------------


def _open(
    settings: Settings, grid: Grid | None, terminal: Terminal
) -> tuple[list[Model], list[ShardSet], Model | None]:
    """Read the models, and the shard directories, that were given by themselves, and say which is ``--teacher``.

    Raises:
        ConfigError: No model was given.
        ArtifactError: Missing, unfinished or damaged.
    """
    inputs, code = settings.inputs, settings.code
    models: list[Model] = []
    shards: list[ShardSet] = []
    paths = {Path(name).resolve(): Path(name) for name in inputs.paths or ()}.values()
    comparisons = [path for path in paths if read_run(path).get("command") == "compare"]
    for path in paths:
        if path in comparisons:
            for model in _so_far(path, code, terminal):
                own = grid is not None or len(comparisons) > 1  # each comparison has rankings of its own
                group = qualified(str(path), model.group or "").rstrip("/") if own else model.group
                models.append(replace(model, group=group))
        elif (path / MANIFEST).is_file():
            shards.append(read_shards(path))
        else:
            models += read_models(path, code)
    # What is named by itself and left by a run that is named too is what that run says.
    known = {(model.path.resolve(), model.group): model for model in sorted(models, key=lambda model: bool(model.part))}
    models = [model for model in models if any(model is other for other in known.values())]
    if grid is not None:
        for group, (name, published) in grid.existing.items():
            models.append(_teacher(name, settings, group, published))
    judge = None if grid is not None or inputs.teacher is None else _teacher(inputs.teacher, settings)
    models += [] if judge is None else [judge]
    if grid is None and not models:
        raise ConfigError("no models to compare", "give directories (dfkd compare student/) or a grid (--recipe NAME)")
    return models, shards, judge


def _so_far(path: Path, code: Code, terminal: Terminal) -> list[Model]:
    """What a comparison's grid has made until now, under the names of its rows. It may be running meanwhile.

    Raises:
        ArtifactError: A comparison without a grid makes nothing.
    """
    allowed = {"allow_code": code.artifacts, "code_dir": code.folder}
    recipe = recipe_layer(str(intact(path / CONFIG)), "compare")
    settings = on_this_machine(resolve("compare", [recipe, Layer("", allowed, code.typed)]), terminal, known=True)
    if settings.sections["grid"] is None:
        raise ArtifactError(f"{path}: a comparison without a grid", "give the directories that it compares")
    grid = plan(settings, path)
    finished = _finished(grid)
    terminal.say(f"{path}: {len(finished)} of {len(grid.runs)} steps are finished")
    teachers = [_teacher(name, settings, group, said) for group, (name, said) in grid.existing.items()]
    return [*teachers, *_models(finished, code)]


def _check_own(grid: Grid, planned: PlannedRun, parents: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`ConfigError` where a directory of the grid holds another run than the one that is planned."""
    hint = f"choose another --out, or remove {planned.out}"
    try:
        check_free(planned.out, planned.settings, parents)
    except ConfigError as error:
        raise ConfigError(error.message, hint) from None
    if (others := grid.other_sources(planned)) and begun(planned.out):
        raise ConfigError(f"{planned.out} holds another run: {'; '.join(others)}", hint)


def _finished(grid: Grid) -> list[PlannedRun]:
    return [run for run in grid.runs if read_run(run.out).get("status") == "done" and not grid.other_sources(run)]


def _teacher(name: str, settings: Settings, group: str = "", published: float | None = None) -> Model:
    """A teacher that was there before: a model directory, or a SPEC with ``--weights``."""
    return replace(read_model(locate(name, settings.inputs), settings.code), group=group, published=published)


def _models(runs: Sequence[PlannedRun], code: Code) -> list[Model]:
    """The models that commands of a grid have made: each its row's, and the others that it has left as ROW/PART."""
    models = []
    for run in runs:
        for model in () if run.model is None else read_models(run.model, code):
            part = f"/{model.part}" if model.part else ""
            row = run.label + part if run.row or part else None
            series = run.series and "/".join(filter(None, (run.series, run.part))) + part
            place: dict[str, Any] = {"row": row, "series": series}
            published = None if part or run.part else run.published
            models.append(replace(model, **place, group=run.teacher, published=published))
    return models


def _parents(models: Sequence[Model], shards: Sequence[ShardSet]) -> list[dict[str, Any]]:
    """What decides the result, by hash, beside images; a grid's runs have identities of their own."""
    parents = [{"role": "model", "path": str(m.path), "sha256": m.sha256} for m in models]
    return parents + [{"role": "shards", "path": str(s.path), "sha256": s.sha256} for s in shards]


def _contents(dataset: str | None, data_dir: str | None) -> list[dict[str, Any]]:
    """What a dataset is read from; nothing where none is named, or it is not on this machine."""
    there = dataset is not None and (dataset in datasets.DATASETS or Path(dataset).is_dir())
    return datasets.contents(dataset, data_dir) if dataset is not None and there else []


def _check_asked(settings: Settings, dry_run: bool) -> None:
    """Raise :class:`ConfigError` where what is typed does not fit together, or a grid that there is not."""
    inputs, how, grid = settings.inputs, settings.run, settings.sections["grid"] is not None
    rows, script, usual = inputs.rows is not None, inputs.script is not None, defaults(Run)
    if grid and how.seed:
        raise ConfigError(f"--seed {how.seed}: the grid has seeds of its own", "change grid.seeds")
    if how.overwrite and (rows or script):
        what = f"--{'rows' if rows else 'script'}: with --overwrite every row in {settings.out} would be removed"
        raise ConfigError(what, "remove what is to go")
    for name in () if grid else (*UNTRAINED, "seed"):
        if getattr(how, name) != usual[name]:
            raise ConfigError(f"--{name} {getattr(how, name)}: there is no grid whose commands take it", "leave it out")
    if rows and not grid:
        raise ConfigError("--rows: there is no grid to choose rows of", "give --recipe with a grid, or leave it out")
    for flag, asked in (("estimate", inputs.estimate), ("script", script)):
        if asked and not (dry_run and grid):
            raise ConfigError(f"--{flag}: is of a grid's plan", "give --recipe with a grid, and --dry-run")


def _rehearse(
    directory: RunDirectory, models: Sequence[Model], grid: Grid | None, terminal: Terminal
) -> dict[str, Any]:
    """``--dry-run``: everything was read and checked; say what would be done."""
    runs = [] if grid is None else grid.runs
    terminal.answer("\n".join([str(run) for run in runs] + [f"compare {model.path}" for model in models]))
    planned = [
        {
            **{key: getattr(run, key) for key in ("teacher", "row", "seed")},
            "out": str(run.out),
            "model": None if run.model is None else str(run.model),
            "config": run.settings.plain(),
        }
        for run in runs
    ]
    answer: dict[str, Any] = {"dry_run": True, "plan": planned, "models": [str(model.path) for model in models]}
    settings, written = directory.settings, "nothing"
    if grid is not None and settings.inputs.estimate:
        answer["estimate"] = estimate(settings, grid, terminal)
    if grid is not None and (name := settings.inputs.script) is not None:
        if Path(name).exists():
            raise ConfigError(f"--script {name} exists", "choose another name, or remove it")
        directory.claim()  # the jobs write into it
        with directory.guard():
            write_atomic(Path(name), utf8(script(grid, name)))  # as it is quoted
        answer["artifacts"], written = {"script": name}, f"{name}, and the record of {directory.path},"
    what = "everything fits" if grid is None else f"{len(runs)} commands, well-formed; their data was not looked for"
    terminal.say(f"dry run: {what}; {written} {'was' if written == 'nothing' else 'were'} written")
    return answer


# -- what is measured --------------------------------------------------------------------------------------------------


def _results(
    models: Sequence[Model],
    shards: Sequence[ShardSet],
    sections: Sequence[Section],
    failed: Sequence[Mapping[str, Any]],
    directory: RunDirectory,
    terminal: Terminal,
) -> dict[str, Any]:
    """``results.json``. A grid is the first section, or the first ones where it has several teachers."""
    settings = directory.settings
    device = pick_device(settings.run.device)
    examiner = Examiner(device, settings.inputs.data_dir, settings.inputs.batch_size)
    # What does not fit is found before anything is measured.
    tests = [[examiner.images(s.dataset, read_info(m.record, m.path), str(m.path)) for m in s.models] for s in sections]
    if examiner.caveat:
        terminal.say(examiner.caveat)
    blocks: list[dict[str, Any]] = []
    lost: dict[str, list[Mapping[str, Any]]] = {}
    for failure in failed:
        lost.setdefault(failure["teacher"], []).append(failure)
    with closing(Progress(terminal, "compare", "models", sum(len(s.models) for s in sections))) as progress:
        meter = Meter(directory, examiner, settings.code, progress)
        for section, (test, *_) in zip(sections, tests, strict=True):
            measured = {
                model.path: meter.measure(model, section.teacher_of(model), section.dataset) for model in section.models
            }
            facts = {"teacher": section.name, "dataset": section.dataset, "test_images": len(test)}
            outcome = {"rows": rows(section, measured), "failed": lost.pop(section.name, [])}
            blocks.append({**facts, "classes": list(test.classes), **outcome})
    directory.save()
    galleries = {s.sha256: s.facts() for s in [*(s for m in models for s in m.shards), *shards]}
    results = {
        "schema": 1,
        "argv": directory.record["argv"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **{key: directory.record[key] for key in ("versions", "started", "seconds")},
        "sections": blocks,
        "shards": list(galleries.values()),
    }
    return named(results)


# -- what is said about it ---------------------------------------------------------------------------------------------


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
    """Every single student counts."""
    if least is not None and not _students(answer):
        raise ConfigError("--fail-below: there is no student to pass it", "give a student, or leave it out")
    check_gate(
        [(run["path"], run["measures"]["top1"]) for _, row in _students(answer) for run in row["runs"]], least, answer
    )

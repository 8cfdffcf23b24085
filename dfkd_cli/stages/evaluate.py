"""Measure models on test images, or images on a teacher.

Reads model or shard directories, folders of images, datasets by name, real:N, noise:N; writes results.json, and with
--line line.png, when --out is given. Of images: the teacher's answers, variety, and how far they are from what its
BatchNorm layers recorded in training (bn_divergence, arXiv:1912.01274, the mean KL divergence of Gaussians: low is
alike); of shards that another teacher made, how often this one gives the class that they were made for. Without test
images, --unlabelled compares models with their teacher.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from dfkd_cli.artifacts.files import write_atomic, write_json
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.catalog import UNTRAINED, Command
from dfkd_cli.config import option
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.options import SeenTeacher
from dfkd_cli.report import evaluation
from dfkd_cli.settings import Settings
from dfkd_cli.stages.lines import pairs
from dfkd_cli.stages.measures import check_gate
from dfkd_cli.stages.opening import AGREEMENTS, Evaluation, Opener
from dfkd_cli.stages.training import rehearse
from dfkd_cli.ui import VERBOSE, Progress, Terminal, finite
from dfkd_cli.urls import named


@dataclass(frozen=True, kw_only=True)
class Inputs(SeenTeacher):
    """What is read, and how."""

    # Volatile: what decides the result is what the paths hold, by hash.
    paths: tuple[str, ...] | None = option(
        None, "model or shard directories, other images", volatile=True, argument="PATH ..."
    )
    teacher: str | None = option(None, "teacher to compare with (default: the one that is on record)", parent=True)
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
        1000, "images whose loss is meant by --sharpness and --line: of the training set, balanced over the classes; "
        "by default all where there are fewer",
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
    ignores=UNTRAINED,
    examples=(
        "dfkd evaluate",
        "dfkd evaluate student/ --min-top1 0.97",
        "dfkd evaluate shards/ noise:1000 real",
        "dfkd evaluate student/ --unlabelled shards/ --min-agreement 0.9",
        "dfkd evaluate teacher/ student/ --sharpness",
    ),
    next="dfkd compare student/",
)


RESULTS, LINE = "results.json", "line.png"
DIVERGENCE = "bn_divergence"


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
        count = {"evaluated": len(plan.evaluations)}  # what is named again has no parents of its own
        directory = RunDirectory(Path(settings.run.out), settings, _parents(plan.evaluations), count)
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
    # Images are ranked by their divergence from their teacher's training data, smallest first.
    ranked = sorted(
        results,
        key=lambda result: (result.get("teacher") or "", result.get(DIVERGENCE) is None, result.get(DIVERGENCE)),
    )
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
    with closing(Progress(terminal, "evaluate", "paths", len(plan.evaluations) + len(plan.lines))) as progress:
        for each in (*plan.evaluations, *plan.lines):
            found.append(finite(named(each.facts | each.measure())))
            progress.update(len(found))
            path, products = each.facts["path"], found[-1].get("sharpness_products")
            if found[-1].get("logits_ok") is False:
                terminal.say(f"{path}: the stored logits are not what the teacher answers to the stored images")
            if products and found[-1]["sharpness"] is None:
                terminal.say(f"{path}: its sharpness is not found, or not finite, after {products} Hessian products")
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
    opener = Opener(settings, terminal)
    if not opener.paths:
        raise ArtifactError("nothing to evaluate: no student/ and no teacher/ here", "dfkd evaluate PATH ...")
    evaluations = [opener.open(path) for path in opener.paths]
    for flag, wanted in (
        ("min-top1 0.97", inputs.min_top1 is not None),
        ("min-agreement 0.97", inputs.min_agreement is not None),
        ("unlabelled shards/", inputs.unlabelled),
        ("sharpness", inputs.sharpness),
        ("line", inputs.line),
    ):
        if wanted and not any(e.facts["kind"] == "model" for e in evaluations):
            what = f"--{flag.partition(' ')[0]} needs a model, these are images"
            raise ConfigError(what, f"dfkd evaluate student/ --{flag}")
    if inputs.min_agreement is not None and not inputs.unlabelled:
        raise ConfigError("--min-agreement: on which images?", "give --unlabelled")
    if opener.orphans:
        terminal.say(f"{', '.join(opener.orphans)}: not compared with the teacher, it is not here -- give --teacher")
    if opener.examiner.caveat:
        terminal.say(opener.examiner.caveat)
    loss = " and ".join(flag for flag in ("sharpness", "line") if getattr(inputs, flag))
    for dataset, count in {end.dataset: len(end.images.pixels) for end in opener.ends}.items():
        terminal.say(f"{loss}: of the loss on {count:,} training images of {dataset}")
    lines = [opener.line(*pair) for pair in pairs(opener.ends)] if inputs.line else []
    return Plan(evaluations, lines)

"""Training a network into a model directory: what ``train-teacher`` and ``distill`` share."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import write_atomic
from dfkd_cli.artifacts.integrity import intact, read_run
from dfkd_cli.artifacts.run import RunDirectory, check_free
from dfkd_cli.artifacts.shards import MANIFEST, ShardWriter
from dfkd_cli.config import dump_yaml, plain
from dfkd_cli.data.seal import check_kept, kept
from dfkd_cli.data.sources import ANSWERS, Source
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.adapter import require_training
from dfkd_cli.models.black_box import BlackBox
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import FILES, save_model
from dfkd_cli.models.names import Architecture, Location, architecture, locate
from dfkd_cli.models.registry import build
from dfkd_cli.objectives.base import Objective
from dfkd_cli.options import Several
from dfkd_cli.regimes.base import Task
from dfkd_cli.rounds.trainer import fit
from dfkd_cli.seeds import derive
from dfkd_cli.settings import Component, Settings
from dfkd_cli.stages.inputs import pick_device
from dfkd_cli.stages.quantization import calibrate_copies, check_steps, copy_weights
from dfkd_cli.stages.snapshots import Snapshots
from dfkd_cli.trust import Code
from dfkd_cli.ui import Terminal

OF_A_SHARD = 1000  # images
QUERIES = "queries"  # where answers of a black box are kept


def fresh(info: ModelInfo, role: str, seed: int, code: Code, teacher: Location | None = None) -> Classifier:
    """A new classifier; its weights depend on its role and the seed only, or are those of the model that it is to copy.

    Args:
        info: What it is; its ``spec`` is any that :func:`~dfkd_cli.models.names.architecture` knows.
        role: What it is for.
        seed: The run's seed.
        code: Which code may run.
        teacher: Where the teacher is, of which it may be a copy.

    Raises:
        ArtifactError: The model to copy takes other images, or knows other classes.
    """
    named = architecture(info.spec, code, teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(role, seed))
        net = build(named.spec, info.num_classes, info.input_size, code.may_run(named.spec))
        require_training(net, info.spec, info.num_classes, info.input_size, batch=2)
    info = dataclasses.replace(info, spec=named.spec)
    return Classifier(net, info) if named.copied is None else copy_weights(net, named.copied.open(code), info)


def specs(settings: Settings, named: str) -> tuple[str, ...]:
    """The networks to train: the one that the command names, or where several learn together those of the method.

    Raises:
        ConfigError: Both are typed, and the one that the command names is not the first of the others.
    """
    config = settings.method.config
    if not isinstance(config, Several):
        return (named,)
    networks = config.students or (named,) * 2
    if named != networks[0] and (typed := settings.typed & {"student", "model"}):
        what = f"--{min(typed)} {named}: of --students {' '.join(networks)} the first is written as that"
        raise ConfigError(what, "leave one out")
    return networks


def architectures(settings: Settings, named: str) -> list[Architecture]:
    """What these are, where the command names this one."""
    return [architecture(spec, settings.code, taught_by(settings)) for spec in specs(settings, named)]


def taught_by(settings: Settings) -> Location | None:
    """Where the command's teacher is; None where it has none, or several."""
    teacher: str | tuple[str, ...] = getattr(settings.inputs, "teacher", ())
    named = [teacher] if isinstance(teacher, str) else list(teacher)
    return locate(named[0], settings.inputs) if len(named) == 1 else None


def students(settings: Settings, info: ModelInfo, role: str) -> tuple[Classifier, list[Classifier]]:
    """The new network to train, and its peers.

    Args:
        settings: Of the command.
        info: What they are; its ``spec`` is that of the one that the command names.
        role: What they are for.
    """
    infos = [dataclasses.replace(info, spec=spec) for spec in specs(settings, info.spec)]
    roles = [role, *(f"{role} {index}" for index in range(1, len(infos)))]
    teacher = taught_by(settings)
    first, *peers = (
        fresh(*which, settings.run.seed, settings.code, teacher) for which in zip(infos, roles, strict=True)
    )
    return first, peers


def connect(
    chosen: Sequence[Component], student: Classifier, teacher: Classifier, seed: int
) -> dict[str, tuple[float, Objective]]:
    """The chosen objectives by name, with their weights, ready for these networks.

    Raises:
        ConfigError: One looks into a teacher of which only answers are seen.
    """
    objectives = {}
    for component in chosen:
        name = component.entry.name
        objective = component.entry.load()(component.config)
        if teacher.opaque and objective.kind != "response":
            raise ConfigError(
                f"--objective {name} looks into the teacher, of which only answers are seen",
                "choose one between answers, such as response",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(f"objective {name}", seed))
            objective.connect(student, teacher)
        objectives[name] = component.weight, objective
    return objectives


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        task: On what.
        provenance: Where the model comes from, for ``model.json``.
        score: Measures a finished model.
        finished: A directory where it has been trained already, by a search for the best teacher.
    """

    task: Task
    provenance: Mapping[str, Any]
    score: Callable[[Classifier], Mapping[str, float]]
    finished: Path | None = None


def train(work: Work, run: RunDirectory, terminal: Terminal, begin: Callable[[], Work] | None = None) -> dict[str, Any]:
    """Train a network, and its peers, in the run's directory, or take the finished ones that are there.

    Args:
        work: What is trained.
        run: The output directory.
        terminal: Where progress goes.
        begin: Does in that directory what comes first, and says what is trained then.

    Returns:
        The command's answer.
    """
    settings, task = run.settings, work.task
    named = getattr(settings.inputs, "student", None) or settings.inputs.model
    check_steps(task, architectures(settings, named))
    regime = settings.method.entry
    lacking = {*ANSWERS} - {*task.source.answers}
    for flag, chosen in settings.components.items():
        for entry in (component.entry for component in chosen):
            if missing := " and ".join(sorted(lacking & {*entry.needs})):
                what = f"--{flag} {entry.name} needs {missing}, which this transfer set has not"
                raise ConfigError(what, "use shards that store them")
    if "teacher" in regime.needs and task.teacher is None:
        raise ConfigError(f"--method {regime.name} needs a teacher", "use it with dfkd distill")
    if "network" in regime.needs and task.teacher is not None and task.teacher.opaque:
        raise ConfigError(f"--method {regime.name} needs gradients, and answers have none", "give a network as teacher")
    if "answers" in regime.needs and not isinstance(task.teacher, BlackBox):
        raise ConfigError(f"--method {regime.name} asks a black box", "give --answers probabilities, topN or label")
    if run.claim():
        run.say_complete(terminal)
        metrics = run.record["metrics"]
    else:
        with run.guard(), kept():
            ledger = task.teacher.ledger if isinstance(task.teacher, BlackBox) else None
            asks = ledger is not None and ledger.open(run.path / QUERIES)
            if begin is not None:
                with run.counting_runs_within():
                    work = begin()
            files, metrics = _make(work, run, terminal)
            if ledger is not None and asks:
                files, metrics = [*files, *ledger.files], metrics | {"queries": ledger.asked}
            run.finish(files, metrics)
    return {
        "artifacts": {catalog.command(settings.command).out: str(run.path)},
        "metrics": metrics,
        "concerns": run.record["concerns"],
    }


def _make(work: Work, run: RunDirectory, terminal: Terminal) -> tuple[list[Path], dict[str, Any]]:
    """Train and write what is made. Returns the files, and what is measured."""
    if work.finished is not None:
        return _taken(work.finished, run, terminal)
    task = work.task
    calibrate_copies(task, terminal)
    learner = run.settings.method.entry.load()(task, run.settings.method.config)
    snapshots = Snapshots(run, task.student, run.path, task.training.snapshots, learner.rounds)
    fit(learner, run, terminal, [snapshots])
    device = run.record.setdefault("device", str(pick_device(run.settings.run.device)))
    models = {role: model.eval().to(device) for role, model in learner.models().items()}
    scores = {role: dict(work.score(model)) for role, model in models.items()}
    metrics = dict(scores["student"])
    check_kept()
    concern = learner.concern(metrics)
    if concern is not None:
        run.warn(concern, terminal)
    files = [*([run.path / "metrics.csv"] if learner.rounds else []), *snapshots.paths.values()]
    for role, model in models.items():
        place = run.path if role == "student" else run.path / role
        save_model(place, model, metrics=scores[role], provenance=dict(work.provenance))
        files += [place / name for name in FILES]
        if role != "student":
            metrics |= {f"{role}.{name}": value for name, value in scores[role].items()}
    for name, source in learner.made().items():
        files += _write_set(run.path / name, source, work, run.settings)
    return files, metrics


def _taken(finished: Path, run: RunDirectory, terminal: Terminal) -> tuple[list[Path], dict[str, Any]]:
    """Copy a model that was trained elsewhere. Returns the files, and what was measured, as where it is trained."""
    record, files = read_run(finished), list[Path]()
    for name in (file["path"] for file in record["artifacts"]):
        (run.path / name).parent.mkdir(exist_ok=True)
        write_atomic(run.path / name, intact(finished / name).read_bytes())
        files.append(run.path / name)
    if "device" in record:  # older records may have none
        run.record["device"] = record["device"]
    for concern in record["concerns"]:
        run.warn(concern, terminal)
    return files, record["metrics"]


def manifest_head(
    settings: Settings, info: ModelInfo, sha256: str, dtype: str, data_free: bool, uses: Sequence[str]
) -> dict[str, Any]:
    """What the manifest of a set says about all of its shards.

    Args:
        settings: Of the command that makes the set.
        info: What the teacher is that it is made from.
        sha256: That teacher's.
        dtype: How pixels are stored.
        data_free: Whether no real images were read for it.
        uses: What was made from real images and used for it.
    """
    return {
        "method": settings.method.entry.name,
        "config": plain(settings.method.config),
        "seed": settings.run.seed,
        "precision": settings.run.precision,
        "space": "pixel",
        "shape": list(info.input_size),
        "dtype": dtype,
        "num_classes": info.num_classes,
        "classes": info.classes and list(info.classes),
        "teacher": {"sha256": sha256, "spec": info.spec},
        "data_free": data_free,
        "uses": uses,
    }


def _write_set(directory: Path, source: Source, work: Work, settings: Settings) -> list[Path]:
    """Write images as shards, chunk by chunk, with what the teacher says about them. Returns the files."""
    teacher, says = work.task.teacher, work.provenance
    assert teacher is not None
    dtype = str(source.dtype).removeprefix("torch.")
    head = manifest_head(settings, teacher.info, says["teacher"], dtype, says["data_free"], says["uses"])
    writer = ShardWriter(directory, head, sum(-(-size // OF_A_SHARD) for size in source.sizes))
    device, at_once, missing = teacher.mean.device, work.task.training.at_once, {*writer.missing()}
    shards = (shard for index in range(len(source.sizes)) for shard in source.chunk(index).split(OF_A_SHARD))
    for index, shard in enumerate(shards):
        if index in missing:
            with torch.no_grad():
                answers = [teacher(part.to(device).pixels).float() for part in shard.split(at_once)]
            writer.write(index, {"images": shard.pixels, "logits": torch.cat(answers)}, {})
    manifest = writer.write_manifest()
    return [directory / MANIFEST, *(directory / row["file"] for row in manifest["shards"])]


def rehearse(settings: Settings, stage: Callable[..., Any], terminal: Terminal) -> dict[str, Any]:
    """``--dry-run``: the command itself, with all lengths cut, on the CPU, in a directory that is thrown away."""
    pick_device(settings.run.device)
    if settings.run.out is not None or catalog.command(settings.command).out is not None:
        check_free(settings.out, settings)
    with tempfile.TemporaryDirectory() as directory:
        run = dataclasses.replace(settings.run, out=str(Path(directory, "out")), device="cpu", devices=1, num_nodes=1)
        quiet = Terminal(silent=True)
        stage(dataclasses.replace(settings.shortened(), run=run), quiet)
    terminal.answer(dump_yaml(settings.plain()).rstrip())
    terminal.say("dry run: everything fits; nothing was written")
    return {"dry_run": True, "config": settings.plain()}

"""``dfkd distill``: a teacher and transfer sets to a student's model directory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.data.seal import sealed
from dfkd_cli.data.sources import first
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.base import Objective
from dfkd_cli.regimes.base import Task
from dfkd_cli.resolve import Component, Settings
from dfkd_cli.seeds import derive
from dfkd_cli.stages.inputs import concatenate, load_teacher, may_be_real, open_transfer_set
from dfkd_cli.stages.measures import agreement
from dfkd_cli.stages.training import fresh, rehearse, train
from dfkd_cli.ui import Terminal


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Train a student. Unless a transfer set is real, no dataset can be opened meanwhile."""
    if dry_run:
        return rehearse(settings, run, terminal)
    inputs = settings.inputs
    data_free = not any(may_be_real(name) for name in inputs.transfer_set)
    with contextlib.ExitStack() as seals:
        if data_free:
            seals.enter_context(sealed("the transfer set is data-free"))
        teacher = load_teacher(inputs, settings.run.allow_code)
        if data_free:
            seals.enter_context(sealed("the transfer set is data-free", teacher.real_data(inputs.data_dir)))
        sets = [open_transfer_set(name, teacher, inputs.data_dir, settings.run.seed) for name in inputs.transfer_set]
        source = concatenate(sets)
        if inputs.num_images is not None:
            if inputs.num_images > len(source):
                raise ConfigError(f"--num-images {inputs.num_images}: the transfer sets have {len(source)} images")
            source = first(source, inputs.num_images)
        parents = [teacher.parent("teacher"), *(s.parent for s in sets)]
        uses = sorted({use for s in sets for use in s.uses})
        facts = {"data_free": data_free, "uses": uses, "num_images": len(source)}
        directory = RunDirectory(Path(settings.run.out or "student"), settings, parents, facts)
        student = fresh(dataclasses.replace(teacher.classifier.info, spec=inputs.student), "student", settings.run.seed)
        objectives = connect(settings.components["objective"], student, teacher.classifier, settings.run.seed)
        task = Task(student, teacher.classifier, source, objectives, inputs, settings.run.seed)

        def score(model: Classifier) -> dict[str, float]:
            return {"agreement_on_transfer_set": agreement(model, teacher.classifier, source)}

        provenance = {
            "command": "distill",
            "dataset": teacher.dataset,
            "data_free": data_free,
            "uses": uses,
            "seed": settings.run.seed,
            "teacher": teacher.sha256,
            "transfer_set": [{k: v for k, v in s.parent.items() if k in ("spec", "sha256")} for s in sets],
            "num_images": len(source),
        }
        answer = train(task, directory, terminal, provenance, score)
    shown = f"{answer['metrics']['agreement_on_transfer_set']:.2%} agreement with the teacher on the transfer set"
    terminal.answer(f"{answer['artifacts']['student']}: {shown}")
    return answer


def connect(
    chosen: Sequence[Component], student: Classifier, teacher: Classifier, seed: int
) -> dict[str, tuple[float, Objective]]:
    """The chosen objectives by name, with their weights, ready for these networks."""
    objectives = {}
    for component in chosen:
        name = component.entry.name
        objective = component.entry.load()(component.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(f"objective {name}", seed))
            objective.connect(student, teacher)
        objectives[name] = component.weight, objective
    return objectives

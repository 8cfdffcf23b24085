"""``dfkd train-teacher``: a dataset to a model directory."""

from __future__ import annotations

from typing import Any

from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import RealSource
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.names import architecture
from dfkd_cli.regimes.base import Task
from dfkd_cli.resolve import Settings
from dfkd_cli.stages.measures import top1
from dfkd_cli.stages.training import fresh, rehearse, train
from dfkd_cli.ui import Terminal


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Train a teacher and measure it on the test images."""
    if dry_run:
        return rehearse(settings, run, terminal)
    inputs = settings.inputs
    dataset = datasets.load(inputs.dataset, "train", data_dir=inputs.data_dir, image_shape=inputs.input_size)
    mean, std = dataset.mean_std()
    info = ModelInfo(inputs.model, len(dataset.classes), dataset.image_shape, mean, std, dataset.classes)
    parents = [*architecture(inputs.model).parents, *datasets.contents(inputs.dataset)]
    directory = RunDirectory(settings.out, settings, parents, {"data_free": False})
    student = fresh(info, "teacher", settings.run.seed, settings.run.allow_code)
    task = Task(student, None, RealSource(dataset), {}, inputs, settings.run.seed)

    def score(model: Classifier) -> dict[str, float]:
        test = datasets.load(inputs.dataset, "test", data_dir=inputs.data_dir, image_shape=info.input_size)
        return {"top1": top1(model, RealSource(test))}

    provenance = {"command": "train-teacher", "dataset": inputs.dataset, "seed": settings.run.seed}
    answer = train(task, directory, terminal, provenance, score)
    terminal.answer(
        f"{answer['artifacts']['teacher']}: top-1 {answer['metrics']['top1']:.2%} on {inputs.dataset} test images"
    )
    return answer

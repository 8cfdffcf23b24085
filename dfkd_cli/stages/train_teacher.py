"""Train a teacher on a dataset.

Reads a dataset, writes a model directory (teacher/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.catalog import Choice, Command
from dfkd_cli.config import option
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import RealSource
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.options import Training
from dfkd_cli.regimes.base import Task
from dfkd_cli.settings import Settings
from dfkd_cli.stages.calibrate import check
from dfkd_cli.stages.measures import top1
from dfkd_cli.stages.training import Work, architectures, connect, rehearse, students, train
from dfkd_cli.ui import Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs(Training):
    """What is read, and how."""

    dataset: str = option("digits", "dataset NAME, or a DIR with train/<class>/ and test/<class>/")
    data_dir: str | None = option(None, "where datasets lie", volatile=True)
    model: str = option(
        "lenet5", "model SPEC: dfkd ls models, torchvision:NAME, timm:NAME, FILE.py:factory, a model directory"
    )
    input_size: tuple[int, int, int] | None = option(None, "channels, height and width of the images", low=1)
    # Decayed weights and little augmentation: impressions of a teacher that was hardened by strong augmentation teach
    # far less, however accurate it is.
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = 0.05
    weight_decay: float = 1e-3
    rotate: float = 5.0
    translate: float = 0.05
    scale: float = 0.05


COMMAND = Command(
    position=10,
    out="teacher",
    choices=(
        Choice("method", "regimes", "supervised"),
        Choice("objective", "objectives", "response", several=True, beside="objective"),
    ),
    shared=True,
    examples=("dfkd train-teacher", "dfkd train-teacher --dataset mnist --model lenet5 --out teacher/"),
    next="dfkd synthesize --method zskd",
)


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Train a teacher and measure it on the test images."""
    if dry_run:
        return rehearse(settings, run, terminal)
    inputs = settings.inputs
    dataset = datasets.load(inputs.dataset, "train", data_dir=inputs.data_dir, image_shape=inputs.input_size)
    if dataset.note:
        terminal.say(f"dataset {inputs.dataset}: {dataset.note}")
    if len(dataset.classes) < 2:
        raise ConfigError(f"{inputs.dataset}: all images are of one class", "give each class a folder of its images")
    # What is wrong with the test images is found before any work.
    test = datasets.load(inputs.dataset, "test", data_dir=inputs.data_dir, image_shape=dataset.image_shape)
    mean, std = dataset.mean_std()
    info = ModelInfo(inputs.model, len(dataset.classes), dataset.image_shape, mean, std, dataset.classes)
    named = architectures(settings, inputs.model)
    parents = [
        *(parent for model in named for parent in model.parents),
        *datasets.contents(inputs.dataset, inputs.data_dir),
    ]
    directory = RunDirectory(settings.out, settings, parents, {"data_free": False})
    network, peers = students(settings, info, "teacher")
    objectives = connect(settings.components["objective"], network, network, settings.run.seed)
    task = Task(network, None, RealSource(dataset), objectives, inputs, settings.run.seed, peers)
    if objectives:
        check(task)

    def score(model: Classifier) -> dict[str, float]:
        return {"top1": top1(model, RealSource(test), inputs.at_once)}

    provenance = {"command": "train-teacher", "dataset": inputs.dataset, "seed": settings.run.seed}
    answer = train(Work(task, provenance, score), directory, terminal)
    terminal.answer(
        f"{answer['artifacts']['teacher']}: top-1 {directory.metric('top1'):.2%} on {inputs.dataset} test images"
    )
    return answer

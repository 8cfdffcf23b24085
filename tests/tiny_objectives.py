"""Objectives between two small networks, and the regime that trains one of them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from stand_ins import STILL, Given
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.config import build, hints
from dfkd_cli.data.sources import Images
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.layers import chain, global_pool
from dfkd_cli.objectives.base import Objective
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.offline import Config, Offline
from dfkd_cli.settings import Component
from dfkd_cli.stages.distill import Inputs as Distill
from dfkd_cli.stages.distill import connect

OBJECTIVES = catalog.entries("objectives")
APART = {("fitnets", "projection")}  # options that need more than a value, and have tests of their own


def variants(name: str) -> list[dict]:
    """Settings of an objective: none, and each other choice that its options leave."""
    found: list[dict] = [{}]
    for key, hint in hints(OBJECTIVES[name].config).items():
        if (name, key) in APART:
            continue
        default = getattr(OBJECTIVES[name].config(), key)
        choices = (True, False) if hint is bool else typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        found += [{key: choice} for choice in choices if choice != default]
    return [*found, {"hard": 1.0, "label_smoothing": 0.2}] if hasattr(OBJECTIVES[name].config, "hard") else found


SIZE, CLASSES = (2, 8, 8), 5


def network(seed: int, first: int, second: int) -> Classifier:
    """Two stages of these widths."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = chain(
            stage1=nn.Sequential(nn.Conv2d(SIZE[0], first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(inplace=True)),
            stage2=nn.Sequential(nn.Conv2d(first, second, 3, 2, 1), nn.BatchNorm2d(second), nn.ReLU(inplace=True)),
            pool=global_pool(),
            head=nn.Linear(second, CLASSES),
        )
        for layer in (net.stage1[1], net.stage2[1]):  # nothing about a trained teacher is standard
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
        net.head.bias.data[0] += 1  # what two networks agree on
    return Classifier(net, ModelInfo("test", CLASSES, SIZE, (0.4,) * 2, (0.3,) * 2))


def connected(
    name: str, student: Classifier, teacher: Classifier, seed: int = 0, count: int = 8, **values
) -> Objective:
    entry = OBJECTIVES[name]
    objective = connect([Component(entry, build(entry.config, values))], student, teacher, seed)[name][1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        objective.expect(count)
    return objective


def images(count: int, labels: Tensor | None = None) -> Images:
    """The first images of a source."""
    generator = torch.Generator().manual_seed(3)
    return Images(torch.rand(count, *SIZE, generator=generator), labels, torch.arange(count))


def offline(
    names: Mapping[str, float | None],
    student: Classifier,
    teacher: Classifier,
    count: int = 6,
    values: Mapping[str, dict] = MappingProxyType({}),
    config: Config = Config(),  # noqa: B008
    **training,
):
    """A regime with these objectives and their settings, and labelled images for it."""
    given = images(count, torch.arange(count) // 2 % CLASSES)
    chosen = [
        Component(entry, build(entry.config, values.get(name, {})), entry.weight if weight is None else weight)
        for name, weight in names.items()
        for entry in [OBJECTIVES[name]]
    ]
    settings = build(Distill, STILL | {"holdout": 0, "batch_size": count, "warmup": 0} | training)
    objectives = connect(chosen, student, teacher, 0)
    task = Task(student, teacher, Given(given.pixels, given.labels), objectives, settings, 0)
    return Offline(task, config), given


def gradients(learner: Offline) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.student.parameters() if p.grad is not None])

"""Every synthesizer on a linear teacher, with settings that take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import stand_ins
import torch
from stand_ins import statistics_of
from torch import nn

from dfkd_cli import catalog
from dfkd_cli.config import hints
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.synthesizers.base import Synthesizer

METHODS = catalog.entries("synthesizers")
TINY = {"batch_size": 2, "iterations": 2, "steps": 2, "epochs": 1, "student_steps": 2}


def linear_teacher(
    classes: int = 4, size: tuple[int, int, int] = (1, 3, 3), batch_norm: bool = False, seed: int = 1
) -> Classifier:
    channels, units = size[0], int(np.prod(size))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(units, classes))
    if batch_norm:
        net.insert(1, nn.BatchNorm1d(units))
    return Classifier(net, ModelInfo("linear", classes, size, mean=(0.2,) * channels, std=(0.5,) * channels))


def teacher_spec(entry: catalog.Entry, other: str = "lenet5") -> str:
    """A model SPEC that has what a method needs of its teacher."""
    with_it = {"attention": "vit-1-32", "batchnorm": "resnet8"}
    return next((with_it[need] for need in entry.needs if need in with_it), other)


def synthesizer(
    name: str, directory: Path, teacher: Classifier | None = None, num_images: int = 6, seed: int = 0, **values
) -> Synthesizer:
    """The method on a teacher (linear by default), its tiny settings changed by ``values``."""
    entry = METHODS[name]
    teacher = teacher or linear_teacher(batch_norm="batchnorm" in entry.needs)
    given = {"metadata": statistics_of(teacher)} if "metadata" in entry.needs else {}
    if "student" in entry.needs:
        given["student"] = linear_teacher(teacher.info.num_classes, teacher.info.input_size, seed=2)
    vectors = {"taps": "penultimate"} if "taps" in hints(entry.config) else {}  # a linear teacher has no maps
    return stand_ins.synthesizer(name, directory, teacher, tiny(name) | vectors | values, num_images, seed, **given)


def tiny(name: str) -> dict[str, Any]:
    return {key: value for key, value in TINY.items() if key in hints(METHODS[name].config)}

"""Regimes with a linear student and a linear teacher, whose steps can be written down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from stand_ins import STILL, Given
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.config import build
from dfkd_cli.data.sources import Source
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.objectives.base import Objective
from dfkd_cli.regimes.base import Regime, Task
from dfkd_cli.stages.distill import Inputs as Distill

REGIMES = catalog.entries("regimes")
CLASSES, SIZE = 4, (1, 3, 3)


def beside(command: catalog.Command, choice: catalog.Choice | None) -> list[str]:
    """The flag of a method beside which there is that choice, where the command's own has it not."""
    if choice is None or choice.beside is None:
        return []
    (method,) = (other for other in command.choices if other.flag == "method")
    has = [name for name, entry in catalog.entries(method.package).items() if choice.beside in entry.needs]
    return [] if method.default in has else ["--method", next(n for n in has if "teacher" not in REGIMES[n].needs)]


def network(seed: int, *hidden: nn.Module) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(9, CLASSES))
    return Classifier(net, ModelInfo("test", CLASSES, SIZE, (0.2,), (0.5,)))


def pixels(count: int = 6) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(7))


def response(**values) -> Objective:
    entry = catalog.entries("objectives")["response"]
    return entry.load()(build(entry.config, values))


def regime(
    name: str,
    source: Source | None = None,
    student: Classifier | None = None,
    objectives: Sequence[tuple[float, Objective]] | None = None,
    config: dict | None = None,
    peers: Sequence[Classifier] = (),
    teacher: Classifier | None = None,
    **training,
) -> Regime:
    """A regime with a linear student and a linear teacher, or others."""
    entry = REGIMES[name]
    source = source or Given(pixels())
    settings = build(Distill, STILL | {"warmup": 0, "holdout": 0, "batch_size": len(source)} | training)
    named = {f"loss{i}": pair for i, pair in enumerate(objectives or [(1.0, response())])}
    task = Task(student or network(1), teacher or network(2), source, named, settings, seed=0, peers=peers)
    return entry.load()(task, build(entry.config, config or {}))


def linear(classifier: Classifier) -> np.ndarray:
    """Weights and bias of a linear classifier, (K, D + 1) float64."""
    layer = classifier.head()
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().double().numpy()


def inputs(images: Tensor) -> np.ndarray:
    """What a linear layer sees of images: normalised, flat, and a one for the bias, (B, D + 1)."""
    flat = (images.flatten(1).double().numpy() - 0.2) / 0.5
    return np.hstack([flat, np.ones((len(flat), 1))])

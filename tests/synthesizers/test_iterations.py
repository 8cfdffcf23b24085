"""Whole iterations of the methods that train generators and students in turns, against NumPy float64.

The oracle has the papers' losses, differentiates them numerically, and takes the steps of the optimisers itself.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import stand_ins
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from oracles import Array, softmax
from synthesis_oracles import Adam, Momentum, gaussian_kl, numerical_gradient
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.seeds import derive
from dfkd_cli.synthesizers.streaming import ITERATIONS_PER_ROUND

SIZE, CLASSES, LATENT, BATCH, STEPS = (1, 2, 3), 4, 3, 6, 3
UNITS, MAPS = 6, 2
HERE = f"{Path(__file__).resolve()}:network"


def network(num_classes: int = CLASSES, norm: bool = False) -> nn.Module:
    """A convolution of single pixels, perhaps a BatchNorm layer, a linear layer."""
    layers = [nn.BatchNorm2d(MAPS)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, MAPS, 1, bias=False), *layers, nn.Flatten(), nn.Linear(MAPS * UNITS, num_classes, bias=False)
    )


@dataclass(frozen=True)
class Net:
    """What :func:`network` computes, from its weights in one row: of the convolution, then of the linear layer."""

    moments: Array | None = None  # of the BatchNorm layer, (2, MAPS)

    def maps(self, theta: Array, x: Array) -> Array:
        """(B, MAPS, H, W) for pixels (B, UNITS)."""
        return (x[:, None] - 0.2) / 0.5 * theta[:MAPS, None]

    def features(self, theta: Array, x: Array) -> Array:
        """(B, MAPS * UNITS)"""
        maps = self.maps(theta, x)
        if self.moments is not None:
            mean, var = self.moments[..., None]
            maps = (maps - mean) / np.sqrt(var + 1e-5)
        return maps.reshape(len(x), -1)

    def logits(self, theta: Array, x: Array) -> Array:
        """(B, CLASSES)"""
        return self.features(theta, x) @ theta[MAPS:].reshape(CLASSES, -1).T


def kl(teacher: Array, student: Array) -> float:
    """Of the answers, mean over the batch."""
    p, q = softmax(teacher), softmax(student)
    return float((p * np.log(p / q)).sum(1).mean())


def entropy(p: Array) -> Array:
    return -(p * np.log(p)).sum(-1)


class Rule:
    """A paper's losses as weighted sums. ``t``: teacher, ``s``: students, each a function of pixels."""

    def __init__(self, teacher: Net, theta: Array) -> None:
        self.net, self.teacher, self.theta = Net(), teacher, theta

    def logits(self, x: Array) -> Array:
        return self.teacher.logits(self.theta, x)

    def generator(self, x: Array, students: Sequence[Array]) -> dict[str, float]:
        raise NotImplementedError

    def student(self, x: Array, theta: Array) -> dict[str, float]:
        raise NotImplementedError


class Dafl(Rule):
    """Eq. 6 of arXiv:1904.01186, and the student's KL divergence."""

    def generator(self, x: Array, students: Sequence[Array]) -> dict[str, float]:
        p = softmax(self.logits(x))
        mean = p.mean(0)
        return {
            "one_hot": -np.log(p.max(1)).mean(),
            "information": (mean * np.log10(mean)).sum(),
            "activation": -np.abs(self.teacher.features(self.theta, x)).mean(),
        }

    def student(self, x: Array, theta: Array) -> dict[str, float]:
        return {"soft": kl(self.logits(x), self.net.logits(theta, x))}


class Dfad(Rule):
    """Mean absolute difference of logits."""

    def distance(self, x: Array, theta: Array) -> float:
        return float(np.abs(self.net.logits(theta, x) - self.logits(x)).mean())

    def generator(self, x: Array, students: Sequence[Array]) -> dict[str, float]:
        return {"adversarial": -np.mean([self.distance(x, theta) for theta in students])}

    def student(self, x: Array, theta: Array) -> dict[str, float]:
        return {"soft": self.distance(x, theta)}


class Zskt(Dfad):
    """KL divergence over classes too, and attention maps: mean squares over channels, of norm one."""

    def distance(self, x: Array, theta: Array) -> float:
        return kl(self.logits(x), self.net.logits(theta, x)) / CLASSES

    def student(self, x: Array, theta: Array) -> dict[str, float]:
        maps = [(net.maps(w, x) ** 2).mean(1) for net, w in ((self.net, theta), (self.teacher, self.theta))]
        own, other = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
        return {"soft": self.distance(x, theta), "attention": ((own - other) ** 2).mean()}


class Dfq(Dfad):
    """KL divergence; BatchNorm statistics of all generators together, sure answers, all classes."""

    def distance(self, x: Array, theta: Array) -> float:
        return kl(self.logits(x), self.net.logits(theta, x))

    def generator(self, x: Array, students: Sequence[Array]) -> dict[str, float]:
        maps, p = self.teacher.maps(self.theta, x), softmax(self.logits(x))
        return super().generator(x, students) | {
            "statistics": gaussian_kl(maps.mean((0, 2)), maps.var((0, 2)), *self.teacher.moments).sum(),
            "instance_entropy": entropy(p).mean(),
            "batch_entropy": -entropy(p.mean(0)),
        }


def clipped(gradients: Sequence[Array], limit: float) -> list[Array]:
    """Gradients of one network, whose common norm is at most ``limit``."""
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    return [gradient * min(1, limit / norm) if limit else gradient for gradient in gradients]


CASES: list[tuple[str, type[Rule], dict[str, Any], bool]] = [
    ("dafl", Dafl, {"lr": 0.02, "student_lr": 0.05, "activation": 0.3, "information": 2.0}, False),
    ("dafl", Dafl, {"student_images": "new", "student_steps": 2, "student_optimizer": "adam", "lr": 0.01}, True),
    ("dfad", Dfad, {"lr": 0.03, "student_steps": 2, "adversarial": 0.7, "schedule": "constant"}, False),
    ("zskt", Zskt, {"lr": 0.02, "attention": 3.0, "taps": ["0"], "clip": 0.01, "student_steps": 3}, False),
    ("zskt", Zskt, {"lr": 0.02, "attention": 3.0, "taps": ["0"], "student_images": "same", "betas": [0.5, 0.9]}, True),
    ("dfq", Dfq, {"lr": 0.02, "generators": 2, "students": 3, "statistics": 2.0, "batch_entropy": 4.0}, True),
]


@pytest.mark.parametrize(("name", "rule", "values", "norm"), CASES, ids=[case[0] for case in CASES])
def test_iterations_are_the_papers(name, rule, values, norm, tmp_path):
    torch.manual_seed(1)
    made = method(name, values, norm, tmp_path)
    c, nets = made.config, (made.teacher, *made.students)
    teacher, *students = (np.concatenate([p.detach().double().numpy().ravel() for p in n.parameters()]) for n in nets)
    if norm:
        layer = made.teacher.net[1]
        teacher = np.delete(teacher, range(MAPS, 3 * MAPS))  # 1 and 0: weight and bias of BatchNorm
        moments = np.stack([layer.running_mean.double().numpy(), layer.running_var.double().numpy()])
    losses = rule(Net(moments if norm else None), teacher)
    generators = [net[0].weight.detach().double().numpy() for net in made.generators]
    stand_ins.work(made, tmp_path)

    of_generators = [Adam(c.betas) for _ in generators]
    adam = c.student_optimizer == "adam"
    of_students = [Adam() if adam else Momentum(c.student_weight_decay) for _ in students]
    seen: dict[str, list[float]] = {}

    def note(terms: dict[str, float]) -> None:
        for key, value in terms.items():
            seen.setdefault(key, []).append(value)

    def weighted(function: Callable[[Array], dict[str, float]]) -> Callable[[Array], float]:
        return lambda x: sum(getattr(c, key) * value for key, value in function(x).items())

    def images(latents: Array) -> Array:
        parts = np.array_split(latents, len(generators))
        return np.concatenate([part @ weight.T for part, weight in zip(parts, generators, strict=True)])

    def rate(first: float, share: float, falls: bool) -> float:
        return first * (1 + np.cos(np.pi * share)) / 2 if falls else first

    for step in range(STEPS):
        torch.manual_seed(derive("generator step", 0, step))
        latents = torch.randn(BATCH, LATENT).double().numpy()
        x = images(latents)
        note(losses.generator(x, students))
        by_pixels = numerical_gradient(weighted(lambda pixels, s=students: losses.generator(pixels, s)), x)
        parts = zip(np.array_split(by_pixels, len(generators)), np.array_split(latents, len(generators)), strict=True)
        gradients = clipped([of_x.T @ z for of_x, z in parts], c.clip)
        lr = rate(c.lr, step / STEPS, c.schedule == "cosine")
        generators = [o.step(w, g, lr) for o, w, g in zip(of_generators, generators, gradients, strict=True)]
        for inner in range(c.student_steps):
            if c.student_images == "updated":
                x = images(latents)
            elif c.student_images == "new":
                x = images(torch.randn(BATCH, LATENT).double().numpy())
            terms = [losses.student(x, theta) for theta in students]
            note({key: np.mean([each[key] for each in terms]) for key in terms[0]})
            of_theta = [numerical_gradient(weighted(lambda w, x=x: losses.student(x, w)), theta) for theta in students]
            lr = rate(c.student_lr, (step + inner / c.student_steps) / STEPS, c.schedule != "constant")
            of_theta = clipped(of_theta, c.clip)
            if adam and c.student_weight_decay:
                of_theta = [g + c.student_weight_decay * w for g, w in zip(of_theta, students, strict=True)]
            students = [o.step(w, g, lr) for o, w, g in zip(of_students, students, of_theta, strict=True)]

    for ours, weight in zip(made.generators, generators, strict=True):
        np.testing.assert_allclose(ours[0].weight.detach(), weight, atol=3e-5)
    for ours, theta in zip(made.students, students, strict=True):
        found = np.concatenate([p.detach().numpy().ravel() for p in ours.parameters()])
        np.testing.assert_allclose(found, theta, atol=3e-5)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    for key, term in seen.items():
        per_iteration = np.reshape(term, (STEPS, -1))[:, -1]  # a student's last step stands for its iteration
        np.testing.assert_allclose(float(row[key]), per_iteration.mean(), rtol=1e-3, atol=1e-6, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "values", "norm"), [(case[0], *case[2:]) for case in CASES])
def test_an_interrupted_run_continues_bit_for_bit(name, values, norm, tmp_path):
    def run(directory: Path, *callbacks: Callback) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            made = method(name, {**values, "steps": 2 * ITERATIONS_PER_ROUND + 3}, norm, directory)
        stand_ins.work(made, directory, *callbacks)
        return made

    stand_ins.check_interruption(run, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_gradients_are_clipped_after_they_are_unscaled(optimizer, tmp_path):
    """In 16 bits the loss is scaled; sgd shows the gradient's size, Adam's first moment keeps a tenth of it."""
    torch.manual_seed(1)
    values = {"clip": 1e-3, "student_optimizer": optimizer, "student_weight_decay": 0.0, "student_lr": 1.0, "steps": 1}
    made = method("dfad", {**values, "student_steps": 1}, False, tmp_path)
    before = nn.utils.parameters_to_vector(made.student.parameters()).detach().clone()
    precision = MixedPrecision("16-mixed", "cpu")
    trainer = pl.Trainer(
        max_epochs=1, plugins=[precision], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(made, DataLoader(TensorDataset(torch.zeros(1))))
    assert precision.scaler is not None and precision.scaler.get_scale() > 1
    if optimizer == "sgd":
        gradient = before - nn.utils.parameters_to_vector(made.student.parameters()).detach()
    else:
        state = made.pairs[0][0].state
        gradient = 10 * nn.utils.parameters_to_vector([state[p]["exp_avg"] for p in made.student.parameters()])
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)


def method(name: str, values: dict[str, Any], norm: bool, directory: Path) -> Any:
    """The method with linear generators, on a teacher with or without BatchNorm."""
    info = ModelInfo(HERE, CLASSES, SIZE, mean=(0.2,), std=(0.5,))
    net = network(norm=norm)
    if norm:
        nn.init.normal_(net[1].running_mean)
        nn.init.uniform_(net[1].running_var, 0.5, 2)
    more = {"batch_size": BATCH, "latent": LATENT, "steps": STEPS, "dtype": "float32", "width": 0.1, **values}
    teacher, student = Classifier(net, info).eval(), Classifier(network(), info)
    made = stand_ins.synthesizer(name, directory, teacher, more, student=student)
    linear = (nn.Sequential(nn.Linear(LATENT, UNITS, bias=False), nn.Unflatten(1, SIZE)) for _ in made.generators)
    for index, net in enumerate(linear):
        made.generators[index] = net
    return made

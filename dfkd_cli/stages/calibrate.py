"""How strongly each term of a distillation pulls at the student before it has learned anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dfkd_cli.data.sources import Batches
from dfkd_cli.errors import ConfigError
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.offline import Config, Offline

FAR = 10.0  # times as strong, or as weak, as the answers: worth a suggestion


@dataclass(frozen=True)
class Pull:
    """A term on the first batch.

    Attributes:
        objective, term: Which one.
        value: Unweighted.
        weight: The objective's times the term's.
        gradient: Norm of the weighted term's gradient in the student's parameters.
        suggested: A weight of the term with which it would pull as hard as the answers, where it is far from that.
    """

    objective: str
    term: str
    value: float
    weight: float
    gradient: float
    suggested: float | None = None

    def __str__(self) -> str:
        line = f"{self.objective}.{self.term}: {self.value:.4g} x {self.weight:.4g}, gradient {self.gradient:.4g}"
        if self.suggested is None:
            return line
        return f"{line}; far from the answers: try --set objective.{self.objective}.{self.term}={self.suggested:.2g}"


def calibrate(task: Task) -> list[Pull]:
    """Measure every term of a task on its first batch, not augmented, on the CPU.

    Raises:
        ConfigError: A term with a weight is zero or not finite, or does not depend on the student.
    """
    learner = Offline(task, Config())
    cpu = torch.device("cpu")
    (images,) = Batches(learner.train_source, task.training.batch_size, task.seed, cpu).steps(0, 1)
    learner.student.train()
    with torch.no_grad():
        teacher = learner.ask_teacher(images.pixels)
    student = learner.ask_student(images.pixels)
    parameters = [p for p in learner.student.parameters() if p.requires_grad]
    pulls = []
    for name, terms in learner.terms(student, teacher, images).items():
        for term, value in terms.items():
            own = getattr(learner.losses[name].config, term)
            weight = learner.weights[name] * own
            if weight:
                pulls.append(Pull(name, term, value.item(), weight, weight * _gradient(value, parameters)))
                _check(pulls[-1])
    return _suggest(pulls, task)


def _gradient(value: Tensor, parameters: list[nn.Parameter]) -> float:
    """The norm of a term's gradient."""
    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return float(nn.utils.get_total_norm(g for g in gradients if g is not None))


def _check(pull: Pull) -> None:
    for what, number in (("value", pull.value), ("gradient", pull.gradient)):
        if number == 0 or not math.isfinite(number):
            raise ConfigError(
                f"{pull.objective}: the {what} of {pull.term} is {number:g} on the first batch, so it teaches nothing",
                "check its taps, its weight and --batch-size, or leave it out",
            )


def _suggest(pulls: list[Pull], task: Task) -> list[Pull]:
    """Add suggestions to the terms that are far from the strongest one between answers."""
    answers = [p.gradient for p in pulls if task.objectives[p.objective][1].kind == "response"]
    if not answers:
        return pulls
    strongest = max(answers)
    found = []
    for pull in pulls:
        ratio = strongest / pull.gradient
        if max(ratio, 1 / ratio) > FAR:
            own = getattr(task.objectives[pull.objective][1].config, pull.term)
            pull = replace(pull, suggested=own * ratio)
        found.append(pull)
    return found

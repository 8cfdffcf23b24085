"""Whether a distillation has something to learn at all times, and how strongly each term pulls at a new student."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from dfkd_cli.data.sources import hold_out
from dfkd_cli.errors import ConfigError
from dfkd_cli.objectives.answers import AnswerObjective
from dfkd_cli.regimes.base import Task, length
from dfkd_cli.regimes.offline import Config, Offline
from dfkd_cli.seeds import seed_torch

BATCHES = 3  # the first ones: enough for a chance term not to mislead
FAR = 10.0  # times as strong, or as weak, as the answers: worth a suggestion


@dataclass(frozen=True)
class MeasuredTerm:
    """A term on the first batches, means over those that have it; each in the epoch in which it begins to count.

    Attributes:
        objective, term: Which one.
        value: Unweighted; 0 where no batch has it.
        weight: The objective's times the term's.
        strength: What the weight is multiplied by in that epoch.
        gradient: Norm of the gradient of the term, weighted and multiplied so, in the student's parameters.
        batches: How many of the batches have it.
        suggested: A weight of the term with which it would pull as hard as the answers, where it is far from that. The
            strength is left out of the comparison: it is there to change.
    """

    objective: str
    term: str
    value: float
    weight: float
    strength: float
    gradient: float
    batches: int
    suggested: float | None = None

    def __str__(self) -> str:
        name = f"{self.objective}.{self.term}"
        if not self.batches:
            return f"{name}: there was nothing for it in any of the first {BATCHES} batches"
        factors = f"{self.value:.4g} x {self.weight:.4g}" + (f" x {self.strength:.4g}" if self.strength != 1 else "")
        line = f"{name}: {factors}, gradient {self.gradient:.4g}"
        if self.batches < BATCHES:
            line += f", in {self.batches} of {BATCHES} batches"
        if self.suggested is None:
            return line
        return f"{line}; far from the answers: try --set objective.{self.objective}.{self.term}={self.suggested:.2g}"


def check(task: Task) -> None:
    """Make sure that a training with objectives always has something to learn.

    Raises:
        ConfigError: No term has a weight; or of an objective that is learned alone at first, there is nothing to learn
            in its phase or after it, or no time for what comes after it.
    """
    weighted = {name: objective for name, (_, objective) in task.objectives.items() if _weights(task, name)}
    if not weighted:
        raise ConfigError(
            f"nothing is learned: no term of {', '.join(task.objectives)} has a weight", "give a weight above 0"
        )
    first, longest = max(task.objectives.items(), key=lambda item: item[1][1].phase)
    phase = longest[1].phase
    if not phase:
        return
    what = f"{first} is learned alone for {phase} epochs"
    if not any(objective.phase for objective in weighted.values()):
        raise ConfigError(f"{what}, and has no weight", "give it a weight above 0, or leave it out")
    after = [name for name, objective in weighted.items() if not objective.phase]
    shorter = f"--set objective.{first}.pretraining"
    if not after:
        raise ConfigError(f"{what}, and nothing after them", f"add --objective response, or {shorter}=0")
    c = task.training
    per_epoch, steps = length(c, len(hold_out(task.source, c.holdout, task.seed, c.most_bytes)[0]))
    if phase * per_epoch >= steps:
        raise ConfigError(
            f"{what}, {phase * per_epoch} steps of {steps}, which leaves none for {', '.join(after)}",
            f"raise --epochs or --steps, or lower {shorter}",
        )


def _weights(task: Task, name: str) -> dict[str, float]:
    """The weights of an objective's terms, times its own, that are not 0."""
    weight, objective = task.objectives[name]
    weights = {term: weight * getattr(objective.config, term) for term in objective.terms}
    return {term: value for term, value in weights.items() if value}


def calibrate(task: Task) -> list[MeasuredTerm]:
    """Measure every term of a task on its first batches, not augmented, on the CPU; none where nothing is learned.

    Raises:
        ConfigError: A term with a weight is missing, zero or not finite, or does not depend on the student.
    """
    learner = Offline(task, Config())
    if not learner.steps:
        return []
    samples = _sample(learner, task)
    measured = []
    for name, objective in learner.losses.items():
        for term, weight in _weights(task, name).items():
            if strength := objective.strength(term):
                pairs = samples.get((name, term), [])
                value, gradient = map(fmean, zip(*pairs or [(0.0, 0.0)], strict=True))
                gradient *= weight * strength
                measured.append(MeasuredTerm(name, term, value, weight, strength, gradient, len(pairs)))
                _check(measured[-1], optional=term in objective.optional)
    return _suggest(measured, task)


def _sample(learner: Offline, task: Task) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The value and the norm of the gradient of each term with a weight, in each of the first batches that has it."""
    cpu = torch.device("cpu")
    batches = learner.batched(learner.train_source)
    start = max(objective.phase for objective in learner.losses.values())
    for objective in learner.losses.values():
        objective.epoch = 0 if objective.phase else start
        objective.progress = objective.epoch * batches.steps_per_epoch / learner.steps
    parameters = [p for p in learner.student.parameters() if p.requires_grad]
    learner.student.train()
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with torch.random.fork_rng(devices=[]):
        for objective in learner.losses.values():
            with torch.no_grad():  # enough of the images for an impression
                objective.observe(
                    learner.ask_teacher(images)[objective.teacher_mode] for images in batches.steps(0, BATCHES)
                )
        for step, images in enumerate(learner.parts(batch)[0] for batch in batches.steps(0, BATCHES)):
            seed_torch(cpu, "step", task.seed, step, 0)
            with torch.no_grad():
                teacher = learner.ask_teacher(images)
            student = learner.ask_student(images.pixels)
            for name, terms in learner.terms(student, teacher, images).items():
                for term in terms.keys() & _weights(task, name).keys():
                    numbers = terms[term].item(), _gradient(terms[term], parameters)
                    samples.setdefault((name, term), []).append(numbers)
    return samples


def _gradient(value: Tensor, parameters: list[nn.Parameter]) -> float:
    """The norm of a term's gradient."""
    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return float(nn.utils.get_total_norm(g for g in gradients if g is not None))


def _check(term: MeasuredTerm, optional: bool) -> None:
    hint = "check its taps, its weight and --batch-size, or leave it out"
    if not term.batches and not optional:
        raise ConfigError(f"{term.objective} gives no {term.term} on the first batches, which has a weight", hint)
    for what, number in (("value", term.value), ("gradient", term.gradient)):
        if term.batches and (number == 0 or not math.isfinite(number)):
            where = f"the {what} of {term.term} is {number:g} on the first batches"
            raise ConfigError(f"{term.objective}: {where}, so it teaches nothing", hint)


def _suggest(measured: list[MeasuredTerm], task: Task) -> list[MeasuredTerm]:
    """Add suggestions to the terms that are far from the strongest one between answers that counts when they do."""
    objectives = {name: objective for name, (_, objective) in task.objectives.items()}

    def suggested(term: MeasuredTerm) -> float | None:
        objective = objectives[term.objective]
        answers = [
            other.gradient / other.strength
            for other in measured
            if isinstance(objectives[other.objective], AnswerObjective)
            and (objectives[other.objective].phase > 0) == (objective.phase > 0)
        ]
        if not term.batches or not any(answers):
            return None
        ratio = max(answers) / (term.gradient / term.strength)
        return getattr(objective.config, term.term) * ratio if max(ratio, 1 / ratio) > FAR else None

    return [replace(term, suggested=suggested(term)) for term in measured]

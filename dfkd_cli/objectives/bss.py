"""Knowledge Distillation with Adversarial Samples Supporting Decision Boundary: images just across it are asked about.

Heo, Lee, Yun, Choi. AAAI 2019. arXiv:1805.05532.

    x <- clip(x - attack_step (g + 1e-4) grad g / ||grad g||),  g = z_b(x) - z_k(x)       `iterations` times at most,
                                        while the teacher's class is b still; x: normalised, clip: to those of [0,1],
                                        or as far beyond as the impression was
    P(k) = p_k / (1 - p_b)                                      of the other classes k
    soft     = -sum_k softmax(z_t / tau)_k log softmax(z_s / tau)_k              on the batch
    boundary = the same on the images x,  mean over them        code:  one k for each, drawn from P
                                                                paper: every k, weighed by P(k)
    strength = 1 - 3/4 e of ``soft``, max(1 - 4/3 e, 0) of ``boundary``         e: the finished share of the training

Images start where both networks are right: give the label, or where there is none, agree. The released code asks the
same of both; a former version of it asked the teacher only. Of more than ``boundary_images``, those are taken whose
other probabilities differ most. Of fewer than two there is no ``boundary``: BatchNorm may have no use for one.
``variant: paper`` moves each image to every other class: K - 1 times the work, for the mean of what ``code`` draws.
Where these are too many for one pass they take turns, as many of each image in every part: the loss and its gradient
are sums over parts. BatchNorm then normalises each part by itself, and its averages learn from the first.

As in the released code: there is no tau^2, and the student's BatchNorm sees the new images too. Its weights fall with
every epoch, here with every step. They hold ``soft`` as well, so that ``response`` beside it is for hard labels only;
``hard`` here does the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.models.activations import averages_kept
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.answers import AnswerObjective, hard_labels
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.options import Answers

EPS = 1e-4  # beyond the boundary
AT_ONCE = 2**22  # numbers of the images that are moved together, 16 MiB; all images of the batch are, one class each
TINY = 1e-12  # no gradient is shorter


@dataclass(frozen=True, kw_only=True)
class Config(Answers):
    """Boundary supporting samples."""

    temperature: float = 3.0
    soft: float = option(4.0, "weight of the teacher's answers, falls to a quarter", low=0)
    boundary: float = option(2.0, "weight of the answers at the boundary, falls to zero", low=0)
    variant: Literal["code", "paper"] = option("code", "images move to a class drawn for each, or to every other class")
    boundary_images: int = option(64, "images of a batch that are moved to the boundary, at most", low=1, rehearsal=2)
    iterations: int = option(10, "steps towards the boundary, at most", low=1, rehearsal=1)
    attack_step: float = option(0.3, "length of a step for each unit of the logits' difference", above=0)


class BSS(AnswerObjective):
    """Answers on the batch, and on images moved across the teacher's decision boundary."""

    kind = "boundary"
    terms = ("soft", "boundary", "hard")
    optional = ("boundary",)
    config: Config

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        super().connect(student, teacher)
        self.networks = student, teacher  # a tuple: they are no parts of this module

    def strength(self, term: str) -> float:
        fading = {"soft": 1 - 0.75 * self.progress, "boundary": max(1 - self.progress * 4 / 3, 0.0)}
        return fading.get(term, 1.0)

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """Terms ``soft``, ``boundary`` where there are images for it and, where it has a weight, ``hard``."""
        terms = {"soft": self.cross_entropies(student, teacher).mean()} | self.hard(student, teacher, images)
        labels = hard_labels(teacher, images)
        chosen = candidates(student.logits.detach(), teacher.logits, labels, self.config.boundary_images)
        if len(chosen) > 1 and self.config.boundary * self.strength("boundary"):
            terms["boundary"] = self.boundary(images.pixels[chosen].detach(), teacher.logits[chosen], labels[chosen])
        return terms

    def boundary(self, pixels: Tensor, logits: Tensor, base: Tensor) -> Tensor:
        """The softened answers' cross-entropy across the boundary, of pixels (B, C, H, W) of classes ``base`` (B,).

        Args:
            pixels: Images whose teacher's class is ``base``.
            logits: (B, K) what the teacher says about them.
            base: Their classes.
        """
        if self.config.variant == "paper":
            rows, target, weights = other_classes(logits, base)
        else:
            rows, target = torch.arange(len(base), device=base.device), other_class(logits, base)
            weights = torch.ones_like(logits[:, 0])
        own, guide = self.networks

        def loss(part: slice) -> Tensor:
            moved = across(guide, pixels[rows[part]], base[rows[part]], target[part], self.config)
            with torch.no_grad():
                answers = Outputs(guide(moved))
            return (weights[part] * self.cross_entropies(Outputs(own(moved)), answers)).sum() / len(base)

        passes = -(-len(rows) // max(len(base), AT_ONCE // pixels[0].numel()))
        return loss(slice(None)) if passes == 1 else added_up(own, loss, passes)

    def cross_entropies(self, student: Outputs, teacher: Outputs) -> Tensor:
        """Cross-entropy of the softened answers, for each image (B,)."""
        own, target = (logits / self.config.temperature for logits in self.answers(student, teacher))
        return F.cross_entropy(own, target.softmax(1), reduction="none")


def added_up(network: Classifier, loss: Callable[[slice], Tensor], passes: int) -> Tensor:
    """The sum of a network's losses, 0-d, on so many parts of some rows, which take turns.

    Only one part is held at a time: its gradient is taken before the next one begins.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients: dict[nn.Parameter, Tensor] = {}
    values = []
    for index in range(passes):
        with averages_kept(network) if index else contextlib.nullcontext():  # they learn from the first
            value = loss(slice(index, None, passes))
        values.append(value.detach())
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[parameter] = gradients[parameter] + gradient if parameter in gradients else gradient
    # Zeros that have these gradients.
    carriers = [((parameter - parameter.detach()) * gradient).sum() for parameter, gradient in gradients.items()]
    return torch.stack([*values, *carriers]).sum()


def candidates(student: Tensor, teacher: Tensor, labels: Tensor, count: int) -> Tensor:
    """The rows of logits (B, K) where both are correct; of more than ``count``, those whose others differ most."""
    correct = (student.argmax(1) == labels) & (teacher.argmax(1) == labels)
    others = ~F.one_hot(labels, student.shape[1]).bool()
    difference = ((teacher.softmax(1) - student.softmax(1)).square() * others).sum(1)
    ranked = difference.masked_fill(~correct, -1).argsort(descending=True, stable=True)
    return ranked[: min(count, int(correct.sum()))]


def other_shares(logits: Tensor, base: Tensor) -> Tensor:
    """The probabilities (B, K) of the classes other than ``base``, which has none, from logits (B, K)."""
    return logits.masked_fill(F.one_hot(base, logits.shape[1]).bool(), -torch.inf).softmax(1)


def other_class(logits: Tensor, base: Tensor) -> Tensor:
    """A class (B,) other than ``base``, drawn with the teacher's probabilities from logits (B, K)."""
    return torch.multinomial(other_shares(logits, base), 1).squeeze(1)


def other_classes(logits: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of a row of logits (B, K) and a class other than ``base``: both (B (K - 1),), and its probability."""
    rows, classes = (~F.one_hot(base, logits.shape[1]).bool()).nonzero(as_tuple=True)
    return rows, classes, other_shares(logits, base)[rows, classes]


def across(network: Classifier, pixels: Tensor, base: Tensor, target: Tensor, config: Config) -> Tensor:
    """Move pixels (B, C, H, W) of classes ``base`` (B,) towards ``target`` (B,), until the network's answer changes.

    They stay within [0,1], and where impressions are beyond that, no further beyond than those.
    """
    low, high = network.normalise(pixels.clamp(max=0)), network.normalise(pixels.clamp(min=1))
    x = network.normalise(pixels)
    for _ in range(config.iterations):
        x.requires_grad_()
        logits = network.net(x)
        before = logits.argmax(1) == base
        if not before.any():
            break
        gap = (logits.gather(1, base[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
        (gradient,) = torch.autograd.grad(gap.sum(), x)
        length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3)).clamp_min(TINY)
        step = config.attack_step * (gap.detach() + EPS) / length * before
        x = (x.detach() - step[:, None, None, None] * gradient).clamp(low, high)
    return network.denormalise(x.detach())

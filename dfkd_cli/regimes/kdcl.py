"""Online Knowledge Distillation via Collaborative Learning: students that learn together, from what they say together.

Guo, Wang, Wu, Yu, Liang, Hu, Luo. CVPR 2020, pages 11020-11029.

    L = sum_i  labels CE(z_i, y) + D(z_i, z)        z: of all students' answers, without a gradient

    naive      z = z_k, k = argmin_i CE(z_i, y)                                           for each image
    linear     z = sum_i a_i z_i, a = argmin CE(sum_i a_i z_i, y), a >= 0, sum_i a_i = 1  for each image
    min-logit  z_c = min_i (z_i - z_i[y])_c                                               for each image
    general    p = sum_i w_i softmax(z_i / tau), w = argmin w^T C w, sum_i w_i = 1
               C_ij = mean_n (f_i(x_n) - t_n)^T (f_j(x_n) - t_n)                          on images held out

The distance D is the objective's, as others report the paper ``--objective response --temperature 2`` on ImageNet. Each
student sees its own random view of the same images. No code was released, and only the abstract could be read: the
formulas are as others report them, and these choices are ours.

- The convex problem of ``linear`` is solved to a gap of 1e-4 nats, by steps from the worst student to the best one.
- ``general`` needs ``--holdout``; C is measured anew at the start of each epoch, with 1e-4 added to its diagonal, and
  weights below zero are set to zero. tau is the objective's temperature, or 1 where it has none. Where there are so few
  images that the share to hold out is none of them, as in a rehearsal, the students keep equal weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.objectives.base import ask
from dfkd_cli.options import Several
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.distillation import Answers, Distillation, in_every_mode

GAP = 1e-4  # nats by which an ensemble may miss the best one
RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Config(Several):
    """Collaborative learning."""

    ensemble: Literal["naive", "linear", "min-logit", "general"] = option("min-logit", "how answers are put together")
    labels: float = option(1.0, "weight of the labels beside the objectives", low=0)


class Collaborative(Distillation):
    """Students that teach each other."""

    needs = ("labels", "objective")
    mixable = False
    config: Config
    mixture: Tensor  # (M,): the weights of ``general``

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        if len(self.students) < 2:
            raise ConfigError("--method kdcl: one student cannot learn together", "give --students SPEC SPEC")
        if config.ensemble == "general" and not task.training.holdout:
            raise ConfigError("--ensemble general weighs students on images held out", "give --holdout 0.1")
        self.register_buffer("mixture", torch.full((len(self.students),), 1 / len(self.students)))
        self.measured = -1  # the epoch of the mixture

    def view(self, images: Images) -> Images:
        """The images as they are: each student has its own view of them."""
        return images

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The labels and the objectives for every student."""
        if self.config.ensemble == "general":
            self._weigh()
        views = [super(Collaborative, self).view(images) for _ in self.students]
        outputs = [ask(student, view.pixels, {}) for student, view in zip(self.students, views, strict=True)]
        with torch.no_grad():
            teacher = self.ensemble(torch.stack([each.logits for each in outputs]), images)
        losses: list[Tensor] = []
        named: dict[str, Tensor] = {}
        for index, (each, view) in enumerate(zip(outputs, views, strict=True)):
            terms = self.terms(each, teacher, view, shared=True)
            labels = F.cross_entropy(each.logits, images.true_labels)
            losses.append(self.config.labels * labels + self.total(terms))
            named |= {f"{name}.{index}": term for name, term in {"labels": labels, **self.named(terms)}.items()}
        return torch.stack(losses).sum(), named

    def ask_teacher(self, images: Images) -> Answers:
        """What all students say together about the same view of images."""
        return self.ensemble(torch.stack([ask(student, images.pixels, {}).logits for student in self.students]), images)

    def ensemble(self, logits: Tensor, images: Images) -> Answers:
        """What answers (M, B, K) of all students come to, in float32."""
        with torch.autocast(logits.device.type, enabled=False):
            if self.config.ensemble != "general":
                return in_every_mode(ENSEMBLES[self.config.ensemble](logits.float(), images.true_labels))
            temperatures = {getattr(objective.config, "temperature", 1.0) for objective in self.losses.values()}
            tau = temperatures.pop() if len(temperatures) == 1 else 1.0
            return in_every_mode(tau * mixed(logits.float() / tau, self.mixture).log())

    def _weigh(self) -> None:
        """Measure the mixture at the start of an epoch."""
        if self.held_out is None or self.measured == int(self.epochs):
            return
        self.measured = int(self.epochs)
        with torch.no_grad():
            answers = []
            for student in self.students:
                student.eval()
                answers.append(torch.cat([student(part.pixels).softmax(1) for part in self.held_parts()]))
                student.train()
            measured = weights(torch.stack(answers), self.held.true_labels.to(self.device))
            # Of all processes the first one's: BatchNorm's averages, which answer here, are each process's own.
            self.mixture.copy_(self.trainer.strategy.broadcast(measured.cpu()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The mixture is a buffer; of which epoch it is decides when it is measured next."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["measured"] = self.measured

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the mixture of that epoch."""
        super().on_load_checkpoint(checkpoint)
        self.measured = checkpoint["measured"]


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    """Of answers (M, B, K) for each image those (B, K) with the lowest cross-entropy with its label (B,)."""
    losses = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits])
    return logits[losses.argmin(0), torch.arange(len(labels), device=labels.device)]


def min_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Of answers (M, B, K), each less its logit of the label (B,), the smallest for each class."""
    return (logits - logits.gather(2, labels.expand(len(logits), -1)[:, :, None])).amin(0)


def linear(logits: Tensor, labels: Tensor) -> Tensor:
    """The convex combination (B, K) of answers (M, B, K) with the lowest cross-entropy for each label (B,)."""
    margins = (logits - logits.gather(2, labels.expand(len(logits), -1)[:, :, None])).double()
    shares = torch.full(margins.shape[:2], 1 / len(margins), dtype=torch.float64, device=logits.device)  # (M, B)
    image = torch.arange(len(labels), device=labels.device)
    for _ in range(50 * len(margins)):
        slopes = _slopes(margins, shares)
        best = slopes.argmin(0)
        worst = slopes.masked_fill(shares == 0, -torch.inf).argmax(0)
        if ((shares * slopes).sum(0) - slopes[best, image]).max() <= GAP:
            break
        low, high = torch.zeros_like(shares[0]), shares[worst, image]  # how much goes from the worst to the best
        limit = high.clone()
        for _ in range(40):
            middle = (low + high) / 2
            moved = _moved(shares, worst, best, middle)
            slopes = _slopes(margins, moved)
            rising = slopes[best, image] > slopes[worst, image]
            low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
        amount = torch.where(high == limit, limit, (low + high) / 2)
        shares = _moved(shares, worst, best, amount * (best != worst))
    return torch.einsum("mb,mbk->bk", shares.to(logits.dtype), logits)


def _slopes(margins: Tensor, shares: Tensor) -> Tensor:
    """The derivatives (M, B) of the cross-entropy in the shares (M, B) of answers (M, B, K) less that of the label."""
    return torch.einsum("bk,mbk->mb", torch.einsum("mb,mbk->bk", shares, margins).softmax(1), margins)


def _moved(shares: Tensor, source: Tensor, target: Tensor, amount: Tensor) -> Tensor:
    """Shares (M, B) with an amount (B,) moved from one student to another (B,), for each image."""
    moved = shares.scatter_add(0, target[None], amount[None])
    return moved.scatter_add(0, source[None], -amount[None]).clamp_min(0)


def mixed(logits: Tensor, weights: Tensor) -> Tensor:
    """The probabilities (B, K) that answers (M, B, K) with these weights (M,) come to."""
    return torch.einsum("m,mbk->bk", weights, logits.softmax(2))


def weights(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The weights (M,) of students with these probabilities (M, N, K) whose mixture is nearest to the labels (N,)."""
    errors = (probabilities - F.one_hot(labels, probabilities.shape[2])).double().flatten(1)
    covariance = errors @ errors.T / len(labels) + RIDGE * torch.eye(len(errors), device=errors.device)
    solution = torch.linalg.solve(covariance, torch.ones(len(errors), dtype=torch.float64, device=errors.device))
    positive = (solution / solution.sum()).clamp_min(0)
    return (positive / positive.sum()).to(probabilities.dtype)


ENSEMBLES = {"naive": naive, "linear": linear, "min-logit": min_logit}

"""Offline distillation: one finished teacher, one student, a transfer set.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. arXiv:1503.02531.

    L = sum_objectives weight * sum_terms strength(e) * term_weight * term(student(a(x)), teacher(a(x)))

``a`` is the random augmentation. The teacher answers the augmented image, as in the ZSKD paper: an impression that is
turned or shifted is asked about anew, not given the answer of the upright one. ``strength`` is 1 but for terms that
grow or fade over the epochs. While one of them is to be learned alone, the others do not count. Parameters that nothing
counted depends on are left as they are, by weight decay too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_cli.data.sources import Images
from dfkd_cli.models.activations import batch_statistics
from dfkd_cli.models.taps import find_taps
from dfkd_cli.objectives.base import Outputs, ask
from dfkd_cli.regimes.base import Regime, Task
from dfkd_cli.rounds import weighted_sum


@dataclass(frozen=True, kw_only=True)
class Config:
    """Offline distillation: everything is in the objectives."""


class Offline(Regime):
    """One frozen teacher, one student."""

    needs = ("teacher",)
    measure = "agreement"

    def __init__(self, task: Task, config: Any) -> None:
        super().__init__(task, config)
        pairs = [pair for objective in self.losses.values() for pair in objective.pairs]
        self.student_taps = find_taps(self.student, (name for name, _ in pairs))
        self.teacher_taps = find_taps(self.teacher, (name for _, name in pairs))
        self.idle_beside: dict[tuple[str, ...], list[nn.Parameter]] = {}

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between student and teacher on the same pixels."""
        with torch.no_grad():
            teacher = self.ask_teacher(images.pixels)
        return self.discrepancy(images, teacher)

    def ask_teacher(self, pixels: Tensor) -> dict[str, Outputs]:
        """The teacher's outputs in each of the modes that objectives want, ``eval`` first."""
        modes: dict[str, AbstractContextManager[None]] = {
            "eval": nullcontext(),
            "train": batch_statistics(self.teacher),
        }
        outputs: dict[str, Outputs] = {}
        for mode in sorted({objective.teacher_mode for objective in self.losses.values()}):
            with modes[mode]:
                outputs[mode] = ask(self.teacher, pixels, self.teacher_taps)
        return outputs

    def ask_student(self, pixels: Tensor) -> Outputs:
        """The student's outputs."""
        return ask(self.student, pixels, self.student_taps)

    def terms(self, student: Outputs, teacher: Mapping[str, Outputs], images: Images) -> dict[str, dict[str, Tensor]]:
        """The unweighted terms of each objective between the student's and the teacher's outputs."""
        with torch.autocast(self.device.type, enabled=False):  # losses are computed in float32
            return {
                name: objective(student, teacher[objective.teacher_mode], images)
                for name, objective in self.losses.items()
            }

    def discrepancy(self, images: Images, teacher: Mapping[str, Outputs]) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between the student and the teacher's outputs: weighted and summed, and their terms."""
        student = self.ask_student(images.pixels)
        counted, logged = dict[str, Tensor](), dict[str, Tensor]()
        alone = any(objective.alone for objective in self.losses.values())
        for name, terms in self.terms(student, teacher, images).items():
            objective = self.losses[name]
            if objective.alone == alone:
                scaled = {term: objective.strength(term) * value for term, value in terms.items()}
                counted[name] = self.weights[name] * weighted_sum(scaled, objective.config)
            prefix = f"{name}." if len(self.losses) > 1 else ""
            logged |= {prefix + term: value for term, value in terms.items()}
        loss = functools.reduce(torch.add, counted.values())
        if tuple(counted) not in self.idle_beside:  # it is the same for every batch
            used, parameters = leaves(loss), [*self.student.parameters(), *self.objectives.parameters()]
            self.idle_beside[tuple(counted)] = [p for p in parameters if p.requires_grad and p not in used]
        self.idle = self.idle_beside[tuple(counted)]
        # Processes wait for the gradient of every parameter, the idle ones included.
        return loss + 0 * torch.stack([student.logits.sum(), *(p.sum() for p in self.idle)]).sum(), logged

    def right(self, images: Images) -> Tensor:
        """Whether the student gives the teacher's class."""
        return self.student(images.pixels).argmax(1) == self.teacher(images.pixels).argmax(1)


def leaves(value: Tensor) -> set[Tensor]:
    """The parameters that a value depends on."""
    found, seen, waiting = set[Tensor](), set[Any](), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):
                found.add(leaf)
            waiting += [before for before, _ in node.next_functions]
    return found

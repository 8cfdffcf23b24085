"""Synthesizers with a student in the loop: it is trained while images are made, and may shape them."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.data.augment import pipeline
from dfkd_cli.data.batches import Batches, room
from dfkd_cli.data.sources import Images, Source
from dfkd_cli.models.activations import Tap
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generators
from dfkd_cli.models.quantized import follow_ranges
from dfkd_cli.objectives.base import Outputs, ask
from dfkd_cli.objectives.response import soft_loss
from dfkd_cli.options import measured_at_once
from dfkd_cli.rounds.learner import fusible, weighted_sum
from dfkd_cli.seeds import derive, seed_torch
from dfkd_cli.synthesis_options import CoTraining, PoolTraining
from dfkd_cli.synthesizers.base import SynthesisTask, Synthesizer


class CoTrainer(Synthesizer):
    """Trains a student, which is written beside the shards. Its ``Config`` extends :class:`CoTraining`.

    Rounds depend on each other: the state is in the checkpoint, and one process does the work.

    Attributes:
        student: The network to train.
        rivals: More students that are trained alike and then forgotten.
        student_taps: For each student, where :meth:`student_terms` wants features.
        teacher_taps: The same of the teacher.
        training_rounds: The number of rounds, at the start of the run, that write no shard.
    """

    needs: ClassVar[tuple[str, ...]] = ("student",)
    stateless = False
    config: CoTraining
    teacher_taps: Mapping[str, Tap] = {}
    training_rounds = 0

    def __init__(self, task: SynthesisTask, config: CoTraining) -> None:
        super().__init__(task, config)
        assert task.student is not None  # it is among the needs
        self.student = task.student.lay_out()
        self.rivals = nn.ModuleList()
        self.student_taps: list[Mapping[str, Tap]] = [{}]

    @property
    def students(self) -> list[Any]:
        """The student and its rivals."""
        return [self.student, *self.rivals]

    @property
    @abstractmethod
    def student_steps(self) -> int:
        """Steps of the student in all."""

    @property
    @abstractmethod
    def of_a_step(self) -> int:
        """Images of one step of the student."""

    def can_fuse(self, parameters: Iterable[Tensor]) -> bool:
        """Whether Adam can be fused: in mixed precision it would unscale gradients itself, too late to clip them."""
        return fusible(parameters) and not (self.config.clip and self.trainer.precision.endswith("mixed"))

    def can_continue(self, index: int) -> bool:
        return self.writer.rows.keys() >= set(range(index - self.training_rounds))

    def models(self) -> Mapping[str, Classifier | Generators]:
        """The student."""
        return {"student": self.student}

    def trained(self) -> Sequence[tuple[Optimizer, LRScheduler | None]]:
        """What is trained: an optimiser and its schedule for each network, the student's first."""
        c, parameters = self.config, [p for net in self.students for p in net.parameters() if p.requires_grad]
        optimizer: Optimizer
        if c.student_optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, c.student_lr, momentum=0.9, weight_decay=c.student_weight_decay)
        else:
            decay, fused = c.student_weight_decay, self.can_fuse(parameters)
            optimizer = torch.optim.Adam(parameters, c.student_lr, weight_decay=decay, fused=fused)
        return [(optimizer, CosineAnnealingLR(optimizer, T_max=max(self.student_steps, 1)))]

    def configure_optimizers(self) -> Any:
        """Optimisers and schedules, as Lightning takes them."""
        self.pairs = self.trained()
        return [optimizer for optimizer, _ in self.pairs], [schedule for _, schedule in self.pairs if schedule]

    def on_fit_start(self) -> None:
        """The augmentation of the student's images; the ranges of a student with few bits will follow these."""
        for student in self.students:
            follow_ranges(student.net)
        self.augment = pipeline(self.config, self.student.background(self.config.fill))

    @torch.no_grad()
    def ask_teacher(self, pixels: Tensor) -> Outputs:
        """The teacher's outputs for pixels (B, C, H, W)."""
        return ask(self.teacher, pixels, self.teacher_taps)

    def unchanged(self, pixels: Tensor) -> Outputs | None:
        """The teacher's outputs for pixels (B, C, H, W) if :meth:`teach` will not augment them; else None."""
        return self.ask_teacher(pixels) if isinstance(self.augment, nn.Identity) else None

    @torch.no_grad()
    def health(self, pixels: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """How images (B, C, H, W), B of at least 1, of any type and device, and the teacher's logits (B, K) look.

        ``confidence``: the teacher's mean highest probability; ``variety``: the number of classes that its answers are
        spread over, as the exponential of their entropy, divided by the most that there can be; ``agreement``: the
        share of images for which the student gives the teacher's class.
        """
        labels, training = logits.argmax(1), self.student.training
        self.student.eval()
        parts = Images(pixels).split(measured_at_once(self.of_a_step))
        answers = [self.student(part.to(self.device).pixels).argmax(1) for part in parts]
        agreed = torch.cat(answers) == labels
        self.student.train(training)
        shares = torch.bincount(labels, minlength=logits.shape[1]) / len(labels)
        return {
            "confidence": logits.softmax(1).amax(1).mean(),
            "variety": torch.xlogy(shares, shares).sum().neg().exp() / min(logits.shape),
            "agreement": agreed.float().mean(),
        }

    def shard_health(self, index: int) -> dict[str, Tensor]:
        """How the images of a shard look that was written."""
        shard = self.writer.read(index)
        return self.health(shard["images"], shard["logits"].to(self.device))

    def concern(self, measures: Mapping[str, float]) -> str | None:
        """Images that are all of one class, or of none."""
        classes = self.teacher.info.num_classes
        # One class gives 1 / classes or more; two of ten are collapsed too, one of two is not.
        if measures.get("variety", 1) < max(0.25, 1.1 / classes):
            return "the teacher sees hardly any variety of classes in the images (variety): they have collapsed"
        if measures.get("confidence", 1) < 0.1 + 0.9 / classes:
            return "the teacher is sure of none of the images (confidence): they are noise to it"
        return None

    @abstractmethod
    def student_terms(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """The named, unweighted terms of the student's loss, 0-d: how far its answers are from the teacher's."""

    def teach(self, pixels: Tensor, teacher: Outputs | None = None) -> dict[str, Tensor]:
        """One step of every student on pixels (B, C, H, W). Returns the unweighted terms, means over the students.

        Args:
            pixels: The images.
            teacher: The teacher's outputs for these pixels, if they were computed already.
        """
        changed = self.augment(pixels)
        if teacher is None or changed is not pixels:
            teacher = self.ask_teacher(changed)
        asked = zip(self.students, self.student_taps, strict=True)
        images = Images(changed)
        terms = [self.student_terms(ask(student, changed, taps), teacher, images) for student, taps in asked]
        self.descend(0, torch.stack([weighted_sum(each, self.config) for each in terms]).sum())
        return means([{name: term.detach() for name, term in each.items()} for each in terms])

    def descend(self, index: int, loss: Tensor) -> None:
        """One step of one of the optimisers, by its place in :meth:`trained`, and of its schedule.

        Args:
            index: Which.
            loss: 0-d; only this optimiser's parameters get its gradient.
        """
        optimizer, schedule = self.pairs[index]
        wrapped: Any = self.optimizers()  # as Lightning keeps them: it counts steps, and scales gradients where needed
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.zero_grad()
        self.manual_backward(loss, inputs=parameters)
        (wrapped[index] if isinstance(wrapped, list) else wrapped).step()
        if schedule is not None:
            schedule.step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients, which Lightning has unscaled by now; those of optimisers that it does not know stay."""
        if self.config.clip:
            self.clip_gradients(optimizer, gradient_clip_val=self.config.clip, gradient_clip_algorithm="norm")


class PoolTrainer(CoTrainer):
    """Trains the student after each new shard, on the pool of all shards so far.

    Its ``Config`` extends :class:`PoolTraining`. Batches of the pool are drawn anew in each round, so that they depend
    on (seed, round) and what the pool holds.
    """

    config: PoolTraining

    @property
    def warmup_rounds(self) -> int:
        return round(self.config.warmup_share * self.rounds)

    @property
    def warming_up(self) -> bool:
        """Whether this is a round of the warm-up: the student is not trained, and images are made without it."""
        return self.current_round < self.warmup_rounds

    @property
    def student_steps(self) -> int:
        return (self.rounds - self.warmup_rounds) * self.config.student_steps

    @property
    def of_a_step(self) -> int:
        return self.config.student_batch_size

    def student_terms(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """How far the student's softened answers are from the teacher's."""
        return {"soft": soft_loss(student.logits, teacher.logits, "kl", self.config.student_temperature)}

    @functools.cached_property
    def pool(self) -> _Pool:
        """The shards so far; first asked for in a round, when the device is known."""
        return _Pool(self.writer, self.device)

    def round(self, index: int) -> Mapping[str, Tensor]:
        """Make a shard against the student as it is, then train the student."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the pool has grown: it finds no place where the last one lay
        self.student.eval()
        measures = {**super().round(index), **self.shard_health(index)}
        if self.warming_up:
            return measures
        self.student.train()
        steps = self.config.student_steps
        seed = derive("pool", self.seed, index)
        batches = Batches(self.pool.grown(index + 1), self.config.student_batch_size, seed, self.device)
        taught: list[dict[str, Tensor]] = []
        for step, images in enumerate(batches.steps(0, steps)):
            seed_torch(self.device, "student step", self.seed, index * steps + step)
            taught.append(self.teach(images.pixels))
        return {**measures, **means(taught)}


class _Pool(Source):
    """The shards that a run has made so far, without labels; on a GPU they stay there as long as there is room."""

    def __init__(self, writer: ShardWriter, device: torch.device) -> None:
        self.writer, self.device, self.kept = writer, device, dict[int, Tensor]()
        self.shape, self.dtype = tuple(writer.head["shape"]), getattr(torch, writer.head["dtype"])

    def grown(self, count: int) -> _Pool:
        """The same pool with its first ``count`` shards."""
        self.sizes = [self.writer.rows[index]["count"] for index in range(count)]
        return self

    def chunk(self, index: int) -> Images:
        if index in self.kept:
            return Images(self.kept[index])
        pixels = self.writer.read(index)["images"]
        if self.device.type != "cpu" and len(self) * self.bytes_per_image <= room(self.device):
            self.kept[index] = pixels = pixels.to(self.device)
        return Images(pixels)


def means(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named number over several steps."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in (rows[0] if rows else ())}

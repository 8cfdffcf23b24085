"""The loop in which every network is trained, teacher or student."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from dfkd_cli.data.augment import pipeline
from dfkd_cli.data.batches import Batches
from dfkd_cli.data.mixing import Mixing
from dfkd_cli.data.sources import Images, Source, hold_out
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.adapter import require_training
from dfkd_cli.models.black_box import BlackBox
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.base import Objective
from dfkd_cli.options import Training
from dfkd_cli.rounds.learner import Learner, fusible
from dfkd_cli.seeds import derive, seed_torch

# What may make images that a network cannot learn from.
CHANGES = ("rotate", "translate", "scale", "resized_crop", "cutmix", "mixup", "noise")
EXPLODED = 1000.0  # times a term's first value, or 1 where that is less
FINISHED = {
    "agreement_on_transfer_set": "agreement with the teacher on the transfer set",
    "top1": "top-1 on test images",
}
LAG = 0.02  # share of what BatchNorm's averages began with that can spoil all of them
ONE_CLASS, ENOUGH = 0.99, 100  # share of the images that is too much of one class, of so many at least
STEPS_PER_ROUND = 200  # enough for Lightning's own cost not to show, few enough to lose little in a kill


def length(training: Training, images: int) -> tuple[int, int]:
    """The steps of one epoch over so many images, and of the whole training."""
    per_epoch = max(images // training.batch_size, 1)
    return per_epoch, training.epochs * per_epoch if training.steps is None else training.steps


@dataclass
class Task:
    """Everything that a training regime is given: networks, images, losses and options.

    Attributes:
        student: The network to train.
        teacher: The network to learn from, or None.
        source: The images, with the stored answers that regime and objectives need.
        objectives: Losses between the two by name, with their weights.
        training: The options of optimiser, schedule and augmentation.
        seed: The run's seed.
        peers: More networks to train, where a regime has several students.
    """

    student: Classifier
    teacher: Classifier | None
    source: Source
    objectives: Mapping[str, tuple[float, Objective]]
    training: Training
    seed: int
    peers: Sequence[Classifier] = ()


class Regime(Learner):
    """Trains a student by steps of one batch each; rounds are stretches of steps.

    A subclass says in ``needs`` what it asks for (``"teacher"``, which has to be a ``"network"`` or nothing but its
    ``"answers"``; ``"objective"`` where distances are the user's choice; ``"labels"``), has a ``Config`` in its
    file, and gives the loss of a batch in :meth:`loss`. Parameters that the loss does not depend on stay as they are:
    neither momentum nor weight decay changes them.
    """

    kind = "regime"
    needs: ClassVar[tuple[str, ...]] = ()
    unit = "steps"
    mixable: ClassVar[bool] = True  # whether it can learn from images that are mixed of several
    epochs = 0.0  # passes over the images before the step that is being done

    def __init__(self, task: Task, config: Any) -> None:
        super().__init__()
        remembers = any(objective.remembers for _, objective in task.objectives.values())
        if task.training.mixes and (remembers or not self.mixable):
            raise ConfigError(
                "this method or objective is about single images of one class each, not about mixtures",
                "leave out --cutmix and --mixup",
            )
        self.config, self.training_config, self.seed, self.source = config, task.training, task.seed, task.source
        if task.training.memory is not None:  # windows of images lie beside the networks
            self.takes_memory = "--batch-size or --memory"
        self.student = task.student.lay_out()
        self.peers = nn.ModuleList(peer.lay_out() for peer in task.peers)
        self.teacher = None if task.teacher is None else task.teacher.freeze().lay_out()
        self.first: dict[str, float] = {}  # what each term was in its first step
        self.steps_before = 0  # of earlier processes
        self.held_classes: Tensor | None = None  # (N,): what is right for the held-out images, once it was asked for
        self.weights = {name: weight for name, (weight, _) in task.objectives.items()}
        self.losses = {name: objective for name, (_, objective) in task.objectives.items()}
        self.objectives = nn.ModuleDict(self.losses)  # what is trained with the student and saved with its state
        self.train_source, self.held_out = hold_out(
            task.source, task.training.holdout, task.seed, task.training.most_bytes
        )
        for name, objective in self.losses.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(f"images of {name}", task.seed))
                objective.expect(len(self.train_source))
        if task.training.accumulate > (batch := min(task.training.batch_size, len(self.train_source))):
            what = f"--accumulate {task.training.accumulate}: a batch has {batch} images, each pass at least one"
            raise ConfigError(what, "raise --batch-size, or lower --accumulate")
        _, self.steps = length(task.training, len(self.train_source))
        if isinstance(box := self.teacher, BlackBox) and self.queries > (box.ledger.budget or self.queries):
            raise ConfigError(
                f"--queries {box.ledger.budget}: {self.queries:,} images are to be asked about",
                "raise it, or give fewer images (--num-images)",
            )

    @property
    def queries(self) -> int:
        """How many images a black box is asked about at most: by the method, or to measure agreement."""
        return len(self.source)

    @property
    def rounds(self) -> int:  # type: ignore[override]  # which others set
        """One for each stretch of steps."""
        return -(-self.steps // STEPS_PER_ROUND)

    def done(self, rounds: int) -> int:
        return min(rounds * STEPS_PER_ROUND, self.steps)

    @property
    def students(self) -> list[Any]:
        """The student and its peers."""
        return [self.student, *self.peers]

    def models(self) -> Mapping[str, Classifier]:
        """What is trained: the student, and its peers, each to be written under its name."""
        return {"student": self.student, **{f"peer-{i}": peer for i, peer in enumerate(self.students[1:], 1)}}

    def made(self) -> Mapping[str, Source]:
        """Sets of images that the training leaves, each to be written under its name. None by default."""
        return {}

    def batched(self, source: Source) -> Batches:
        """The batches of a source, on this process's device."""
        c = self.training_config
        return Batches(source, c.batch_size, self.seed, self.device, c.most_bytes)

    def held_parts(self) -> Iterator[Images]:
        """The held-out images on this process's device, no more at once than a pass of a step learns from."""
        return (part.to(self.device) for part in self.held.split(self.training_config.at_once))

    def parts(self, images: Images) -> list[Images]:
        """A batch as its passes see it: always so many parts, of sizes that differ by one at most."""
        passes, count = self.training_config.accumulate, len(images.pixels)
        return [images[count * index // passes : count * (index + 1) // passes] for index in range(passes)]

    def draw(self, start: int, stop: int) -> Iterator[Images]:
        """The batches of steps ``start`` to ``stop``."""
        return self.batches.steps(start, stop)

    def span(self, step: int) -> tuple[int, int]:
        """The first step of the training that a step is of, and the one after its last: there may be several."""
        return 0, self.steps

    def passed(self, step: int) -> float:
        """The epochs of its training before a step."""
        return step / self.batches.steps_per_epoch

    def view(self, images: Images) -> Images:
        """What is learned from a batch: images changed at random, and mixed with each other where that is wanted.

        Torch's random state is already seeded for it.
        """
        return self.mix(images.changed(self.augment(images.pixels)))

    @abstractmethod
    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, weighted and summed, and its unweighted terms for the log."""

    def expected(self, images: Images) -> Tensor:
        """The class (B,) that the student should give to each held-out image, by default its label. Asked for once."""
        return images.true_labels

    def concern(self, measures: Mapping[str, float]) -> str | None:
        """A loss that has exploded; or, of the finished network, answers hardly above chance or to one class alone."""
        for name in measures.keys() & self.first.keys():
            if measures[name] > EXPLODED * max(self.first[name], 1):
                return f"{name} was {self.first[name]:.2g} and has exploded to {measures[name]:.2g}: lower --lr"
        chance = 1 / self.student.info.num_classes
        for name in measures.keys() & FINISHED.keys():
            if measures[name] < 0.1 + 0.9 * chance:
                how = "hardly" if measures[name] > chance else "not"
                what = f"{measures[name]:.2%} {FINISHED[name]} is {how} above chance ({chance:.2%})"
                return f"{what}: {self.advice}"
        most = measures.get("largest_class_of_transfer_set", 0.0)
        if most > ONE_CLASS and len(self.source) >= ENOUGH:
            return (
                f"to the teacher {most:.2%} of the images are of one class: they teach little, agreement means little"
            )
        return None

    @property
    def advice(self) -> str:
        """What to change where nothing was learned."""
        if self.losses and not any(self.weights[name] and loss.of_answers for name, loss in self.losses.items()):
            return "the head learned nothing: add --objective response"
        for layer in self.student.batch_norms():
            momentum, count = getattr(layer, "momentum", None), getattr(layer, "num_batches_tracked", None)
            kept = 0 if momentum is None or count is None else (1 - momentum) ** int(count)
            if kept > LAG:
                what = (
                    f"averages of its BatchNorm layers, which move by {momentum:g} a step, are {kept:.0%} as they began"
                )
                return f"{what}: train for longer (--epochs, --steps), or raise their momentum"
        c = self.training_config
        on = {name.replace("_", "-"): value for name, value in vars(c).items() if name in CHANGES and value}
        changes = [f"--{name} {value:g}" for name, value in on.items()]
        less = f"change the images less than by {' '.join(changes)}, " if changes else ""
        return f"{less}train for longer (--epochs, --steps), or try another --lr"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["first"] = self.first

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Later rounds are compared with the first one."""
        self.first, self.steps_before = checkpoint.get("first", {}), checkpoint["global_step"]

    def after_step(self) -> None:
        """What else happens after each step of the student. Nothing by default."""

    measure: ClassVar[str] = "accuracy"  # what the share of held-out images with the expected class is called

    def configure_optimizers(self) -> Any:
        """The student's optimiser, and a learning rate that rises, and then falls along a cosine or in steps."""
        c = self.training_config
        trained = [*self.students, self.objectives]
        parameters = [parameter for net in trained for parameter in net.parameters() if parameter.requires_grad]
        if c.optimizer == "sgd":
            nesterov = c.nesterov and c.momentum > 0
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, c.lr, momentum=c.momentum, weight_decay=c.weight_decay, nesterov=nesterov
            )
        else:
            cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[c.optimizer]
            optimizer = cls(parameters, c.lr, weight_decay=c.weight_decay, fused=fusible(parameters))
        return [optimizer], [self.schedule(optimizer, *self.span(max(self.steps_before - 1, 0)))]

    def schedule(self, optimizer: torch.optim.Optimizer, start: int, stop: int) -> LRScheduler:
        """The learning rates of a training from its first step to the one after its last."""
        c, steps = self.training_config, stop - start
        warmup = min(int(c.warmup * steps), steps - 1)
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        if c.schedule == "constant":
            return rise
        if c.schedule == "step":
            milestones = [round(share * steps) for share in c.milestones]
            return ChainedScheduler([rise, MultiStepLR(optimizer, milestones, c.gamma)])
        fall = CosineAnnealingLR(optimizer, T_max=steps - warmup)
        # Older versions of PyTorch begin with the first of a sequence even where the second begins at once.
        return SequentialLR(optimizer, [rise, fall], milestones=[warmup]) if warmup else fall

    def on_fit_start(self) -> None:
        """Get the batches ready on this process's device."""
        self.augment = pipeline(self.training_config, self.student.background(self.training_config.fill))
        self.mix = Mixing(self.training_config.cutmix, self.training_config.mixup, self.student.info.num_classes)
        self.batches = self.batched(self.train_source)
        if self.held_out is not None:
            self.held = self.held_out.all().each(Tensor.cpu)  # as they are stored, until they are shown

    def on_train_start(self) -> None:
        """Check that passes of all processes have images enough for the student, each its share of a batch."""
        passes = self.trainer.world_size * self.training_config.accumulate
        if (share := self.batches.batch_size // passes) < 1:
            what = f"a batch of {self.batches.batch_size} images has none for some of the {passes} passes of a step"
            raise ConfigError(what, "raise --batch-size, or lower --accumulate")
        self.require_images(share)

    def require_images(self, count: int) -> None:
        """Refuse networks that cannot be trained on so few images at once as one."""
        for student in self.students if count < 2 else ():
            info = student.info
            require_training(student.net, info.spec, info.num_classes, info.input_size, count)

    def round(self, index: int) -> Mapping[str, Tensor]:
        """A stretch of optimiser steps. Logs each term's mean over the steps that had it, and the held-out measure."""
        start, stop = index * STEPS_PER_ROUND, min((index + 1) * STEPS_PER_ROUND, self.steps)
        sums: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        for student in self.students:
            student.train()
        for step, images in enumerate(self.draw(start, stop), start):
            terms = self._step(step, images)
            self.first |= {name: float(term) for name, term in terms.items() if name not in self.first}
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term
            counts.update(terms.keys())
        means = {name: total / counts[name] for name, total in sums.items()}
        if self.held_out is not None:
            means[self.measure] = self._measure()
        return means

    def _step(self, step: int, images: Images) -> dict[str, Tensor]:
        """One step of the optimiser, on a batch. Returns the unweighted terms."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        seed_torch(self.device, "step", self.seed, step, self.global_rank)
        images = images[self.global_rank :: self.trainer.world_size]  # processes share each batch
        self.epochs = self.passed(step)
        images = self.view(images)
        start, stop = self.span(step)
        for objective in self.losses.values():
            objective.epoch, objective.progress = int(self.epochs), (step - start) / (stop - start)
        optimizer.zero_grad()  # to None: zeros would leave what has no gradient to weight decay and old momentum
        terms: dict[str, Tensor] = {}
        for part in self.parts(images):
            loss, found = self.loss(part)
            share = len(part.pixels) / len(images.pixels)
            self.manual_backward(loss * share if share < 1 else loss)
            for name, term in found.items():
                terms[name] = terms.get(name, 0) + share * term.detach()
        optimizer.step()
        schedule.step()
        self.after_step()
        for objective in self.losses.values():
            objective.after_step()
        return terms

    @torch.no_grad()
    def _measure(self) -> Tensor:
        self.student.eval()
        if self.held_classes is None:
            self.held_classes = torch.cat([self.expected(part) for part in self.held_parts()])
        answers = torch.cat([self.student(part.pixels).argmax(1) for part in self.held_parts()])
        return (answers == self.held_classes).float().mean()

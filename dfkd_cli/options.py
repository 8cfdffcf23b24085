"""Options that several methods or commands share, in groups. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from typing import Literal

from dfkd_cli.config import option
from dfkd_cli.errors import ConfigError

MOST_THREADS = 4096
TAPS = "features: stage1 ..., stages, last, penultimate, logits, a module's path"


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Changes to training images; random ones are drawn anew for every image of every batch."""

    rotate: float = option(0.0, "random rotation, +- degrees", low=0, high=180)
    translate: float = option(0.0, "random shift, +- fraction of the side", low=0, high=1)
    scale: float = option(0.0, "random zoom, +- fraction: 0.1 zooms by 0.9 to 1.1", low=0, high=0.9)
    flip: bool = option(False, "mirror left-right with probability 1/2")
    crop: int = option(0, "random crop after padding by this many pixels on each side", low=0, high=2**13)
    noise: float = option(0.0, "Gaussian noise, standard deviation in pixel units", low=0)
    resized_crop: float = option(
        0.0, "enlarge a random window with at least this share of the area, up to all; 0: none", low=0, high=1
    )
    saturate: bool = option(False, "cut pixels to [0,1] before all other changes, as an image file would")
    fill: Literal["black", "mean"] = option("black", "what comes in from outside the image; mean: the model's")


MOST_IMAGES = 10**8  # of one set
MEASURED_AT_ONCE = 16, 500  # images, at least and at most


def measured_at_once(learned: int) -> int:
    """Images of a pass that only measures, where so many are of one that learns: no more, so that there is room.

    It keeps no activations for a backward pass, so that there is room for a few in any case.
    """
    least, most = MEASURED_AT_ONCE
    return min(max(learned, least), most)


@dataclass(frozen=True, kw_only=True)
class Training(Augmentation):
    """How a network is trained: any teacher, any student."""

    epochs: int = option(100, "passes over the images", low=1, rehearsal=1)
    steps: int | None = option(
        None, "optimiser steps, instead of --epochs; 0 only calibrates a copy with few bits", low=0, rehearsal=1
    )
    batch_size: int = option(128, "images per step", low=1, rehearsal=2)
    optimizer: Literal["adam", "adamw", "sgd"] = option("adam", "optimiser")
    lr: float = option(4e-3, "peak learning rate", above=0)
    momentum: float = option(0.9, "momentum of sgd", low=0, high=1)
    nesterov: bool = option(True, "Nesterov's momentum, of sgd")
    weight_decay: float = option(0.0, "weight decay", low=0)
    warmup: float = option(0.05, "share of the steps with rising learning rate", low=0, high=1)
    schedule: Literal["cosine", "step", "constant"] = option("cosine", "learning rate after the warm-up")
    milestones: tuple[float, ...] = option((0.5, 0.75), "shares of all steps after which a step falls", low=0, high=1)
    gamma: float = option(0.1, "what the learning rate is multiplied by at each milestone", above=0, high=1)
    cutmix: float = option(0.0, "a, of Beta(a, a): a window of each image is of another, CutMix; 0: none", low=0)
    mixup: float = option(0.0, "a, of Beta(a, a): each image is blended with another, MixUp; 0: none", low=0)
    accumulate: int = option(
        1,
        "passes that share one step: each sees a part of its images, as does BatchNorm; for large images",
        low=1,
        rehearsal=1,
    )
    memory: float | None = option(
        None,
        "GiB of images held at once on the device, one shard at least, and in main memory of those held out; of a "
        "larger set half of that is learned from while the other half is read (default: 0.5, of a GPU an eighth, and "
        "nothing is read meanwhile)",
        above=0,
    )
    holdout: float = option(0.0, "share of the images that only measures", low=0, high=0.5)
    batch_norm: Literal["auto", "free", "frozen"] = option(
        "auto", "what BatchNorm knows of its inputs; auto: frozen where a copy's images are far from that, else free"
    )
    snapshots: int = option(0, "keep the weights of so many evenly spaced rounds, for a look back", low=0)

    @property
    def most_bytes(self) -> int | None:
        """``memory`` in bytes; None where it is not given."""
        return None if self.memory is None else round(self.memory * 2**30)

    @property
    def at_once(self) -> int:
        """Images of a pass that only measures."""
        return measured_at_once(-(-self.batch_size // self.accumulate))

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return bool(self.cutmix or self.mixup)


@dataclass(frozen=True, kw_only=True)
class TaughtAtFirst:
    """How long a teacher teaches."""

    teacher_epochs: int | None = option(
        None, "epochs in which the teacher teaches; then labels do, or its classes (default: all)", low=0
    )
    fade: bool = option(
        False, "over these epochs the teacher's share falls from all to nothing, and labels have the rest"
    )

    def __post_init__(self) -> None:
        if self.fade and self.teacher_epochs is None:
            raise ConfigError("--fade: over how many epochs?", "give --teacher-epochs, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Assisted(TaughtAtFirst):
    """Which networks learn from the teacher before the student does."""

    def through(self, student: str) -> tuple[str, ...]:
        """The SPECs of the networks between the teacher and a student of that SPEC."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Several:
    """Which networks learn together."""

    students: tuple[str, ...] | None = option(
        None, "model SPECs; the first is written as the student, instead of --student (default: that one twice)"
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What losses between the logits share."""

    temperature: float = option(4.0, "softmax temperature", above=0)
    standardise: bool = option(False, "z-scores of each image's logits instead of the logits (arXiv:2403.01427)")
    hard: float = option(0.0, "weight of the true labels; the teacher's own where the set has none", low=0)
    label_smoothing: float = option(0.0, "share of the hard label spread over all classes", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Rising:
    """What losses share that grow into their weight: with strength ``min(e / ramp, 1)`` in epoch e, counted from 1."""

    ramp: int = option(20, "epochs over which the objective rises to its weight; 1 for none", low=1)


@dataclass(frozen=True, kw_only=True)
class Preceding:
    """What losses share that are learned before all others: alone, and then no more."""

    pretraining: int = option(30, "epochs in which only this is learned; 0: all the time, beside the rest", low=0)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What losses between features share."""

    taps: tuple[str, ...] = option(("stages",), TAPS)
    teacher_taps: tuple[str, ...] | None = option(None, "the teacher's, in the same order (default: the same names)")


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """How many images there are, by the class."""

    images_per_class: int = option(
        0,
        "so many images of each class, which take turns, instead of a number of images; 0: off",
        low=0,
        rehearsal=0,
    )


@dataclass(frozen=True, kw_only=True)
class Limited:
    """How long the work may take."""

    deadline: str | None = option(
        None, "end after so much time, such as 90s, 30m or 2h, with the images that are made by then", volatile=True
    )

    def __post_init__(self) -> None:
        """A time has a unit."""
        if self.deadline is not None and not re.fullmatch(r"\d{1,6}(\.\d+)?[smhd]", self.deadline):
            raise ConfigError(f"--deadline {self.deadline}: not a time", "give a number and s, m, h or d, such as 30m")

    @property
    def seconds(self) -> float | None:
        """The time, None without a limit."""
        if self.deadline is None:
            return None
        return float(self.deadline[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[self.deadline[-1]]


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """What a foreign teacher's file does not say."""

    weights: str | None = option(None, "weights of a foreign teacher: a file of PyTorch or safetensors", parent=True)
    weights_key: str | None = option(None, "where in it they are, such as ema (default: where most of them fits)")
    input_size: tuple[int, int, int] | None = option(None, "its channels, height and width", low=1)
    mean: tuple[float, ...] | None = option(
        None, "mean per channel that pixels in [0,1] are normalised with (default: 0)"
    )
    std: tuple[float, ...] | None = option(None, "standard deviation per channel (default: 1)", above=0)
    num_classes: int | None = option(None, "its number of classes", low=1)


FOREIGN = tuple(field.name for field in fields(ForeignModel))


@dataclass(frozen=True, kw_only=True)
class SeenTeacher(ForeignModel):
    """A teacher, and what is seen of it."""

    answers: str = option(
        "network", "what is seen of the teacher: the network, or of a black box probabilities, topN (top5) or label"
    )

    def __post_init__(self) -> None:
        """Answers have names."""
        if not re.fullmatch(r"network|probabilities|label|top[1-9]\d{0,5}", self.answers):
            raise ConfigError(f"--answers {self.answers}: unknown", "choose from: network, probabilities, topN, label")

    @property
    def only_asked(self) -> bool:
        """Whether it is a black box."""
        return self.answers != "network"


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a command runs: flags that every command has."""

    out: str | None = option(None, "directory to write", volatile=True)
    overwrite: bool = option(False, "replace what is there", volatile=True, typed=True)
    seed: int = option(0, "seed of everything random", low=0, high=2**63 - 1)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "device", volatile=True)
    devices: int = option(1, "number of devices (processes)", low=1, volatile=True)
    num_nodes: int = option(1, "machines that share the run, and see the same --out", low=1, volatile=True)
    threads: int | None = option(
        None,
        "CPU threads of each process (default: as many as the run began with; OMP_NUM_THREADS, or all cores)",
        low=1,
        high=MOST_THREADS,
        volatile=True,
    )
    precision: Literal["32", "bf16", "16"] = option("32", "arithmetic; bf16 pays on GPUs, and on CPUs with AMX")
    logger: Literal["csv", "tensorboard"] = option(
        "csv", "curves: metrics.csv alone, or also tensorboard", volatile=True
    )
    allow_code: bool = option(False, "run the Python file or module that an artifact names", volatile=True, typed=True)
    code_dir: str | None = option(
        None, "where those files lie (default: in the artifact, beside it, or here)", volatile=True, typed=True
    )

    def __post_init__(self) -> None:
        """An output has a name, in which ``~`` is the user's home wherever it was written."""
        if self.out == "":
            raise ConfigError("--out: no directory has an empty name", "give one, or leave it out")
        if self.out is not None:
            object.__setattr__(self, "out", os.path.expanduser(self.out))

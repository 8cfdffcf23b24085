"""Options that several methods or commands share, in groups. Nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from dfkd_cli.config import option
from dfkd_cli.errors import ConfigError

TAPS = "features: stage1 ..., stages, last, penultimate, logits, a module's path"
StudentOptimizer = Literal["adam", "sgd"]
RateSchedule = Literal["constant", "cosine", "student"]
GeneratorEnd = Literal["tanh", "normal", "sigmoid"]
StudentImages = Literal["same", "updated", "new"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Changes to training images; random ones are drawn anew for every image of every batch."""

    rotate: float = option(0.0, "random rotation, +- degrees", low=0, high=180)
    translate: float = option(0.0, "random shift, +- fraction of the side", low=0, high=1)
    scale: float = option(0.0, "random zoom, +- fraction: 0.1 zooms by 0.9 to 1.1", low=0, high=0.9)
    flip: bool = option(False, "mirror left-right with probability 1/2")
    crop: int = option(0, "random crop after padding by this many pixels on each side", low=0)
    noise: float = option(0.0, "Gaussian noise, standard deviation in pixel units", low=0)
    resized_crop: float = option(
        0.0, "enlarge a random window with at least this share of the area, up to all; 0: none", low=0, high=1
    )
    saturate: bool = option(False, "cut pixels to [0,1] before all other changes, as an image file would")
    fill: Literal["black", "mean"] = option("black", "what comes in from outside the image; mean: the model's")


MOST_IMAGES = 10**8  # of one set


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
    holdout: float = option(0.0, "share of the images that only measures", low=0, high=0.5)
    batch_norm: Literal["auto", "free", "frozen"] = option(
        "auto", "what BatchNorm knows of its inputs; auto: frozen where a copy's images are far from that, else free"
    )
    snapshots: int = option(0, "keep the weights of so many evenly spaced rounds, for a look back", low=0)

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
class Shards:
    """How images are cut into shards and stored."""

    batch_size: int = option(1000, "images of one shard", low=1, rehearsal=2)
    dtype: Literal["float16", "float32"] = option("float16", "stored pixels")


@dataclass(frozen=True, kw_only=True)
class ImageOptimization(Shards):
    """How a batch of images is optimised through a frozen teacher. One batch is one round is one shard."""

    batch_size: int = option(200, "images optimised together; also the images of one shard")
    iterations: int = option(50, "inner steps on one batch of images", low=1, rehearsal=1)
    lr: float = option(0.1, "Adam learning rate on the pixels", above=0)
    clamp: bool = option(False, "keep pixels in [0,1] after each inner step")


@dataclass(frozen=True, kw_only=True)
class CoarseToFine(ImageOptimization):
    """The same at one resolution after the other. A network that takes no other sides sees larger pixels."""

    coarse_iterations: int = option(0, "inner steps before these, at half the resolution", low=0, rehearsal=1)


@dataclass(frozen=True, kw_only=True)
class Inversion(CoarseToFine):
    """How DeepDream and DeepInversion optimise images, as the teacher's ``net`` takes them, and their image priors."""

    batch_size: int = 256
    iterations: int = 2000
    lr: float = option(0.05, "Adam learning rate on the normalised pixels")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's betas, below 1", low=0, high=0.99999)
    warmup: int = option(0, "inner steps with rising learning rate, at each resolution", low=0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after the warm-up")
    jitter: int = option(2, "roll the batch by up to so many pixels on both axes, anew in each inner step", low=0)
    view_flip: bool = option(False, "mirror each image with probability 1/2 in each inner step")
    temperature: float = option(1.0, "softmax temperature of the teacher", above=0)
    cross_entropy: float = option(1.0, "weight of the cross-entropy with the class", low=0)
    total_variation: float = option(2.5e-5, "weight of a smoothness prior, norms of neighbour differences", low=0)
    total_variation_l1: float = option(0.0, "weight of a smoothness prior, mean absolute differences", low=0)
    l2: float = option(0.0, "weight of the images' mean norm", low=0)


@dataclass(frozen=True, kw_only=True)
class StatisticsInversion(Inversion):
    """How DeepInversion looks at the teacher's BatchNorm layers."""

    statistics: float = option(10.0, "weight of the distance to the BatchNorm statistics", low=0)
    first_layer: float = option(1.0, "weight of the first BatchNorm layer among them; the others have 1", low=0)


@dataclass(frozen=True, kw_only=True)
class SmoothInversion(CoarseToFine):
    """How The Knowledge Within optimises images of one class each, as the teacher's ``net`` takes them."""

    lr: float = option(0.3, "Adam learning rate on the normalised pixels")
    temperature: float = option(1.0, "softmax temperature of the teacher", above=0)
    cross_entropy: float = option(1.0, "weight of the cross-entropy with the class", low=0)
    smoothness: float = option(1e-3, "weight of a smoothness prior, squared distance to the blurred image", low=0)
    blur: float = option(1.0, "standard deviation of that Gaussian blur, pixels", above=0)


@dataclass(frozen=True, kw_only=True)
class CoTraining(Augmentation):
    """How a student is trained in the loop. The random changes are those of the images that it is trained on."""

    student_optimizer: StudentOptimizer = option("sgd", "the student's optimiser; sgd with momentum 0.9")
    student_lr: float = option(0.1, "the student's first learning rate", above=0)
    student_weight_decay: float = option(1e-4, "the student's weight decay", low=0)
    clip: float = option(
        0.0,
        "limit of the norm of the students' gradient, and of that of generators trained in turns with them; 0: none",
        low=0,
    )
    soft: float = option(1.0, "weight of the student's distance from the teacher's answers", low=0)


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining(CoTraining):
    """How a generator and a student are trained in turns."""

    steps: int = option(
        10_000, "iterations, each of which trains the generator and then the student", low=1, rehearsal=1
    )
    batch_size: int = option(256, "images of one step; also the images of one shard", low=2, rehearsal=2)
    latent: int = option(100, "numbers that the generator makes an image from", low=1)
    lr: float = option(1e-3, "the generator's Adam learning rate", above=0)
    betas: tuple[float, float] = option((0.9, 0.999), "the generator's Adam betas, below 1", low=0, high=0.99999)
    schedule: RateSchedule = option("cosine", "learning rates: all stay, all fall to 0, only the student's falls")
    width: float = option(1.0, "the generator's numbers of maps, times this", above=0)
    end: GeneratorEnd = option(
        "tanh", "how the generator ends: tanh and BatchNorm, BatchNorm with scale, or within [0,1]"
    )
    generators: int = option(1, "generators, which share the images of a step; all are written", low=1, rehearsal=2)
    students: int = option(1, "students; all but the first only stand against the generators", low=1, rehearsal=2)
    student_steps: int = option(1, "steps of the student in each iteration", low=1, rehearsal=1)
    student_images: StudentImages = option(
        "new", "the student's images: the generator's own, of the same latents after its step, new in every step"
    )
    dtype: Literal["float16", "float32"] = option("float16", "stored pixels")

    def __post_init__(self) -> None:
        """Every generator needs an image."""
        if self.generators > self.batch_size:
            raise ConfigError(
                f"--generators {self.generators}: more than the {self.batch_size} images of a step",
                "give fewer, or a larger --batch-size",
            )


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(GeneratorTraining):
    """How generators are trained against students."""

    adversarial: float = option(1.0, "weight of the students' distance, which the generators make large", low=0)


@dataclass(frozen=True, kw_only=True)
class PoolTraining(CoTraining):
    """How a student is trained on the pool of all images made so far."""

    student_steps: int = option(400, "steps of the student after each batch of images", low=0, rehearsal=1)
    student_batch_size: int = option(128, "images of one step of the student", low=2, rehearsal=2)
    student_temperature: float = option(20.0, "softmax temperature of the student's loss", above=0)
    warmup_share: float = option(
        0.0, "share of the rounds, at the start, that only make images: the student rests", low=0, high=1
    )


@dataclass(frozen=True, kw_only=True)
class PooledGeneration(PoolTraining):
    """How a generator makes the pool: for each batch of images it is trained for a few steps through the teacher."""

    batch_size: int = option(256, "images made together; also the images of one shard", low=2, rehearsal=2)
    iterations: int = option(200, "inner steps on one batch of images", low=1, rehearsal=1)
    lr: float = option(1e-3, "Adam learning rate of the generator", above=0)
    betas: tuple[float, float] = option((0.5, 0.999), "Adam's betas, below 1", low=0, high=0.99999)
    latent: int = option(256, "numbers that the generator makes an image from", low=1)
    width: float = option(1.0, "multiplies the generator's maps", above=0)
    view_crop: int = option(
        4, "networks see generated images cropped at random, after padding by so many pixels", low=0
    )
    view_flip: bool = option(True, "networks see generated images mirrored with probability 1/2")
    crop: int = option(4, "random crop of the student's images after padding by so many pixels")
    flip: bool = option(True, "mirror the student's images with probability 1/2")
    cross_entropy: float = option(1.0, "weight of the cross-entropy with the class", low=0)
    statistics: float = option(1.0, "weight of the distance to the BatchNorm statistics", low=0)
    statistics_momentum: float = option(0.0, "share of former batches in the statistics", low=0, high=1)
    adversarial: float = option(0.5, "weight of the disagreement with the student that is sought", low=0)
    dtype: Literal["float16", "float32"] = option("float16", "stored pixels")


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
        "so many times the classes, which take turns, instead of a number of images; 0: off",
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

    weights: str | None = option(None, "weights of a foreign teacher: a file of PyTorch or safetensors")
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
    overwrite: bool = option(False, "replace what --out holds", volatile=True, typed=True)
    seed: int = option(0, "seed of everything random", low=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "device", volatile=True)
    devices: int = option(1, "number of devices (processes)", low=1, volatile=True)
    num_nodes: int = option(1, "machines that share the run, and see the same --out", low=1, volatile=True)
    threads: int | None = option(
        None,
        "CPU threads of each process (default: as many as the run began with; OMP_NUM_THREADS, or all cores)",
        low=1,
        volatile=True,
    )
    precision: Literal["32", "bf16", "16"] = option("32", "arithmetic")
    logger: Literal["csv", "tensorboard"] = option(
        "csv", "curves: metrics.csv alone, or also tensorboard", volatile=True
    )
    allow_code: bool = option(False, "run the Python file or module that an artifact names", volatile=True, typed=True)
    code_dir: str | None = option(
        None, "where those files lie (default: in the artifact, beside it, or here)", volatile=True, typed=True
    )

"""Options that several synthesizers share, in groups: how images are made, and cut into shards. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfkd_cli.config import option
from dfkd_cli.errors import ConfigError
from dfkd_cli.options import Augmentation

StudentOptimizer = Literal["adam", "sgd"]
RateSchedule = Literal["constant", "cosine", "student"]
GeneratorEnd = Literal["tanh", "normal", "sigmoid"]
StudentImages = Literal["same", "updated", "new"]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How images are cut into shards and stored."""

    batch_size: int = option(1000, "images of one shard", low=1, rehearsal=2)
    dtype: Literal["float16", "float32", "uint8"] = option(
        "float16", "stored pixels; uint8: 256 levels from 0 to 1, and what that changes for the teacher is said"
    )

    @property
    def of_a_shard(self) -> int:
        """The images of one shard."""
        return self.batch_size

    @property
    def unbounded(self) -> str | None:
        """What would keep pixels in [0,1]; None where something does."""
        return None

    def __post_init__(self) -> None:
        """What leaves the range of a type is found before it is made."""
        if self.dtype == "uint8" and self.unbounded is not None:
            raise ConfigError("--dtype uint8: pixels may leave [0,1]", self.unbounded)


@dataclass(frozen=True, kw_only=True)
class ShardsOfBatches(Shards):
    """How batches are put into shards. What is in them does not depend on that."""

    batch_size: int = option(200, "images made together")
    shard_size: int = option(0, "images of one shard, a multiple of the batch; 0: one batch", low=0, rehearsal=0)

    @property
    def of_a_shard(self) -> int:
        return self.shard_size or self.batch_size

    def __post_init__(self) -> None:
        """A batch is in one shard."""
        super().__post_init__()
        if self.shard_size % self.batch_size:
            what = f"--shard-size {self.shard_size}: no multiple of the {self.batch_size} images of a batch"
            raise ConfigError(what, f"give {-(-self.shard_size // self.batch_size) * self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class ImageOptimization(ShardsOfBatches):
    """How a batch of images is optimised through a frozen teacher. One shard is one round."""

    batch_size: int = option(200, "images optimised together")
    iterations: int = option(50, "inner steps on one batch of images", low=1, rehearsal=1)
    lr: float = option(0.1, "Adam learning rate on the pixels", above=0)
    clamp: bool = option(False, "keep pixels in [0,1] after each inner step")
    jitter: int = option(0, "roll the batch by up to so many pixels on both axes, anew in each inner step", low=0)
    view_flip: bool = option(False, "mirror each image with probability 1/2 in each inner step")
    soften: float = option(
        0.0, "blur the images now and then: standard deviation of the Gaussian, pixels (arXiv:1506.06579)", low=0
    )
    soften_every: int = option(4, "inner steps from one of these blurs to the next", low=1)

    @property
    def unbounded(self) -> str | None:
        return None if self.clamp else "give --clamp, or another --dtype"


@dataclass(frozen=True, kw_only=True)
class CoarseToFine(ImageOptimization):
    """The same at one resolution after the other. A network that takes no other sides sees larger pixels."""

    coarse_iterations: int = option(0, "inner steps before these, at half the resolution", low=0, rehearsal=1)


@dataclass(frozen=True, kw_only=True)
class Inversion(CoarseToFine):
    """How DeepDream and those after it optimise images, as the teacher's ``net`` takes them, and their priors."""

    batch_size: int = 256
    iterations: int = 2000
    lr: float = option(0.05, "Adam learning rate on the normalised pixels")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's betas, below 1", low=0, high=0.99999)
    warmup: int = option(0, "inner steps with rising learning rate, at each resolution", low=0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after the warm-up")
    jitter: int = 2
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
class GeneratorTraining(CoTraining, ShardsOfBatches):
    """How a generator and a student are trained in turns."""

    steps: int = option(
        10_000, "iterations, each of which trains the generator and then the student", low=1, rehearsal=1
    )
    batch_size: int = option(256, "images of one step", low=2)
    latent: int = option(100, "numbers that the generator makes an image from", low=1)
    lr: float = option(1e-3, "the generator's Adam learning rate", above=0)
    betas: tuple[float, float] = option((0.9, 0.999), "the generator's Adam betas, below 1", low=0, high=0.99999)
    schedule: RateSchedule = option("cosine", "learning rates: all stay, all fall to 0, only the student's falls")
    width: float = option(1.0, "the generator's numbers of maps, times this", low=1e-6, high=1000)
    end: GeneratorEnd = option(
        "tanh", "how the generator ends: tanh and BatchNorm, BatchNorm with scale, or within [0,1]"
    )
    generators: int = option(
        1, "generators, which share the images of a step; all are written", low=1, high=1000, rehearsal=2
    )
    students: int = option(1, "students; all but the first only stand against the generators", low=1, rehearsal=2)
    student_steps: int = option(1, "steps of the student in each iteration", low=1, rehearsal=1)
    student_images: StudentImages = option(
        "new", "the student's images: the generator's own, of the same latents after its step, new in every step"
    )

    @property
    def unbounded(self) -> str | None:
        return None if self.end == "sigmoid" else "give --end sigmoid, or another --dtype"

    def __post_init__(self) -> None:
        """Every generator needs an image."""
        super().__post_init__()
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
class PooledGeneration(PoolTraining, Shards):
    """How a generator makes the pool: for each batch of images it is trained for a few steps through the teacher."""

    batch_size: int = option(256, "images made together; also the images of one shard", low=2, rehearsal=2)
    iterations: int = option(200, "inner steps on one batch of images", low=1, rehearsal=1)
    lr: float = option(1e-3, "Adam learning rate of the generator", above=0)
    betas: tuple[float, float] = option((0.5, 0.999), "Adam's betas, below 1", low=0, high=0.99999)
    latent: int = option(256, "numbers that the generator makes an image from", low=1)
    width: float = option(1.0, "multiplies the generator's maps", low=1e-6, high=1000)
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

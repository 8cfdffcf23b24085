"""The generator of the papers on generator-based synthesis: latent vectors to images of any size.

A linear layer to 128 maps of a quarter of the sides, then two times nearest-neighbour upsampling and a 3x3 convolution,
and one convolution to the image's channels. Larger images are doubled as often as it takes to start from at most 16
pixels: four times for 224, as in the ImageNet experiments of arXiv:2112.06253. It is the generator of DAFL
(arXiv:1904.01186), of zero-shot transfer (arXiv:1905.09768), of DFAD (arXiv:1912.11006) and of CMI (arXiv:2105.08584),
which differ in how it ends. Where a method trains a generator throughout, ``end`` may be another:

    tanh        tanh, then BatchNorm without scale: what the teacher's ``net`` takes           DAFL, DFAD
    normal      BatchNorm with scale: what the teacher's ``net`` takes                          zero-shot transfer
    sigmoid     pixels in [0,1], convolutions without bias                                      CMI and its successors

The last starts at grey in the papers' code, whose images are about as bright. Here it starts at the mean that the
teacher normalises with: on digits, sixty inner steps from grey end farther from the teacher's BatchNorm statistics than
ten from there. The mean 0 of a teacher that takes pixels as they are says nothing: that starts at grey too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from dfkd_cli.artifacts.files import digest, write_json
from dfkd_cli.artifacts.integrity import intact
from dfkd_cli.artifacts.records import Between, Count, Hashed, read_json
from dfkd_cli.models.classifier import ModelInfo
from dfkd_cli.models.directory import Input, read_info, save_weights
from dfkd_cli.models.weights import load_weights
from dfkd_cli.synthesis_options import GeneratorEnd

WIDTHS = (128, 128, 64)  # maps at the start and after each doubling, the last one for all further ones
LARGEST_START = 16  # pixels
RECORD = "generator.json"
WEIGHTS = "generator.safetensors"
FILES = RECORD, WEIGHTS
SCHEMA = 3


class Settings(TypedDict):
    """What :class:`Generators` takes beside the input of the teacher."""

    latent: Annotated[int, Between(1, 10**6)]
    end: GeneratorEnd
    width: Annotated[float, Between(1e-6, 1000)]
    epsilon: float
    count: Annotated[int, Between(1, 1000)]


class Training(TypedDict):
    """How they were trained."""

    batch_size: Annotated[int, Between(1, 10**6)]


class Provenance(TypedDict):
    """Where they come from."""

    teacher: str
    num_images: Count
    config: Training


class GeneratorRecord(TypedDict):
    """``generator.json``."""

    schema: Literal[3]
    kind: Literal["generator"]
    settings: Settings
    teacher_input: Input
    weights: Hashed
    provenance: Provenance


class Generator(nn.Module):
    """Latents (B, D) to images (B, C, H, W) of the size that a teacher takes, in pixel space.

    Args:
        info: Of the teacher: its input's size and normalisation.
        latent: D.
        end: How it ends.
        width: Multiplies the numbers of maps.
        epsilon: Of the BatchNorm layers after the inner convolutions. DAFL's code has 0.8 there, where it seems to have
            meant the momentum.
    """

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1)
    offset: Tensor  # (1, C, 1, 1), added before the sigmoid

    def __init__(
        self, info: ModelInfo, latent: int, end: GeneratorEnd, width: float = 1.0, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.info, self.latent, self.end = info, latent, end
        channels, *sides = info.input_size
        doublings = max(2, math.ceil(math.log2(max(sides) / LARGEST_START)))
        start, *sizes = [tuple(-(-side // 2**i) for side in sides) for i in range(doublings, -1, -1)]
        widths = [max(1, round(width * maps)) for maps in (*WIDTHS, *WIDTHS[-1:] * (doublings - 2))]
        self.linear = nn.Linear(latent, widths[0] * math.prod(start))
        layers: list[nn.Module] = [nn.Unflatten(1, (widths[0], *start)), nn.BatchNorm2d(widths[0])]
        for size, (before, after) in zip(sizes, itertools.pairwise(widths), strict=True):
            layers += [
                nn.Upsample(size=size),
                nn.Conv2d(before, after, 3, padding=1, bias=end != "sigmoid"),
                nn.BatchNorm2d(after, epsilon),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1))
        ends: dict[GeneratorEnd, list[nn.Module]] = {
            "tanh": [nn.Tanh(), nn.BatchNorm2d(channels, affine=False)],
            "normal": [nn.BatchNorm2d(channels)],
            "sigmoid": [],
        }
        self.finish = nn.Sequential(*ends[end])
        mean = torch.tensor(info.mean).view(1, -1, 1, 1)
        offset = torch.where((mean > 0) & (mean < 1), mean, 0.5).logit()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", torch.tensor(info.std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        images = self.finish(self.body(self.linear(latents)))
        return torch.sigmoid(images + self.offset) if self.end == "sigmoid" else images * self.std + self.mean


class Generators(nn.ModuleList):
    """Generators, alike but for their weights, that share each batch.

    Args:
        info, latent, end, width, epsilon: Of each, as :class:`Generator` takes them.
        count: How many.
    """

    def __init__(
        self,
        info: ModelInfo,
        latent: int,
        end: GeneratorEnd,
        width: float = 1.0,
        epsilon: float = 1e-5,
        count: int = 1,
    ) -> None:
        super().__init__(Generator(info, latent, end, width, epsilon) for _ in range(count))
        self.info, self.latent = info, latent
        self.settings = {"latent": latent, "end": end, "width": width, "epsilon": epsilon, "count": count}

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, D) to images (B, C, H, W), a part of about the same size by each generator, in order."""
        parts = latents.tensor_split(len(self))
        images = [generator(part) for generator, part in zip(self, parts, strict=True)]
        return torch.cat(images) if len(images) > 1 else images[0]

    def sample(self, latents: Tensor, count: int) -> Tensor:
        """Up to B images for latents (B, D), as many of each generator. All B are made: BatchNorm looks at them."""
        images = self(latents)
        return images[torch.arange(count, device=images.device) * len(images) // count]


def save_generators(directory: Path, generators: Generators, provenance: dict[str, Any]) -> None:
    """Write a generator directory. The record is written last: a directory with a readable record is complete."""
    record = {
        "schema": SCHEMA,
        "kind": "generator",
        "settings": generators.settings,
        "teacher_input": dataclasses.asdict(generators.info),
        "weights": {"file": WEIGHTS, "sha256": save_weights(directory / WEIGHTS, generators)},
        "provenance": provenance,
    }
    write_json(directory / RECORD, record)


def load_generators(directory: Path) -> tuple[Generators, dict[str, Any]]:
    """Read and check a generator directory. Returns the generators on the CPU, and the record.

    Raises:
        ArtifactError: Missing, damaged, or from a newer version.
    """
    record = read_json(intact(directory / RECORD), GeneratorRecord)
    weights = intact(directory / WEIGHTS, record["weights"]["sha256"])
    info = read_info(record["teacher_input"], directory / RECORD)
    settings: dict[str, Any] = {k: v for k, v in record["settings"].items() if k in Settings.__annotations__}
    with torch.random.fork_rng(devices=[]):
        generators = Generators(info, **settings)
    load_weights(generators, weights)
    return generators, dict(record)


def identity(record: Mapping[str, Any]) -> str:
    """The hash that stands for generators: their weights and how they are used."""
    return digest([record["weights"]["sha256"], record["settings"], record["teacher_input"]])

"""Images by the chunk: the one view of shards, real sets, folders, noise and generators that training has.

A source is a numbered list of chunks, each loaded on demand and always the same, so that a set of any size is
shuffled and trained on in bounded memory and any step of any epoch can be found again after an interruption.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfkd_cli.artifacts.files import digest, sha256_file
from dfkd_cli.artifacts.shards import ShardReader, as_pixels
from dfkd_cli.data.datasets import Dataset, rank_in_class
from dfkd_cli.data.image_files import fingerprint, image_files
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.generators import Generators
from dfkd_cli.seeds import derive

MEMORY = 512 << 20  # bytes of images held at once on a CPU: the same everywhere, as the order of images follows from it
HASHED = 1 << 30  # bytes of a folder's images up to which each is hashed whole, and not only what a fingerprint sees
ANSWERS = ("logits", "targets")  # what may be stored about the pixels of images
OF_A_CHUNK = 1000  # images of noise


@dataclass(frozen=True)
class Images:
    """Some images and what is known about them. Any tensor may be on any device.

    Attributes:
        pixels: (B, C, H, W); uint8 stands for [0,255], floats are in pixel space [0,1] (impressions may leave it).
        labels: (B,) int64 class indices, or None.
        positions: (B,) int64, where each stands in the source that :class:`Batches` drew it from, or None.
        logits: (B, K) float32, the stored answers of the teacher to these very pixels, or None.
        targets: (B, K) float32, the stored soft labels that these very pixels were made for, or None.
        shares: (B, K) float32, where images are mixed of several, the share of each class; labels have the largest.
    """

    pixels: Tensor
    labels: Tensor | None = None
    positions: Tensor | None = None
    logits: Tensor | None = None
    targets: Tensor | None = None
    shares: Tensor | None = None

    @property
    def truth(self) -> Tensor:
        """What a cross-entropy with true labels takes: labels (B,), or of mixed images the shares (B, K)."""
        return self.true_labels if self.shares is None else self.shares

    @property
    def true_labels(self) -> Tensor:
        """The labels of images that have them."""
        if self.labels is None:
            raise ValueError("these images have no labels")
        return self.labels

    def __getitem__(self, rows: slice | Tensor) -> Images:
        return self.each(lambda values: values[rows])

    def split(self, size: int) -> list[Images]:
        """The images in order, at most ``size`` in each part, as :func:`torch.split` gives them."""
        return [self[start : start + size] for start in range(0, len(self.pixels), size)]

    def to(self, device: torch.device) -> Images:
        """The images on a device, as float32 in pixel space."""
        # CUDA copies what is not pinned before it returns; what comes from a device must be there.
        moved = self.each(lambda values: values.to(device, non_blocking=device.type == "cuda"))
        return replace(moved, pixels=as_pixels(moved.pixels))

    def changed(self, pixels: Tensor) -> Images:
        """The images with other pixels (B, C, H, W): labels and positions stay, answers stored for the old ones go."""
        return self if pixels is self.pixels else replace(self, pixels=pixels, logits=None, targets=None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Images:
        """The images with every tensor changed."""
        return Images(**{name: change(values) for name, values in vars(self).items() if values is not None})


def concatenated(parts: Sequence[Images]) -> Images:
    """Images one part after the other, with what all the parts have."""
    names = [name for name in vars(parts[0]) if all(getattr(part, name) is not None for part in parts)]
    return Images(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


class Source(ABC):
    """Images in numbered chunks.

    Attributes:
        sizes: Images in each chunk.
        shape: (C, H, W) of every image.
        dtype: How pixels are held.
        labelled: Whether chunks carry true labels.
        answers: The stored answers that chunks carry, each with its number of classes. None unless asked for.
        only_read: Whether chunks are read or drawn, by no network that others use: another thread can load them.
    """

    sizes: Sequence[int]
    shape: tuple[int, int, int]
    dtype: torch.dtype
    labelled = False
    answers: Mapping[str, int] = {}
    only_read = False

    @abstractmethod
    def chunk(self, index: int) -> Images:
        """Load one chunk."""

    def classes(self) -> Tensor | None:
        """The class (N,) int64 that each image is of, or was made for. None where nothing says."""
        return None

    def use(self, device: torch.device) -> None:  # noqa: B027  # most read them
        """Compute images on this device from now on. Sources that read their images from somewhere ignore it."""

    def __len__(self) -> int:
        return sum(self.sizes)

    def all(self) -> Images:
        """Every image, for sources that are known to be small."""
        return concatenated([self.chunk(index) for index in range(len(self.sizes))])

    @property
    def bytes_per_image(self) -> int:
        """Memory that one image takes, with its answers."""
        return int(np.prod(self.shape)) * self.dtype.itemsize + sum(self.answers.values()) * torch.float32.itemsize


class ShardSource(Source):
    """The impressions of a shard directory, with those of the wanted :data:`ANSWERS` that every shard has."""

    only_read = True

    def __init__(self, reader: ShardReader, wanted: Collection[str] = ()) -> None:
        self.reader, self.sizes, self.shape, self.dtype = reader, reader.sizes, reader.shape, reader.dtype
        asked = {*ANSWERS} & {*wanted}  # without any, no shard is read
        self.answers = dict.fromkeys(asked & reader.verify() if asked else (), reader.num_classes)

    def chunk(self, index: int) -> Images:
        tensors = self.reader.read(index)
        return Images(tensors["images"], **{name: tensors[name].float() for name in self.answers})

    def classes(self) -> Tensor | None:
        targets = [self.reader.read(index).get("targets") for index in range(len(self.sizes))]
        made_for = [target.argmax(1) for target in targets if target is not None]
        return torch.cat(made_for) if len(made_for) == len(targets) else None


class NoiseSource(Source):
    """``noise:N``: uniform noise in [0,1], what the ``noise`` method makes, without storing it."""

    only_read = True

    def __init__(self, count: int, shape: tuple[int, int, int], seed: int) -> None:
        self.sizes = [min(OF_A_CHUNK, count - start) for start in range(0, count, OF_A_CHUNK)]
        self.shape, self.dtype, self.seed = shape, torch.float32, seed

    def chunk(self, index: int) -> Images:
        generator = torch.Generator().manual_seed(derive("shard", self.seed, index))
        return Images(torch.rand(self.sizes[index], *self.shape, generator=generator))


class GeneratorSource(Source):
    """Images of generators, made when they are asked for; the same ones every time.

    Args:
        generators: In training mode, so that their BatchNorm takes the statistics of each chunk.
        count: Images in all.
        chunk: Images of a chunk: as many as they were trained with at once.
        seed: Seed of the latents.
    """

    def __init__(self, generators: Generators, count: int, chunk: int, seed: int) -> None:
        self.generators, self.seed, self.batch = generators.train().requires_grad_(False), seed, chunk
        self.sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
        self.shape, self.dtype = generators.info.input_size, torch.float32
        self.device = torch.device("cpu")

    def use(self, device: torch.device) -> None:
        self.device = device
        self.generators.to(device)

    def chunk(self, index: int) -> Images:
        drawn = torch.Generator().manual_seed(derive("latents", self.seed, index))
        latents = torch.randn(self.batch, self.generators.latent, generator=drawn)
        return Images(self.generators.sample(latents.to(self.device), self.sizes[index]))


class RealSource(Source):
    """Labelled real images, all of a dataset or a chosen part."""

    labelled = only_read = True

    def __init__(self, dataset: Dataset, indices: Tensor | None = None, chunk: int = 1000) -> None:
        self.dataset = dataset
        self.parts = torch.split(torch.arange(len(dataset)) if indices is None else indices, chunk)
        self.sizes = [len(part) for part in self.parts]
        self.shape, self.dtype = dataset.image_shape, torch.uint8

    def chunk(self, index: int) -> Images:
        part = self.parts[index]
        return Images(self.dataset.images(part), self.dataset.labels[part])

    def classes(self) -> Tensor:
        return self.dataset.labels[torch.cat(self.parts)]


class FolderSource(Source):
    """A folder of images of any depth, without labels, brought to one shape. Nobody says that they are not real."""

    only_read = True

    def __init__(self, folder: Path, shape: tuple[int, int, int], chunk: int = 1000) -> None:
        self.files = image_files(folder, shape)
        self.parts = torch.split(torch.arange(len(self.files)), chunk)
        self.sizes = [len(part) for part in self.parts]
        self.shape, self.dtype = shape, torch.uint8
        paths = sorted(self.files.paths)
        whole = sum(os.path.getsize(path) for path in paths) <= HASHED
        seen = [sha256_file(Path(path)) if whole else fingerprint(path) for path in paths]
        self.sha256 = digest([[os.path.relpath(path, folder), what] for path, what in zip(paths, seen, strict=True)])

    def chunk(self, index: int) -> Images:
        return Images(self.files[self.parts[index]])


class Concat(Source):
    """Several sources, one after the other. Labels and answers survive where every part has them."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.owners = [(part, i) for part in parts for i in range(len(part.sizes))]
        self.sizes = [size for part in parts for size in part.sizes]
        self.parts, self.shape = parts, parts[0].shape
        self.dtype = parts[0].dtype if len({p.dtype for p in parts}) == 1 else torch.float32
        self.labelled = all(part.labelled for part in parts)
        self.only_read = all(part.only_read for part in parts)
        self.answers = dict(set.intersection(*(set(part.answers.items()) for part in parts)))

    def use(self, device: torch.device) -> None:
        for part in self.parts:
            part.use(device)

    def chunk(self, index: int) -> Images:
        part, local = self.owners[index]
        images = part.chunk(local)
        if images.pixels.dtype != self.dtype:
            images = images.to(torch.device("cpu"))
        answers = {name: getattr(images, name) for name in self.answers}
        return Images(images.pixels, images.labels if self.labelled else None, **answers)

    def classes(self) -> Tensor | None:
        of_parts = [part.classes() for part in self.parts]
        known = [classes for classes in of_parts if classes is not None]
        return torch.cat(known) if len(known) == len(of_parts) else None


class Subset(Source):
    """Some images of a source.

    Args:
        source: All images.
        chosen: (N,) which of them.
    """

    def __init__(self, source: Source, chosen: np.ndarray) -> None:
        self.source = source
        rows = [np.flatnonzero(part) for part in np.split(chosen, np.cumsum(source.sizes)[:-1])]
        self.rows = [(chunk, torch.from_numpy(part)) for chunk, part in enumerate(rows) if len(part)]
        self.sizes = [len(part) for _, part in self.rows]
        self.shape, self.dtype = source.shape, source.dtype
        self.labelled, self.answers, self.only_read = source.labelled, source.answers, source.only_read

    def use(self, device: torch.device) -> None:
        self.source.use(device)

    def chunk(self, index: int) -> Images:
        chunk, rows = self.rows[index]
        return self.source.chunk(chunk)[rows]

    def classes(self) -> Tensor | None:
        of_all, starts = self.source.classes(), np.cumsum([0, *self.source.sizes])
        return None if of_all is None else torch.cat([of_all[starts[chunk] + rows] for chunk, rows in self.rows])


class Classified(Source):
    """Images of a source, labelled with the classes that somebody gives them.

    Args:
        source: The images.
        classify: The classes (B,) of pixels (B, C, H, W), float32 in pixel space, on the CPU.
    """

    labelled = True

    def __init__(self, source: Source, classify: Callable[[Tensor], Tensor]) -> None:
        self.source, self.classify = source, classify
        self.sizes, self.shape, self.dtype, self.answers = source.sizes, source.shape, source.dtype, source.answers

    def use(self, device: torch.device) -> None:
        self.source.use(device)

    def chunk(self, index: int) -> Images:
        images = self.source.chunk(index)
        parts = [self.classify(part.to(torch.device("cpu")).pixels) for part in images.split(500)]
        return replace(images, labels=torch.cat(parts))


def batches(source: Source, size: int, device: torch.device) -> Iterator[Images]:
    """Every image of a source once, in order, at most ``size`` of one chunk at a time, on a device as float32."""
    for index in range(len(source.sizes)):
        yield from (part.to(device) for part in source.chunk(index).split(size))


def first(source: Source, count: int) -> Source:
    """The first ``count`` images of a source."""
    return Subset(source, np.arange(len(source)) < count)


def of_each_class(source: Source, count: int, names: Sequence[str]) -> Source:
    """The first images of every class.

    Args:
        source: All images.
        count: So many of each class.
        names: Of the classes, for messages.

    Raises:
        ConfigError: It is not known which class images are of, or one has fewer.
    """
    classes, label = source.classes(), f"--images-per-class {count}"
    if classes is None:
        raise ConfigError(f"{label}: the images have no labels, nor were they made for classes", "give --num-images")
    sizes = classes.bincount(minlength=len(names))
    if sizes[fewest := int(sizes.argmin())] < count:
        raise ConfigError(
            f"{label}: of class {names[fewest]} the transfer sets have {sizes[fewest]} images", "give less"
        )
    return Subset(source, (rank_in_class(classes) < count).numpy())


def hold_out(source: Source, share: float, seed: int, memory: int | None = None) -> tuple[Source, Source | None]:
    """What is left of a source and what is held out: two parts that have no image in common.

    The second has ``share`` of the images, but no more than can be held at once, in ``memory`` bytes where these are
    fewer, or is None.
    """
    most = MEMORY if memory is None else min(memory, MEMORY)
    count = min(round(share * len(source)), most // source.bytes_per_image)
    chosen = np.zeros(len(source), dtype=bool)
    chosen[np.random.default_rng(derive("holdout", seed)).permutation(len(source))[:count]] = True
    return (Subset(source, ~chosen), Subset(source, chosen)) if chosen.any() else (source, None)

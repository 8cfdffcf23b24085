"""Labelled real images, for teachers, with-data baselines and evaluation."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional as transforms

from dfkd_cli.artifacts.files import digest, take_lock
from dfkd_cli.data import seal
from dfkd_cli.data.image_files import (
    ImageFiles,
    Shape,
    check_channels,
    class_names,
    common_folders,
    common_shape,
    fingerprint,
    holds_images,
    image_paths,
    labelled_files,
    mixed,
)
from dfkd_cli.errors import ArtifactError, ConfigError, DfkdError, did_you_mean, some
from dfkd_cli.models.classifier import ModelInfo

DATASETS = {
    "digits": "1,797 handwritten digits, gray, 8x8 shown at 32x32, bundled with scikit-learn",
    "mnist": "70,000 handwritten digits, gray, 28x28 padded to 32x32",
    "fashion-mnist": "70,000 pictures of clothing in 10 classes, gray, 28x28 padded to 32x32",
    "cifar10": "60,000 photographs in 10 classes, RGB, 32x32",
    "cifar100": "60,000 photographs in 100 classes, RGB, 32x32",
    "svhn": "99,289 house-number digits, RGB, 32x32",
}

# What is to be said of a model whose record does not name a dataset's classes.
BY_POSITION = "no class names, or not the dataset's -- classes are matched by position"

Split = Literal["train", "test"]

# What the folders of the splits are called, in any case. Of several, plain names come first, then the order here.
_HALVES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training", "training_set", "train_set"),
    "test": ("test", "testing", "test_set", "val", "valid", "validation"),
}
_PLAIN = ("train", "test", "val")

_DIGITS = tuple("0123456789")
_MEMORY_BUDGET = 2 * 1024**3  # bytes: a directory of images that needs more is decoded batch by batch
_STATISTICS_IMAGES = 10_000
_NETWORK_TIMEOUT = 30.0  # seconds


class _Published(NamedTuple):
    """How torchvision calls a dataset, its channels, and where in a root torchvision keeps it."""

    reader: str
    channels: int
    kept: str


_PUBLISHED = {
    "mnist": _Published("MNIST", 1, "MNIST/raw"),
    "fashion-mnist": _Published("FashionMNIST", 1, "FashionMNIST/raw"),
    "cifar10": _Published("CIFAR10", 3, "cifar-10-batches-py"),
    "cifar100": _Published("CIFAR100", 3, "cifar-100-python"),
    "svhn": _Published("SVHN", 3, "test_32x32.mat"),
}
# What its readers raise where files are absent, damaged, or cannot be downloaded.
_UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, AssertionError, EOFError, pickle.UnpicklingError)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled set of real images."""

    name: str
    split: Split
    classes: tuple[str, ...]
    image_shape: Shape
    labels: Tensor  # (N,) int64
    pixels: Tensor | ImageFiles  # (N, C', H', W') uint8, brought to `image_shape` when read
    note: str = ""  # what is to be said of the shape, where its images have several

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (n,) as uint8 (n, C, H, W), 0 to 255."""
        return _fit(self.pixels[indices], self.image_shape)

    def labelled_for(self, info: ModelInfo, model: str) -> Dataset:
        """The same images with labels as a model counts its classes, as far as it knows their names.

        Args:
            info: What the model's record says.
            model: Whose it is, for messages.

        Raises:
            ArtifactError: Another number of classes, or only some of their names are the model's.
        """
        hint = "give the --dataset that it was made for"
        if len(self.classes) != info.num_classes:
            counts = f"dataset {self.name} has {len(self.classes)} classes, {model} {info.num_classes}"
            raise ArtifactError(f"{counts}: the dataset's are {some(self.classes)}", hint)
        names = info.classes or self.classes
        strange = set(self.classes) - set(names)
        if self.classes == names or len(strange) == len(names):  # the same, or other names for all of them
            return self
        if strange:
            raise ArtifactError(f"dataset {self.name}: {model} has no classes {', '.join(sorted(strange))}", hint)
        order = torch.tensor([names.index(name) for name in self.classes])
        return replace(self, classes=names, labels=order[self.labels])

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, pixels being 0 to 1.

        From at most 10,000 evenly chosen images. The deviation is at least 1/255, so that it can be divided by.
        """
        count = min(len(self), _STATISTICS_IMAGES)
        chosen = torch.arange(count) * len(self) // count
        histogram = torch.zeros(self.image_shape[0], 256, dtype=torch.float64)
        for part in torch.split(chosen, 256):
            for row, channel in zip(histogram, self.images(part).transpose(0, 1), strict=True):
                row += channel.flatten().bincount(minlength=256)
        values = torch.arange(256, dtype=torch.float64) / 255
        weights = histogram / histogram.sum(dim=1, keepdim=True)  # (C, 256)
        mean = weights @ values
        variance = (weights * (values - mean[:, None]) ** 2).sum(dim=1)
        return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist())


def load(
    name: str,
    split: Split,
    *,
    data_dir: str | None = None,
    image_shape: Shape | None = None,
    download: bool = True,
) -> Dataset:
    """Load one split of a dataset.

    Args:
        name: A key of ``DATASETS``, or a directory with ``train/<class>/*`` and ``test/<class>/*``, of which only the
            split has to be there. Test images may also lie in ``val/``, where ``test/`` is not there or has no folders
            of classes, or in folders of classes alone. Other common names of these halves, such as ``Training`` or
            ``valid``, are known too.
        split: Which half.
        data_dir: Where to look first, and where to download to.
        image_shape: (C, H, W) to convert to; the dataset's own by default.
        download: Whether a dataset that is nowhere on this machine may be downloaded.

    Raises:
        ConfigError: No such dataset.
        ArtifactError: Its files are missing or damaged, or do not fit.
        DataSealed: Data-free code runs.
    """
    seal.check(f"dataset {name!r}")
    if image_shape:
        check_channels(f"dataset {name!r}", image_shape, files=name not in DATASETS)
    pixels: Tensor | ImageFiles
    note = ""
    if name == "digits":
        pixels, labels, classes = _load_digits(split)
        native_shape = (1, 32, 32)
    elif name in _PUBLISHED:
        pixels, labels, classes = _load_published(name, split, seal.dataset_roots(data_dir), download)
        native_shape = (_PUBLISHED[name].channels, 32, 32)
    else:
        paths, labels, classes = _list_tree(_directory(name), split)
        native_shape, note = (image_shape, "") if image_shape else common_shape(paths)
        pixels = ImageFiles(paths, native_shape)
    if isinstance(pixels, ImageFiles) and len(labels) * math.prod(pixels.shape) <= _MEMORY_BUDGET:
        pixels = pixels[torch.arange(len(labels))]
    return Dataset(name, split, classes, image_shape or native_shape, labels, pixels, note)


def contents(name: str, data_dir: str | None = None) -> list[dict[str, Any]]:
    """What a dataset is read from, as a run's parents; nothing of torchvision's own files, whose sums it checks.

    Of a directory the images that are read: their names, and what :func:`fingerprint` sees of each. ``formerly`` is
    what earlier versions had for a hash, of the names and sizes of all files; None where they had none, as of a dataset
    that is known by its name and lies there as images.

    Raises:
        ConfigError: No such dataset.
        ArtifactError: A file cannot be read.
    """
    if name in DATASETS:
        root = _tree(name, data_dir)
        if root is None:
            return []
        return [{**contents(str(root))[0], "spec": name, "formerly": None}]
    root = _directory(name)
    labelled = [place / label for place in (halves_of(root) or {"": root}).values() for label in class_names(place)]
    images = sorted(path for place in labelled for path in image_paths(place))
    seen = [[os.path.relpath(path, root), *fingerprint(path)] for path in images]  # threads would take thrice as long
    files = sorted(path for path in root.rglob("*") if path.is_file())
    sizes = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in files]
    return [{"role": "dataset", "path": name, "sha256": digest(seen), "formerly": digest(sizes)}]


def _tree(name: str, data_dir: str | None) -> Path | None:
    """Where a dataset that is known by its name is read from images; None where it is read from published files."""
    for root in seal.dataset_roots(data_dir) if name in _PUBLISHED else ():
        if any((root / name / split).is_dir() for split in ("train", "test")):
            return root / name
        if (root / _PUBLISHED[name].kept).exists():
            return None
    return None


def _directory(name: str) -> Path:
    """The directory of a dataset that is not known by its name."""
    if name and Path(name).is_dir():
        return Path(name)
    hint = "a relative path counts from here: give --dataset" if "/" in name else did_you_mean(name, DATASETS)
    raise ConfigError(f"dataset {name!r}: neither a known name nor a directory", hint)


def class_balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` indices into ``labels`` (N,), as evenly over the classes as they allow.

    The choice depends on ``seed`` only, and a smaller choice is the beginning of a larger one.
    """
    if not 0 < count <= len(labels):
        raise ConfigError(f"{count} images wanted, but the dataset has {len(labels)}", f"choose 1 to {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[rank_in_class(labels[order]).argsort(stable=True)[:count]]


def rank_in_class(labels: Tensor) -> Tensor:
    """How many of its class stand before each of the ``labels`` (N,)."""
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(labels)
    rank[labels.argsort(stable=True)] = torch.arange(len(labels)) - first.repeat_interleave(sizes)
    return rank


def _fit(images: Tensor, shape: Shape) -> Tensor:
    """Bring uint8 images (n, C, H, W) to ``shape``; returns the same tensor if they have it."""
    if images.shape[1] != shape[0]:
        images = transforms.rgb_to_grayscale(images) if shape[0] == 1 else transforms.grayscale_to_rgb(images)
    if images.shape[2:] == (28, 28) and shape[1:] == (32, 32):
        images = pad(images, (2, 2, 2, 2))  # MNIST as LeNet-5 was made for it
    elif images.shape[2:] != shape[1:]:
        images = transforms.resize(images, list(shape[1:]), antialias=True)
    return images


def _load_digits(split: Split) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    halves = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    chosen = halves[split == "test"]
    small = torch.from_numpy(images[chosen]).view(-1, 1, 8, 8) * (255 / 16)
    pixels = interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    return pixels, torch.from_numpy(labels[chosen]), _DIGITS


def _load_published(
    name: str, split: Split, roots: list[Path], download: bool
) -> tuple[Tensor | ImageFiles, Tensor, tuple[str, ...]]:
    for root in roots:
        if (root / name / split).is_dir():
            paths, labels, classes = _list_tree(root / name, split)
            shape, _ = common_shape(paths)
            return ImageFiles(paths, (_PUBLISHED[name].channels, *shape[1:])), labels, classes
        with contextlib.suppress(*_UNREADABLE):
            return _read_published(name, split, root, download=False)
    reason = "downloading is off"
    if download:
        try:
            return _download(name, split, roots[0])
        except (*_UNREADABLE, DfkdError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[-1]
    raise ArtifactError(
        f"dataset {name!r}: no complete copy in {', '.join(map(str, roots))}, and no download ({reason})",
        f"put the torchvision files under {roots[0]}, or set DFKD_DATA to the directory that has them",
    )


def _download(name: str, split: Split, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Download a dataset, one process at a time: who has waited finds what another one has brought meanwhile."""
    while (held := take_lock(root / f".{name}.lock")) is None:
        time.sleep(0.5)
    with held:
        with contextlib.suppress(*_UNREADABLE):
            return _read_published(name, split, root, download=False)
        return _read_published(name, split, root, download=True)


def _read_published(name: str, split: Split, root: Path, download: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    reader = getattr(torchvision.datasets, _PUBLISHED[name].reader)
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    with _quiet_network():
        data = reader(root, download=download, **which)
    if name == "svhn":
        return torch.from_numpy(data.data).contiguous(), torch.from_numpy(data.labels), _DIGITS
    pixels = torch.as_tensor(data.data)  # (N, H, W) or (N, H, W, 3)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(data.targets), _DIGITS if name == "mnist" else tuple(data.classes)


@contextlib.contextmanager
def _quiet_network() -> Iterator[None]:
    """Keep torchvision's progress bars off the terminal, and do not wait forever for a network that drops packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def halves_of(root: Path) -> dict[str, Path]:
    """Where the splits of a dataset directory lie, as far as it has them, whichever of their names they have."""
    folders = class_names(root)
    called = {half: [name for name in folders if name.lower() in names] for half, names in _HALVES.items()}
    halves = {}
    for half, names in _HALVES.items():
        ordered = sorted(called[half], key=lambda name: (name not in _PLAIN, names.index(name.lower())))
        if not all(called.values()):  # by itself another name may be a class's: Train beside Car, Test beside Control
            ordered = [name for name in ordered if name in _PLAIN or _with_classes(root, folders) == [name]]
        labelled = [name for name in ordered if class_names(root / name)]  # test/ may be what a contest wants labelled
        if ordered:
            halves[half] = root / (labelled or ordered)[0]
    return halves


def _with_classes(root: Path, folders: list[str]) -> list[str]:
    """Which of the folders in ``root`` hold folders, and no images themselves."""
    return [name for name in folders if class_names(root / name) and not holds_images(root / name)]


def _list_tree(root: Path, split: Split) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """The image files of a split of a dataset directory, mixed, with their labels (N,) and the classes."""
    halves = halves_of(root)
    if not halves and split == "test":
        halves["test"] = root
    if split not in halves:
        hint = "a dataset directory has train/<class>/* and test/<class>/*, or val/"
        raise ArtifactError(f"{root}: has no {split}/", hint)
    classes = {half: class_names(folder) for half, folder in halves.items()}
    if not classes[split]:
        raise ArtifactError(f"{halves[split]}: no folders of classes in it", "give each class a folder of its images")
    if strange := {name for names in classes.values() if names for name in {*names} ^ {*classes[split]}}:
        both = " and ".join(f"{folder.name}/" for folder in halves.values())
        raise ArtifactError(f"{root}: not in both {both}: {', '.join(sorted(strange))}")
    if inner := common_folders(halves[split], classes[split]):
        what = f"{halves[split]}: no images in {some(classes[split])}, but in the same folders of each: {some(inner)}"
        hint = (
            f"if those are the classes, give {halves[split] / classes[split][0]}, or name the halves train/ and test/"
        )
        raise ArtifactError(what, f"{hint}; if not, put the images of each class into one folder")
    files = labelled_files(halves[split], classes[split])
    paths, labels = zip(*mixed(files), strict=True)
    return list(paths), torch.tensor(labels), tuple(classes[split])

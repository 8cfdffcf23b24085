"""What commands read and run on: teachers, transfer sets and devices, checked before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_cli.artifacts.integrity import check_foreign
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.data import datasets
from dfkd_cli.data.datasets import DATASETS  # by itself: for what is read without importing
from dfkd_cli.data.sources import FolderSource, GeneratorSource, NoiseSource, RealSource, ShardSource, Source
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models import generators
from dfkd_cli.models.classifier import ModelInfo
from dfkd_cli.models.generators import RECORD as GENERATORS
from dfkd_cli.models.names import LoadedModel, Location
from dfkd_cli.options import MOST_IMAGES, Run
from dfkd_cli.seeds import derive

LOG = logging.getLogger(__name__)


def real_data(model: Location, data_dir: str | None = None) -> list[str]:
    """Directories that hold real images, as far as a model's record and the command know: nothing is built for it."""
    # A dataset's name is no directory, even where one happens to be called like it.
    recorded = None if model.dataset in DATASETS else model.dataset
    return [place for place in (data_dir, recorded) if place and Path(place).is_dir()]


@dataclass
class TransferSet:
    """One transfer set that was opened.

    Attributes:
        source: Its images.
        parent: Its entry in the run's list of parents.
        uses: What they were made with that was itself made from real images, such as ``metadata``.
        made_from: The hash of the teacher that they were made from, where they were.
        real: Whether they say that they are real images, or made of such.
    """

    source: Source
    parent: dict[str, Any]
    uses: Sequence[str] = ()
    made_from: str | None = None
    real: bool = False


def real_images(teacher: LoadedModel, name: str, data_dir: str | None, count: int | None, seed: int) -> RealSource:
    """The training images of a dataset as the teacher takes them: all, or ``count`` balanced over the classes.

    Raises:
        ConfigError: The dataset has not so many images.
        ArtifactError: It does not fit the teacher.
    """
    info = teacher.classifier.info
    images = datasets.load(name, "train", data_dir=data_dir, image_shape=info.input_size)
    images = images.labelled_for(info, "the teacher")
    if images.classes != info.classes:
        LOG.warning("teacher: %s", datasets.BY_POSITION)
    return balanced(images, count, seed)


def balanced(images: datasets.Dataset, count: int | None, seed: int) -> RealSource:
    """All images of a dataset, or ``count`` as evenly over the classes as they allow."""
    return RealSource(images, datasets.class_balanced(images.labels, count, derive("few", seed)) if count else None)


def may_be_real(name: str) -> bool:
    """Whether a transfer set holds real images, or images that nobody says are not: a folder."""
    path, kind = Path(name), name.partition(":")[0]
    made_by_dfkd = any((path / record).exists() for record in (MANIFEST, GENERATORS))
    is_dataset = kind in DATASETS and not path.exists()
    return kind == "real" or is_dataset or (path.is_dir() and not made_by_dfkd)


def _counted(name: str) -> tuple[str, int | None]:
    """``real:200`` as ``("real", 200)``, ``real`` as ``("real", None)``."""
    kind, colon, count = name.partition(":")
    if kind not in ("real", "noise", *DATASETS) or not colon or Path(name).exists():
        return name, None
    if not (count.isdecimal() and len(count) < 10 and 0 < int(count) <= MOST_IMAGES):
        raise ConfigError(f"{name}: {count!r} is not a number of images", f"e.g. {kind}:200")
    return kind, int(count)


def wanted_images(inputs: Any, info: ModelInfo) -> int:
    """How many images ``num_images``, or ``images_per_class`` times the classes, asks for.

    Raises:
        ConfigError: More than a set may have.
    """
    if not inputs.images_per_class:
        return int(inputs.num_images)
    if (count := inputs.images_per_class * info.num_classes) > MOST_IMAGES:
        what = f"--images-per-class {inputs.images_per_class}"
        raise ConfigError(f"{what}: {count:,} images of {info.num_classes} classes", "give less")
    return count


def is_images(name: str) -> bool:
    """Whether :func:`open_images` may know the name."""
    return _counted(name)[0] in ("real", "noise", *DATASETS) or Path(name).is_dir()


def open_images(
    name: str, teacher: LoadedModel, data_dir: str | None, seed: int, wanted: Collection[str] = ()
) -> TransferSet:
    """Open what can be shown to a teacher: a transfer set, also another teacher's, or a dataset's training images.

    Args:
        name: As for :func:`open_transfer_set`, or a dataset's ``NAME`` or ``NAME:N``.
        teacher: It will see the images.
        data_dir: Where datasets lie.
        seed: Of what is drawn.
        wanted: The stored answers that shards are to come with, whoever gave them.

    Raises:
        ConfigError: Neither, or the dataset has not so many images.
        ArtifactError: Missing or damaged.
    """
    dataset, count = _counted(name)
    if dataset not in DATASETS or Path(name).exists():
        impressions = _impressions(name, teacher.classifier.info, seed, wanted)
        return impressions or open_transfer_set(name, teacher, data_dir, seed)
    images = datasets.load(dataset, "train", data_dir=data_dir, image_shape=teacher.classifier.info.input_size)
    return TransferSet(balanced(images, count, seed), {"role": "images", "spec": name})


def open_transfer_set(
    name: str, teacher: LoadedModel, data_dir: str | None, seed: int, wanted: Collection[str] = ()
) -> TransferSet:
    """Open ``real``, a dataset by name, ``noise``, shards (with wanted answers), a generator, or a folder of images.

    ``real`` is the dataset that the teacher's record names; all three may end in ``:N``, so many images.

    Raises:
        ConfigError: Not a transfer set.
        ArtifactError: Missing or damaged, or made from another teacher (its teacher's will do).
    """
    kind, count = _counted(name)
    info = teacher.classifier.info
    if kind in ("real", "noise", *DATASETS) and not Path(name).exists():
        if kind == "noise":
            if not count:
                raise ConfigError("transfer set noise needs a number of images", "e.g. noise:1000")
            return TransferSet(NoiseSource(count, info.input_size, seed), {"role": "transfer-set", "spec": name})
        dataset = teacher.dataset if kind == "real" else kind
        if dataset is None:
            hint = "name it, such as cifar10 or cifar10:200, or use shards or a folder"
            raise ConfigError(f"transfer set {name}: the teacher's record names no dataset", hint)
        real = real_images(teacher, dataset, data_dir, count, seed)
        parent = {"role": "transfer-set", "spec": f"{name} {dataset}" if kind == "real" else name}
        for content in datasets.contents(dataset, data_dir):
            parent |= {key: content[key] for key in ("sha256", "formerly")}
        return TransferSet(real, parent)
    path = Path(name)
    if not path.is_dir():
        hint = "make it: dfkd synthesize --method zskd" if name.rstrip("/") == "shards" else "check the path"
        raise ArtifactError(f"no transfer set at {name}", hint)
    if (impressions := _impressions(name, info, seed, wanted)) is not None:
        if not teacher.knows(impressions.made_from):
            raise ArtifactError(f"{name} was made from another teacher", "give the --teacher it was made from")
        return impressions
    if len(halves := datasets.halves_of(path)) > 1:
        train, test = (half.name for half in halves.values())
        raise ConfigError(f"transfer set {name} has {train}/ and {test}/", f"give {name.rstrip('/')}/{train}")
    check_foreign(path)
    folder = FolderSource(path, info.input_size)
    return TransferSet(folder, {"role": "transfer-set", "path": name, "sha256": folder.sha256})


def _impressions(name: str, info: ModelInfo, seed: int, wanted: Collection[str] = ()) -> TransferSet | None:
    """Shards, or a generator; None where the name is neither's."""
    path, real = Path(name), False
    if (path / MANIFEST).exists():
        reader = ShardReader(path)
        sha256, made_from, uses = reader.sha256, reader.teacher, reader.manifest.get("uses", ())
        real = not reader.manifest.get("data_free", True)
        source: Source = ShardSource(reader, wanted)
    elif (path / GENERATORS).exists():
        made_by, record = generators.load_generators(path)
        sha256, uses = generators.identity(record), ()
        made_from, images = record["provenance"]["teacher"], record["provenance"]["num_images"]
        source = GeneratorSource(made_by, images, record["provenance"]["config"]["batch_size"], seed)
    else:
        return None
    if source.shape != info.input_size:
        raise ArtifactError(f"{name} has images of {source.shape}, the teacher takes {info.input_size}")
    return TransferSet(source, {"role": "transfer-set", "path": name, "sha256": sha256}, uses, made_from, real)


def check_precision(how: Run, device: torch.device) -> None:
    """Refuse what Lightning would change without a word."""
    if device.type == "cpu" and how.precision == "16":
        raise ConfigError("--precision 16: not on a CPU", "give --precision bf16, or 32, which is faster on most")


def pick_device(name: str, count: int = 1) -> torch.device:
    """The device that ``--device`` names; ``auto`` is an accelerator where there is one. Arithmetic is float32 in full.

    Args:
        name: The device.
        count: How many of them are wanted; of the CPU, any number of processes.

    Raises:
        ConfigError: It is not to be had on this machine.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise ConfigError(f"--device {name}: not available on this machine", "`dfkd info` lists what is; or auto")
    if name == "cuda" and count > torch.cuda.device_count():
        raise ConfigError(f"--devices {count}: this machine has {torch.cuda.device_count()}", "give no more")
    torch.backends.cudnn.allow_tf32 = False  # by default, CUDA's convolutions round their inputs to 10 bits
    return torch.device(name)

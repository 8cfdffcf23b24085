"""What commands read and run on: teachers, transfer sets and devices, checked before any work starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_cli.artifacts.files import digest, sha256_file
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import Concat, FolderSource, GeneratorSource, NoiseSource, RealSource, ShardSource, Source
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models import generators
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import identity, load_model
from dfkd_cli.models.registry import build, code_file
from dfkd_cli.models.weights import load_weights
from dfkd_cli.seeds import derive
from dfkd_cli.settings import FOREIGN


@dataclass
class LoadedModel:
    """A model that was read, with its identity.

    Attributes:
        classifier: On the CPU.
        sha256: Stands for the weights and how they are used.
        record: ``model.json``, or what stands for it with a foreign model.
        path: Where it was read from.
    """

    classifier: Classifier
    sha256: str
    record: dict[str, Any]
    path: str

    @property
    def dataset(self) -> str | None:
        """The dataset it was trained on, as far as its record says."""
        return self.record.get("provenance", {}).get("dataset")

    @property
    def line(self) -> tuple[str, ...]:
        """Its own hash, that of its teacher where it was a student, of that one's teacher...: images of all fit it."""
        provenance = self.record.get("provenance", {})
        taught_by = [provenance["teacher"]] if "teacher" in provenance else []
        return (self.sha256, *provenance.get("line", taught_by))

    def real_data(self, data_dir: str | None = None) -> list[str]:
        """Directories that hold real images, as far as the teacher's record and the command know."""
        # A dataset's name is no directory, even where one happens to be called like it.
        given = None if self.dataset in datasets.DATASETS else self.dataset
        return [place for place in (data_dir, given) if place and Path(place).is_dir()]

    def parent(self, role: str) -> dict[str, Any]:
        """The entry in a run's list of parents."""
        return {"role": role, "path": self.path, "sha256": self.sha256}


def load_teacher(inputs: Any, allow_code: bool) -> LoadedModel:
    """The teacher that ``--teacher`` names: a model directory, or a SPEC with ``--weights``.

    Raises:
        ArtifactError: Missing, damaged, or not a model.
        ConfigError: A foreign model whose input space is not known.
    """
    path = Path(inputs.teacher)
    given = [f"--{name.replace('_', '-')}" for name in FOREIGN if getattr(inputs, name) is not None]
    if path.is_dir() and given:
        raise ConfigError(f"{path} is a directory, which says what it is", f"leave out {', '.join(given)}")
    if path.is_dir() or (inputs.weights is None and (path.exists() or ":" not in inputs.teacher)):
        if path.is_file():
            raise ArtifactError(
                f"{path} is a file, not a model directory",
                "give its architecture and file: --teacher SPEC --weights FILE --input-size C H W --num-classes K",
            )
        if not path.exists():
            hint = "train one: dfkd train-teacher" if inputs.teacher == "teacher" else "a SPEC needs --weights FILE too"
            raise ArtifactError(f"no teacher at {path}", hint)
        classifier, record = load_model(path, allow_code=allow_code)
        return LoadedModel(classifier, identity(record), record, inputs.teacher)
    return _foreign(inputs)


def _foreign(inputs: Any) -> LoadedModel:
    if inputs.weights is None:
        raise ConfigError(f"teacher {inputs.teacher} has no weights", "give --weights FILE")
    missing = [f"--{name.replace('_', '-')}" for name in ("input_size", "num_classes") if getattr(inputs, name) is None]
    if missing:
        raise ConfigError(f"teacher {inputs.teacher}: its file does not say its input", f"give {' and '.join(missing)}")
    channels = inputs.input_size[0]
    mean, std = inputs.mean or (0.0,) * channels, inputs.std or (1.0,) * channels
    file, (_, colon, factory) = code_file(inputs.teacher), inputs.teacher.partition(":")
    spec = inputs.teacher if file is None else f"{file}{colon}{factory}"  # without a leading ./
    info = ModelInfo(spec, inputs.num_classes, inputs.input_size, mean, std)
    with torch.random.fork_rng(devices=[]):
        net = build(info.spec, info.num_classes, info.input_size, allow_code=True)  # the user's own words
    if not Path(inputs.weights).is_file():
        raise ArtifactError(f"no weights file {inputs.weights}", "check --weights")
    load_weights(net, Path(inputs.weights))
    sha256 = digest([sha256_file(Path(inputs.weights)), dataclasses.asdict(info)])
    return LoadedModel(Classifier(net, info), sha256, {"provenance": {}}, inputs.teacher)


@dataclass
class TransferSet:
    """One transfer set that was opened.

    Attributes:
        source: Its images.
        parent: Its entry in the run's list of parents.
        uses: What they were made with that was itself made from real images, such as ``metadata``.
    """

    source: Source
    parent: dict[str, Any]
    uses: Sequence[str] = ()


def real_images(teacher: LoadedModel, name: str, data_dir: str | None, count: int | None, seed: int) -> RealSource:
    """The training images of a dataset as the teacher takes them: all, or ``count`` balanced over the classes.

    Raises:
        ConfigError: The dataset has not so many images.
        ArtifactError: It does not fit the teacher.
    """
    info = teacher.classifier.info
    images = datasets.load(name, "train", data_dir=data_dir, image_shape=info.input_size)
    return _some(images.labelled_for(info, "the teacher"), count, seed)


def _some(images: datasets.Dataset, count: int | None, seed: int) -> RealSource:
    return RealSource(images, datasets.class_balanced(images.labels, count, derive("few", seed)) if count else None)


def may_be_real(name: str) -> bool:
    """Whether a transfer set holds real images, or images that nobody says are not: a folder."""
    ours = (Path(name) / MANIFEST).exists() or (Path(name) / generators.RECORD).exists()
    return name.partition(":")[0] == "real" or (Path(name).is_dir() and not ours)


def _counted(name: str) -> tuple[str, int | None]:
    """``real:200`` as ``("real", 200)``, ``real`` as ``("real", None)``."""
    kind, colon, count = name.partition(":")
    if kind not in ("real", "noise", *datasets.DATASETS) or not colon or Path(name).exists():
        return name, None
    if not (count.isdecimal() and int(count)):
        raise ConfigError(f"{name}: {count!r} is not a number of images", f"e.g. {kind}:200")
    return kind, int(count)


def is_images(name: str) -> bool:
    """Whether :func:`open_images` may know the name."""
    return _counted(name)[0] in ("real", "noise", *datasets.DATASETS) or Path(name).is_dir()


def open_images(name: str, teacher: LoadedModel, data_dir: str | None, seed: int) -> TransferSet:
    """Open what can be shown to a teacher: a transfer set, also another teacher's, or a dataset's training images.

    Args:
        name: As for :func:`open_transfer_set`, or a dataset's ``NAME`` or ``NAME:N``.
        teacher: It will see the images.
        data_dir: Where datasets lie.
        seed: Of what is drawn.

    Raises:
        ConfigError: Neither, or the dataset has not so many images.
        ArtifactError: Missing or damaged.
    """
    dataset, count = _counted(name)
    if dataset not in datasets.DATASETS or Path(name).exists():
        ours = _ours(name, teacher.classifier.info, seed)
        return ours[0] if ours is not None else open_transfer_set(name, teacher, data_dir, seed)
    images = datasets.load(dataset, "train", data_dir=data_dir, image_shape=teacher.classifier.info.input_size)
    return TransferSet(_some(images, count, seed), {"role": "images", "spec": name})


def open_transfer_set(
    name: str, teacher: LoadedModel, data_dir: str | None, seed: int, wanted: Collection[str] = ()
) -> TransferSet:
    """Open ``real``, ``real:N``, ``noise:N``, shards (with wanted answers), a generator, or a folder of images.

    Raises:
        ConfigError: Not a transfer set.
        ArtifactError: Missing or damaged, or made from another teacher (its teacher's will do).
    """
    kind, count = _counted(name)
    info = teacher.classifier.info
    if kind in ("real", "noise") and not Path(name).exists():
        if kind == "noise":
            if not count:
                raise ConfigError("transfer set noise needs a number of images", "e.g. noise:1000")
            return TransferSet(NoiseSource(count, info.input_size, seed), {"role": "transfer-set", "spec": name})
        if teacher.dataset is None:
            raise ConfigError(f"transfer set {name}: the teacher's record names no dataset", "use shards or a folder")
        real = real_images(teacher, teacher.dataset, data_dir, count, seed)
        parent = {"role": "transfer-set", "spec": f"{name} {teacher.dataset}"}
        for content in datasets.contents(teacher.dataset):
            parent["sha256"] = content["sha256"]
        return TransferSet(real, parent)
    path = Path(name)
    if not path.is_dir():
        hint = "make it: dfkd synthesize --method zskd" if name.rstrip("/") == "shards" else "check --transfer-set"
        raise ArtifactError(f"no transfer set at {name}", hint)
    ours = _ours(name, info, seed, wanted)
    if ours is not None:
        found, made_from = ours
        if made_from not in teacher.line:
            raise ArtifactError(f"{name} was made from another teacher", "give the --teacher it was made from")
        return found
    folder = FolderSource(path, info.input_size)
    return TransferSet(folder, {"role": "transfer-set", "path": name, "sha256": folder.sha256})


def _ours(name: str, info: ModelInfo, seed: int, wanted: Collection[str] = ()) -> tuple[TransferSet, str] | None:
    """Shards or a generator, and the identity of the teacher they were made from; None where the name is neither's."""
    path = Path(name)
    if (path / MANIFEST).exists():
        reader = ShardReader(path)
        sha256, made_from, uses = reader.sha256, reader.teacher, reader.manifest.get("uses", ())
        source: Source = ShardSource(reader, wanted)
    elif (path / generators.RECORD).exists():
        made_by, record = generators.load_generators(path)
        sha256, uses = generators.identity(record), ()
        try:
            made = record["provenance"]
            made_from = str(made["teacher"])
            source = GeneratorSource(made_by, made["num_images"], made["config"]["batch_size"], seed)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{name}: its provenance is damaged: {error}", "make the generator again") from None
    else:
        return None
    if source.shape != info.input_size:
        raise ArtifactError(f"{name} has images of {source.shape}, the teacher takes {info.input_size}")
    return TransferSet(source, {"role": "transfer-set", "path": name, "sha256": sha256}, uses), made_from


def concatenate(sets: list[TransferSet]) -> Source:
    """All transfer sets as one."""
    return sets[0].source if len(sets) == 1 else Concat([s.source for s in sets])


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

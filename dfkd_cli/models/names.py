"""What the name of a model means: one that is there, to be opened, or an architecture, to be built anew."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from dfkd_cli.artifacts.files import digest, sha256_file
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader, as_pixels
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.black_box import BlackBox, Function
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.committee import committee
from dfkd_cli.models.directory import changed_code, identity, load_model, read_record
from dfkd_cli.models.exported import RECORD as EXPORT
from dfkd_cli.models.exported import load_export, read_export
from dfkd_cli.models.registry import build, code_hashes, family, load_code
from dfkd_cli.models.weights import load_weights
from dfkd_cli.options import FOREIGN, ForeignModel, SeenTeacher
from dfkd_cli.spec import LIBRARIES, Spec
from dfkd_cli.trust import Code

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that was read, with its identity.

    Attributes:
        classifier: On the CPU.
        sha256: Stands for the weights and how they are used.
        record: ``model.json``, or what would stand there of a foreign model.
        path: Where it was read from, as it was named.
        unknown: Whether nobody knows what is inside, and so which images were made from it.
        size: Bytes of the file of its weights; None where there is none.
        formerly: The hash by which earlier versions recorded it, where that is another.
    """

    classifier: Classifier
    sha256: str
    record: dict[str, Any]
    path: str
    unknown: bool = False
    size: int | None = None
    formerly: str | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        """Where it comes from: its ``dataset``, ``teacher`` (by hash) ..., as far as its record says."""
        return self.record.get("provenance", {})

    @property
    def dataset(self) -> str | None:
        """The dataset it was trained on, as far as its record says."""
        return self.provenance.get("dataset")

    @property
    def ancestry(self) -> tuple[str, ...]:
        """Its own hash, that of its teacher where it was a student, of that one's teacher...: images of all fit it."""
        taught_by = [self.provenance["teacher"]] if "teacher" in self.provenance else []
        return (self.sha256, *self.provenance.get("line", taught_by))

    def knows(self, made_from: str | None) -> bool:
        """Whether images that were made from a teacher, by its hash, can have been made from this one or its line."""
        return self.unknown or made_from in self.ancestry

    def network(self) -> LoadedModel:
        """It, where it is a network that can be looked into.

        Raises:
            ConfigError: Only its answers are seen.
        """
        if self.classifier.opaque:
            raise ConfigError(f"{self.path}: only answers are seen of it", "give the network, a model directory")
        return self

    def seen(self, said: ForeignModel, budget: int | None = None) -> LoadedModel:
        """It as the flags say that it is seen: itself, or a black box that is asked about at most so many images."""
        if not isinstance(said, SeenTeacher) or not said.only_asked:
            return self
        if isinstance(self.classifier, BlackBox):
            what = f"--answers {said.answers}: the answers in {self.path} are seen as they are stored"
            raise ConfigError(what, "leave it out")
        return dataclasses.replace(
            self, classifier=BlackBox(self.classifier, self.classifier.info, said.answers, budget)
        )

    def parent(self, role: str) -> dict[str, Any]:
        """The entry in a run's list of parents."""
        formerly = {} if self.formerly is None else {"formerly": self.formerly}
        return {"role": role, "path": self.path, "sha256": self.sha256} | formerly


def together(models: Sequence[LoadedModel], combine: Literal["probabilities", "logits"]) -> LoadedModel:
    """Models that answer as one. Images that were made from any of them fit it.

    Raises:
        ArtifactError: They take other images, or know other classes.
        ConfigError: One is the answers that a transfer set stores.
    """
    if len(models) == 1:
        return models[0]
    if stored := [model.path for model in models if isinstance(model.classifier, BlackBox)]:
        what = f"{stored[0]}: its answers are to the images that it stores, and other teachers see them changed"
        raise ConfigError(what, "give it as the only teacher")
    line = [sha256 for model in models for sha256 in model.ancestry]
    datasets = {model.dataset for model in models}
    provenance = {"dataset": datasets.pop() if len(datasets) == 1 else None, "line": line}
    one = committee([model.classifier for model in models], combine)
    sha256 = digest([combine, *(model.sha256 for model in models)])
    path, unknown = " ".join(model.path for model in models), any(model.unknown for model in models)
    return LoadedModel(one, sha256, {"provenance": provenance}, path, unknown)


@dataclass(frozen=True)
class ModelDirectory:
    """A directory with ``model.json``, which says what it is."""

    name: str

    @property
    def dataset(self) -> str | None:
        """The dataset it was trained on, as far as its record says."""
        return read_record(Path(self.name)).get("provenance", {}).get("dataset")

    @property
    def sha256(self) -> str:
        """Stands for its weights and how they are used."""
        return identity(read_record(Path(self.name)))

    def open(self, code: Code) -> LoadedModel:
        """Read and check it, as :func:`~dfkd_cli.models.directory.load_model` does."""
        classifier, record = load_model(Path(self.name), code=code)
        sha256 = identity(record)
        if now := changed_code(record, spec := code.locate(classifier.info.spec, Path(self.name))):
            LOG.warning("%s was made with other code than %s has now: it counts as another model", self.name, spec)
            sha256 = digest([sha256, now])
        return LoadedModel(classifier, sha256, record, self.name, size=_size(self.name, record))


@dataclass(frozen=True)
class ExportDirectory:
    """A directory with ``export.json``: an ONNX model that onnxruntime runs."""

    name: str

    @property
    def dataset(self) -> str | None:
        """The dataset that the model in it was trained on, as far as its record says."""
        return read_export(Path(self.name)).get("provenance", {}).get("dataset")

    def open(self, code: Code) -> LoadedModel:
        """Read and check it, as :func:`~dfkd_cli.models.exported.load_export` does. No code is run."""
        classifier, record = load_export(Path(self.name))
        return LoadedModel(classifier, identity(record), record, self.name, size=_size(self.name, record))


def _size(directory: str, record: dict[str, Any]) -> int:
    return Path(directory, record["weights"]["file"]).stat().st_size


@dataclass(frozen=True)
class ForeignWeights:
    """A SPEC, a file of weights for it, and what the file does not say; ``key`` is where in the file they are."""

    name: str
    weights: Path
    info: ModelInfo
    key: str | None = None
    dataset: ClassVar[None] = None  # nobody says

    @property
    def sha256(self) -> str:
        """Stands for its weights and how they are used, and for its code, wherever that lies.

        Raises:
            ArtifactError: A file is missing.
        """
        return self.hashes[0]

    @property
    def hashes(self) -> list[str]:
        """That hash, and with code those of earlier versions: by its whole file, and by the SPEC as it was typed."""
        spec = Spec.read(self.info.spec)
        factory = {"spec": spec.bits + spec.name}
        return [*(self._hash(factory | {"code": code}) for code in code_hashes(self.info.spec)), self._hash({})]

    @functools.cached_property
    def _weights_sha256(self) -> str:
        """Of a file that may be large, for all hashes that it is in."""
        if self.weights.is_dir():
            raise ArtifactError(f"{self.weights} is a directory", "give the file of weights in it to --weights")
        if not self.weights.is_file():
            raise ArtifactError(f"no weights file {self.weights}", "check --weights")
        return sha256_file(self.weights)

    def _hash(self, code: dict[str, str]) -> str:
        facts = dataclasses.asdict(self.info) | code
        return digest([self._weights_sha256, facts, *([self.key] if self.key else [])])

    def open(self, code: Code) -> LoadedModel:
        """Build it and load the weights.

        Raises:
            ConfigError: It cannot be built.
            ArtifactError: The file is missing, or is not of this network; or the SPEC is code that may not run.
        """
        (sha256, *older), size = self.hashes, self.weights.stat().st_size

        def load(net: nn.Module) -> None:
            load_weights(net, self.weights, self.key)

        with torch.random.fork_rng(devices=[]):
            net = build(self.info.spec, self.info.num_classes, self.info.input_size, code.may_run(self.name), load)
        # Its older hashes are in its line, which its students go on with: images that were made then fit all of them.
        record = dataclasses.asdict(self.info) | {"provenance": {"line": older} if older else {}}
        formerly = older[0] if older else None
        return LoadedModel(Classifier(net, self.info), sha256, record, self.name, size=size, formerly=formerly)


@dataclass(frozen=True)
class UserFunction:
    """A user's function of pixels, and what it does not say of them."""

    name: str
    info: ModelInfo
    dataset: ClassVar[None] = None  # nobody says

    def open(self, code: Code) -> LoadedModel:
        """Import it.

        Raises:
            ConfigError: There is no such function.
            ArtifactError: The SPEC is code that may not run.
        """
        code.check(self.name)
        function = Function(load_code(self.name), self.name, self.info.num_classes)
        asked = Classifier(function, self.info.of_pixels())
        facts = dataclasses.asdict(self.info)
        sha256, *older = (digest([facts, code]) for code in (*code_hashes(self.name), None))
        formerly = older[0] if older else None
        return LoadedModel(asked, sha256, facts | {"provenance": {}}, self.name, unknown=True, formerly=formerly)


@dataclass(frozen=True)
class StoredAnswers:
    """A shard directory, which stores what a teacher answered to its images."""

    name: str
    dataset: ClassVar[None] = None  # it may be real, and is not to be opened

    def open(self, code: Code) -> LoadedModel:
        """Read the answers. Its hash is the teacher's: images that were made from that one fit it.

        Raises:
            ArtifactError: The directory is damaged.
        """
        reader = ShardReader(Path(self.name))
        channels = reader.shape[0]
        info = ModelInfo(
            f"answers in {self.name}", reader.num_classes, reader.shape, (0.0,) * channels, (1.0,) * channels,
            tuple(reader.manifest.get("classes") or ()) or None,
        )  # fmt: skip
        stored = BlackBox(None, info, "probabilities")
        for index in range(len(reader.sizes)):
            tensors = reader.read(index)
            stored.ledger.know(as_pixels(tensors["images"]), tensors["logits"])
        return LoadedModel(stored, reader.teacher, dataclasses.asdict(info) | {"provenance": {}}, self.name)


# Their official weights take pixels in [-1,1]: torchvision's transform_input makes these of normalised ones.
TRANSFORMING = ("torchvision:inception_v3", "torchvision:googlenet")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Another kind is one more class here, and one more case in `locate`.
Location = ModelDirectory | ExportDirectory | ForeignWeights | UserFunction | StoredAnswers


def made_by_dfkd(path: str) -> ModelDirectory | ExportDirectory:
    """A directory that is a model or, as its files say, an export."""
    return ExportDirectory(path) if Path(path, EXPORT).is_file() else ModelDirectory(path)


def locate(name: str, said: ForeignModel) -> Location:
    """What ``--teacher`` names: a model directory, a set with its answers, or a SPEC of which flags say the rest.

    Of a black box, code without weights is a function, not a network.

    Raises:
        ArtifactError: There is nothing, or a file.
        ConfigError: Too much is said of a directory, or too little of a foreign model.
    """
    path = Path(name)
    flags = [f"--{key.replace('_', '-')}" for key in FOREIGN if getattr(said, key) is not None]
    if path.is_dir():
        if flags:
            raise ConfigError(f"{path} is a directory, which says what it is", f"leave out {', '.join(flags)}")
        return StoredAnswers(name) if (path / MANIFEST).is_file() else made_by_dfkd(name)
    if said.weights is not None:
        return ForeignWeights(name, Path(said.weights), _info(name, said), said.weights_key)
    if ":" in name and isinstance(said, SeenTeacher) and said.only_asked:
        return UserFunction(name, _info(name, said))
    if path.is_file():
        raise ArtifactError(
            f"{path} is a file, not a model directory",
            "give its architecture and file: --teacher SPEC --weights FILE --input-size C H W --num-classes K",
        )
    if ":" in name:
        raise ConfigError(
            f"teacher {name} has no weights", "give --weights FILE; of a function that is only asked, --answers"
        )
    made = {"teacher": "train one: dfkd train-teacher", "student": "train one: dfkd distill"}
    what = f"no {'student' if name == 'student' else 'teacher'} at {path}"
    raise ArtifactError(what, made.get(name, "a SPEC needs --weights FILE too"))


def _info(name: str, said: ForeignModel) -> ModelInfo:
    """What flags say of a network or a function."""
    if said.input_size is None or said.num_classes is None:
        missing = [f"--{key.replace('_', '-')}" for key in ("input_size", "num_classes") if getattr(said, key) is None]
        raise ConfigError(f"teacher {name}: its file does not say its input", f"give {' and '.join(missing)}")
    channels = said.input_size[0]
    read = Spec.read(name)
    spec = name if read.file is None else f"{read.bits}{read.file}:{read.name}"  # without a leading ./
    mean, std = said.mean or (0.0,) * channels, said.std or (1.0,) * channels
    if max(map(abs, mean + std)) > 1:
        LOG.warning("teacher %s: mean %s, std %s are of pixels in [0,255]; here pixels are in [0,1], divide by 255",
                    name, mean, std)  # fmt: skip
    if spec in TRANSFORMING and (mean, std) == IMAGENET:
        LOG.warning(
            "%s: its official weights take ImageNet's mean and std only to undo them; taken are 0.5 and 0.5", spec
        )
        mean = std = (0.5,) * channels
    if said.mean is said.std is None and read.source in LIBRARIES:
        LOG.warning(
            "teacher %s: pixels in [0,1] are not normalised; weights of such networks mostly take --mean %s --std %s",
            name, *(" ".join(map(str, values)) for values in IMAGENET),
        )  # fmt: skip
    return ModelInfo(spec, said.num_classes, said.input_size, mean, std)


@dataclass(frozen=True)
class Architecture:
    """What a SPEC means where a new model is wanted.

    Attributes:
        spec: What builds it.
        directory: The model directory whose record says so; None where the SPEC itself does.
        copied: The model whose weights the new one begins with; None where it begins with random ones.
    """

    spec: str
    directory: str | None = None
    copied: ModelDirectory | ForeignWeights | None = None

    @property
    def parents(self) -> list[dict[str, Any]]:
        """What it is read from, as a run's parents: a directory counts by what its record says, a file by its code."""
        if self.copied is not None:
            return [{"role": "weights", "path": self.copied.name, "sha256": self.copied.sha256}]
        file = Spec.read(self.spec).file
        if self.directory is None and file is None:
            return []
        known = code_hashes(self.spec)
        known = known if self.directory is None else [*known[:1], digest(self.spec)]
        hashes = dict(zip(("sha256", "formerly"), known, strict=False))
        return [{"role": "architecture", "path": self.directory or str(file)} | hashes]


def architecture(name: str, code: Code = Code(), teacher: Location | None = None) -> Architecture:  # noqa: B008
    """The architecture that a SPEC names: that of a model directory, or any that can be built.

    A copy with few bits begins with the weights of the directory or, where none is named, of the teacher; of a copy of
    that kind, the bits are other ones.

    Raises:
        ArtifactError: A directory without a model.
        ConfigError: A copy of the teacher, which is not one network.
    """
    bits, rest = (read := Spec.read(name)).bits, read.rest
    if bits and not rest:
        if not isinstance(teacher, ModelDirectory | ForeignWeights):
            raise ConfigError(f"{name} is a copy of the teacher, which has to be one network", f"{name}DIR")
        if isinstance(teacher, ForeignWeights):
            return Architecture(bits + teacher.name, copied=teacher)
        rest = teacher.name
    if family(rest) is None and Path(rest).is_dir():
        spec = code.locate(read_record(Path(rest))["spec"], Path(rest))
        if bits:
            return Architecture(bits + Spec.read(spec).rest, copied=ModelDirectory(rest))
        return Architecture(spec, rest)
    return Architecture(name)

"""What is measured of a model: its answers on images, how far they are those of its teacher, and its cost."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassCalibrationError, MulticlassStatScores

from dfkd_cli.data import datasets
from dfkd_cli.data.sources import Images, RealSource, Source, batches
from dfkd_cli.errors import GateNotMet
from dfkd_cli.models.black_box import Function
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.names import LoadedModel

BATCH = 500  # images of a forward pass
CPU = torch.device("cpu")


def share(hits: Tensor) -> float:
    """The share of True: float64, so that 19 of 20 is 0.95 and no gate at 0.95 sees less."""
    return float(hits.double().mean())


def top1(model: Classifier, source: Source, batch_size: int = BATCH) -> float:
    """Share of the labelled images whose label the model gives; it is shown ``batch_size`` at once."""
    return _share_answered(model, source, lambda images: images.true_labels, batch_size)


def agreement(student: Classifier, teacher: Classifier, source: Source, batch_size: int = BATCH) -> tuple[float, float]:
    """Share of images on which two models give the same class, and share of the teacher's most frequent class.

    Both are shown ``batch_size`` images at once.
    """
    teacher.eval().to(student.mean.device)
    counts = torch.zeros(teacher.info.num_classes, dtype=torch.long)

    def answer(images: Images) -> Tensor:
        classes = teacher(images.pixels).argmax(1)
        counts.add_(classes.bincount(minlength=len(counts)).cpu())
        return classes

    return _share_answered(student, source, answer, batch_size), int(counts.max()) / len(source)


@torch.no_grad()
def _share_answered(model: Classifier, source: Source, expected: Callable[[Images], Tensor], batch_size: int) -> float:
    # Counted batch by batch: answers kept among the large buffers of a long set would hold on to their memory.
    model.eval()
    device = model.mean.device
    correct = sum(int((model(i.pixels).argmax(1) == expected(i)).sum()) for i in batches(source, batch_size, device))
    return correct / len(source)


@dataclass(frozen=True, eq=False)
class Examination:
    """What a model answers to labelled images.

    Attributes:
        measures: ``top1`` and ``top5`` (shares; top-K of fewer than five classes), ``nll`` (nats per image), ``ece``
            (15 bins of equal width, weighted absolute gaps), ``per_class`` (share correct by class name, NaN without
            images).
        answers: The class (N,) that it gives to each image, on the CPU.
        classes: The names of its classes.
    """

    measures: dict[str, Any]
    answers: Tensor
    classes: Sequence[str]

    def agreement(self, teacher: Examination) -> float:
        """Share of the images to which both give the class of the same name; of the same number if names differ."""
        answers, own, theirs = self.answers, list(self.classes), list(teacher.classes)
        if own != theirs and set(own) == set(theirs):
            answers = torch.tensor([theirs.index(name) for name in own])[answers]
        return share(answers == teacher.answers)


@torch.no_grad()
def examine(
    model: Classifier, source: Source, classes: Sequence[str], device: torch.device, batch_size: int = BATCH
) -> Examination:
    """Accuracy and calibration on images that are labelled as the model counts its classes, in one pass."""
    model, count = model.eval().to(device), len(classes)
    # Counts, because torchmetrics' ready accuracies are rounded to float32.
    by_class = MulticlassStatScores(count, average="none").to(device)
    in_five = MulticlassStatScores(count, average="micro", top_k=min(5, count)).to(device)
    ece = MulticlassCalibrationError(count, n_bins=15, norm="l1").to(device)
    nll, answers = 0.0, []
    for images in batches(source, batch_size, device):
        assert images.labels is not None
        logits = model(images.pixels).float()
        by_class.update(logits, images.labels)
        in_five.update(logits, images.labels)
        # Not logits: where all lie in [0,1] they would be taken for probabilities. Below 1: exactly 1 has a 16th bin.
        ece.update(logits.softmax(1).clamp(max=1 - 2**-24), images.labels)
        nll += float(F.cross_entropy(logits, images.labels, reduction="sum"))
        answers.append(logits.argmax(1).cpu())
    correct, *_, present = by_class.compute().cpu().double().unbind(1)
    measures = {
        "top1": float(correct.sum() / present.sum()),
        "top5": int(in_five.compute()[0]) / len(source),
        "nll": nll / len(source),
        "ece": float(ece.compute()) if math.isfinite(nll) else math.nan,  # torchmetrics counts NaN as 0
        "per_class": dict(zip(classes, (correct / present).tolist(), strict=True)),
    }
    return Examination(measures, torch.cat(answers), model.info.classes or classes)


@torch.no_grad()
def cost(model: Classifier, device: torch.device) -> dict[str, Any]:
    """``parameters``; ``macs``, the multiply-accumulates of one image in matrix products and convolutions.

    Also ``latency_ms``: the median time of one image alone, on ``device``, with one thread. None of a user's function:
    nobody knows what is inside, and each question may cost.
    """
    if isinstance(model.net, Function):
        return dict.fromkeys(("parameters", "macs", "latency_ms"))
    model = model.eval().to(device)
    image = torch.zeros(1, *model.info.input_size, device=device)
    with FlopCounterMode(display=False) as flops:
        model(image)
    return {
        "parameters": model.num_parameters,
        "macs": flops.get_total_flops() // 2,
        "latency_ms": 1000 * seconds(functools.partial(model, image), threads=1),
    } | model.recorded


def seconds(call: Callable[[], Any], threads: int, **least: float) -> float:
    """The median time of a call, with so many CPU threads, from runs of ``min_run_time`` seconds at least."""
    # Importing the timer loads PyTorch's compiler of extensions, which warns about compilers that are not needed here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return float(timer.blocked_autorange(**least).median)  # type: ignore[arg-type]  # it has two parameters


class Examiner:
    """Examines models on the test images of datasets, each model once.

    Classes are matched by their names, in whatever order a model counts them; by position where it has no names for
    them, or others than the dataset.
    """

    def __init__(self, device: torch.device, data_dir: str | None, batch_size: int = BATCH) -> None:
        self.device, self.batch_size = device, batch_size
        self.data_dir = data_dir
        self._load = functools.cache(functools.partial(datasets.load, data_dir=data_dir))
        self._examinations: dict[Any, Examination] = {}
        self._answered: dict[Any, Examination] = {}
        self._costs: dict[Any, dict[str, Any]] = {}  # of each architecture
        self._by_position: dict[str, None] = {}

    def images(self, dataset: str, info: ModelInfo, model: str, split: datasets.Split = "test") -> datasets.Dataset:
        """A dataset's images as a model takes them, labelled as it counts its classes.

        Raises what :func:`datasets.load` and :meth:`datasets.Dataset.labelled_for` do.
        """
        images = self._load(dataset, split, image_shape=info.input_size).labelled_for(info, model)
        if images.classes != info.classes:
            self._by_position[model] = None
        return images

    @property
    def caveat(self) -> str:
        """What is to be said of models whose classes are matched by position; empty if there are none."""
        models = ", ".join(self._by_position)
        return models and f"{models}: {datasets.BY_POSITION}"

    def examine(self, model: LoadedModel, dataset: str) -> Examination:
        """Show a dataset's test images to a model."""
        key = model.sha256, model.classifier.info.classes, dataset  # names of classes are no part of the hash
        if key not in self._examinations:
            images = self.images(dataset, model.classifier.info, model.path)
            examination = examine(model.classifier, RealSource(images), images.classes, self.device, self.batch_size)
            self._examinations[key] = examination
        return self._examinations[key]

    def agreement(self, model: LoadedModel, teacher: LoadedModel, name: str, source: Source) -> float:
        """Share of images, which are opened for the teacher by name, to which a model and it give the same class."""
        opened = name, teacher.sha256
        return self._answers(model, opened, source).agreement(self._answers(teacher, opened, source))

    @torch.no_grad()
    def _answers(self, model: LoadedModel, opened: tuple[str, str], source: Source) -> Examination:
        """What a model answers to images without labels."""
        classifier, key = model.classifier, (model.sha256, model.classifier.info.classes, opened)
        if key not in self._answered:
            classifier.eval().to(self.device)
            shown = batches(source, self.batch_size, self.device)
            answers = torch.cat([classifier(images.pixels).argmax(1).cpu() for images in shown])
            names = classifier.info.classes or range(classifier.info.num_classes)
            self._answered[key] = Examination({}, answers, [*map(str, names)])
            classifier.cpu()
        return self._answered[key]

    def measure(self, model: LoadedModel, teacher: LoadedModel | None, dataset: str | None) -> dict[str, Any]:
        """The measures of a model, its ``agreement`` with the teacher, None without one, and what it costs.

        Beside what :func:`cost` says ``bytes``, those of the file of its weights. Without test images, what it costs.
        """
        measures, agreement = {}, None
        if dataset is not None:
            examination = self.examine(model, dataset)
            measures = examination.measures
            agreement = None if teacher is None else examination.agreement(self.examine(teacher, dataset))
        architecture = _architecture(model)
        if architecture not in self._costs:
            self._costs[architecture] = cost(model.classifier, self.device)
        model.classifier.cpu()  # many models are measured, one after the other
        return {**measures, "agreement": agreement, "bytes": model.size, **self._costs[architecture]}


def _architecture(model: LoadedModel) -> tuple[Any, ...]:
    """What models have in common that cost the same, such as repeats over seeds.

    Users' networks of the same SPEC need not be alike: it names a file, of which there may be another one elsewhere. Of
    what only answers are seen of, each is one of its own.
    """
    net, info = model.classifier.net, model.classifier.info
    if model.classifier.opaque:
        return (model.sha256,)
    shapes = tuple((name, tensor.shape) for name, tensor in net.state_dict().items())
    code = frozenset(type(module).__module__ for module in net.modules())  # says in which file of a user it is
    return info.spec, info.num_classes, info.input_size, str(net), shapes, code


def check_gate(
    models: Iterable[tuple[str, float]], least: float | None, answer: Mapping[str, Any], what: str = "top-1"
) -> None:
    """Raise :class:`GateNotMet`, with the answer, where that of a model, by its path, is below."""
    below = [f"{path} {share:.6g}" for path, share in models if least is not None and share < least]
    if below:
        raise GateNotMet(f"{what} is below {least:.6g}: {', '.join(below)}", answer=answer)

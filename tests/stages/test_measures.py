"""Accuracy, calibration, agreement and cost of a model, against NumPy."""

from __future__ import annotations

import json
import time

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from dfkd_cli.data.datasets import Dataset
from dfkd_cli.data.sources import RealSource
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.names import LoadedModel
from dfkd_cli.stages.measures import Examiner, agreement, cost, examine, top1
from dfkd_cli.ui import finite

CPU = torch.device("cpu")


class Table(nn.Module):
    """Answers image n, whose first pixel is n of 255, with row n of a table of logits."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.from_numpy(logits).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def exam(logits: np.ndarray, labels: np.ndarray, chunk: int = 60) -> tuple[Classifier, RealSource, tuple[str, ...]]:
    count, classes = logits.shape
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(count)
    names = tuple(f"class {k}" for k in range(classes))
    dataset = Dataset("made up", "test", names, (1, 2, 2), torch.from_numpy(labels), pixels)
    model = Classifier(Table(logits), ModelInfo("table", classes, (1, 2, 2), (0.0,), (1.0,)))
    return model, RealSource(dataset, chunk=chunk), names


def ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[index == b].mean() - confidence[index == b].mean()) * (index == b).sum() for b in set(index)]
    return sum(gaps) / len(labels)


@pytest.mark.parametrize("classes", [3, 8])
@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(3.0, id="usual"),
        pytest.param(400.0, id="saturated: probabilities are exactly 0 and 1"),
        pytest.param(0.0, id="logits that could be probabilities"),
    ],
)
def test_accuracy_and_calibration(scale, classes):
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(201, classes)) * scale if scale else rng.random((201, classes))
    logits = logits.astype(np.float32).astype(np.float64)
    labels = np.where(rng.random(201) < 0.5, logits.argmax(1), rng.integers(0, classes, 201))
    labels[labels == 1] = 0  # class 1 has no image
    examination = examine(*exam(logits, labels), CPU, batch_size=7)
    measures = examination.measures

    best = np.argsort(-logits, axis=1)[:, :5]
    probabilities = oracles.softmax(logits)
    log_probabilities = logits - logits.max(1, keepdims=True)
    log_probabilities -= np.log(np.exp(log_probabilities).sum(1, keepdims=True))
    per_class = measures.pop("per_class")
    assert examination.answers.tolist() == logits.argmax(1).tolist()
    assert measures == {
        "top1": (logits.argmax(1) == labels).mean(),  # exactly
        "top5": (best == labels[:, None]).any(1).mean(),
        "nll": pytest.approx(-log_probabilities[np.arange(201), labels].mean(), rel=1e-6),
        "ece": pytest.approx(ece(probabilities, labels), rel=1e-5),
    }
    assert list(per_class) == [f"class {k}" for k in range(classes)]
    assert np.isnan(per_class.pop("class 1"))
    assert per_class == {f"class {k}": (logits.argmax(1)[labels == k] == k).mean() for k in range(classes) if k != 1}


def test_certainty_is_in_the_last_of_the_15_bins():
    logits = np.repeat([[30.0, 0.0], [3.0, 0.0]], 10, axis=0)  # confidence 1 in float32, and 0.95
    labels = np.repeat([1, 0], 10)  # wrong, and right: gaps of opposite sign that one bin cancels
    measures = examine(*exam(logits, labels), CPU).measures
    assert measures["ece"] == pytest.approx((1 + oracles.softmax(logits)[-1, 0]) / 2 - 0.5, rel=1e-6)


def test_a_share_is_exact_so_that_a_gate_at_it_is_met():
    right = np.array([0] * 19 + [1])
    model, source, names = exam(np.tile([[1.0, 0.0]], (20, 1)), right)
    assert examine(model, source, names, CPU).measures["top1"] == 0.95
    assert top1(model, source) == 0.95  # float32 says 0.9499999881
    other, *_ = exam(np.eye(2)[right], right)
    assert agreement(model, other, source) == (0.95, 0.95)
    assert agreement(other, model, source) == (0.95, 1.0)


def test_shares_count_every_image_of_every_chunk():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    labels = np.random.default_rng(1).integers(4, size=50)
    model, source, _ = exam(logits, labels, chunk=20)
    assert top1(model.train(), source) == np.mean(logits.argmax(1) == labels)
    assert not model.training


def test_a_broken_model_has_no_likelihood_and_no_calibration():
    logits = np.random.default_rng(0).normal(size=(30, 4))
    logits[3] = np.nan
    measures = finite(examine(*exam(logits, np.zeros(30, dtype=np.int64)), CPU).measures)
    assert measures["nll"] is None
    assert measures["ece"] is None
    json.dumps(measures, allow_nan=False)


def test_finite_keeps_what_json_has():
    value = {"a": [1.5, float("nan"), {"b": float("-inf")}], "c": None, "d": "nan", "e": 3, "f": True}
    assert finite(value) == {"a": [1.5, None, {"b": None}], "c": None, "d": "nan", "e": 3, "f": True}


class Slow(nn.Module):
    """A network of known cost: 1x6x6 to 2x4x4 by 3x3 filters, then to 3 classes, in 5 ms or more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)
        self.threads: list[int] = []
        self.begun: list[float] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.begun.append(time.perf_counter())
        time.sleep(0.005)
        self.threads.append(torch.get_num_threads())
        assert len(images) == 1
        return self.linear(self.conv(images).flatten(1))


def test_cost():
    net, before = Slow(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        costs = cost(Classifier(net, ModelInfo("slow", 3, (1, 6, 6), (0.1,), (0.5,))), CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    latency = costs.pop("latency_ms")
    assert costs == {"parameters": 2 * 9 + 2 + 32 * 3 + 3, "macs": 2 * 4 * 4 * 9 + 32 * 3}
    assert 5 <= latency <= 1000 * np.diff(net.begun).max()  # how long it takes beyond the 5 ms is the machine's affair
    assert net.threads[-1] == 1


class Opaque(Classifier):
    """Says what it costs, as exports do."""

    opaque = True

    def __init__(self, parameters: int) -> None:
        super().__init__(nn.Flatten(), INFO)
        self.recorded = {"parameters": parameters}


INFO = ModelInfo("./net.py:build", 16, (1, 4, 4), (0.0,), (1.0,))  # relative: each may be of another file


def named(module: str, forward) -> nn.Module:
    """A network without parameters, of a class ``Net`` of a user's file."""
    return type("Net", (nn.Module,), {"__module__": module, "forward": forward})()


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (nn.Conv2d(1, 1, 4), nn.Conv2d(1, 16, 4), "parameters"),
        (nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, stride=2), "macs"),
        (named("d1", lambda self, x: x), named("d2", lambda self, x: x @ x), "macs"),
        (Opaque(3), Opaque(4), "parameters"),
    ],
    ids=["shapes", "stride", "code", "export"],
)
def test_each_network_of_a_spec_has_its_own_cost(one, other, what):
    examiner = Examiner(CPU, None)
    classifiers = [net if isinstance(net, Classifier) else Classifier(net, INFO) for net in (one, other)]
    models = [LoadedModel(classifier, f"{n}", {}, f"d{n}") for n, classifier in enumerate(classifiers)]
    measured = [examiner.measure(model, None, None)[what] for model in models]
    assert measured == [cost(classifier, CPU)[what] for classifier in classifiers]
    assert measured[0] != measured[1]


def test_repeats_over_seeds_are_timed_once():
    examiner, nets = Examiner(CPU, None), [nn.Conv2d(1, 16, 4) for _ in range(2)]
    models = [LoadedModel(Classifier(net, INFO), f"{seed}", {}, f"seed{seed}") for seed, net in enumerate(nets)]
    assert examiner.measure(models[0], None, None) == examiner.measure(models[1], None, None)

"""`dfkd evaluate`: every measure against NumPy, and the command on directories that are made here."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from stand_ins import random_images
from torch import nn
from torchvision.io import write_png
from torchvision.utils import save_image

from dfkd_cli.artifacts.shards import MANIFEST, ShardReader, ShardWriter
from dfkd_cli.cli.app import main
from dfkd_cli.data import datasets
from dfkd_cli.data.datasets import Dataset
from dfkd_cli.data.sources import RealSource
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import identity, load_model, save_model
from dfkd_cli.models.registry import build
from dfkd_cli.models.statistics import Moments, RunningMoments, recorded_moments
from dfkd_cli.stages import shard_measures
from dfkd_cli.stages.measures import Examination, agreement, cost, examine, finite, top1
from dfkd_cli.stages.shard_measures import bn_divergences, measure_images, measure_shards

CPU = torch.device("cpu")
DIGITS = tuple("0123456789")


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


# -- models ------------------------------------------------------------------------------------------------------------


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
    probabilities = softmax(logits)
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
    assert measures["ece"] == pytest.approx((1 + softmax(logits)[-1, 0]) / 2 - 0.5, rel=1e-6)


def test_a_share_is_exact_so_that_a_gate_at_it_is_met():
    right = np.array([0] * 19 + [1])
    model, source, names = exam(np.tile([[1.0, 0.0]], (20, 1)), right)
    assert examine(model, source, names, CPU).measures["top1"] == 0.95
    assert top1(model, source) == 0.95  # float32 says 0.9499999881
    other, *_ = exam(np.eye(2)[right], right)
    assert agreement(model, other, source) == 0.95


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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
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
    assert 5 <= latency < 50
    assert net.threads[-1] == 1


# -- impressions -------------------------------------------------------------------------------------------------------


def tiny_teacher() -> Classifier:
    """A classifier of 2x6x6 images in 4 classes with two BatchNorm layers, its statistics as if trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(3 * 4 * 4, 4)
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), head)
        for layer in (net[1], net[3]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        head.weight.data *= 8
    return Classifier(net, ModelInfo("tiny", 4, (2, 6, 6), (0.2, 0.3), (0.5, 0.4))).eval()


def write_shards(
    path: Path, teacher: Classifier, sha256: str, *, targets: bool = True, shift: float = 0.0, sizes=(5, 5, 3)
) -> dict[str, np.ndarray]:
    """Write random impressions, and return all that is in them in float64. ``shift`` falsifies the stored logits."""
    generator, info = torch.Generator().manual_seed(1), teacher.info
    head = {
        "method": "zskd",
        "config": {"temperature": 3.0},
        "shape": list(info.input_size),
        "dtype": "float16",
        "num_classes": info.num_classes,
        "teacher": {"sha256": sha256, "spec": info.spec},
    }
    writer, written = ShardWriter(path, head, len(sizes)), []
    for index, size in enumerate(sizes):
        images = (torch.randn(size, *info.input_size, generator=generator) * 2).half()
        with torch.no_grad():
            shard = {"images": images, "logits": teacher.eval()(images.float()) + shift}
        if targets:
            shard["targets"] = torch.rand(size, info.num_classes, generator=generator).pow(4).softmax(1)
            shard["targets"][0] = torch.eye(info.num_classes)[0]  # zeros have no logarithm
        writer.write(index, shard, {})
        written.append(shard)
    return {name: np.concatenate([shard[name].double().numpy() for shard in written]) for name in written[0]}


def spread(images: np.ndarray) -> float:
    pairs = itertools.combinations(images, 2)
    return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]))


def distance(layer: nn.BatchNorm2d, seen: np.ndarray) -> float:
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    return float(np.linalg.norm(seen.mean((0, 2, 3)) - mean) + np.linalg.norm(seen.var((0, 2, 3)) - var))


def similarity(layer: nn.BatchNorm2d, seen: np.ndarray) -> float:
    """Mean over the channels that were alive in training of the Gaussian of the training from that of the images."""
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    alive = var >= 1e-5
    seen_mean, seen_var = oracles.channel_moments(seen[:, alive])
    return oracles.gaussian_divergence(mean[alive], var[alive], seen_mean, np.maximum(seen_var, 1e-6)).mean()


def prefix_outputs(teacher: Classifier, images: np.ndarray) -> list[np.ndarray]:
    """What comes into the two BatchNorm layers of the tiny teacher."""
    with torch.no_grad():
        normalised = teacher.normalise(torch.from_numpy(images).float())
        return [teacher.net[:stop](normalised).double().numpy() for stop in (1, 3)]


@pytest.mark.parametrize("sample", [1000, 4])
def test_shard_measures(tmp_path, monkeypatch, sample):
    monkeypatch.setattr(shard_measures, "SAMPLE", sample)
    teacher = tiny_teacher()
    data = write_shards(tmp_path, teacher, "0" * 64)
    measures = measure_shards(ShardReader(tmp_path), teacher, CPU, batch_size=2)

    given = data["logits"].argmax(1)
    histogram = np.bincount(given, minlength=4)
    frequent = histogram[histogram > 0] / 13
    aimed, answered = data["targets"], softmax(data["logits"] / 3.0)
    chosen = data["images"] if sample > 13 else data["images"][[0, 3, 6, 9]]
    outputs = dict(zip((1, 3), prefix_outputs(teacher, data["images"]), strict=True))
    layers = {str(i): distance(teacher.net[i], x) for i, x in outputs.items()}
    divergences = {str(i): similarity(teacher.net[i], x) for i, x in outputs.items()}
    assert 0 < (aimed.argmax(1) == given).sum() < 13
    assert measures == {
        "count": 13,
        "confidence": pytest.approx(softmax(data["logits"]).max(1).mean(), rel=1e-9),
        "class_balance": pytest.approx(-(frequent * np.log(frequent)).sum() / np.log(4), rel=1e-6),
        "class_histogram": histogram.tolist(),
        "target_match": (aimed.argmax(1) == given).mean(),
        "target_divergence": pytest.approx(
            np.where(aimed > 0, aimed * np.log(np.maximum(aimed, 1e-300) / answered), 0).sum(1).mean(), rel=1e-9
        ),
        "diversity": pytest.approx(spread(chosen), rel=1e-6),
        "value_range": [data["images"].min(), data["images"].max()],
        "bn_distance": pytest.approx(sum(layers.values()), rel=1e-5),
        "bn_distance_layers": pytest.approx(layers, rel=1e-5),
        "bn_divergence": pytest.approx(sum(divergences.values()) / 2, rel=1e-5),
        "bn_divergence_layers": pytest.approx(divergences, rel=1e-5),
        "logits_ok": True,
    }


def test_shards_without_targets_teacher_or_batch_norm(tmp_path):
    write_shards(tmp_path, tiny_teacher(), "0" * 64, targets=False)
    alone = measure_shards(ShardReader(tmp_path), None, CPU)
    batch_norm = {"bn_distance", "bn_distance_layers", "bn_divergence", "bn_divergence_layers"}
    absent = {"target_match", "target_divergence", *batch_norm, "logits_ok"}
    assert {name for name, value in alone.items() if value is None} == absent
    plain = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(72, 4)), tiny_teacher().info)
    measures = measure_shards(ShardReader(tmp_path), plain, CPU)
    assert all(measures[name] is None for name in batch_norm)
    assert measures["logits_ok"] is False  # another teacher


def test_one_image_has_no_diversity(tmp_path):
    write_shards(tmp_path, tiny_teacher(), "0" * 64, sizes=(1,))
    measures = finite(measure_shards(ShardReader(tmp_path), tiny_teacher(), CPU))
    assert measures["diversity"] is None
    assert measures["class_balance"] == 0


@pytest.mark.parametrize(("shift", "ok"), [(5e-4, True), (5e-3, False)])
def test_falsified_logits_are_noticed(tmp_path, shift, ok):
    teacher = tiny_teacher()
    write_shards(tmp_path, teacher, "0" * 64, shift=shift)
    assert measure_shards(ShardReader(tmp_path), teacher, CPU)["logits_ok"] is ok


def test_moments_of_batches_are_those_of_all():
    rng = np.random.default_rng(0)
    values = (1000 + rng.normal(size=(23, 3, 2, 5)) * [[[[1.0]], [[0.1]], [[20.0]]]]).astype(np.float32)
    moments = RunningMoments()
    for part in np.split(values, [1, 9, 20]):
        moments.add(torch.from_numpy(part))
    exact = values.astype(np.float64)
    assert moments.count == 23 * 10
    np.testing.assert_allclose(moments.mean, exact.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(moments.variance, exact.var((0, 2, 3)), rtol=1e-3)
    sum_of_squares = (values**2).mean((0, 2, 3)) - values.mean((0, 2, 3)) ** 2  # what this must be better than
    assert abs(sum_of_squares[1] / exact.var((0, 2, 3))[1] - 1) > 0.1


def test_images_are_measured_as_impressions_are():
    teacher = tiny_teacher()
    source = random_images(teacher.info, 13, chunk=4)
    measures = measure_images(source, teacher, CPU, batch_size=3)
    pixels = source.all().pixels.double().numpy() / 255
    with torch.no_grad():
        logits = teacher(torch.from_numpy(pixels).float()).double().numpy()
    layers = zip((1, 3), prefix_outputs(teacher, pixels), strict=True)
    assert measures["class_histogram"] == np.bincount(logits.argmax(1), minlength=4).tolist()
    assert measures["confidence"] == pytest.approx(softmax(logits).max(1).mean(), rel=1e-6)
    assert measures["bn_divergence"] == pytest.approx(
        np.mean([similarity(teacher.net[i], x) for i, x in layers]), rel=1e-5
    )
    absent = {"target_match", "target_divergence", "logits_ok"}
    assert {name for name, value in measures.items() if value is None} == absent


def test_divergence_is_not_of_batches_and_not_of_dead_channels():
    teacher = tiny_teacher()
    teacher.net[1].running_var[1] = 9e-6  # far away from anything
    teacher.net[3].running_var[:] = 0
    measures = [measure_images(random_images(teacher.info, 12), teacher, CPU, batch_size=size) for size in (1, 5, 12)]
    pixels = random_images(teacher.info, 12).all().pixels.double().numpy() / 255
    expected = similarity(teacher.net[1], prefix_outputs(teacher, pixels)[0])
    for found in measures:
        assert found["bn_divergence_layers"] == {"1": pytest.approx(expected, rel=1e-5)}
        assert found["bn_divergence"] == found["bn_divergence_layers"]["1"]
        assert set(found["bn_distance_layers"]) == {"1", "3"}


def test_what_was_recorded_has_no_divergence():
    recorded = recorded_moments(tiny_teacher())
    assert bn_divergences({}, recorded) == {}
    assert bn_divergences(recorded, recorded) == {"1": 0.0, "3": 0.0}
    wider = {name: Moments(m.mean, 4 * m.variance) for name, m in recorded.items()}
    narrow = bn_divergences(recorded, wider)["1"], bn_divergences(wider, recorded)["1"]
    assert narrow == pytest.approx(((4 - 1 - np.log(4)) / 2, (1 / 4 - 1 + np.log(4)) / 2), rel=1e-6)  # not symmetric


def test_hooks_are_removed_also_after_a_failure():
    teacher = tiny_teacher()
    source = random_images(teacher.info, 3)
    measure_images(source, teacher, CPU)
    teacher.net[4] = nn.Unflatten(1, (7, 7))  # after both BatchNorm layers
    with pytest.raises(RuntimeError):
        measure_images(source, teacher, CPU)
    assert not teacher.net[1]._forward_pre_hooks
    assert not teacher.net[3]._forward_pre_hooks


def test_layers_that_do_not_run_are_left_out():
    teacher = tiny_teacher()
    teacher.net[1].unused = nn.BatchNorm2d(9)
    assert len(teacher.batch_norms()) == 3
    measures = measure_images(random_images(teacher.info, 3), teacher, CPU)
    assert list(measures["bn_distance_layers"]) == list(measures["bn_divergence_layers"]) == ["1", "3"]


# -- the command -------------------------------------------------------------------------------------------------------


def digits() -> tuple[torch.Tensor, np.ndarray]:
    test = datasets.load("digits", "test")
    return test.images(torch.arange(len(test))).float() / 255, test.labels.numpy()


def make_model(path: Path, spec: str, seed: int = 0, classes: int = 10, **provenance) -> str:
    """A random model that gives digits various classes. Returns its sha256."""
    info = ModelInfo(spec, classes, (1, 32, 32), (0.3,), (0.4,), DIGITS[:classes])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = Classifier(build(spec, classes, info.input_size), info).eval()
        model.head().bias -= model(digits()[0][:50]).mean(0)
    return save_model(path, model, metrics={}, provenance=provenance)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """teacher/ and student/ as the pipeline leaves them, shards/ of resnet/, and things that do not fit."""
    root = tmp_path_factory.mktemp("pipeline")
    teacher = make_model(root / "teacher", "lenet5", dataset="digits")
    make_model(root / "student", "lenet5-half", dataset="digits", teacher=teacher)
    make_model(root / "orphan", "lenet5-half", seed=1, dataset="digits", teacher="f" * 64)
    make_model(root / "three", "lenet5-half", classes=3, dataset="digits")
    make_model(root / "nameless", "lenet5-half")
    resnet = make_model(root / "resnet", "resnet8", dataset="digits")
    write_shards(root / "shards", load_model(root / "resnet")[0], resnet)
    (root / "empty").mkdir()
    return root


@pytest.fixture
def here(pipeline, tmp_path, monkeypatch) -> Path:
    """A copy of the pipeline, as the working directory."""
    shutil.copytree(pipeline, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def top1_of(path: Path) -> tuple[float, np.ndarray]:
    """The accuracy on the test digits and the answers, without the code under test."""
    images, labels = digits()
    with torch.no_grad():
        given = load_model(path)[0].eval()(images).argmax(1).numpy()
    return float((given == labels).mean()), given


def test_nothing_named_is_the_student_beside_the_teacher(pipeline, dfkd):
    before = sorted(pipeline.rglob("*"))
    done = dfkd("evaluate", "--json", cwd=pipeline)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)  # one document and nothing else
    assert set(answer) == {"schema", "ok", "command", "artifacts", "metrics", "results", "seconds"}
    assert (answer["schema"], answer["ok"], answer["command"], answer["artifacts"]) == (1, True, "evaluate", {})
    teacher, student = answer["results"]
    for result in (teacher, student):
        assert set(result) == {
            "path", "kind", "spec", "uses", "dataset", "count", "top1", "top5", "nll", "ece", "per_class", "agreement",
            "parameters", "macs", "latency_ms", "device",
        }  # fmt: skip
        assert tuple(result["per_class"]) == DIGITS
        assert (result["count"], result["dataset"]) == (360, "digits")
    (accuracy, given), (student_accuracy, student_given) = (top1_of(pipeline / n) for n in ("teacher", "student"))
    assert (teacher["path"], teacher["top1"], teacher["agreement"]) == ("teacher", accuracy, 1.0)
    assert (student["path"], student["top1"]) == ("student", student_accuracy)
    assert student["agreement"] == (given == student_given).mean()
    assert 0 < student["agreement"] < 1
    assert student["parameters"] == 78 + 608 + 24120 + 10164 + 850
    assert {k: answer["metrics"][k] for k in ("top1", "macs")} == {k: student[k] for k in ("top1", "macs")}
    assert sorted(pipeline.rglob("*")) == before


def test_gate_and_out(here, dfkd):
    done = dfkd("evaluate", "teacher", "student", "--min-top1", "1", "--out", "out", "--json", cwd=here)
    assert done.returncode == 5, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["ok"], answer["error"]["code"]) == (False, "gate")
    assert f"student {top1_of(here / 'student')[0]:.6g}" in answer["error"]["message"]
    written = json.loads((here / "out" / "results.json").read_text())
    assert [result["path"] for result in written["results"]] == ["teacher", "student"]
    assert json.loads((here / "out" / "run.json").read_text())["status"] == "done"


def test_gate_at_the_very_accuracy_is_met(here, cli):
    exact = top1_of(here / "student")[0]
    assert cli("evaluate", "student/", "--min-top1", repr(exact))[0] == 0
    code, out, err = cli("evaluate", "student/", "--min-top1", repr(exact + 1e-9))
    assert code == 5
    assert f"{exact:.2%}" in out  # the results are shown all the same
    assert "top-1 is below" in err


def test_out_again_and_replayed(here, cli):
    code, first, _ = cli("evaluate", "shards", "student", "--out", "out", "--json")
    assert code == 0
    assert json.loads(first)["artifacts"] == {"results": "out/results.json"}
    before = (here / "out" / "results.json").read_bytes()
    code, again, messages = cli("evaluate", "shards", "student", "--out", "out", "--json", "--min-top1", "0")
    assert code == 0
    assert "already complete" in messages
    assert json.loads(again)["results"] == json.loads(first)["results"] == json.loads(before)["results"]
    assert cli("evaluate", "shards", "orphan", "--out", "out")[0] == 2  # something else is there
    assert (here / "out" / "results.json").read_bytes() == before
    code, replayed, _ = cli("evaluate", "--recipe", "out/config.yaml", "--out", "other", "--json")
    assert code == 0
    assert [result["path"] for result in json.loads(replayed)["results"]] == ["shards", "student"]


def test_shards_and_models_mix(here, cli):
    code, out, err = cli("evaluate", "shards", "student/", "--teacher", "resnet", "--json")
    assert code == 0, err
    shards, student = json.loads(out)["results"]
    assert set(shards) == {
        "path", "kind", "method", "uses", "count", "confidence", "class_balance", "class_histogram", "target_match",
        "target_divergence", "diversity", "value_range", "bn_distance", "bn_distance_layers", "bn_divergence",
        "bn_divergence_layers", "logits_ok",
    }  # fmt: skip
    assert (shards["path"], shards["kind"], shards["method"], shards["count"]) == ("shards", "shards", "zskd", 13)
    assert shards["logits_ok"] is True
    assert len(shards["bn_distance_layers"]) == len(load_model(here / "resnet")[0].batch_norms())
    assert shards["bn_distance"] == pytest.approx(sum(shards["bn_distance_layers"].values()))
    assert (student["path"], student["kind"]) == ("student/", "model")
    assert student["agreement"] == (top1_of(here / "student")[1] == top1_of(here / "resnet")[1]).mean()
    code, out, _ = cli("evaluate", "shards", "student/", "--teacher", "resnet")
    assert code == 0
    assert " ".join(out.splitlines()[0].split()) == "MODEL TOP-1 TOP-5 NLL ECE AGREEMENT PARAMS MACS LATENCY"
    heads = "SET IMAGES CONFIDENCE BALANCE TARGET MATCH DIVERSITY BN DISTANCE BN DIVERGENCE"
    assert " ".join(out.splitlines()[2].split()) == heads
    assert f"{student['top1']:.2%}" in out.splitlines()[1]
    assert f"{shards['bn_distance']:.3f}" in out.splitlines()[3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A directory with the teacher and some of its training images as files."""
    root = tmp_path_factory.mktemp("trained")
    code = main(
        ["train-teacher", "--model", "resnet8", "--steps", "30", "--batch-size", "32", "--out", f"{root}/teacher"]
    )
    assert code == 0
    train = datasets.load("digits", "train")
    (root / "photos").mkdir()
    for index, pixels in enumerate(train.images(torch.arange(60))):
        write_png(pixels, str(root / "photos" / f"{index}.png"))
    return root


def test_sets_of_images_are_ranked_by_their_likeness_to_the_training_data(trained, dfkd):
    paths = ["noise:100", "real:100", "photos/", "digits"]
    done = dfkd("evaluate", *paths, "--out", "out", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert json.loads((trained / "out" / "results.json").read_text())["results"] == results
    assert [(r["path"], r["kind"], r["count"]) for r in results] == [
        ("noise:100", "images", 100), ("real:100", "images", 100),
        ("photos/", "images", 60), ("digits", "images", 1437),
    ]  # fmt: skip
    noise, *real = [result["bn_divergence"] for result in results]
    assert noise > 1.5 * max(real)
    layers = [
        name for name, m in load_model(trained / "teacher")[0].net.named_modules() if isinstance(m, nn.BatchNorm2d)
    ]
    for result in results:
        assert sorted(result["bn_divergence_layers"]) == sorted(layers)
        assert result["bn_divergence"] == pytest.approx(np.mean(list(result["bn_divergence_layers"].values())))


def test_ranks_are_shown_and_by_layer_where_more_is_asked_for(trained, monkeypatch, cli):
    monkeypatch.chdir(trained)
    paths = ["teacher", "noise:40", "digits:40"]
    code, out, err = cli("evaluate", *paths, "--teacher", "teacher", "-v")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[:5]] == ["MODEL", "teacher", "SET", "digits:40", "noise:40"]
    layers = load_model(trained / "teacher")[0].batch_norms()
    assert lines[5] == ["BN", "DIVERGENCE", "digits:40", "noise:40"]
    assert len(lines) == 6 + len(layers)
    assert len(cli("evaluate", *paths)[1].splitlines()) == 5


def test_images_without_batch_norm_or_without_a_teacher(pipeline, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(pipeline)
    code, out, _ = cli("evaluate", "noise:30", "digits:30")  # a LeNet-5
    assert code == 0
    assert " ".join(out.splitlines()[0].split()) == "SET IMAGES CONFIDENCE BALANCE DIVERSITY"
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["noise:30", "digits:30"]
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("evaluate", "noise:30")
    assert code == 2
    assert "give --teacher" in err


def test_a_table_in_a_file_has_whole_paths(here, cli):
    path = "runs/[red]of a very long name" + "x" * 70
    shutil.move(here / "shards", here / path)
    code, out, _ = cli("evaluate", path)
    assert code == 0
    assert path in out.splitlines()[1]


def test_false_logits_are_reported(here, cli):
    classifier, record = load_model(here / "teacher")
    write_shards(here / "false", classifier, identity(record), shift=1.0)
    code, out, err = cli("evaluate", "false", "--json")
    assert code == 0
    assert json.loads(out)["results"][0]["logits_ok"] is False
    assert "false: the stored logits" in err


def test_a_teacher_that_is_not_the_recorded_one(here, cli):
    code, out, err = cli("evaluate", "orphan", "shards", "--json")
    assert code == 0
    orphan, shards = json.loads(out)["results"]
    assert orphan["agreement"] is shards["logits_ok"] is None
    assert err.count("give --teacher") == 1
    assert "orphan, shards:" in err
    code, out, err = cli("evaluate", "orphan", "--teacher", "student", "--json")
    given = [top1_of(here / name)[1] for name in ("orphan", "student")]
    assert json.loads(out)["results"][0]["agreement"] == (given[0] == given[1]).mean()
    assert "give --teacher" not in err
    code, out, _ = cli("evaluate", "shards", "--teacher", "teacher", "--json")  # images like any others to it
    assert code == 0
    assert (shown := json.loads(out)["results"][0])["kind"] == "images"
    reader, teacher = ShardReader(Path("shards")), load_model(Path("teacher"))[0]
    with torch.no_grad():
        answers = torch.cat([teacher(reader.read(i)["images"].float()) for i in range(len(reader.sizes))])
    assert shown["class_histogram"] == answers.argmax(1).bincount(minlength=10).tolist() != shards["class_histogram"]


def test_agreement_is_of_classes_and_not_of_their_numbers(here, cli):
    """The same network, its classes counted backwards, agrees with itself everywhere."""
    model, _ = load_model(here / "teacher")
    with torch.no_grad():
        for parameter in model.head().parameters():
            parameter.copy_(parameter.flip(0))
    for name, classes in (("reversed", model.info.classes[::-1]), ("wrong", model.info.classes)):
        info = dataclasses.replace(model.info, classes=classes)
        save_model(here / name, Classifier(model.net, info), metrics={}, provenance={"dataset": "digits"})
    code, out, err = cli("evaluate", "teacher", "reversed", "wrong", "--teacher", "teacher", "--json")
    assert code == 0, err
    teacher, other, wrong = json.loads(out)["results"]
    assert other["top1"] == teacher["top1"] < 1
    assert other["agreement"] == 1
    given = top1_of(here / "teacher")[1]
    assert wrong["agreement"] == (given == 9 - given).mean() == 0  # although its weights are those of the other
    assert "matched by position" not in err


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (("a", "b", "c"), ("c", "b", "a"), 1.0),
        (("a", "b", "c"), ("a", "b", "c"), 0.25),
        (("a", "b", "c"), ("a", "b", "d"), 0.25),  # other names: by position
        (("a", "a", "b"), ("a", "a", "b"), 0.25),  # names that tell nothing apart
    ],
)
def test_agreement_is_by_name_in_any_order(own, theirs, expected):
    student, teacher = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 2])
    assert Examination({}, student, own).agreement(Examination({}, teacher, theirs)) == expected


def test_classes_without_names_are_matched_by_position_and_that_is_said(here, cli):
    model, record = load_model(here / "student")
    teacher = record["provenance"]["teacher"]
    for name, classes in (("unnamed", None), ("strange", tuple("abcdefghij"))):
        other = Classifier(model.net, dataclasses.replace(model.info, classes=classes))
        save_model(here / name, other, metrics={}, provenance={"dataset": "digits", "teacher": teacher})
    code, out, err = cli("evaluate", "student", "unnamed", "strange", "--json")
    assert code == 0, err
    named, *others = json.loads(out)["results"]
    for other in others:
        assert [other[key] for key in ("top1", "agreement", "per_class")] == [
            named[key] for key in ("top1", "agreement", "per_class")
        ]
    assert err.count("matched by position") == 1
    assert "unnamed, strange: no class names" in err
    assert "matched by position" not in cli("evaluate", "student")[2]


# -- the teacher that is on record -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory, dfkd) -> Path:
    """mentor/, shards/ of it with a student that was trained along, and pupil/, all as the commands leave them."""
    root = tmp_path_factory.mktemp("taught")
    tiny = ("--steps", "2", "--batch-size", "4")
    for command in (
        ["train-teacher", "--steps", "30", "--batch-size", "32", "--out", "mentor"],
        [
            "synthesize",
            "--method",
            "zskt",
            "--teacher",
            "mentor",
            "--student",
            "lenet5-half",
            "--num-images",
            "8",
            *tiny,
        ],
        ["distill", "--teacher", "mentor", "--transfer-set", "noise:8", *tiny, "--out", "pupil"],
    ):
        done = dfkd(*command, cwd=root)
        assert done.returncode == 0, done.stderr
    return root


def agreements(root: Path) -> dict[str, float]:
    """Of the students in the fixture with their teacher, without the code under test."""
    given = {name: top1_of(root / name)[1] for name in ("mentor", "pupil", "shards/student")}
    return {name: float((answers == given["mentor"]).mean()) for name, answers in given.items() if name != "mentor"}


def test_the_recorded_teacher_is_found_where_the_record_says(taught, tmp_path, monkeypatch, cli):
    expected = agreements(taught)
    assert len(set(expected.values())) == 2, "equal agreements would hide a mistake"
    for here, prefix in ((taught, ""), (tmp_path, f"{taught}/")):  # where the command ran, or elsewhere: beside them
        monkeypatch.chdir(here)
        code, out, err = cli("evaluate", *(f"{prefix}{name}" for name in (*expected, "shards")), "--json")
        assert code == 0, err
        *students, shards = json.loads(out)["results"]
        assert [student["agreement"] for student in students] == list(expected.values())
        assert shards["logits_ok"] is True
        assert "not compared" not in err
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_named_is_found_by_its_hash(taught, tmp_path, monkeypatch, cli):
    expected = agreements(taught)["pupil"]
    shutil.copytree(taught / "pupil", tmp_path / "far" / "pupil")
    shutil.copytree(taught / "mentor", tmp_path / "under" / "another-name")
    monkeypatch.chdir(tmp_path)
    for paths in (["far/pupil", "under/another-name"], ["under/another-name", "far/pupil"]):
        code, out, err = cli("evaluate", *paths, "--json")
        assert code == 0, err
        results = {result["path"]: result for result in json.loads(out)["results"]}
        assert list(results) == paths
        assert results["far/pupil"]["agreement"] == expected
    code, out, err = cli("evaluate", "far/pupil", "--json")
    assert json.loads(out)["results"][0]["agreement"] is None
    assert "far/pupil: not compared with the teacher, it is not here -- give --teacher" in err
    shutil.copytree(taught / "mentor", tmp_path / "teacher")
    code, out, err = cli("evaluate", "far/pupil", "--json")
    assert (json.loads(out)["results"][0]["agreement"], "not compared" in err) == (expected, False)


def test_a_typed_teacher_wins_over_the_recorded_one(taught, monkeypatch, cli):
    monkeypatch.chdir(taught)
    code, out, err = cli("evaluate", "pupil", "mentor", "--teacher", "shards/student", "--json")
    assert code == 0, err
    pupil, mentor = json.loads(out)["results"]
    given = {name: top1_of(taught / name)[1] for name in ("pupil", "mentor", "shards/student")}
    assert pupil["agreement"] == (given["pupil"] == given["shards/student"]).mean()
    assert mentor["agreement"] == agreements(taught)["shards/student"]


def test_a_recorded_teacher_that_changed_or_cannot_be_read_is_none(taught, tmp_path, monkeypatch, cli):
    """Nobody asked for it: the student is measured all the same."""
    for name in ("mentor", "pupil"):
        shutil.copytree(taught / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    weights, record = Path("mentor/model.safetensors"), Path("mentor/model.json")
    data, text = weights.read_bytes(), record.read_text()

    def evaluated() -> str:
        code, out, err = cli("evaluate", "pupil", "--json")
        assert (code, json.loads(out)["results"][0]["agreement"]) == (0, None), err
        return err

    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert (
        "pupil: not compared with its teacher, which cannot be read: mentor/model.safetensors: damaged" in evaluated()
    )
    weights.write_bytes(data)
    record.write_text(json.dumps({**json.loads(text), "mean": [0.9]}))
    assert "it is not here" in evaluated()
    for strange in ("{}", json.dumps({**json.loads(text), "weights": 3})):
        record.write_text(strange)
        assert "it is not here" in evaluated()


def test_images_that_changed_are_measured_anew(here, cli):
    for place in ("train/0", "train/1", "test/0", "test/1"):
        Path("photos", place).mkdir(parents=True)
        save_image(torch.rand(1, 32, 32), f"photos/{place}/0.png")
    make_model(here / "two", "lenet5-half", classes=2)
    command = ["evaluate", "two", "--dataset", "photos", "--out", "measured"]
    assert cli(*command)[0] == 0
    assert "already complete" in cli(*command)[2]
    save_image(torch.rand(1, 32, 32), "photos/test/0/1.png")
    code, _, err = cli(*command)
    assert (code, "another dataset" in err) == (2, True)


def test_a_teacher_alone(here, cli):
    shutil.rmtree(here / "student")
    code, out, err = cli("evaluate", "--json")
    assert [result["path"] for result in json.loads(out)["results"]] == ["teacher"]
    assert "give --teacher" not in err
    shutil.rmtree(here / "teacher")
    code, out, _ = cli("evaluate", "--json")
    assert code == 3
    assert json.loads(out)["error"]["code"] == "artifact"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent"], 3, "absent: no such directory"),
        (["empty"], 3, "empty: no image files in it"),
        (["student", "noise"], 2, "noise needs a number of images"),
        (["digits:many"], 2, "digits:many: 'many' is not a number of images"),
        (["digits:5000"], 2, "the dataset has 1437"),
        (["student", "absent"], 3, "absent"),
        (["three"], 3, "digits has 10 classes, three 3"),
        (["student", "--teacher", "three"], 3, "digits has 10 classes, three 3"),
        (["student", "--teacher", "absent"], 3, "no teacher at absent"),
        (["nameless"], 2, "give --dataset"),
        (["student", "--dataset", "digitz"], 2, "did you mean 'digits'"),
        (["shards", "--min-top1", "0.5"], 2, "--min-top1 needs a model"),
        (["student", "--min-top1", "95"], 2, "at most 1"),
        pytest.param(
            ["student", "--device", "cuda"], 2, "--device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(pipeline, monkeypatch, cli, arguments, code, message):
    monkeypatch.chdir(pipeline)
    status, out, err = cli("evaluate", *arguments, "--json")
    assert status == code
    assert message in err
    assert json.loads(out)["ok"] is False


def test_a_dataset_where_the_record_names_none(pipeline, monkeypatch, cli):
    monkeypatch.chdir(pipeline)
    code, out, err = cli("evaluate", "nameless", "--dataset", "digits", "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["agreement"] is None
    assert "give --teacher" not in err  # it records none


def test_a_damaged_shard(here, cli):
    name = json.loads((here / "shards" / MANIFEST).read_text())["shards"][1]["file"]
    data = bytearray((here / "shards" / name).read_bytes())
    data[-1] ^= 1
    (here / "shards" / name).write_bytes(data)
    code, _, err = cli("evaluate", "shards")
    assert code == 3
    assert name in err


def test_dry_run_opens_everything_and_writes_nothing(pipeline, monkeypatch, cli):
    monkeypatch.chdir(pipeline)
    before = sorted(pipeline.rglob("*"))
    code, out, _ = cli("evaluate", "student", "--dry-run", "--out", "out", "--json")
    assert code == 0
    assert json.loads(out)["config"]["paths"] == ["student"]
    assert cli("evaluate", "three", "--dry-run")[0] == 3
    assert sorted(pipeline.rglob("*")) == before


def test_results_are_there_when_the_gate_is_not_met(here, cli):
    code, out, _ = cli("evaluate", "student", "--min-top1", "1", "--json")
    answer = json.loads(out)
    assert (code, answer["ok"], answer["error"]["code"]) == (5, False, "gate")
    assert answer["results"][0]["top1"] == answer["metrics"]["top1"] == top1_of(here / "student")[0]

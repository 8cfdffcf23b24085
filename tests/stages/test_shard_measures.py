"""What is measured of images, against NumPy; and that hooks and batches leave no trace."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from stand_ins import random_images, write_shards
from torch import nn

from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.data.sources import ANSWERS, ShardSource
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.moments import Moments
from dfkd_cli.models.statistics import RunningMoments, recorded_moments
from dfkd_cli.stages import shard_measures
from dfkd_cli.stages.shard_measures import bn_divergences, measure_images, measure_shards
from dfkd_cli.ui import finite

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(("sample", "values"), [(1000, 2**25), (4, 2**25), (1000, 4 * 2 * 6 * 6 + 1)])
def test_shard_measures(tmp_path, monkeypatch, sample, values):
    monkeypatch.setattr(shard_measures, "SAMPLE", sample)
    monkeypatch.setattr(shard_measures, "VALUES", values)
    teacher = tiny_teacher()
    data = write_shards(tmp_path, teacher, "0" * 64)
    measures = measure_shards(ShardReader(tmp_path), teacher, CPU, batch_size=2)

    given = data["logits"].argmax(1)
    histogram = np.bincount(given, minlength=4)
    frequent = histogram[histogram > 0] / 13
    aimed, answered = data["targets"], oracles.softmax(data["logits"] / 3.0)
    chosen = data["images"] if values * sample == 1000 * 2**25 else data["images"][[0, 3, 6, 9]]
    outputs = dict(zip((1, 3), prefix_outputs(teacher, data["images"]), strict=True))
    layers = {str(i): distance(teacher.net[i], x) for i, x in outputs.items()}
    divergences = {str(i): similarity(teacher.net[i], x) for i, x in outputs.items()}
    assert 0 < (aimed.argmax(1) == given).sum() < 13
    assert measures == {
        "count": 13,
        "confidence": pytest.approx(oracles.softmax(data["logits"]).max(1).mean(), rel=1e-9),
        "class_balance": pytest.approx(-(frequent * np.log(frequent)).sum() / np.log(4), rel=1e-6),
        "class_histogram": histogram.tolist(),
        "target_match": (aimed.argmax(1) == given).mean(),
        "target_divergence": pytest.approx(
            np.where(aimed > 0, aimed * np.log(np.maximum(aimed, 1e-300) / answered), 0).sum(1).mean(), rel=1e-9
        ),
        "agreement": None,
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
    absent = {"target_match", "target_divergence", "agreement", *batch_norm, "logits_ok"}
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


def test_another_networks_opinion_of_impressions(tmp_path):
    """As DeepInversion measures: the classes that images were made for, and their maker's answers, beside its own."""
    teacher = tiny_teacher()
    data = write_shards(tmp_path, teacher, "0" * 64)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(72, 4)), teacher.info)
    measures = measure_images(ShardSource(ShardReader(tmp_path), ANSWERS), other, CPU, batch_size=3)
    weight, bias = (part.detach().double().numpy() for part in other.net[1].parameters())
    mean, std = (np.array(part)[:, None, None] for part in (teacher.info.mean, teacher.info.std))
    opinion = (((data["images"] - mean) / std).reshape(13, -1) @ weight.T + bias).argmax(1)
    assert measures["target_match"] == (opinion == data["targets"].argmax(1)).mean()
    assert measures["agreement"] == (opinion == data["logits"].argmax(1)).mean()
    assert 0 < measures["agreement"] != measures["target_match"] < 1
    assert measures["class_histogram"] == np.bincount(opinion, minlength=4).tolist()
    assert measures["logits_ok"] is None  # nobody says that it answers alike
    assert measures["target_divergence"] is None  # its temperature is not the method's


def test_images_are_measured_as_impressions_are():
    teacher = tiny_teacher()
    source = random_images(teacher.info, 13, chunk=4)
    measures = measure_images(source, teacher, CPU, batch_size=3)
    pixels = source.all().pixels.double().numpy() / 255
    with torch.no_grad():
        logits = teacher(torch.from_numpy(pixels).float()).double().numpy()
    layers = zip((1, 3), prefix_outputs(teacher, pixels), strict=True)
    assert measures["class_histogram"] == np.bincount(logits.argmax(1), minlength=4).tolist()
    assert measures["confidence"] == pytest.approx(oracles.softmax(logits).max(1).mean(), rel=1e-6)
    assert measures["bn_divergence"] == pytest.approx(
        np.mean([similarity(teacher.net[i], x) for i, x in layers]), rel=1e-5
    )
    absent = {"target_match", "target_divergence", "agreement", "logits_ok"}
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

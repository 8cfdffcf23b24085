"""The loss between two networks: its ends are theirs, BatchNorm's averages are of each place, the barrier is a sum."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import oracles
import pytest
import tiny_network
import torch
from PIL import Image
from tiny_objectives import CLASSES, SIZE, images, network
from torch import nn

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import Images
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import save_model
from dfkd_cli.models.names import LoadedModel
from dfkd_cli.report import charts
from dfkd_cli.seeds import derive
from dfkd_cli.stages.lines import AT, End, barrier, estimate_statistics, line

CPU = torch.device("cpu")


def shown(count: int) -> Images:
    return Images(images(count).pixels, torch.arange(count) * 3 % CLASSES)


def end(model: Classifier, shown: Images) -> End:
    return End(LoadedModel(model, "", {}, "model"), "digits", shown)


def own(model: Classifier, shown: Images) -> dict[str, float]:
    """Loss and top-1, in float64."""
    with torch.no_grad():
        logits = model.eval()(shown.pixels).double().numpy()
    targets = np.eye(logits.shape[1])[shown.labels.numpy()]
    right = (logits.argmax(1) == shown.labels.numpy()).mean()
    return {"loss": oracles.cross_entropy(targets, oracles.softmax(logits)), "top1": right}


def linear(seed: int) -> Classifier:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SIZE)), CLASSES))
    return Classifier(net, ModelInfo("linear", CLASSES, SIZE, (0.4,) * 2, (0.3,) * 2))


def test_every_point_is_the_loss_of_the_weights_there():
    first, second, given = linear(0), linear(1), shown(23)
    found = line(end(first, given), end(second, given), CPU, batch_size=5)
    assert [point["at"] for point in found["points"]] == AT
    assert {-0.25, 0.0, 0.5, 1.0, 1.25} <= {*AT}
    x = (given.pixels.double().numpy().reshape(23, -1) - 0.4) / 0.3
    rows = [[p.detach().double().numpy() for p in model.parameters()] for model in (first, second)]
    losses = {}
    for point in found["points"]:
        t = point["at"]
        weight, bias = ((1 - t) * a + t * b for a, b in zip(*rows, strict=True))
        logits = x @ weight.T + bias
        losses[t] = oracles.cross_entropy(np.eye(CLASSES)[given.labels.numpy()], oracles.softmax(logits))
        assert point["loss"] == pytest.approx(losses[t], rel=1e-5)
        assert point["top1"] == (logits.argmax(1) == given.labels.numpy()).mean()
    rises = [losses[t] - (1 - t) * losses[0] - t * losses[1] for t in AT if 0 <= t <= 1]
    assert found["barrier"] == pytest.approx(max(rises), abs=1e-5)
    for model, at in ((first, 0.0), (second, 1.0)):
        (point,) = (point for point in found["points"] if point["at"] == at)
        assert {key: point[key] for key in ("loss", "top1")} == pytest.approx(own(model, given), rel=1e-6)


def test_a_barrier_is_the_highest_rise_above_the_chord():
    assert barrier([{"at": t, "loss": loss} for t, loss in ((0.0, 1), (0.25, 4), (0.5, 4.5), (1.0, 3))]) == 2.5
    assert barrier([{"at": t, "loss": loss} for t, loss in ((-0.25, 9), (0.0, 1), (0.5, 0), (1.0, 3), (1.25, 9))]) == 0


def test_averages_are_the_moments_of_what_layers_see():
    model, given = network(0, 3, 4), shown(11)
    reference = Classifier(network(0, 3, 4).net, model.info)
    estimate_statistics(model.eval(), given)
    assert not model.training
    with torch.no_grad():  # one batch, as if it were the whole of a training that keeps nothing of before
        for norm in reference.batch_norms():
            norm.momentum = 1.0
        reference.train()(given.pixels)
    for layer, expected in zip(model.batch_norms(), reference.batch_norms(), strict=True):
        torch.testing.assert_close(layer.running_mean, expected.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, expected.running_var, rtol=1e-5, atol=1e-6)
    inputs = nn.functional.conv2d(model.normalise(given.pixels), *model.net.stage1[0].parameters(), padding=1)
    values = inputs.detach().double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(model.net.stage1[1].running_mean, values.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.net.stage1[1].running_var, values.var(1, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("count", [100, 101, 199, 201])
def test_no_image_is_normalised_alone(count):
    """A hidden layer of vectors cannot: its moments are those of all images, whatever their batches."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 3), nn.BatchNorm1d(3), nn.Linear(3, CLASSES))
    model, given = Classifier(net, ModelInfo("v", CLASSES, SIZE, (0.0,) * 2, (1.0,) * 2)), shown(count)
    estimate_statistics(model.eval(), given)
    values = net[1](given.pixels.flatten(1)).detach().double().numpy()
    np.testing.assert_allclose(net[2].running_mean, values.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(net[2].running_var, values.var(0, ddof=1), rtol=1e-4)


def test_with_batch_norm_both_ends_have_averages_of_the_same_images():
    models, given = (network(0, 3, 4), network(1, 3, 4)), shown(11)
    before = [own(model, given)["loss"] for model in models]
    points = {p["at"]: p for p in line(end(models[0], given), end(models[1], given), CPU, 4)["points"]}
    assert [own(model, given)["loss"] for model in models] == before, "the models are as they were"
    for model, at, old in zip(models, (0.0, 1.0), before, strict=True):
        assert points[at]["loss"] != pytest.approx(old, rel=1e-3)
        estimate_statistics(model.eval(), given)
        assert points[at]["loss"] == pytest.approx(own(model, given)["loss"], rel=1e-5)
    state = [model.state_dict() for model in models]
    middle = network(2, 3, 4)
    middle.load_state_dict({name: (state[0][name] + state[1][name]) / 2 for name in state[0]})
    estimate_statistics(middle.eval(), given)
    assert points[0.5]["loss"] == pytest.approx(own(middle, given)["loss"], rel=1e-5)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Two networks of one architecture, one that sees other pixels, and a LeNet-5, as the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_network.save(tmp_path / "one", 0)
    tiny_network.save(tmp_path / "other", 1)
    tiny_network.save(tmp_path / "brighter", 1, mean=0.2)
    return tmp_path


def evaluate(*args) -> list[str]:
    return ["evaluate", "--allow-code", "--line", "--train-images", "40", *map(str, args)]


def test_a_line_is_written_drawn_and_shown(here, cli):
    code, out, err = cli(*evaluate("one", "other", "brighter", "one", "--out", "flat", "--json"))
    assert code == 0, err
    answer = json.loads(out)
    assert "line: of the loss on 40 training images of digits" in err
    assert [found["path"] for found in answer["lines"]] == ["one -> other", "one -> one", "other -> one"]
    found = answer["lines"][0]
    assert (found["from"], found["to"], found["dataset"], found["train_images"]) == ("one", "other", "digits", 40)
    assert json.loads((here / "flat" / "results.json").read_text())["lines"] == answer["lines"]
    train = datasets.load("digits", "train", image_shape=(1, 32, 32))
    chosen = datasets.class_balanced(train.labels, 40, derive("few", 0))
    given = Images(train.images(chosen).float() / 255, train.labels[chosen])
    for name, at in (("one", 0.0), ("other", 1.0)):
        model = tiny_network.save(here / "again", ["one", "other"].index(name))
        estimate_statistics(model, given)
        (point,) = (point for point in found["points"] if point["at"] == at)
        assert {key: point[key] for key in ("loss", "top1")} == pytest.approx(own(model, given), rel=1e-5)
    assert {point["loss"] for point in answer["lines"][1]["points"]} == {found["points"][4]["loss"]}
    assert answer["artifacts"] == {"results": "flat/results.json", "line": "flat/line.png"}
    assert Image.open("flat/line.png").size[0] > 500
    before = sha256_file(here / "flat" / "line.png")
    code, out, err = cli(*evaluate("one", "other", "brighter", "one", "--out", "flat"))
    assert code == 0
    assert "already complete" in err
    assert sha256_file(here / "flat" / "line.png") == before
    rows = [row.split() for row in out.splitlines()]
    assert rows[5] == ["LINE", "LOSS", "HALFWAY", "AT", "THE", "END", "BARRIER"]
    assert rows[6][:5] == [
        "one",
        "->",
        "other",
        f"{found['points'][4]['loss']:.4f}",
        f"{found['points'][12]['loss']:.4f}",
    ]
    assert rows[6][-1] == f"{found['barrier']:.4f}"


def test_a_loss_that_is_not_finite_is_none_and_no_trouble(here, cli):
    model = tiny_network.save(here / "broken", 3)
    nn.init.constant_(model.net[5].weight, 3e38)
    shutil.rmtree("broken")
    save_model(here / "broken", model, metrics={}, provenance={"dataset": "digits"})
    code, out, err = cli(*evaluate("broken", "broken", "--out", "flat", "--json"))
    assert code == 0, err
    (found,) = json.loads(out)["lines"]
    assert found["barrier"] is None
    assert all(point["loss"] is None for point in found["points"])
    code, out, _ = cli(*evaluate("broken", "broken", "--out", "flat"))
    assert code == 0
    assert out.splitlines()[-1].split() == ["broken", "->", "broken", "-", "-", "-"]


def test_what_has_no_line_between_it(here, cli, make_teacher):
    for paths in (["one", "brighter"], ["one", make_teacher("lenet5")], ["one"]):
        code, _, err = cli(*evaluate(*paths))
        assert code == 2
        (said,) = [text for text in err.splitlines() if text.startswith("error")]
        assert "no two of the models have the same architecture, input, classes and dataset" in said
        assert all(str(path) in said for path in paths)
    code, _, err = cli(*evaluate("noise:30", "--teacher", "one"))
    assert (code, "--line needs a model, these are images" in err) == (2, True)


def test_networks_that_only_the_order_of_classes_tells_apart_do_not_meet():
    model, given = network(0, 3, 4), shown(4)
    info = dataclasses.replace(model.info, classes=tuple("abcde"))
    turned = dataclasses.replace(info, classes=tuple("edcba"))
    first, second = (end(Classifier(model.net, each), given) for each in (info, turned))
    assert first.meets(end(Classifier(network(1, 3, 4).net, info), given))
    assert not first.meets(second)
    assert not first.meets(end(Classifier(network(1, 3, 5).net, info), given))
    assert not first.meets(dataclasses.replace(first, dataset="mnist"))
    weightless = end(Classifier(nn.Identity(), info), given)
    assert not weightless.meets(weightless)


def test_a_picture_of_losses_of_all_sizes():
    points = [{"at": at, "loss": None if at < 0 else 10 ** (4 * at), "top1": 0.5} for at in AT]
    assert charts.lines([{"path": "a$b -> c", "points": points}]).startswith(b"\x89PNG")

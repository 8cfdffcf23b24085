"""The largest eigenvalue of the Hessian against all of them, and what `dfkd evaluate --sharpness` says of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_network
import torch
import torch.nn.functional as F
from tiny_objectives import CLASSES, images, network
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torchvision.io import write_png

from dfkd_cli.data import datasets
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import load_model
from dfkd_cli.models.names import LoadedModel
from dfkd_cli.models.registry import build
from dfkd_cli.seeds import derive
from dfkd_cli.stages import sharpness as module
from dfkd_cli.stages.sharpness import product, require_hessian, sharpness
from dfkd_cli.trust import Code


def labelled(model: Classifier, wrong: bool = False) -> Images:
    """Eleven images, in float64; labelled in turn, or with what the model thinks least of."""
    pixels = images(11).pixels.double()
    return Images(pixels, model.eval()(pixels).argmin(1) if wrong else (torch.arange(11) * 7 + 3) % CLASSES)


def hessian(model: Classifier, shown: Images) -> np.ndarray:
    """The whole matrix, (P, P)."""
    names = [name for name, _ in model.named_parameters()]
    weights = [weight.detach() for weight in model.eval().parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([weight.numel() for weight in weights])
        state = {name: part.view_as(w) for name, part, w in zip(names, parts, weights, strict=True)}
        return F.cross_entropy(functional_call(model, state, (shown.pixels,)), shown.labels)

    flat = torch.cat([weight.flatten() for weight in weights])
    return torch.autograd.functional.hessian(loss, flat).numpy()


@pytest.mark.parametrize("wrong", [False, True])
def test_it_is_the_largest_of_all_eigenvalues(wrong):
    model = network(0, 2, 3).double()
    shown = labelled(model, wrong)
    spectrum = np.linalg.eigvalsh(hessian(model, shown))
    assert (-spectrum[0] > spectrum[-1]) == wrong  # not the one of the largest modulus
    single = copy.deepcopy(model).float()
    for net, batch_size in ((model, 4), (model, 100), (single, 4)):
        found = sharpness(net, Images(shown.pixels.to(net.mean.dtype), shown.labels), batch_size, seed=0)
        assert found["sharpness"] == pytest.approx(spectrum[-1], rel=1e-3)
        assert 2 < found["sharpness_products"] < 100


def test_products_are_those_of_the_matrix():
    model = network(1, 2, 3).double().to(memory_format=torch.channels_last)
    shown = labelled(model)
    vector = torch.randn(sum(weight.numel() for weight in model.parameters()), dtype=torch.float64)
    expected = hessian(model, shown) @ vector.numpy()
    np.testing.assert_allclose(product(model, shown, 3, vector), expected, rtol=0, atol=1e-12)


def test_nothing_about_the_model_changes():
    model = network(0, 2, 3).train()
    before = copy.deepcopy(model.state_dict())
    shown = Images(images(4).pixels, torch.arange(4))
    first, second = (sharpness(model, shown, 4, seed=0) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_loss_without_curvature_and_one_that_is_not_finite():
    model, shown = network(0, 2, 3), Images(images(4).pixels, torch.zeros(4, dtype=torch.int64))
    with torch.no_grad():
        model.net.head.bias[0] += 1e4  # so sure that float32 has nothing left to learn
    assert sharpness(model, shown, 4, seed=0) == {"sharpness": 0.0, "sharpness_products": 1}
    with torch.no_grad():
        model.net.head.bias[0] = np.nan
    assert np.isnan(sharpness(model, shown, 4, seed=0)["sharpness"])


@pytest.mark.parametrize(("spec", "size"), [("lenet5-half", (1, 32, 32)), ("alexnet-half", (3, 32, 32))])
def test_networks_with_quick_layers_have_one(spec, size):
    """The layers' own gradients, differentiated: against differences of the gradient of the loss."""
    torch.manual_seed(0)
    info = ModelInfo(spec, 10, size, (0.3,) * size[0], (0.4,) * size[0])
    model = Classifier(build(spec, 10, size), info).double().eval()
    shown = Images(torch.rand(3, *size, dtype=torch.float64), torch.arange(3))
    weights = list(model.parameters())
    vector = torch.randn(sum(weight.numel() for weight in weights), dtype=torch.float64)
    vector /= vector.norm()

    def gradient(step: float) -> Tensor:
        nn.utils.vector_to_parameters(start + step * vector, weights)
        loss = F.cross_entropy(model(shown.pixels), shown.labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    start = nn.utils.parameters_to_vector(weights).detach()
    found, step = product(model, shown, 2, vector), 1e-6
    slope = (gradient(step) - gradient(-step)) / (2 * step)
    assert (found - slope).norm() < 1e-4 * found.norm()


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models") / "model"
    tiny_network.save(place, 0)
    return place


def training_images(count: int) -> Images:
    """The balanced images that ``real:COUNT`` has, too."""
    train = datasets.load("digits", "train", image_shape=(1, 32, 32))
    chosen = datasets.class_balanced(train.labels, count, derive("few", 0))
    return Images(train.images(chosen).double() / 255, train.labels[chosen])


def test_a_column_and_a_result(cli, model, tmp_path):
    command = ["evaluate", model, "--allow-code", "--sharpness", "--train-images", 40]
    code, out, err = cli(*command, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert "sharpness: of the loss on 40 training images of digits" in err
    (result,) = json.loads(out)["results"]
    expected = np.linalg.eigvalsh(
        hessian(load_model(model, code=Code(artifacts=True))[0].double(), training_images(40))
    )[-1]
    assert result["sharpness"] == pytest.approx(expected, rel=1e-3)
    assert (result["train_images"], result["count"]) == (40, 360)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == [result]
    code, out, _ = cli(*command)
    head, row = (line.split() for line in out.splitlines())
    assert row[head.index("SHARPNESS")] == f"{result['sharpness']:.4g}"
    assert "SHARPNESS" not in cli("evaluate", model, "--allow-code")[1]


def test_one_that_is_not_found_is_said(cli, model, monkeypatch):
    monkeypatch.setattr(module, "VECTORS", 3)
    monkeypatch.setattr(module, "RESTARTS", 1)
    code, out, err = cli("evaluate", model, "--allow-code", "--sharpness", "--train-images", 20, "--json")
    assert code == 0
    (result,) = json.loads(out)["results"]
    assert result["sharpness"] is None
    assert f"its sharpness is not found, or not finite, after {result['sharpness_products']} Hessian products" in err


class Once(torch.autograd.Function):
    """The identity, whose gradient has none."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


@pytest.mark.parametrize(
    ("act", "why"),
    [(Once.apply, "trying to differentiate twice"), (Tensor.detach, "does not require grad")],
)
def test_a_network_that_cannot_be_differentiated_twice(cli, model, monkeypatch, act, why):
    forward = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda self, pixels: act(forward(self, pixels)))
    code, _, err = cli("evaluate", model, "--allow-code", "--sharpness")
    assert code == 3
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert f"{model}: its loss cannot be differentiated twice" in line and why in line
    assert line.endswith("leave out --sharpness")


def test_what_has_no_weights_is_refused():
    model = Classifier(nn.Identity(), network(0, 2, 3).info)
    with pytest.raises(ArtifactError, match="oracle: it has no weights"):
        require_hessian(LoadedModel(model, "", {}, "oracle"), Images(images(2).pixels, torch.arange(2)))


def test_all_training_images_where_there_are_fewer_than_by_default(cli, model, tmp_path):
    train = datasets.load("digits", "train")
    for half, count in (("train", 2), ("test", 1)):
        for index in range(10 * count):
            place = tmp_path / "few" / half / str(index % 10)
            place.mkdir(parents=True, exist_ok=True)
            write_png(train.images(torch.tensor([index]))[0], str(place / f"{index}.png"))
    code, out, err = cli("evaluate", model, "--allow-code", "--sharpness", "--dataset", tmp_path / "few", "--json")
    assert (code, json.loads(out)["results"][0]["train_images"]) == (0, 20), err
    assert "of the loss on 20 training images of" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["noise:30", "--sharpness", "--teacher", "MODEL"], 2, "--sharpness needs a model, these are images"),
        (["MODEL", "--sharpness", "--train-images", "5000"], 2, "--train-images 5000: dataset digits has 1437"),
        (["MODEL", "--sharpness", "--train-images", "1"], 2, "at least 2"),
    ],
)
def test_what_has_no_sharpness(cli, model, arguments, code, message):
    status, _, err = cli("evaluate", "--allow-code", *(model if a == "MODEL" else a for a in arguments))
    assert status == code
    assert message in err


def test_a_rehearsal_opens_the_training_images_and_measures_nothing(cli, model, tmp_path):
    code, _, err = cli("evaluate", model, "--allow-code", "--sharpness", "--dry-run", "--out", tmp_path / "out")
    assert code == 0, err
    assert not (tmp_path / "out").exists()

"""Networks as users write them: what they do to their input, what they return, and how they end."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from stand_ins import classifier, statistics_of, synthesizer
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.activations import batch_statistics, pre_activations
from dfkd_cli.models.adapter import require_training
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.registry import build

SIZE, CLASSES = (1, 8, 8), 4
SPEC = "net.py:make"


@dataclasses.dataclass
class Answer:
    features: Tensor
    logits: Tensor


Named = collections.namedtuple("Named", ["logits", "aux"])


class Net(nn.Module):
    """A small network; what it takes in and gives out is changed by functions."""

    def __init__(self, start=lambda x: x, end=lambda net, y, x: y, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, classes)
        self.other = nn.Linear(6, classes)
        self.start, self.end = start, end

    def plain(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))

    def forward(self, x: Tensor):
        x = self.start(x)
        return self.end(self, self.plain(x), x)


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """``adapted(net)``: the network as it is after it was built from a user's code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("def make(): return net\n")

    def adapt(net: nn.Module, classes: int = CLASSES) -> Classifier:
        (tmp_path / "net.py").write_text("import builtins\ndef make(): return builtins.dfkd_test_net\n")
        monkeypatch.setattr("builtins.dfkd_test_net", net, raising=False)
        return classifier(build(SPEC, classes, SIZE, allow_code=True), SPEC, SIZE, classes)

    return adapt


def hidden(x: Tensor) -> Tensor:
    x.data.sub_(0.5)  # no version of it tells
    return x


@pytest.mark.parametrize(
    "start", [lambda x: x.sub_(0.5), nn.ReLU(inplace=True), hidden, lambda x: x.view(len(x), -1).mul_(2).view_as(x)]
)
def test_a_network_never_gets_the_callers_tensor(adapted, start):
    model = adapted(Net(start))
    model.freeze()
    images = torch.randn(3, *SIZE)
    before = images.clone()
    expected = model.net.plain(start(images.clone()))
    for _ in range(2):
        assert torch.equal(model.net(images), expected)
        assert torch.equal(images, before)
    leaf = images.requires_grad_()
    assert torch.autograd.grad(model.net(leaf).sum(), leaf)[0].abs().sum() > 0


def test_what_writes_only_in_training_is_told_too(adapted):
    class Noisy(Net):
        def forward(self, x):
            if self.training:
                x += 1
            return self.plain(x)

    images = torch.zeros(2, *SIZE)
    adapted(Noisy()).net.train()(images)
    assert not images.any()


def test_a_network_that_behaves_costs_nothing(adapted, caplog):
    net = adapted(Net()).net
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert not caplog.records


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda net, y, x: (y, x), "returns tuple of (1, 4), (1, 1, 8, 8);"),
        (lambda net, y, x: [None, {"main": y}], "returns list of NoneType, dict of main (1, 4)"),
        (lambda net, y, x: {"features": x, "logits": y}, "dict of features (1, 1, 8, 8), logits (1, 4)"),
        (lambda net, y, x: Answer(x, y), "Answer of features (1, 1, 8, 8), logits (1, 4)"),
        (
            lambda net, y, x: Named(y, x) if net.training else y,
            "returns Named of logits (1, 4), aux (1, 1, 8, 8) in",
        ),
        (lambda net, y, x: (y, x) if net.training else {"out": y}, "returns dict of out (1, 4)"),
    ],
)
def test_the_logits_are_found_in_what_is_returned_in_both_modes(adapted, caplog, end, words):
    model = adapted(Net(end=end))
    images = torch.rand(2, *SIZE)
    for net in (model.net.eval(), model.net.train()):
        expected = net.plain(images)
        assert torch.equal(net(images), expected)
    assert model.head() is model.net.fc
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert words in record.getMessage()


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda net, y, x: (x, y), r"gives tuple of \(1, 1, 8, 8\), \(1, 4\) for an image.*under the name `logits`"),
        (lambda net, y, x: None, r"gives NoneType for an image instead of logits \(1, 4\)"),
        (lambda net, y, x: y.sum(), r"instead of logits \(1, 4\)"),
        (lambda net, y, x: y[:, :3], r"gives \(1, 3\) for an image instead of logits \(1, 4\) -- check --num-classes"),
    ],
)
def test_what_is_no_logits_is_refused_with_what_it_is(adapted, end, words):
    with pytest.raises(ArtifactError, match=words):
        adapted(Net(end=end))


def test_one_logit_is_refused(adapted):
    with pytest.raises(ConfigError, match=r"of one class there is nothing to learn.*\(0, z\)"):
        adapted(Net(classes=1), 1)


@pytest.mark.parametrize("end", [lambda net, y, x: y, lambda net, y, x: y[:, 0], lambda net, y, x: (y, x)])
def test_one_logit_of_two_classes_is_told_how_it_becomes_two(adapted, end):
    with pytest.raises(ArtifactError, match=r"instead of logits \(1, 2\) -- .*two classes: return the logits \(0, z\)"):
        adapted(Net(end=end, classes=1), 2)
    two = adapted(Net(end=lambda net, y, x: torch.cat([torch.zeros_like(y), y], 1), classes=1), 2)  # as is told
    assert two(torch.rand(3, *SIZE)).shape == (3, 2)


def test_logits_with_the_dimensions_of_an_image_are_told_to_be_flattened(adapted):
    with pytest.raises(ArtifactError, match=r"gives \(1, 4, 1, 1\) for an image.* add flatten\(1\)"):
        adapted(Net(end=lambda net, y, x: y[..., None, None]))


@pytest.mark.parametrize("first", [torch.tensor(3), torch.tensor([1j]), torch.tensor([True])])
def test_the_first_parameter_need_not_be_of_floating_point(adapted, first):
    net = Net()
    net.steps = nn.Parameter(first, requires_grad=False)  # before those of its layers
    assert next(net.parameters()).dtype == first.dtype
    assert adapted(net)(torch.rand(3, *SIZE)).shape == (3, CLASSES)


def test_log_probabilities_are_logits_and_probabilities_become_them(adapted, caplog):
    images = torch.rand(5, *SIZE)
    logged = adapted(Net(end=lambda net, y, x: y.log_softmax(1)))
    assert not caplog.records
    probable = adapted(Net(end=lambda net, y, x: y.softmax(1)))
    assert "ends in probabilities" in caplog.records[0].getMessage()
    for model in (logged, probable):
        net = model.net.eval()
        torch.testing.assert_close(net(images), net.plain(images).log_softmax(1))
        assert model.head() is net.fc
    for kind in (torch.float64, torch.float16):
        typed = adapted(Net(end=lambda net, y, x, kind=kind: y.softmax(1).to(kind))).net.eval()
        torch.testing.assert_close(typed(images).float(), typed.plain(images).log_softmax(1), atol=1e-2, rtol=1e-2)
    sure = adapted(Net(end=lambda net, y, x: (1e4 * y).softmax(1))).net.eval()
    assert sure(images).isfinite().all()


def test_probabilities_in_evaluation_alone_are_logits_in_training(adapted):
    net = adapted(Net(end=lambda net, y, x: y if net.training else y.softmax(1))).net
    images = torch.rand(5, *SIZE)
    torch.testing.assert_close(net.eval()(images), net.plain(images).log_softmax(1))
    assert torch.equal(net.train()(images), net.plain(images))


class Cosine(nn.Module):
    """A layer of cosines, as face recognition has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


def features(*end: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *end)


class Times(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * x


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = features(), nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(self.body(x)) + self.two(self.body(x))) / 2


@pytest.mark.parametrize(
    "end",
    [
        [nn.Linear(6, CLASSES), Times()],
        [nn.Linear(6, CLASSES), Times(), nn.LogSoftmax(1)],
        [nn.Linear(6, CLASSES), nn.BatchNorm1d(CLASSES)],
        [nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES))],
        [Cosine(), Times()],
        [nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, CLASSES, 1), nn.Flatten(), nn.Softmax(1)],
    ],
)
def test_class_weights_are_found_behind_scales_and_norms(adapted, tmp_path, end):
    model = adapted(features(*end))
    layer = next(m for m in end if hasattr(m, "weight"))
    assert model.head() is layer
    for name, values in (("zskd", {}), ("soft-target", {"layers": ("logits",)})):
        made = synthesizer(name, tmp_path / name, model, {"batch_size": 3, "iterations": 2} | values, 3).make(0, 3)
        assert made.pixels.isfinite().all()
    assert list(pre_activations(model))[-1].startswith(str(list(model.net).index(layer)))
    statistics = statistics_of(model)
    means = statistics.layers[list(statistics.layers)[-1]].mean
    assert means.shape == (CLASSES, CLASSES)


def test_two_heads_are_refused_by_name(adapted):
    with pytest.raises(ArtifactError, match="not those of one, two times a factor -- this method needs each class's w"):
        adapted(Summed()).head()


def test_frozen_statistics_are_statistics():
    net = nn.Sequential(FrozenBatchNorm2d(1), nn.InstanceNorm2d(1, track_running_stats=True), nn.BatchNorm2d(1))
    model = classifier(net)
    assert model.batch_norms() == [net[0], net[2]]
    before = dict(vars(net[0]))
    with batch_statistics(model):
        pass
    assert vars(net[0]) == before


def test_what_cannot_be_trained_is_said(adapted):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES), nn.BatchNorm1d(CLASSES))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    require_training(net, SPEC, CLASSES, SIZE, 2)
    with pytest.raises(ConfigError, match=r"cannot be trained on 1 images at once.*larger --batch-size"):
        require_training(net, SPEC, CLASSES, SIZE, 1)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    odd = adapted(Net(end=lambda net, y, x: (x, y) if net.training else y)).net
    with pytest.raises(ConfigError, match=r"gives \(1, 1, 8, 8\) for an image in training"):
        require_training(odd, SPEC, CLASSES, SIZE, 2)


def test_a_lazy_network_is_as_any_other(adapted):
    net = nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(CLASSES))
    assert adapted(net).head() is net[3]


def test_networks_of_torchvision_with_auxiliary_heads_answer_alike_in_both_modes():
    net = build("torchvision:googlenet", CLASSES, (3, 64, 64))
    assert isinstance(net, torchvision.models.GoogLeNet)
    assert net.train()(torch.rand(2, 3, 64, 64)).shape == (2, CLASSES)


def test_an_image_by_itself_has_logits_too(adapted):
    with pytest.raises(ArtifactError, match=r"gives \(\d*,?\) for one image by itself") as refused:
        adapted(Net(end=lambda net, y, x: y.squeeze()))
    assert "flatten(1)" in refused.value.hint


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda net, y, x: y.sigmoid(), "leave out a sigmoid"),
        (lambda net, y, x: F.dropout(y), "answers change with chance"),
        (lambda net, y, x: y - y.mean(0), "with the other images of a batch"),
        (lambda net, y, x: y, None),
        (lambda net, y, x: y * 0, None),  # a head that begins with 0
        (lambda net, y, x: y.abs() / 100, None),  # from 0 to 1 for small images alone
    ],
)
def test_answers_that_are_none_are_told(adapted, caplog, end, words):
    with caplog.at_level(logging.WARNING):
        adapted(Net(end=end))
    assert (words in caplog.text) if words else not caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_not_finite_are_none_to_compare(adapted, value):
    assert not adapted(Net(end=lambda net, y, x: y + value))(torch.rand(2, *SIZE)).isfinite().any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_numbers_take_pixels(adapted, kind):
    model = adapted(Net().to(kind))
    assert model(torch.rand(3, *SIZE)).dtype == torch.float32


def test_a_script_is_refused(adapted):
    with pytest.raises(ConfigError, match="returned RecursiveScriptModule"):
        adapted(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))))


def test_what_a_factory_passes_on_is_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def inner(num_classes=1000): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def make(*, weights=None, **more): return inner(**more)\n"
    )
    assert build(SPEC, CLASSES, SIZE, allow_code=True)[1].out_features == CLASSES


def test_a_torchvision_transformer_has_the_images_size():
    assert build("torchvision:vit_b_32", 3, (3, 64, 64)).image_size == 64
    with pytest.raises(ConfigError, match="torchvision:vit_b_32: cannot be built"):
        build("torchvision:vit_b_32", 3, (3, 65, 65))

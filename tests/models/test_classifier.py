"""Classifiers: normalisation, what is frozen, and the layer that gives the logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_ins import classifier
from torch import nn

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.activations import averages_kept
from dfkd_cli.models.classifier import Classifier, ModelInfo, probe
from dfkd_cli.models.graphs import _Graphs
from dfkd_cli.models.registry import build


def test_normalisation_and_logits():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    net = build("resnet8", 4, (3, 8, 8)).eval()
    model = Classifier(net, ModelInfo("resnet8", 4, (3, 8, 8), mean, std)).eval()
    pixels = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    expected = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(model.normalise(torch.from_numpy(pixels)), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(torch.from_numpy(pixels)), net(torch.from_numpy(expected).float()))
    assert all(key.startswith("net.") for key in model.state_dict())


def test_no_normalisation_costs_nothing():
    model = Classifier(nn.Identity(), ModelInfo("x", 1, (1, 2, 2), (0.0,), (1.0,)))
    pixels = torch.rand(1, 1, 2, 2)
    assert model.normalise(pixels) is pixels


def test_freeze_survives_a_training_parent():
    model = classifier().freeze()
    nn.ModuleList([model]).train()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.num_parameters == 61_706


def test_batch_norms_are_those_with_statistics():
    net = nn.Sequential(
        nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.BatchNorm1d(8)
    )
    assert classifier(net).batch_norms() == [net[0], net[3]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 0}, "positive whole numbers"),
        ({"input_size": (3, 8)}, "positive whole numbers"),
        ({"mean": (0.5,)}, "3-channel images need 3"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"classes": ("cat",)}, "1 class names for 2 classes"),
    ],
)
def test_model_info_is_checked(values, message):
    good = {"spec": "x", "num_classes": 2, "input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    with pytest.raises(ConfigError, match=message):
        ModelInfo(**good | values)


def test_head_may_be_a_convolution_that_is_flattened():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 10, 1), nn.Flatten(), nn.Dropout())
    assert classifier(net).head() is net[2]


@pytest.mark.parametrize("last", [nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid()])
def test_head_must_give_the_logits_themselves(last):
    with pytest.raises(ArtifactError, match="no linear layer gives the logits: they are not those of 1 times a factor"):
        classifier(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), last)).head()


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("end", [nn.Identity(), Fails()])
def test_probe_leaves_no_trace(end):
    net = nn.Sequential(build("resnet8", 10, (1, 32, 32)), nn.Dropout(), end).train()
    net[0].stage1.eval()  # a mixed mode must come back too
    model = classifier(net)
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.random.get_rng_state()
    if isinstance(end, Fails):
        with pytest.raises(RuntimeError, match="on purpose"):
            model.head()
    else:
        assert model.head() is net[0].head
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_probe_keeps_the_random_state_of_a_random_network():
    class Noisy(nn.Module):
        def forward(self, x):
            return torch.randn(1, 3)

    random = torch.random.get_rng_state()
    assert probe(Noisy(), (1, 4, 4)).shape == (1, 3)
    assert torch.equal(torch.random.get_rng_state(), random)


class Viewed(nn.Module):
    """What comes out of its layers must lie contiguously: always, in training, or never."""

    def __init__(self, when=lambda net: True) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6 * 8 * 8, 4)
        self.when = when

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.fc(x.view(len(x), -1) if self.when(self) else x.flatten(1))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x[:, None])).mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("net", "moves"),
    [
        (Viewed(), False),
        (Viewed(lambda net: net.training), False),
        (Viewed(lambda net: False), True),
        (Volumes(), False),
        (nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), False),
    ],
)
def test_weights_are_laid_out_as_the_network_can_run(net, moves):
    model = classifier(net, "net", (3, 8, 8), 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert model.lay_out() is model
    weight = next(net.parameters())
    assert weight.ndim == 5 or weight.is_contiguous(memory_format=torch.channels_last) == moves
    for training in (True, False):
        model.train(training)
        model(torch.rand(2, 3, 8, 8)).sum().backward()
        if training:
            net.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_head_may_be_a_convolution_that_is_averaged():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert classifier(net, "net", (3, 8, 8), 4).head() is net[2]


class Remembering(nn.Module):
    """Puts another tensor, of the batch's size, in a buffer's place; another buffer is one number in many places."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 4)
        self.register_buffer("latest", torch.zeros(1, 4))
        self.register_buffer("shift", torch.tensor(float("inf")).expand(4))

    def forward(self, x):
        self.latest = self.fc(x.flatten(1))
        return self.latest


def test_probe_puts_back_what_took_a_buffers_place():
    net = Remembering()
    latest, shift = net.latest, net.shift
    assert probe(net, (3, 4, 4), 2).shape == (2, 4)
    assert net.latest is latest and not latest.any() and net.shift is shift


def test_a_pass_that_leaves_batch_norms_averages_is_another_kind():
    """A recorded one of either kind would do to them what it did when it was recorded."""
    model = classifier(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)))
    graphs, images = _Graphs(model.net), torch.zeros(2, *model.info.input_size)
    usual = graphs._kind(images)
    with averages_kept(model):
        assert graphs._kind(images) != usual
    assert graphs._kind(images) == usual

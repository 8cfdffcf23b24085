"""Networks that keep more than weights, or load and store these in a way of their own."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stand_ins import classifier
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.adapter import require_gradients, require_training
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.directory import load_model, save_model
from dfkd_cli.models.names import locate
from dfkd_cli.models.statistics import batch_moments, recorded_moments
from dfkd_cli.options import ForeignModel
from dfkd_cli.trust import Code

SIZE, CLASSES = (1, 8, 8), 4
IMAGES = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(3))


class Merging(nn.Conv2d):
    """An update of low rank, which is merged into the weights for evaluation: as in LoRA."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.update, self.merged = nn.Parameter(torch.randn_like(self.weight)), False

    def train(self, mode: bool = True) -> Merging:
        if mode == self.merged:
            self.weight.data.add_(self.update.data, alpha=-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + (0 if self.merged else self.update), self.bias)


class Remembering(nn.Conv2d):
    """Weights without mean, which are worked out once."""

    standard = None

    def forward(self, x: Tensor) -> Tensor:
        if self.standard is None:
            self.standard = self.weight.detach() - self.weight.detach().mean()
        return self._conv_forward(x, self.standard, self.bias)


class Doubling(nn.Conv2d):
    """Changes its weights for evaluation, once and for all."""

    fused = False

    def train(self, mode: bool = True) -> Doubling:
        if not mode and not self.fused:
            self.weight.data.mul_(2)
            self.fused = True
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.fused else self._conv_forward(x, 2 * self.weight, self.bias)


class Net(nn.Module):
    """A small network of one kind of convolution and of normalisation."""

    def __init__(self, convolution: type = nn.Conv2d, norm: type = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = convolution(1, 6, 3), norm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """``opened(make, weights)``: what ``--teacher`` reads of a user's function and a file of weights."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("import builtins\ndef make(): return builtins.dfkd_test_make()\n")

    def read(make, weights: dict) -> Classifier:
        monkeypatch.setattr("builtins.dfkd_test_make", make, raising=False)
        torch.save(weights, "w.pt")
        said = ForeignModel(weights="w.pt", input_size=SIZE, num_classes=CLASSES)
        return locate("./net.py:make", said).open(Code(frozenset({"./net.py:make"}))).classifier

    return read


@pytest.mark.parametrize("kind", [Merging, Remembering, Doubling])
def test_what_a_network_makes_of_its_weights_it_makes_of_those_of_the_file(opened, kind):
    """As PyTorch alone has it: built, loaded, set to evaluation. Afterwards in every mode, and in what is stored."""

    def make() -> Net:
        return Net(kind)

    torch.manual_seed(5)
    weights = make().state_dict()
    plain = make()
    plain.load_state_dict(weights)
    plain.eval()
    with torch.no_grad():
        expected = plain(IMAGES)
        model = opened(make, copy.deepcopy(weights)).eval()
        torch.testing.assert_close(model(IMAGES), expected)
        model.lay_out()
        model.head()
        torch.testing.assert_close(model(IMAGES), expected)
        if kind is Merging:
            save_model(Path("model"), model, metrics={}, provenance={})
            torch.testing.assert_close(model(IMAGES), expected)
            again, _ = load_model(Path("model"), allow_code=True)
            torch.testing.assert_close(again.eval()(IMAGES), expected)


class Kept(nn.Module):
    """BatchNorm whose statistics are parameters without gradients."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            variance, mean = torch.var_mean(x, (0, 2, 3))
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(variance, 0.1)
        return (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()


def test_statistics_that_are_parameters_stay_as_they_were_read(opened):
    def make() -> Net:
        return Net(norm=Kept)

    weights = make().state_dict()
    weights["bn.running_mean"] = torch.randn(6)
    model = opened(make, copy.deepcopy(weights)).freeze().lay_out()
    require_training(model.net, "net", CLASSES, SIZE, batch=2)
    assert all(torch.equal(value, weights[key]) for key, value in model.net.state_dict().items())


class OfImages(nn.Module):
    """BatchNorm with statistics of the shape of images, as tutorials have it."""

    shape = (1, -1, 1, 1)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(channels).view(self.shape))
        self.register_buffer("running_var", torch.rand(channels).add(0.5).view(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt()


class OfTokens(OfImages):
    """The same of tokens (B, N, C)."""

    shape = (-1,)


class Tokens(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = OfTokens(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)


class Last(nn.Module):
    """Channels are the last of four axes; the sides are six, as many as there are channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = OfTokens(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Placed(OfImages):
    """Channels are the second axis, and each place has a shift of its own: it takes no other sides."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.shift = nn.Parameter(torch.zeros(1, channels, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


@pytest.mark.parametrize("norm", [OfImages, Tokens, Last, Placed])
def test_statistics_of_ones_own_are_compared_channel_by_channel(norm):
    """The oracle is BatchNorm of PyTorch with the same statistics."""
    net = Net(norm=norm).eval()
    own = net.bn if isinstance(net.bn, OfImages) else net.bn.norm
    usual = copy.deepcopy(net)
    usual.bn = nn.BatchNorm2d(6, affine=False, eps=0).eval()
    usual.bn.running_mean.copy_(own.running_mean.flatten())
    usual.bn.running_var.copy_(own.running_var.flatten())
    seen = []
    for model in (classifier(net, "net", SIZE, CLASSES), classifier(usual, "net", SIZE, CLASSES)):
        (recorded,) = recorded_moments(model).values()
        with batch_moments(model) as moments:
            answer = model(IMAGES)
        (found,) = moments.values()
        seen.append((recorded.mean, recorded.variance, found.mean, found.variance, answer))
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)


class Lenient(Net):
    def load_state_dict(self, state, strict=True):
        own = self.state_dict()
        for key in own.keys() & state.keys():
            own[key].copy_(state[key])


class Narrow(Net):
    def load_state_dict(self, state):
        return super().load_state_dict(state)

    def state_dict(self):
        return super().state_dict()


def test_weights_fit_by_their_names_whatever_a_networks_own_loading_takes(opened):
    weights = {key.replace("fc", "classifier"): value for key, value in Net().state_dict().items()}
    with pytest.raises(ArtifactError, match=r"missing fc\.weight"):
        opened(Lenient, weights)


def test_a_network_may_load_and_store_as_it_likes(opened):
    weights = Net().state_dict()
    model = opened(Narrow, weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.net.state_dict().items())
    with pytest.raises(ConfigError, match=r"weights cannot be kept: .*destination"):
        require_training(model.net, "net", CLASSES, SIZE, batch=2)


@pytest.mark.parametrize(("key", "message"), [("bn.running_var", r"bn\.running_var \(below 0\)"), ("fc.bias", None)])
def test_weights_that_answer_nothing_are_refused(opened, key, message):
    weights = Net().state_dict()
    weights[key] = torch.full_like(weights[key], -0.5 if message else 3e38)
    weights["fc.weight"] = torch.full_like(weights["fc.weight"], 1e38)
    with pytest.raises(ArtifactError, match=message or "answers are not finite"):
        opened(Net, weights)


class Probable(Net):
    """Without weights until they are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.skip_init(nn.Linear, 6, CLASSES)
        nn.init.constant_(self.fc.weight, torch.nan)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


def test_probabilities_are_told_with_the_weights_of_the_file(opened):
    weights = Net().state_dict()
    plain = Net()
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected = plain.eval()(IMAGES).log_softmax(1)
        torch.testing.assert_close(opened(Probable, weights).eval()(IMAGES), expected)


class Growing(nn.Module):
    """Its last layer comes into being with the first image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 6, 3), None

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).flatten(1)
        self.fc = self.fc or nn.Linear(features.shape[1], CLASSES)
        return self.fc(features)


class Observing(Net):
    """Has buffers that have no size before they see an image, as what is prepared for few bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.resize_(6).copy_(self.conv(x).detach().mean((0, 2, 3)))
        return super().forward(x)


@pytest.mark.parametrize("make", [Growing, Observing])
def test_parts_may_come_into_being_when_a_network_runs(opened, make):
    plain = make()
    with torch.no_grad():
        plain(IMAGES)
        model = opened(make, plain.state_dict())
        torch.testing.assert_close(model.eval()(IMAGES), plain.eval()(IMAGES))


def test_what_a_users_code_changes_for_all_is_undone(opened, tmp_path):
    """The type of new tensors, threads, the working directory, what of the import path we brought, what is warned."""
    threads = torch.get_num_threads()
    filters = [*warnings.filters]

    def make() -> Net:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
        os.chdir("/")
        sys.path.pop(0)
        logging.disable(logging.WARNING)
        warnings.simplefilter("error", DeprecationWarning)
        warnings.filterwarnings("ignore", message="of mine")
        return Net()

    weights, places = Net().state_dict(), [*sys.path]
    model = opened(make, weights)
    assert (torch.get_default_dtype(), Path.cwd()) == (torch.float32, tmp_path)
    assert (torch.get_num_threads(), sys.path) == (threads, places)
    assert model(torch.zeros(2, *SIZE)).dtype is torch.float32
    assert logging.root.manager.disable == 0
    mine, *others = warnings.filters
    assert (mine[0], others) == ("ignore", filters)  # what it does not want to hear stays unsaid
    warnings.filters.remove(mine)


class Checkpointed(Net):
    """Keeps nothing of its first layers for the gradients, but computes them anew."""

    def forward(self, x: Tensor) -> Tensor:
        first = checkpoint(lambda y: F.relu(self.bn(self.conv(y))), x, use_reentrant=False)
        return self.fc(first.mean((2, 3)))


def test_checkpointed_layers_let_gradients_back_but_cannot_be_looked_into():
    model = classifier(Checkpointed(), "net", SIZE, CLASSES).freeze()
    require_gradients(model.net, "net", SIZE)
    with pytest.raises(ArtifactError, match="switch gradient checkpointing off"):
        require_gradients(model.net, "net", SIZE, batch_moments(model))

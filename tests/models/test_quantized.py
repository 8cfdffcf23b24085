"""Quantisers against their formulas in float64, and what they leave of a network: its names, taps and weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.quantized import (
    Rounding,
    RoundingLayer,
    affine,
    computed_in_float,
    find_ranges,
    follow_ranges,
    quantisers,
    quantize,
    round_values,
    round_weight,
)
from dfkd_cli.models.registry import build
from dfkd_cli.models.taps import Taps

RNG = np.random.default_rng(0)
SIZE = (3, 16, 16)


def classifier(spec: str) -> Classifier:
    torch.manual_seed(0)
    return Classifier(build(spec, 10, SIZE), ModelInfo(spec, 10, SIZE, (0.5,) * 3, (0.2,) * 3)).eval()


def calibrated(spec: str) -> Classifier:
    made = classifier(spec)
    find_ranges(made, [torch.rand(8, *SIZE)])
    return made


def of_weights(weight: np.ndarray, bits: int) -> np.ndarray:
    """The weight (O, ...) by the formula."""
    top = 2 ** (bits - 1) - 1
    scale = np.abs(weight).reshape(len(weight), -1).max(1).reshape(-1, *[1] * (weight.ndim - 1)) / top
    return scale * np.clip(np.rint(weight / np.where(scale, scale, 1)), -top, top)


def of_values(values: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    top = 2**bits - 1
    scale = (high - low) / top
    zero = np.rint(-low / scale)
    return scale * (np.clip(np.rint(values / scale) + zero, 0, top) - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7), (3, 2, 5)])
def test_weights_are_rounded_for_each_output_channel(bits, shape):
    weight = RNG.normal(size=shape) * 10.0 ** RNG.integers(-3, 3, size=(shape[0], *[1] * (len(shape) - 1)))
    weight[1] = 0
    rounded = round_weight(torch.tensor(weight, dtype=torch.float32), bits).double().numpy()
    single = weight.astype(np.float32).astype(float)
    np.testing.assert_allclose(rounded, of_weights(single, bits), rtol=1e-5, atol=1e-12)
    for channel in np.delete(rounded, 1, 0):
        assert len(np.unique(channel.round(12))) <= 2**bits - 1  # the range is symmetric
        assert np.abs(channel).max() == pytest.approx(np.abs(single[rounded.tolist().index(channel.tolist())]).max())


@pytest.mark.parametrize("low,high", [(0.0, 3.0), (-1.0, 2.0), (-5.0, 0.0), (-0.1, 7.0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_are_rounded_within_their_range(low, high, bits):
    values = RNG.uniform(low - 1, high + 1, size=2000)
    rounded = round_values(torch.tensor(values, dtype=torch.float32), torch.tensor([low, high]), bits).double().numpy()
    np.testing.assert_allclose(rounded, of_values(values, low, high, bits), atol=1e-5 * (high - low))
    assert len(np.unique(rounded)) <= 2**bits
    assert rounded.max() - rounded.min() == pytest.approx(high - low)


def test_zero_stays_zero_and_halves_go_to_the_even_one():
    limits = torch.tensor([-1.0, 2.0])
    assert round_values(torch.zeros(1), limits, 4).item() == 0
    scale, zero = affine(torch.tensor([0.0, 15.0]), 4)
    assert (scale.item(), zero.item()) == (1, 0)
    halves = torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5])
    assert round_values(halves, torch.tensor([0.0, 15.0]), 4).tolist() == [0, 2, 2, 4, 4]
    assert round_values(torch.tensor([3.0]), torch.tensor([0.0, 0.0]), 8).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("limits", [(0.0, 6.0), (-1.3, 2.7), (-4.0, 0.0), (0.0, 0.0)])
def test_what_is_trained_is_what_pytorch_exports_to_the_bit(bits, limits):
    ends = torch.tensor(limits)
    scale, zero = affine(ends, bits)
    halves = (torch.arange(-600, 600) / 2 * scale).repeat(2)
    values = torch.cat([torch.randn(5000) * 3, halves, torch.tensor([-0.0, 1e-30, 1e4, -1e4])]).requires_grad_(True)
    factor = torch.randn(len(values))
    own = round_values(values, ends, bits)
    other = round_values(values, ends, bits, (scale, zero))
    assert torch.equal(own, other)
    gradients = [torch.autograd.grad((factor * made).sum(), values)[0] for made in (own, other)]
    assert torch.equal(*gradients)


def test_gradients_go_straight_through_within_the_range():
    values = torch.tensor([-3.0, -0.9, 0.0, 0.2, 1.9, 2.6], requires_grad=True)
    round_values(values, torch.tensor([-1.0, 2.0]), 4).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 0]
    weight = torch.randn(3, 5, requires_grad=True)
    (round_weight(weight, 2) * torch.arange(5)).sum().backward()
    assert weight.grad.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_ranges_are_the_extremes_in_float_over_all_batches():
    made = classifier("w4a4:resnet8")
    batches = [torch.rand(4, *SIZE), torch.rand(4, *SIZE) * 1.5]
    with torch.no_grad():
        inputs = {}
        twin = classifier("resnet8")
        for name in ("stem.0", "stage2.0.conv2", "head"):
            twin.net.get_submodule(name).register_forward_pre_hook(
                lambda _, given, name=name: inputs.setdefault(name, []).append(given[0])
            )
        for batch in batches:
            twin(batch)
    find_ranges(made, batches)
    for name, seen in inputs.items():
        seen = torch.cat(seen)
        expected = [min(seen.min().item(), 0), max(seen.max().item(), 0)]
        assert made.net.get_submodule(name).input_range.tolist() == expected, name


def test_ranges_follow_the_batches_of_a_training():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    quantize(net, 8, 8, SIZE, "test")
    follow_ranges(net)
    low = high = None
    for factor in (1.0, 3.0, 0.5):
        batch = torch.randn(4, *SIZE) * factor
        net.train()(batch)
        ends = min(batch.min().item(), 0), max(batch.max().item(), 0)
        low, high = ends if low is None else (0.99 * low + 0.01 * ends[0], 0.99 * high + 0.01 * ends[1])
    net.eval()(torch.randn(4, *SIZE) * 9)  # of which nothing is learned
    assert net[1].input_range.tolist() == pytest.approx([low, high], rel=1e-5)
    assert net[1].calibrated


def test_names_and_weights_and_answers_stay_until_ranges_are_known():
    plain, made = classifier("resnet8"), classifier("w4a4:resnet8")
    assert [*dict(plain.net.named_modules())] == [*dict(made.net.named_modules())]
    assert [*dict(plain.net.named_parameters())] == [*dict(made.net.named_parameters())]
    added = made.net.state_dict().keys() - plain.net.state_dict().keys()
    assert {name.rpartition(".")[2] for name in added} == {"input_range", "output_range"}
    pixels = torch.rand(2, *SIZE)
    assert torch.equal(plain(pixels), made(pixels))
    assert Taps(plain).stages == Taps(made).stages
    find_ranges(made, [pixels])
    assert not torch.equal(plain(pixels), made(pixels))
    assert Taps(plain).stages == Taps(made).stages
    assert isinstance(made.head(), nn.Linear)


def test_the_first_and_the_last_layer_have_eight_bits():
    layers = [module for module in quantisers(classifier("w4a3:resnet8").net) if isinstance(module, RoundingLayer)]
    assert [(layer.weight_bits, layer.input_bits) for layer in layers] == [(8, 8), *[(4, 3)] * 8, (8, 8)]


def test_what_is_added_is_rounded_too():
    net = classifier("w4a4:resnet14").net
    joints = {name for name, module in net.named_modules() if isinstance(module, Rounding) and module.output_bits}
    blocks = [f"stage{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    shortcuts = {"stem.2", "stage1.0.relu2", "stage2.0.relu2", "stage3.0.relu2"}  # where it is the identity
    projections = {"stage2.0.shortcut.1", "stage3.0.shortcut.1"}
    assert joints == {f"{block}.bn2" for block in blocks} | shortcuts | projections
    assert all(module.output_bits == 8 for module in quantisers(net) if module.output_bits)


def test_a_layer_computes_with_rounded_weight_and_input():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10))
    quantize(net, 3, 4, SIZE, "test")
    assert computed_in_float(net, SIZE) == []
    find_ranges(Classifier(net, ModelInfo("t", 10, SIZE, (0.0,) * 3, (1.0,) * 3)), [torch.rand(32, *SIZE)])
    hidden = torch.rand(7, 6) * 3
    layer = net[3]
    low, high = layer.input_range.double().tolist()
    weight, bias = layer.state_dict()["weight"].double().numpy(), layer.bias.detach().double().numpy()
    expected = of_values(hidden.double().numpy(), low, high, 4) @ of_weights(weight, 3).T + bias
    np.testing.assert_allclose(layer(hidden).detach().numpy(), expected, atol=1e-5)


def test_a_state_is_taken_over_with_its_ranges_and_copied():
    made, other = calibrated("w8a8:resnet8"), classifier("w8a8:resnet8")
    pixels = torch.rand(3, *SIZE)
    assert not any(module.calibrated for module in quantisers(other.net))
    other.net.load_state_dict(made.net.state_dict())
    assert torch.equal(made(pixels), other(pixels))
    assert torch.equal(copy.deepcopy(made)(pixels), made(pixels))


def test_eight_bits_are_nearer_than_four_than_two():
    pixels, plain = torch.rand(8, *SIZE), classifier("resnet8")
    errors = []
    for spec in ("w8a8:resnet8", "w4a8:resnet8", "w4a4:resnet8", "w2a2:resnet8"):
        made = classifier(spec)
        find_ranges(made, [pixels])
        errors.append((made(pixels) - plain(pixels)).norm().item())
    assert errors == sorted(errors) and errors[0] < 0.1 * errors[-1]


class Named(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.named = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), named

    def forward(self, x):
        y = (self.conv(input=x) if self.named else self.conv(x)).relu().mean((2, 3))
        return self.fc(input=y) if self.named else self.fc(y)


def test_layers_may_be_called_by_keyword():
    answers = []
    for named in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = Named(named)
        quantize(made, 4, 4, SIZE, "named")
        info = ModelInfo("named", 10, SIZE, (0.0,) * 3, (1.0,) * 3)
        find_ranges(Classifier(made, info).eval(), [torch.linspace(0, 1, 3 * 16 * 16).view(1, *SIZE)])
        answers.append(made(torch.linspace(-1, 2, 3 * 16 * 16).view(1, *SIZE)))
    assert torch.equal(*answers)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.kernel = nn.Parameter(torch.rand(8, 8, 1, 1))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        maps = nn.functional.conv2d(self.patches(x), self.kernel)
        tokens = maps.flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens, tokens, tokens)[0]).mean(1))


def test_what_stays_float_is_named():
    net = Attentive()
    quantize(net, 8, 8, SIZE, "test")
    assert sorted(computed_in_float(net, SIZE)) == ["", "attention"]
    assert {name for name, module in net.named_modules() if isinstance(module, RoundingLayer)} == {"patches", "head"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_layers_whose_weight_is_computed_stay_float(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10)]
    made = Classifier(nn.Sequential(*layers), ModelInfo("test", 10, SIZE, (0.0,) * 3, (1.0,) * 3)).eval()
    pixels = torch.rand(2, *SIZE)
    plain = made(pixels).detach()
    quantize(made.net, 8, 8, SIZE, "test")
    assert computed_in_float(made.net, SIZE) == ["2"]
    find_ranges(made, [pixels])
    kinds = {"0": RoundingLayer, "1": Rounding, "5": RoundingLayer}  # what goes to a float layer leaves the integers
    assert {name: type(made.net.get_submodule(name)).__mro__[1] for name in kinds} == kinds
    assert [*map(made.net.get_submodule, kinds)] == quantisers(made.net)
    assert 0 < (made(pixels) - plain).norm() < 0.1 * plain.norm()
    made.train()(pixels).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    layers = nn.Sequential(nn.Flatten(), norm(nn.Linear(768, 10)))
    with pytest.raises(ConfigError, match=r"nothing in it can be quantised -- .* a weight of its own"):
        quantize(layers, 8, 8, SIZE, "test")


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(10, 768))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def test_a_network_in_which_nothing_can_be_quantised_is_refused():
    with pytest.raises(ConfigError, match="test: nothing in it can be quantised"):
        quantize(Functional(), 8, 8, SIZE, "test")
    with pytest.raises(ConfigError, match="w9a8 is not a pair of widths from 2 to 8"):
        build("w9a8:resnet8", 10, SIZE)

"""Moments of what goes into BatchNorm layers, and what comes out: in any layout and precision, with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn

from dfkd_cli.models import moments as moments_of_layers
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.moments import moments, normalise
from dfkd_cli.models.registry import build
from dfkd_cli.models.statistics import batch_moments

RNG = np.random.default_rng(0)
LAST, FIRST = torch.channels_last, torch.contiguous_format


def layer_of(channels: int, affine: bool) -> nn.BatchNorm2d:
    """A layer with random statistics, and weights."""
    layer = nn.BatchNorm2d(channels, affine=affine, eps=1e-3).double().eval().requires_grad_(False)
    for value in layer.state_dict().values():
        if value.ndim:
            value.copy_(torch.from_numpy(RNG.uniform(0.5, 2, channels)))
    return layer


def normalised(layer: nn.BatchNorm2d, values: np.ndarray) -> np.ndarray:
    """The same in NumPy."""
    state = {name: value.numpy()[:, None, None] for name, value in layer.state_dict().items() if value.ndim}
    output = (values - state["running_mean"]) / np.sqrt(state["running_var"] + layer.eps)
    return output * state.get("weight", 1) + state.get("bias", 0)


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("correction", [0, 1])
def test_values_are_those_of_numpy(correction, affine, dtype, tolerance, layout):
    """Means of half precision are exact: only what goes in is rounded, and what comes out."""
    layer = layer_of(3, affine)
    values = torch.from_numpy(RNG.normal(1, 2, (4, 3, 6, 5))).to(dtype).to(memory_format=layout)
    exact = values.double().numpy()
    output, seen = normalise(layer.to(torch.float32 if dtype == torch.bfloat16 else dtype), values, correction)
    assert output.dtype == dtype and seen.mean.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(output.double(), normalised(layer.double(), exact), rtol=tolerance, atol=tolerance)
    for found in (seen, moments(values, correction)):
        for ours, theirs in zip((found.mean, found.variance), oracles.channel_moments(exact, correction), strict=True):
            np.testing.assert_allclose(ours.double(), theirs, rtol=min(tolerance, 1e-5))


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize("images", [64, 65])
def test_of_many_values_few_digits_are_lost(images, layout):
    """A float32 sum of a quarter of a million, one by one, would be off by 5e-5."""
    values = torch.from_numpy(RNG.normal(3, 1, (images, 2, 64, 64))).float().to(memory_format=layout)
    seen, exact = moments(values), oracles.channel_moments(values.double().numpy())
    for ours, theirs in zip((seen.mean, seen.variance), exact, strict=True):
        np.testing.assert_allclose(ours.double(), theirs, rtol=1e-5)


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("correction", [0, 1])
def test_gradients_are_those_of_finite_differences(correction, affine, layout):
    layer = layer_of(2, affine)
    values = torch.from_numpy(RNG.normal(1, 2, (3, 2, 2, 3))).to(memory_format=layout).requires_grad_()

    def both(x: Tensor) -> tuple[Tensor, ...]:
        output, seen = normalise(layer, x, correction)
        alone = moments(x, correction)
        return output, seen.mean, seen.variance, alone.mean, alone.variance

    assert torch.autograd.gradcheck(both, (values,))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_network_answers_alike_and_its_gradients_are_sums_of_both(bf16, monkeypatch):
    """Beside the same network, of whose layers' inputs PyTorch takes mean and variance. Images go in parts of four."""
    monkeypatch.setattr(moments_of_layers, "_CACHED", 4 * 16**3)
    torch.manual_seed(0)
    info = ModelInfo("resnet8", 5, (3, 16, 16), (0.5,) * 3, (0.25,) * 3, tuple("abcde"))
    teacher = Classifier(build("resnet8", 5, info.input_size), info).freeze().lay_out()
    for layer in teacher.batch_norms():
        nn.init.uniform_(layer.running_var, 0.5, 2)
    images = torch.rand(6, 3, 16, 16).to(memory_format=LAST).requires_grad_()

    def gradient(logits: Tensor, means: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
        pull = sum((m - 1).square().sum() + v.square().sum() for m, v in zip(means, variances, strict=True))
        return torch.autograd.grad(logits.float().square().sum() + pull, images)[0]

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with batch_moments(teacher) as seen:
            logits = teacher(images)
        ours = gradient(logits, [m.mean for m in seen.values()], [m.variance for m in seen.values()])
        assert not any("forward" in vars(layer) for layer in teacher.batch_norms())
        inputs: list[Tensor] = []
        for layer in teacher.batch_norms():
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float()))
        expected = teacher(images)
        variances, means = zip(*(torch.var_mean(x, (0, 2, 3), correction=0) for x in inputs), strict=True)
        theirs = gradient(expected, means, variances)
    torch.testing.assert_close(logits, expected)
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=0.03 if bf16 else 1e-5)

"""The three schemes of The Knowledge Within against their formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import synthesis_oracles as formulas
import torch
from scipy.integrate import trapezoid
from stand_ins import synthesizer
from torch import nn

from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import load_model
from dfkd_cli.models.moments import Moments, moments
from dfkd_cli.synthesizers.base import Synthesizer
from dfkd_cli.synthesizers.terms import roughness, statistics_distance, statistics_divergence

RNG = np.random.default_rng(0)
MEAN, STD, CLASSES, SIZE = (0.2, 0.6), (0.5, 0.3), 3, (2, 4, 5)


def small_teacher() -> Classifier:
    """A linear classifier behind a BatchNorm that was trained on other images than noise."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(40, CLASSES))
        net[0].running_mean.copy_(torch.tensor([0.7, -0.4]))
        net[0].running_var.copy_(torch.tensor([0.3, 2.0]))
        nn.init.uniform_(net[0].weight, 0.5, 1.5)
        nn.init.normal_(net[0].bias)
    return Classifier(net, ModelInfo("small", CLASSES, SIZE, MEAN, STD)).eval()


def method(name: str, directory: Path, teacher: Classifier | None = None, **values) -> Synthesizer:
    return synthesizer(name, directory, teacher or small_teacher(), {"batch_size": 4, "iterations": 6} | values)


def recorded(teacher: Classifier) -> tuple[np.ndarray, np.ndarray]:
    norm = teacher.net[0]
    return norm.running_mean.double().numpy(), norm.running_var.double().numpy()


# -- noise -------------------------------------------------------------------------------------------------------------


def test_gaussian_noise_is_standard_normal_as_the_network_takes_it(tmp_path):
    count, teacher = 4000, small_teacher()
    noise = synthesizer("gaussian", tmp_path, teacher, {})
    torch.manual_seed(0)
    made = noise.make(0, count)
    assert (made.pixels.shape, made.targets, dict(made.terms)) == ((count, *SIZE), None, {})
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        drawn = (made.pixels[:, channel].double().numpy().ravel() - mean) / std
        n = drawn.size
        assert abs(drawn.mean()) < 5 / n**0.5
        assert abs(drawn.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs((drawn**4).mean() - 3) < 5 * (96 / n) ** 0.5
    torch.manual_seed(0)
    exact = np.array(STD)[:, None, None] * torch.randn(count, *SIZE).double().numpy() + np.array(MEAN)[:, None, None]
    np.testing.assert_allclose(made.pixels, exact, atol=1e-6)


# -- the smoothness prior ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 9, 6), (1, 1, 2, 5), (2, 1, 1, 1)])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5])
def test_roughness_is_the_distance_to_the_blurred_image(shape, sigma):
    pixels = RNG.normal(size=shape)
    images = torch.tensor(pixels, requires_grad=True)
    value = roughness(images, sigma)
    value.backward()
    expected, gradient = formulas.roughness(pixels, sigma)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(images.grad, gradient, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: roughness(x, sigma), images)


def test_roughness_sees_no_brightness_and_hates_noise_most():
    smooth = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 16, 1).expand(1, 1, 16, 16)
    noise = torch.from_numpy(RNG.permutation(smooth.numpy().ravel())).view(1, 1, 16, 16)
    assert roughness(torch.full_like(smooth, 3.0), 1.0) < 1e-20
    torch.testing.assert_close(roughness(noise + 3, 1.0), roughness(noise, 1.0))
    torch.testing.assert_close(roughness(2 * noise, 1.0), 4 * roughness(noise, 1.0))
    torch.testing.assert_close(roughness(torch.cat([noise, noise]), 1.0), roughness(noise, 1.0))
    assert roughness(smooth, 1.0) < 0.01 * roughness(noise, 1.0)


# -- the BatchNorm term ------------------------------------------------------------------------------------------------


def test_the_formula_of_the_divergence_is_that_of_two_gaussians():
    mean_p, var_p, mean_q, var_q = 0.3, 0.7, -0.5, 1.9
    x = np.linspace(-15, 15, 100_001)
    p, q = (np.exp(-((x - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v) for m, v in ((mean_p, var_p), (mean_q, var_q)))
    integral = trapezoid(p * np.log(p / q), x)
    np.testing.assert_allclose(formulas.gaussian_kl(mean_p, var_p, mean_q, var_q), integral, rtol=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (4, 3, 2, 5)])
def test_statistics_divergence_is_the_papers(shape, reverse):
    values = [RNG.normal(1, 2, size=shape) for _ in range(2)]
    mean, var = RNG.normal(size=(2, shape[1])), RNG.uniform(0.5, 3, size=(2, shape[1]))
    theirs = {str(i): Moments(torch.from_numpy(mean[i]), torch.from_numpy(var[i])) for i in range(2)}
    theirs["unused"] = Moments(torch.zeros(7), torch.ones(7))

    def divergence(first, second):
        return statistics_divergence({"0": moments(first), "1": moments(second)}, theirs, reverse)

    inputs = [torch.tensor(x, requires_grad=True) for x in values]
    value = divergence(*inputs)
    value.backward()
    expected = [formulas.statistics_divergence(x, mean[i], var[i], reverse) for i, x in enumerate(values)]
    np.testing.assert_allclose(value.item(), (expected[0][0] + expected[1][0]) / 2, rtol=1e-10)
    for given, (_, gradient) in zip(inputs, expected, strict=True):
        np.testing.assert_allclose(given.grad, gradient / 2, atol=1e-12)
    assert torch.autograd.gradcheck(divergence, inputs)


@pytest.mark.parametrize("reverse", [False, True])
def test_statistics_divergence_is_zero_for_the_training_data_alone(reverse):
    data = torch.from_numpy(RNG.normal(size=(50, 2, 3, 3)))
    same, shuffled = moments(data), moments(data[torch.randperm(50)])
    assert statistics_divergence({"bn": shuffled}, {"bn": same}, reverse).abs() < 1e-12
    for other in (data + 0.1, data * 1.1, data * 0.9):
        assert statistics_divergence({"bn": moments(other)}, {"bn": same}, reverse) > 1e-3
    changed = Moments(3 * same.mean + 5, 9 * same.variance)  # the same change to both, as another unit would
    assert statistics_divergence({"bn": moments(3 * data + 5)}, {"bn": changed}, reverse).abs() < 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_dead_channels_do_not_count_and_constant_batches_stay_finite(reverse):
    alive = Moments(torch.tensor([0.5]), torch.tensor([2.0]))
    both = Moments(torch.tensor([0.5, 1.0]), torch.tensor([2.0, 0.5e-5]))
    images = torch.randn(8, 2, 3, 3).requires_grad_()
    value = statistics_divergence({"bn": moments(images)}, {"bn": both}, reverse)
    torch.testing.assert_close(value, statistics_divergence({"bn": moments(images[:, :1])}, {"bn": alive}, reverse))
    dead = Moments(torch.zeros(2), torch.zeros(2))
    assert statistics_divergence({"bn": moments(images)}, {"bn": dead}, reverse) == 0
    (gradient,) = torch.autograd.grad(value, images)
    assert (gradient[:, 0] != 0).all() and (gradient[:, 1] == 0).all()
    flat = torch.ones(3, 1, 2, 2, requires_grad=True)
    value = statistics_divergence({"bn": moments(flat)}, {"bn": alive}, reverse)
    (gradient,) = torch.autograd.grad(value, flat)
    assert value.isfinite() and gradient.isfinite().all()


# -- the inner loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("inception", {}),
        ("inception", {"smoothness": 0.0, "cross_entropy": 0.5, "temperature": 3.0}),
        ("inception", {"smoothness": 0.1, "blur": 0.6}),
        ("bn-statistics", {}),
        ("bn-statistics", {"cross_entropy": 0.0, "smoothness": 0.0}),  # the third scheme alone
        ("bn-statistics", {"bn_loss": "kl-reverse", "statistics": 0.3, "smoothness": 0.1}),
    ],
)
def test_inner_loop_is_adam_on_the_normalised_images(name, values, tmp_path):
    count, lr, iterations, teacher = 4, 0.05, 6, small_teacher()
    maker = method(name, tmp_path, teacher, lr=lr, **values)
    config = maker.config
    torch.manual_seed(3)
    made = maker.make(0, count)
    torch.manual_seed(3)
    start, targets = torch.randn(count, *SIZE).double().numpy(), np.eye(CLASSES)[[0, 1, 2, 0]]
    np.testing.assert_array_equal(made.targets, targets)

    norm, linear = teacher.net[0], teacher.net[2]
    (mean, var), weight = recorded(teacher), linear.weight.double().numpy()
    scale = (norm.weight.double().numpy() / np.sqrt(var + norm.eps))[:, None, None]
    shift = norm.bias.double().numpy()[:, None, None] - scale * mean[:, None, None]

    def terms(x):
        logits = (scale * x + shift).reshape(count, -1) @ weight.T + linear.bias.double().numpy()
        through = (oracles.impression_gradient(logits, targets, config.temperature) @ weight).reshape(x.shape) * scale
        found = {
            "cross_entropy": (oracles.impression_loss(logits, targets, config.temperature), through),
            "smoothness": formulas.roughness(x, config.blur),
        }
        if name == "bn-statistics":
            reverse = config.bn_loss == "kl-reverse"
            found["statistics"] = formulas.statistics_divergence(x, mean, var, reverse)
        return found

    last = {}

    def gradient(x):
        last.update(terms(x))
        return sum(getattr(config, key) * part for key, (_, part) in last.items())

    expected = oracles.adam(start, gradient, lr, iterations, lambda x: x)
    assert np.abs(expected - start).max() > 0.05
    pixels = np.array(STD)[:, None, None] * expected + np.array(MEAN)[:, None, None]
    np.testing.assert_allclose(made.pixels, pixels, atol=2e-5)
    assert set(made.terms) == {key for key in last if key != "smoothness" or config.smoothness}
    for key, term in made.terms.items():
        np.testing.assert_allclose(term, last[key][0], rtol=1e-4)


def test_l2_is_deepinversions_distance_with_biased_variances(tmp_path):
    teacher = small_teacher()
    maker = method("bn-statistics", tmp_path, teacher, bn_loss="l2")
    images = torch.randn(4, *SIZE)
    targets = maker.targets(0, 4)
    with maker.looking() as show:
        look = show(images)
    distance = maker.terms(look, targets)["statistics"]
    x, (mean, var) = images.double().numpy(), recorded(teacher)
    expected = sum(np.linalg.norm(a - b) for a, b in ((x.mean((0, 2, 3)), mean), (x.var((0, 2, 3)), var)))
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    torch.testing.assert_close(distance, statistics_distance(look.moments, maker.recorded))


@pytest.mark.parametrize("bn_loss", ["kl", "kl-reverse", "l2"])
def test_batches_come_nearer_to_the_statistics(bn_loss, tmp_path, make_teacher):
    teacher, _ = load_model(make_teacher("resnet8"))
    with torch.random.fork_rng(), torch.no_grad():  # running statistics as after training, on images that are not noise
        torch.manual_seed(0)
        for norm in teacher.batch_norms():
            norm.momentum = None
        teacher.net.train()
        teacher.net(torch.nn.functional.avg_pool2d(torch.randn(16, 1, 96, 96), 3) + 1)
    terms = []
    for iterations in (1, 12):
        values = {"batch_size": 6, "iterations": iterations, "bn_loss": bn_loss, "lr": 0.2}
        terms.append(synthesizer("bn-statistics", tmp_path / str(iterations), teacher, values).round(0)["statistics"])
    assert terms[1] < 0.5 * terms[0]

"""The soft-targeted transfer set against its formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import synthesis_oracles as formulas
import torch
from stand_ins import synthesizer
from torch import nn

from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import load_model
from dfkd_cli.synthesizers.soft_target import SoftTarget, activation_reward, normal_logits
from dfkd_cli.synthesizers.terms import tempered_divergence

RNG = np.random.default_rng(0)
DRAWS = 100_000
WEIGHTS = {  # (K, D)
    "more features than classes": RNG.normal(size=(4, 7)) * np.array([[0.1], [1], [3], [20]]),
    "more classes than features": RNG.normal(size=(6, 2)),
    "alike and opposite": np.array([[1.0, 2, 3], [2, 4, 6], [-1, -2, -3], [3, 0, -1]]),
}


def conv_teacher() -> Classifier:
    """One convolution (2 maps of 3x3) and a linear layer: 5x5 images in 3 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
    return Classifier(net, ModelInfo("small", 3, (1, 5, 5), mean=(0.2,), std=(0.5,))).eval()


def method(directory: Path, teacher: Classifier, **values) -> SoftTarget:
    made = synthesizer("soft-target", directory, teacher, {"batch_size": 4, "iterations": 5} | values)
    assert isinstance(made, SoftTarget)
    return made


def drawn(weight: np.ndarray, sigma: float, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    return normal_logits(torch.from_numpy(weight).float(), sigma, count).double().numpy()


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("sigma", [1.0, 20.0])
def test_sampled_logits_have_the_moments_of_the_distribution(weight, sigma):
    samples = drawn(weight, sigma)
    covariance = sigma**2 * formulas.correlation(weight)
    np.testing.assert_array_less(np.abs(samples.mean(0)), 5 * sigma / DRAWS**0.5)
    products = samples.T @ samples / DRAWS  # of two normal variables: variance C_ii C_jj + C_ij^2
    error = 5 * np.sqrt((sigma**4 + covariance**2) / DRAWS)
    np.testing.assert_array_less(np.abs(products - covariance), error)
    fourth = (samples**4).mean(0)
    np.testing.assert_array_less(np.abs(fourth - 3 * sigma**4), 5 * np.sqrt(96 / DRAWS) * sigma**4)


@pytest.mark.parametrize("name", ["more classes than features", "alike and opposite"])
def test_a_singular_correlation_is_sampled_exactly(name):
    weight = WEIGHTS[name]
    correlation = formulas.correlation(weight)
    rank = np.linalg.matrix_rank(correlation)
    assert rank < len(weight)
    samples = drawn(weight, 3.0, 100)
    assert np.linalg.matrix_rank(samples, tol=1e-3) == rank
    values, vectors = np.linalg.eigh(correlation)
    np.testing.assert_allclose(samples @ vectors[:, values < 1e-9], 0, atol=1e-5)


def test_classes_that_are_alike_get_the_same_logits_and_opposite_ones_the_opposite():
    samples = drawn(WEIGHTS["alike and opposite"], 5.0, 100)
    np.testing.assert_allclose(samples[:, 1], samples[:, 0], rtol=1e-5)
    np.testing.assert_allclose(samples[:, 2], -samples[:, 0], rtol=1e-5)


def test_the_length_of_weights_says_nothing_and_their_order_only_who_is_who():
    weight = WEIGHTS["more features than classes"]
    samples = drawn(weight, 2.0, 50)
    np.testing.assert_allclose(drawn(weight * np.array([[7], [0.1], [1], [100]]), 2.0, 50), samples, atol=1e-5)
    np.testing.assert_allclose(drawn(weight[[2, 0, 3, 1]], 2.0, 50), samples[:, [2, 0, 3, 1]], atol=1e-6)
    np.testing.assert_allclose(drawn(weight, 6.0, 50), 3 * samples, atol=1e-5)
    assert np.abs(drawn(weight, 2.0, 50, seed=1) - samples).max() > 1


@pytest.mark.parametrize("weight", [np.eye(5), RNG.normal(size=(5, 3))], ids=["orthogonal", "any"])
def test_classes_are_as_frequent_as_the_distribution_says(weight):
    root = np.linalg.cholesky(formulas.correlation(weight) + 1e-9 * np.eye(5))
    independent = np.bincount((RNG.normal(size=(DRAWS, 5)) @ root.T).argmax(1), minlength=5) / DRAWS
    shares = np.bincount(drawn(weight, 1.0).argmax(1), minlength=5) / DRAWS
    error = np.sqrt(shares * (1 - shares) / DRAWS)
    np.testing.assert_array_less(np.abs(shares - independent), 5 * 2**0.5 * error + 1e-9)
    if np.array_equal(weight, np.eye(5)):
        np.testing.assert_array_less(np.abs(shares - 0.2), 5 * error)


def two_layers() -> Classifier:
    """Two linear layers, of 6 and 3 units: 2x2 images in 3 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    return Classifier(net, ModelInfo("two", 3, (1, 2, 2), mean=(0.0,), std=(1.0,))).eval()


@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize("layers", [("1", "logits"), ("logits", "1"), ("1",)])
def test_images_take_turns_in_the_layer_that_they_have_a_target_in(first, layers, tmp_path):
    count, tau, sigma, teacher = 5, 2.0, 6.0, two_layers()
    maker = method(tmp_path, teacher, layers=layers, temperature=tau, sigma=sigma, activation=0)
    images = torch.randn(count, 1, 2, 2, requires_grad=True)
    torch.manual_seed(4)
    targets = maker.targets(first, count)
    with maker.looking() as show:
        value = maker.terms(show(images), targets)["divergence"]
    weights = {"1": teacher.net[1].weight, "logits": teacher.net[3].weight}
    x = images.detach().double().numpy().reshape(count, -1)
    outputs = {
        "1": x @ teacher.net[1].weight.detach().double().numpy().T + teacher.net[1].bias.detach().double().numpy()
    }
    outputs["logits"] = np.maximum(outputs["1"], 0) @ teacher.net[3].weight.detach().double().numpy().T
    outputs["logits"] += teacher.net[3].bias.detach().double().numpy()
    torch.manual_seed(4)
    expected = 0.0
    for index, name in enumerate(layers):
        mine = [n for n in range(count) if (first + n) % len(layers) == index]
        sampled = normal_logits(weights[name].detach(), sigma, len(mine)).double().numpy()
        expected += sum(formulas.soft_target_loss(outputs[name][[n]], sampled[[i]], tau) for i, n in enumerate(mine))
        rows, labels = targets[name]
        assert list(range(count))[rows] == mine
        np.testing.assert_allclose(labels, oracles.softmax(sampled / tau), atol=1e-6)
    assert value.item() == pytest.approx(expected / count, rel=1e-5)
    assert maker.make(first, count).targets is None
    assert method(tmp_path, teacher, activation=0).make(first, count).targets is not None


def test_only_linear_layers_have_targets(tmp_path):
    for layers in (("0",), ("stage1",), ("penultimate",)):  # the last one is what goes into a layer
        with pytest.raises(ConfigError, match="not a linear layer"):
            method(tmp_path, conv_teacher(), layers=layers)


def test_targets_are_tempered_samples_and_one_for_every_image(tmp_path):
    teacher, tau, sigma = conv_teacher(), 3.0, 8.0
    maker = method(tmp_path, teacher, temperature=tau, sigma=sigma)
    torch.manual_seed(5)
    targets = maker.soft_labels(maker.targets(0, 40))
    assert (targets.shape, targets.dtype) == ((40, 3), torch.float32)
    sampled = drawn(teacher.head().weight.double().numpy(), sigma, 40, seed=5)
    np.testing.assert_allclose(targets, oracles.softmax(sampled / tau), atol=1e-6)
    assert len(targets.unique(dim=0)) == 40


# -- terms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (5, 10)])
@pytest.mark.parametrize("tau", [1.0, 20.0])
def test_tempered_divergence_is_the_papers(shape, tau):
    logits, sampled = RNG.normal(scale=10, size=shape), RNG.normal(scale=10, size=shape)
    z, target = torch.tensor(logits, requires_grad=True), torch.from_numpy(oracles.softmax(sampled / tau))
    loss = tempered_divergence(z, target, tau)
    loss.backward()
    np.testing.assert_allclose(loss.item(), formulas.soft_target_loss(logits, sampled, tau), rtol=1e-10)
    np.testing.assert_allclose(z.grad, oracles.impression_gradient(logits, target.numpy(), tau), atol=1e-12)
    assert torch.autograd.gradcheck(lambda a: tempered_divergence(a, target, tau), z)
    assert tempered_divergence(torch.from_numpy(sampled + 7), target, tau).abs() < 1e-12  # no loss at the target
    one_hot = torch.eye(shape[1], dtype=torch.float64)[torch.arange(shape[0]) % shape[1]]
    assert tempered_divergence(z, one_hot, tau).isfinite()


def test_activation_reward_is_the_mean_size_of_features():
    features = [RNG.normal(size=(3, 2, 4, 4)), RNG.normal(size=(3, 5))]
    inputs = [torch.tensor(x, requires_grad=True) for x in features]
    expected = [-sum(np.abs(row).sum() / row.size for row in x) / len(x) for x in features]
    np.testing.assert_allclose(activation_reward(inputs[:1]).item(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(activation_reward(inputs).item(), np.mean(expected), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: activation_reward(x), inputs)


@pytest.mark.parametrize(("taps", "path"), [(("last",), "stage2"), (("stages",), None), (("penultimate",), "fc2")])
def test_features_are_those_at_the_taps_last_by_default(taps, path, tmp_path, teacher):
    lenet, _ = load_model(teacher)
    maker = method(tmp_path, lenet, taps=taps)
    if taps == ("last",):
        assert maker.config.taps == method(tmp_path, lenet).config.taps
    net, images = lenet.net.eval(), torch.randn(4, 1, 32, 32)
    paths = ["stage1", "stage2"] if path is None else [path]
    values = [net[: [name for name, _ in net.named_children()].index(path) + 1](images) for path in paths]
    targets = maker.targets(0, 4)
    with maker.looking() as show:
        terms = maker.terms(show(images), targets)
    expected = -np.mean([value.detach().double().abs().mean() for value in values])
    np.testing.assert_allclose(terms["activation"].detach(), expected, rtol=1e-5)


def test_a_teacher_without_feature_maps_needs_other_taps_or_no_reward(tmp_path):
    linear = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(25, 3)), conv_teacher().info)
    with pytest.raises(ConfigError, match="last"):
        method(tmp_path, linear)
    assert set(method(tmp_path, linear, taps="penultimate").round(0)) == {"divergence", "activation"}
    assert set(method(tmp_path / "other", linear, activation=0).round(0)) == {"divergence"}


# -- the inner loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"activation": 0.0}, {"activation": 2.0, "total_variation": 0.01}])
def test_inner_loop_is_adam_towards_targets_that_stay(values, tmp_path):
    count, tau, lr, iterations, teacher = 3, 5.0, 0.05, 5, conv_teacher()
    maker = method(tmp_path, teacher, temperature=tau, sigma=10.0, lr=lr, iterations=iterations, **values)
    torch.manual_seed(3)
    made = maker.make(0, count)
    torch.manual_seed(3)  # the same draws: first the targets, then the start
    sampled = normal_logits(teacher.head().weight, 10.0, count).double().detach().numpy()
    start = torch.randn(count, 1, 5, 5).double().numpy()
    kernel, bias, weight, offset = (p.double().numpy() for p in teacher.net.parameters())

    def terms(x):
        maps = np.empty((count, 2, 3, 3))
        for filter_, row, column in np.ndindex(2, 3, 3):
            window = x[:, 0, row : row + 3, column : column + 3]
            maps[:, filter_, row, column] = (window * kernel[filter_, 0]).sum((1, 2)) + bias[filter_]
        features = np.tanh(maps)  # the last value at the last resolution
        logits = features.reshape(count, -1) @ weight.T + offset
        return {
            "divergence": formulas.soft_target_loss(logits, sampled, tau),
            "activation": -np.abs(features).mean(),
            "total_variation": oracles.total_variation(x)[0],
        }

    def loss(x):
        return sum(getattr(maker.config, key) * value for key, value in terms(x).items())

    before_last = [start]

    def gradient(x):
        before_last[0] = x
        return formulas.numerical_gradient(loss, x)

    expected = oracles.adam(start, gradient, lr, iterations, lambda x: x)
    assert np.abs(expected - start).max() > 0.05
    np.testing.assert_allclose(made.pixels, 0.5 * expected + 0.2, atol=2e-5)
    np.testing.assert_allclose(made.targets, oracles.softmax(sampled / tau), atol=1e-6)
    for key, term in made.terms.items():
        np.testing.assert_allclose(term, terms(before_last[0])[key], rtol=1e-4)
    assert set(made.terms) == {key for key in terms(start) if getattr(maker.config, key)}


def test_the_reward_makes_features_larger(tmp_path):
    teacher, sizes = conv_teacher(), []
    for weight in (0.0, 5.0):
        maker = method(tmp_path / str(weight), teacher, activation=weight, iterations=20)
        torch.manual_seed(0)
        pixels = maker.make(0, 4).pixels
        sizes.append(teacher.net[:2](teacher.normalise(pixels)).abs().mean())
    assert sizes[1] > 1.1 * sizes[0]

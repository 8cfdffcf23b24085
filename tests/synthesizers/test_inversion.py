"""DeepDream, DeepInversion and its adaptive form against NumPy; what BatchNorm layers see; a student in the loop."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from comparisons import assert_same_state, state
from pipeline import kill_after_saving
from scipy.integrate import trapezoid
from stand_ins import work
from tiny_synthesizers import synthesizer
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import load_model
from dfkd_cli.models.moments import Moments, moments
from dfkd_cli.models.statistics import batch_moments, gaussian_divergence, recorded_moments
from dfkd_cli.seeds import seed_torch
from dfkd_cli.synthesizers.adaptive_deepinversion import agreement
from dfkd_cli.synthesizers.base import ImageOptimizer, Look
from dfkd_cli.synthesizers.cotraining import PoolTrainer
from dfkd_cli.synthesizers.terms import statistics_distance

METHODS = ("deepdream", "deepinversion", "adaptive-deepinversion")
ENTRIES = catalog.entries("synthesizers")
NEEDS_BATCH_NORM = [name for name, entry in ENTRIES.items() if "batchnorm" in entry.needs]
SHAPES = [(1, 1, 2, 2), (2, 3, 5, 4), (3, 1, 7, 7)]
RNG = np.random.default_rng(0)


def tensor(values: np.ndarray) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def smooth_teacher(seed: int = 1) -> Classifier:
    """4x6 images of two channels, or any other size, in 3 classes; two BatchNorm layers, as if trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.BatchNorm1d(3), nn.Linear(3, 3),
        )  # fmt: skip
        for layer in (net[1], net[5]):
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.05, 2)
        net[6].weight.data *= 4
    return Classifier(net, ModelInfo("smooth", 3, (2, 4, 6), mean=(0.2, 0.4), std=(0.5, 0.3))).eval()


def forward(classifier: Classifier, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of the smooth teacher on normalised images, and what goes into its BatchNorm layers; float64."""
    weights = {name: value.double().numpy() for name, value in classifier.net.state_dict().items()}

    def normalise(values, layer):
        shape = (1, -1) + (1,) * (values.ndim - 2)
        mean, variance = (weights[f"{layer}.running_{name}"].reshape(shape) for name in ("mean", "var"))
        scale, shift = (weights[f"{layer}.{name}"].reshape(shape) for name in ("weight", "bias"))
        return (values - mean) / np.sqrt(variance + 1e-5) * scale + shift

    maps = np.einsum("nchw,dc->ndhw", x, weights["0.weight"][:, :, 0, 0]) + weights["0.bias"].reshape(1, -1, 1, 1)
    pooled = (1 / (1 + np.exp(-normalise(maps, 1)))).mean((2, 3))
    return normalise(pooled, 5) @ weights["6.weight"].T + weights["6.bias"], [maps, pooled]


def recorded(classifier: Classifier) -> list[tuple[np.ndarray, np.ndarray]]:
    layers = (classifier.net[1], classifier.net[5])
    return [(layer.running_mean.double().numpy(), layer.running_var.double().numpy()) for layer in layers]


# -- terms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["total_variation", "total_variation_l1", "l2"])
def test_image_priors_are_the_papers(name, shape, tmp_path):
    method = synthesizer("deepdream", tmp_path, **{"total_variation": 0.0, name: 1.0})
    logits, target, pixels = RNG.normal(size=(shape[0], 4)), np.eye(4)[: shape[0]], RNG.normal(size=shape)
    logits, target = torch.from_numpy(logits), torch.from_numpy(target)
    terms = method.terms(Look(tensor(pixels), logits), target)
    assert set(terms) == {"cross_entropy", name}
    np.testing.assert_allclose(terms[name].item(), oracles.image_priors(pixels)[name], rtol=1e-12)
    expected = oracles.impression_loss(logits.numpy(), target.numpy(), 1)
    np.testing.assert_allclose(terms["cross_entropy"].item(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: method.terms(Look(x, logits), target)[name], tensor(pixels))


@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (2, 1, 4, 1), (2, 1, 1, 1)])
def test_a_line_of_pixels_varies_along_it_alone(shape, tmp_path):
    method = synthesizer("deepdream", tmp_path, total_variation_l1=1.0, total_variation=0.0)
    pixels = RNG.normal(size=shape)
    line = np.diff(pixels.reshape(2, -1), axis=1)
    terms = method.terms(Look(tensor(pixels), torch.zeros(2, 4)), torch.eye(4)[:2])
    np.testing.assert_allclose(terms["total_variation_l1"].item(), np.abs(line).mean() if line.size else 0, rtol=1e-12)


def test_flat_images_have_no_gradient_that_is_not_finite(tmp_path):
    method = synthesizer("deepdream", tmp_path, total_variation=1.0, total_variation_l1=1.0, l2=1.0)
    images = torch.zeros(2, 1, 3, 3, requires_grad=True)
    terms = method.terms(Look(images, torch.zeros(2, 4)), torch.eye(4)[:2])
    (gradient,) = torch.autograd.grad(sum(terms.values()), images)
    assert torch.equal(gradient, torch.zeros_like(images))


@pytest.mark.parametrize("first", [1.0, 10.0, 0.0])
@pytest.mark.parametrize("shapes", [[(4, 3, 5, 2), (4, 2, 1, 1)], [(1, 2, 3, 3)], [(6, 4), (6, 1)], [(1, 2)]])
def test_statistics_distance_is_the_papers_with_unbiased_variances(shapes, first):
    values = [RNG.normal(size=shape) for shape in shapes]
    theirs = [(RNG.normal(size=shape[1]), RNG.uniform(0.5, 2, size=shape[1])) for shape in shapes]
    stored = {str(i): Moments(torch.from_numpy(m), torch.from_numpy(v)) for i, (m, v) in enumerate(theirs)}

    def distance(*inputs):
        return statistics_distance({str(i): moments(x, 1) for i, x in enumerate(inputs)}, stored, first)

    inputs = [tensor(x) for x in values]
    expected = oracles.statistics_distance(values, theirs, first)
    np.testing.assert_allclose(distance(*inputs).item(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(distance, inputs)


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 2), (5, 4), (3, 100)])
def test_agreement_is_the_papers_or_the_released_codes(shape, scale, variant):
    student, teacher = RNG.normal(scale=scale, size=shape), RNG.normal(scale=scale, size=shape)
    inputs = tensor(student), tensor(teacher)
    expected = oracles.agreement(student, teacher, variant)
    np.testing.assert_allclose(agreement(*inputs, variant).item(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *logits: agreement(*logits, variant), inputs)  # through both networks


def test_agreement_of_equals_is_one_and_of_opposites_the_least():
    sure = 100 * torch.eye(3)
    for variant, least in (("paper", 1 - np.log(2)), ("code", 0.0)):
        assert agreement(sure, sure, variant).item() == pytest.approx(1)
        assert agreement(sure, sure.roll(1, 0), variant).item() == pytest.approx(least, abs=1e-6)


def test_the_agreement_is_the_released_codes_unless_asked_otherwise(tmp_path):
    assert adaptive(tmp_path).config.variant == "code"


# -- BatchNorm statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (5, 2, 3, 4), (1, 3, 1, 1), (2, 3, 7)])
def test_moments(shape, correction):
    values = 5 + RNG.normal(size=shape)
    seen = moments(tensor(values), correction)
    axes = tuple(axis for axis in range(len(shape)) if axis != 1)
    np.testing.assert_allclose(seen.mean.detach(), values.mean(axes), rtol=1e-12)
    if values.size // shape[1] > 1:
        np.testing.assert_allclose(seen.variance.detach(), values.var(axes, ddof=correction), rtol=1e-12)
    else:
        assert not seen.variance.any()

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return moments(x, correction).mean, moments(x, correction).variance

    assert torch.autograd.gradcheck(pair, tensor(values))


@pytest.mark.parametrize("correction", [0, 1])
def test_what_goes_into_every_layer_is_seen(correction):
    teacher, x = smooth_teacher(), RNG.normal(size=(5, 2, 4, 6))
    with torch.no_grad(), batch_moments(teacher, correction) as seen:
        teacher.net(torch.zeros(2, 2, 4, 6))  # the last run counts
        teacher.net(torch.from_numpy(x).float())
    assert list(seen) == list(recorded_moments(teacher)) == ["1", "5"]
    expected = [oracles.channel_moments(values, correction) for values in forward(teacher, x)[1]]
    for ours, stored, (mean, variance), theirs in zip(
        seen.values(), recorded_moments(teacher).values(), expected, recorded(teacher), strict=True
    ):
        np.testing.assert_allclose(ours.mean, mean, atol=1e-6)
        np.testing.assert_allclose(ours.variance, variance, atol=1e-6)
        np.testing.assert_array_equal(stored.mean, theirs[0])
        np.testing.assert_array_equal(stored.variance, theirs[1])


def test_gaussian_divergence():
    p, q = [(RNG.normal(size=6), RNG.uniform(0.01, 5, size=6)) for _ in range(2)]
    found = gaussian_divergence(*(Moments(torch.from_numpy(m), torch.from_numpy(v)) for m, v in (p, q)))
    np.testing.assert_allclose(found, oracles.gaussian_divergence(*p, *q), rtol=1e-12)
    x = np.linspace(-30, 30, 200_001)[:, None]  # and by integration, which tells the two directions apart
    log_p, log_q = (-((x - m) ** 2) / (2 * v) - np.log(2 * np.pi * v) / 2 for m, v in (p, q))
    np.testing.assert_allclose(found, trapezoid(np.exp(log_p) * (log_p - log_q), x, axis=0), rtol=1e-6)
    mean, variances = torch.zeros(2), torch.tensor([0.0, 4e-6])
    dead = gaussian_divergence(Moments(mean, variances), Moments(mean, torch.zeros(2)))
    np.testing.assert_allclose(dead, [0, (4 - 1 - np.log(4)) / 2], rtol=1e-6)  # variances are at least 1e-6


# -- the inner loop ----------------------------------------------------------------------------------------------------

WEIGHTS = {"cross_entropy": 0.7, "total_variation": 0.01, "total_variation_l1": 0.3, "l2": 0.05}
STATISTICS = {"statistics": 0.4, "first_layer": 3.0}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("deepdream", {}),
        ("deepdream", {"temperature": 4.0}),
        ("deepdream", {"coarse_iterations": 2}),
        ("deepinversion", {"betas": (0.5, 0.9)}),
        ("deepinversion", {"iterations": 4, "warmup": 2, "schedule": "cosine"}),
        ("deepinversion", {"coarse_iterations": 4, "warmup": 1, "schedule": "cosine"}),
        ("deepinversion", {"clamp": True, "total_variation_l1": 0.0}),
        ("deepinversion", {"statistics": 0.0}),
        ("sre2l", {"crop": 1.0, "view_flip": False, "iterations": 5, "clamp": False}),
        ("sre2l", {"curriculum": 1.0, "curriculum_form": "step", "view_flip": False, "clamp": False}),
        ("adaptive-deepinversion", {"competition": 2.0}),
        ("adaptive-deepinversion", {"competition": 2.0, "variant": "paper"}),
        ("adaptive-deepinversion", {"competition": 0.0}),
    ],
)
def test_images_are_those_of_the_papers_optimisation(name, values, tmp_path):
    """All terms, their weights, the schedule, both resolutions and the range; the gradient is taken numerically."""
    teacher, student = smooth_teacher(), smooth_teacher(2)
    settings = WEIGHTS | (STATISTICS if name != "deepdream" else {}) | {"iterations": 3, "jitter": 0, "lr": 0.05}
    method: ImageOptimizer = synthesizer(name, tmp_path, teacher, **(settings | values))
    if name == "adaptive-deepinversion":
        method.student = student
    config = method.config
    torch.manual_seed(3)
    made = method.make(0, 2)
    torch.manual_seed(3)
    x = method.start(2).double().numpy()
    assert abs(x.mean()) < 0.5 and 0.7 < x.std() < 1.3  # normal noise for `net`

    def loss(images, pooled):
        view = images.reshape(2, 2, 2, 2, 3, 2).mean((3, 5)) if pooled else images
        logits, seen = forward(teacher, view)
        terms = oracles.image_priors(view) | {
            "cross_entropy": oracles.impression_loss(logits, np.eye(3)[:2], config.temperature)
        }
        if name != "deepdream":
            correction = 0 if name == "sre2l" else 1  # divided by the count, or by one less
            terms["statistics"] = oracles.statistics_distance(seen, recorded(teacher), config.first_layer, correction)
        if name == "adaptive-deepinversion":
            terms["competition"] = oracles.agreement(forward(student, view)[0], logits, config.variant)
        return sum(getattr(config, key) * value for key, value in terms.items())

    mean, std = (np.reshape(values, (1, 2, 1, 1)) for values in (teacher.info.mean, teacher.info.std))
    start, project = x, (lambda x: np.clip(x, -mean / std, (1 - mean) / std)) if config.clamp else (lambda x: x)
    for pooled, steps in ((True, config.coarse_iterations), (False, config.iterations)):
        rising = min(config.warmup, steps)
        rates = [config.lr * oracles.inversion_rate(t, steps, rising, config.schedule) for t in range(steps)]

        def gradient(x, pooled=pooled):
            return oracles.numerical_gradient(lambda x: loss(x, pooled), x)

        x = oracles.adam(x, gradient, rates.__getitem__, steps, project, config.betas)
    assert np.abs(x - start).max() > 0.1
    np.testing.assert_allclose(made.pixels, x * std + mean, atol=2e-4)
    assert torch.equal(made.targets, torch.eye(3)[:2])
    if config.clamp:
        assert made.pixels.min() >= -1e-6 and made.pixels.max() <= 1 + 1e-6
        assert (made.pixels < 1e-6).any() and (made.pixels > 1 - 1e-6).any()


def test_how_strongly_each_term_pulls_at_the_start(tmp_path):
    teacher = smooth_teacher()
    settings = WEIGHTS | STATISTICS | {"jitter": 0, "total_variation": 0.3, "coarse_iterations": 0}
    method = synthesizer("deepinversion", tmp_path, teacher, **settings)
    config, pulls = method.config, method.pulls(2)
    seed_torch(torch.device("cpu"), "shard", 0, 0)
    method.targets(0, 2)
    x = method.start(2).double().numpy()

    def terms(images):
        logits, seen = forward(teacher, images)
        distance = oracles.statistics_distance(seen, recorded(teacher), config.first_layer, 1)
        loss = oracles.impression_loss(logits, np.eye(3)[:2], config.temperature)
        return oracles.image_priors(images) | {"cross_entropy": loss, "statistics": distance}

    assert pulls.keys() <= terms(x).keys() and {"cross_entropy", "statistics", "total_variation"} <= pulls.keys()
    for name, (value, pull) in pulls.items():
        gradient = oracles.numerical_gradient(lambda images, name=name: terms(images)[name], x)
        np.testing.assert_allclose(value, terms(x)[name], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(pull, getattr(config, name) * np.linalg.norm(gradient), rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("warmup", "rising", "steps"), [(0, 0, 7), (100, 100, 2000), (3, 3, 7), (9, 5, 5)])
def test_learning_rate(warmup, rising, steps, schedule, tmp_path):
    method = synthesizer("deepdream", tmp_path, warmup=warmup, schedule=schedule)
    rates = [method.rate(step, steps) for step in range(steps)]
    np.testing.assert_allclose(rates, [oracles.inversion_rate(t, steps, rising, schedule) for t in range(steps)])
    method.rate(steps, steps)  # a scheduler asks once more after the last step


@pytest.mark.parametrize("name", ["deepdream", "class-impressions", "inception", "soft-target"])
def test_what_the_teacher_sees_of_each_stage(name, tmp_path):
    """Half the sides first, rolled by half as much; gradients reach every pixel of the full images."""
    teacher, sizes = smooth_teacher(), []
    only = {"total_variation": 0} if name == "deepdream" else {"smoothness": 0} if name == "inception" else {}
    method = synthesizer(name, tmp_path, teacher, coarse_iterations=2, iterations=3, jitter=3, **only)
    with teacher.net.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:]))):
        method.make(0, 2)
    assert sizes == [(2, 3)] * 2 + [(4, 6)] * 3
    images = torch.randn(2, 2, 4, 6)
    moved = images.clone().requires_grad_()
    with method.looking() as show:
        method._optimize(moved, method.targets(0, 2), show, 2, 1)
    change = (moved.detach() - images).unflatten(2, (2, 2)).unflatten(4, (3, 2)).transpose(3, 4).flatten(4)
    assert (change != 0).all()
    torch.testing.assert_close(change, change[..., :1].expand_as(change))  # the same in each two by two pixels

    for size, reach in (((4, 6), 3), ((2, 3), 1)):
        picture = torch.arange(float(np.prod(size))).view(size).expand(1, 2, -1, -1)
        views = (method.view(picture, 0)[0, 0].numpy() for _ in range(2000))
        shifts = {tuple(int(i) for i in np.argwhere(view == 0)[0]) for view in views}
        steps = range(-reach, reach + 1)
        assert shifts == {(down % size[0], right % size[1]) for down in steps for right in steps}


@pytest.mark.parametrize("name", ["deepdream", "class-impressions", "zskd"])
def test_images_are_mirrored_one_by_one(name, tmp_path):
    method = synthesizer(name, tmp_path, smooth_teacher(), jitter=0, view_flip=True)
    images = torch.randn(64, 2, 4, 6)
    view = method.view(images, 0)
    mirrored, kept = ((view == other).flatten(1).all(1) for other in (images.flip(-1), images))
    assert torch.equal(mirrored, ~kept)
    assert 16 < mirrored.sum() < 48
    still = synthesizer(name, tmp_path, smooth_teacher(), jitter=0)
    assert still.view(images, 0) is images


@pytest.mark.parametrize("spec", ["lenet5", "timm:vit_tiny_patch16_224", "vit-1-32"])
def test_teachers_of_one_size_see_larger_pixels_first(spec, make_teacher, tmp_path):
    """A network that takes no images of half the sides is shown full ones, four pixels alike; then all of them."""
    if spec.startswith("timm:"):
        pytest.importorskip("timm")
    teacher, seen = load_model(make_teacher(spec))[0], []
    method = synthesizer("deepdream", tmp_path, teacher, coarse_iterations=1, iterations=1, jitter=0)
    start = torch.randn(2, *teacher.info.input_size)
    method.start = lambda count: start.clone()
    with teacher.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone())):
        method.make(0, 2)
    means = start.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
    torch.testing.assert_close(seen[0], means.repeat_interleave(2, 2).repeat_interleave(2, 3))
    change = (seen[1] - start).unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).transpose(3, 4).flatten(4)
    assert (change != 0).any()
    torch.testing.assert_close(change, change[..., :1].expand_as(change), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("size", [(2, 5, 3), (2, 1, 7)])
@pytest.mark.parametrize("fixed", [False, True])
def test_coarse_images_have_all_of_an_odd_side(size, fixed, tmp_path):
    """Where sides are odd, the last row and column are in windows of their own, of fewer pixels."""
    method = synthesizer("deepdream", tmp_path, smooth_teacher(), coarse_iterations=1)
    method.fixed_size = fixed
    images = torch.from_numpy(RNG.normal(size=(3, *size))).requires_grad_()
    coarse = method._coarse(images, 2)
    rows, columns = (range(0, side, 2) for side in size[1:])
    pixels = images.detach().numpy()
    means = np.array([[pixels[..., i : i + 2, j : j + 2].mean((2, 3)) for j in columns] for i in rows]).transpose(
        2, 3, 0, 1
    )
    if not fixed:
        np.testing.assert_allclose(coarse.detach().numpy(), means, rtol=1e-12)
    (gradient,) = torch.autograd.grad(coarse.sum(), images)
    assert (gradient != 0).all()


# -- what is watched ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "watched"),
    [
        ("deepdream", {}, 0),
        ("deepinversion", {"statistics": 0.0}, 0),
        ("deepinversion", {}, 3),  # two layers, and the network, whose passes are told apart
        ("adaptive-deepinversion", {"statistics": 0.0}, 0),
        ("adaptive-deepinversion", {}, 3),
    ],
)
def test_layers_are_watched_only_for_a_term(name, values, watched, tmp_path):
    teacher, hooks = smooth_teacher(), []
    method = synthesizer(name, tmp_path, teacher, **values)
    with teacher.net[0].register_forward_hook(lambda *_: hooks.append(sum(state(teacher)["hooks"]) - 1)):
        made = method.make(0, 2)
    assert hooks == [watched] * 2
    assert ("statistics" in made.terms) == bool(watched)


@pytest.mark.parametrize(("name", "whole"), [("deepinversion", True), ("bn-statistics", True), ("deepdream", False)])
def test_the_last_batch_has_statistics_of_as_many_images(name, whole, tmp_path):
    """Where they are looked at. What is too much of it is thrown away; a set of one short batch is as it is."""
    seen = []

    def make(num_images: int, first: int, count: int) -> Tensor:
        teacher = smooth_teacher()
        method = synthesizer(name, tmp_path / f"{num_images}", teacher, num_images, batch_size=4, iterations=2)
        torch.manual_seed(3)
        with teacher.net[0].register_forward_hook(lambda _, images, __: seen.append(len(images[0]))):
            made = method.make(first, count)
        assert len(made.pixels) == len(made.targets) == count
        return made.pixels

    last, full = make(5, 4, 1), make(8, 4, 4)
    assert torch.equal(last, full[:1]) == whole
    assert make(1, 0, 1).shape[0] == 1
    assert seen == [4 if whole else 1] * 2 + [4] * 2 + [1] * 2


def test_layers_that_do_not_run_have_no_part(tmp_path):
    teacher = smooth_teacher()
    torch.manual_seed(0)
    expected = synthesizer("deepinversion", tmp_path, teacher, first_layer=5.0).make(0, 2)
    teacher.net.insert(1, nn.Sequential())
    teacher.net[1].auxiliary = nn.BatchNorm2d(7)  # the first of the modules: not the first layer that runs
    teacher.net[1].forward = lambda x: x
    assert len(teacher.batch_norms()) == 3
    torch.manual_seed(0)
    made = synthesizer("deepinversion", tmp_path, teacher, first_layer=5.0).make(0, 2)
    assert made.terms == expected.terms


# -- a student in the loop ---------------------------------------------------------------------------------------------


class Witness:
    """What a student is shown: its mode, its images, and its learning rate."""

    def __init__(self, method: PoolTrainer) -> None:
        self.calls: list[tuple[bool, Tensor, float]] = []
        self.method = method
        method.student.net.register_forward_pre_hook(self.note)

    def note(self, net: nn.Module, inputs: tuple[Tensor]) -> None:
        rate = self.method.pairs[0][0].param_groups[0]["lr"]
        self.calls.append((net.training, inputs[0].detach().clone(), rate))

    def rounds(self, count: int) -> list[list[tuple[bool, Tensor, float]]]:
        size = len(self.calls) // count
        assert size * count == len(self.calls)
        return [self.calls[i * size : (i + 1) * size] for i in range(count)]


ADAPTIVE = {"num_images": 6, "iterations": 3, "student_steps": 4, "student_batch_size": 2, "dtype": "float32"}


def adaptive(directory: Path, **values) -> PoolTrainer:
    method = synthesizer("adaptive-deepinversion", directory, smooth_teacher(), **(ADAPTIVE | values))
    method.student = smooth_teacher(2)
    return method


def test_the_student_is_trained_on_the_shards_so_far(tmp_path):
    method = adaptive(tmp_path, student_lr=0.3)
    before = copy.deepcopy(method.student.state_dict())
    witness = Witness(method)
    work(method, tmp_path)
    pools = [method.writer.read(index)["images"] for index in range(3)]
    steps = 0
    for index, calls in enumerate(witness.rounds(3)):
        # Three inner steps, a look at the finished images, four steps of the student.
        assert [training for training, *_ in calls] == [False] * 4 + [True] * 4
        seen = torch.cat([method.teacher.denormalise(images) for training, images, _ in calls if training])
        distance = torch.cdist(seen.flatten(1), torch.cat(pools).flatten(1))
        assert distance.amin(1).max() < 1e-3
        shards = distance.argmin(1) // 2
        assert set(shards.tolist()) == set(range(index + 1)) and len(seen) == 8
        for _, _, rate in calls[4:]:
            assert rate == pytest.approx(0.3 * (1 + np.cos(np.pi * steps / 12)) / 2, abs=1e-12)
            steps += 1
    assert method.pairs[0][0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert all(not torch.equal(value, before[name]) for name, value in method.student.state_dict().items())


def test_shards_of_later_rounds_are_not_in_the_pool(tmp_path):
    first, again = adaptive(tmp_path), adaptive(tmp_path)
    work(first, tmp_path)
    finished = {path.name: sha256_file(path) for path in tmp_path.glob("*.safetensors")}
    shutil.rmtree(tmp_path / "checkpoints")
    again = adaptive(tmp_path)
    assert again.writer.missing() == []  # all there, as a kill before the first checkpoint would leave them
    work(again, tmp_path)
    assert {path.name: sha256_file(path) for path in tmp_path.glob("*.safetensors")} == finished
    for name, value in first.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name


def test_a_student_sees_the_pixels_in_numbers_of_its_own(tmp_path):
    method = adaptive(tmp_path)
    seen = torch.randn(2, *method.teacher.info.input_size)
    with batch_moments(method.teacher) as felt:
        look = Look(seen, method.teacher.net(seen), felt)
    method.student = Classifier(method.student.net, replace(method.student.info, mean=(0.1, 0.9), std=(0.5, 0.2)))
    student = method.student(method.teacher.denormalise(seen))
    term = method.terms(look, torch.eye(3)[:2])["competition"]
    torch.testing.assert_close(term, agreement(student, look.logits, method.config.variant))


def test_a_student_that_is_not_trained_stays_as_it_is(tmp_path):
    method = adaptive(tmp_path, student_steps=0)
    before = copy.deepcopy(method.student.state_dict())
    work(method, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in method.student.state_dict().items())


@pytest.mark.parametrize("fails", [None, "teacher", "student"])
def test_networks_are_left_as_they_were(fails, tmp_path):
    """Whether it goes well or not: the frozen teacher's values and hooks; the student's hooks."""
    teacher = smooth_teacher().train()
    before = state(teacher.freeze())
    method = synthesizer("adaptive-deepinversion", tmp_path, teacher, **ADAPTIVE)
    method.student = smooth_teacher(2)
    hooks = state(method.student)["hooks"]
    if fails is None:
        work(method, tmp_path)
    else:
        with getattr(method, fails).net[0].register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            work(method, tmp_path)
    assert_same_state(state(teacher), before)
    assert state(method.student)["hooks"] == hooks


# -- the command -------------------------------------------------------------------------------------------------------

COMMAND = [
    "synthesize", "--method", "adaptive-deepinversion", "--student", "lenet5-half", "--num-images", "24",
    "--batch-size", "2", "--iterations", "2", "--student-steps", "2", "--student-batch-size", "4", "--crop", "2",
    "--flip", "--device", "cpu",
]  # fmt: skip
STUDENT = ("student/model.safetensors", "student/model.json")


def files(directory: Path) -> dict[str, str]:
    names = [path.name for path in directory.glob("shard-*")]
    return {name: sha256_file(directory / name) for name in [*names, "manifest.json", "metrics.csv", *STUDENT]}


def test_killed_and_continued_is_the_uninterrupted_run(tmp_path, make_teacher, cli):
    command = [*COMMAND, "--teacher", str(make_teacher("resnet8")), "--out"]
    kill_after_saving([*command, "killed"], tmp_path, tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert not (tmp_path / "killed" / "student").exists()
    for name in ("whole", "killed"):
        assert cli(*command, tmp_path / name)[0] == 0
    expected = files(tmp_path / "whole")
    assert len(expected) == 12 + 4
    assert files(tmp_path / "killed") == expected

    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert set(STUDENT) <= {file["path"] for file in record["artifacts"]}
    assert ShardReader(tmp_path / "whole").manifest["method"] == "adaptive-deepinversion"
    rows = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    terms = ["cross_entropy", "total_variation", "statistics", "competition", "soft"]
    assert set(rows[0].split(",")) == {"round", *terms, "confidence", "variety", "agreement"}
    assert len(rows) == 13

    shard = tmp_path / "whole" / "shard-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])  # a part of the student's past is lost
    code, _, err = cli(*command, tmp_path / "whole")
    assert code == 0, err
    assert files(tmp_path / "whole") == expected


def test_a_student_in_the_loop_is_trained_by_one_process(tmp_path, make_teacher, cli):
    for more in ([], ["--dry-run"]):
        command = [*COMMAND, "--teacher", make_teacher("resnet8"), "--out", tmp_path / "s", "--devices", "2", *more]
        code, _, err = cli(*command)
        assert code == 2
        assert err == "error: a student in the loop is trained by one process -- give --devices 1 --num-nodes 1\n"
    assert not (tmp_path / "s").exists()
    assert cli(*command[:-3], "--dry-run")[0] == 0


@pytest.mark.parametrize("name", NEEDS_BATCH_NORM)
def test_a_teacher_without_batch_norm_is_told_what_works(name, tmp_path, teacher, cli):
    student = ["--student", "lenet5-half"] if "student" in ENTRIES[name].needs else []
    code, _, err = cli("synthesize", "--method", name, *student, "--teacher", teacher, "--out", tmp_path / "s")
    assert code == 3
    assert f"--method {name} needs a teacher with BatchNorm, lenet5 has none" in err
    works = err.partition("these work without: ")[2].strip().split(", ")
    assert {"deepdream", "zskd", "class-impressions"} <= set(works) and not set(NEEDS_BATCH_NORM) & set(works)
    assert "psaq-vit" not in works  # which looks into attention, that this teacher lacks as well

"""Images from metadata: samples, the objective and the optimisation against NumPy formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from dropout_network import TEMPERATURE, forward, small_teacher
from stand_ins import statistics_of, synthesizer
from torch import nn

from dfkd_cli.artifacts.metadata import Metadata
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.synthesizers.lopes import Lopes, fixed_dropout, leading_eigenvectors, square_root

VARIANTS = ("top", "all", "all-dropout", "spectral-all", "spectral-pairs")


def method(teacher: Classifier, directory: Path, metadata: Metadata, cls: type[Lopes] = Lopes, **values) -> Lopes:
    values = {"batch_size": 6, "iterations": 3} | values
    return synthesizer("lopes", directory, teacher, values, values["batch_size"], cls=cls, metadata=metadata)


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["gaussian", "code"])
def test_samples_have_the_recorded_moments(sampling, tmp_path):
    metadata = statistics_of(small_teacher(), count=9, covariance_units=8)  # three images a class: singular
    made = method(small_teacher(), tmp_path, metadata, sampling=sampling, variant="all")
    labels, count = torch.arange(3).repeat(20_000), 20_000
    torch.manual_seed(0)
    drawn = made.sample(labels)
    for label in range(3):
        for name, layer in metadata.layers.items():
            rows = drawn[name][labels == label].double().numpy()
            if layer.joint:
                wanted = metadata.block((name,))[label].double().numpy()
                assert np.linalg.matrix_rank(wanted, tol=1e-6) < len(wanted)
                wanted = wanted if sampling == "gaussian" else wanted @ wanted
            else:
                wanted = np.diag(layer.std[label].double().numpy() ** 2)
            deviation = np.sqrt(np.diag(wanted))
            np.testing.assert_array_less(
                np.abs(rows.mean(0) - layer.mean[label].numpy()), 5 * deviation / count**0.5 + 1e-6
            )
            error = 5 * np.sqrt((np.outer(deviation**2, deviation**2) + wanted**2) / count) + 1e-6
            np.testing.assert_array_less(np.abs(np.cov(rows.T, bias=True) - wanted), error)


def test_spectral_variants_sample_their_layers_together(tmp_path):
    metadata = statistics_of(small_teacher(), covariance_units=8)
    labels = torch.zeros(20_000, dtype=torch.int64)
    wanted = metadata.covariance[0, :5, 5:].double().numpy()
    for variant, together in (("spectral-all", 1), ("spectral-pairs", 1), ("all", 0)):
        torch.manual_seed(0)
        drawn = method(small_teacher(), tmp_path, metadata, variant=variant).sample(labels)
        a, b = drawn["4"].double().numpy(), drawn["6"].double().numpy()
        error = 5 * np.outer(a.std(0), b.std(0)) * (2 / len(a)) ** 0.5
        np.testing.assert_array_less(np.abs(np.cov(a.T, b.T, bias=True)[:5, 5:] - together * wanted), error)
        assert (np.abs(wanted) > 2 * error).any(), "too weak to tell"


def test_roots_and_eigenvectors():
    rows = np.random.default_rng(0).normal(size=(4, 6))
    covariance = rows.T @ rows  # rank 4 of 6
    root = square_root(torch.from_numpy(covariance)).double().numpy()
    np.testing.assert_allclose(root, root.T, atol=1e-6)
    np.testing.assert_allclose(root @ root, covariance, atol=1e-5)
    values, vectors = np.linalg.eigh(covariance)
    for share, kept in ((0.1, 1), (0.3, 2), (0.5, 3), (1.0, 6)):
        basis = leading_eigenvectors(torch.from_numpy(covariance), share).double().numpy()
        assert basis.shape == (6, kept)
        np.testing.assert_allclose(basis.T @ basis, np.eye(kept), atol=1e-6)
        best = vectors[:, -kept:]
        np.testing.assert_allclose(basis @ basis.T, best @ best.T, atol=1e-5)
        assert values[-kept] > 1e-3 or kept == 6


def test_starting_images_have_the_teachers_mean_and_deviation(tmp_path):
    teacher = small_teacher()
    torch.manual_seed(0)
    start = method(teacher, tmp_path, statistics_of(teacher)).start(2000)
    assert start.shape == (2000, 1, 5, 5)
    assert abs(start.mean() - 0.2) < 5 * 0.5 / start.numel() ** 0.5
    assert abs(start.std() - 0.5) < 5 * 0.5 / (2 * start.numel()) ** 0.5


# -- what is minimised -------------------------------------------------------------------------------------------------


def distance(variant: str, aims: dict, given: dict, metadata: Metadata, labels: np.ndarray, share: float) -> float:
    """The objective from its formula, image by image."""
    gaps = {name: np.maximum(aims[name], 0) - np.maximum(given[name], 0) for name in aims}
    if variant == "top":
        return float((gaps["6"] ** 2).mean())
    if not variant.startswith("spectral"):
        return float(sum((gap**2).mean() / gap.shape[1] for gap in gaps.values()))
    joint = metadata.joint
    parts = [joint] if variant == "spectral-all" else [joint[i : i + 2] for i in range(len(joint) - 1)]
    total = 0.0
    for names in parts:
        stacked, covariance = np.concatenate([gaps[n] for n in names], axis=1), metadata.block(names).double().numpy()
        kept = int(np.ceil(share * stacked.shape[1]))
        for gap, label in zip(stacked, labels, strict=True):
            vectors = np.linalg.eigh(covariance[label])[1][:, ::-1][:, :kept]
            total += ((vectors.T @ gap) ** 2).mean() / len(stacked) / len(parts)
    return total


class Watched(Lopes):
    """Starts from given images and remembers the first value and gradient."""

    pixels: torch.Tensor
    value: float | None = None

    def start(self, count):
        return self.pixels.clone()

    def terms(self, look, targets):
        terms, self.aims = super().terms(look, targets), targets.values
        if self.value is None:
            (self.gradient,) = torch.autograd.grad(terms["reconstruction"], look.images, retain_graph=True)
            self.value = float(terms["reconstruction"].detach())
        return terms


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("units", [8, 26])
def test_every_variant_minimises_its_formula(variant, units, tmp_path):
    teacher, share = small_teacher(), 0.3
    metadata = statistics_of(teacher, count=60, covariance_units=units)
    made = method(teacher, tmp_path, metadata, Watched, variant=variant, spectrum=share)
    torch.manual_seed(0)
    made.pixels = torch.randn(6, 1, 5, 5)
    after_dropout = []
    with teacher.net[4].register_forward_pre_hook(lambda _, inputs: after_dropout.append(inputs[0].detach())):
        made.make(1, 6)
    pixels, labels = made.pixels.double().numpy(), made.labels(1, 6).numpy()
    assert labels.tolist() == [1, 2, 0, 1, 2, 0]
    aims = {name: aim.double().numpy() for name, aim in made.aims.items()}
    matched = {"top": {"6"}, "all": {"0", "4", "6"}, "all-dropout": {"0", "4", "6"}}
    assert set(aims) == matched.get(variant, set(metadata.joint))
    mask = (after_dropout[0] != 0).numpy() / (1 - teacher.net[3].p) if variant == "all-dropout" else None
    value = distance(variant, aims, forward(teacher, pixels, mask), metadata, labels, share)
    assert made.value == pytest.approx(value, rel=1e-4)
    assert value > 1e-6
    for place in [(0, 0, 1, 2), (4, 0, 3, 3), (5, 0, 2, 2)]:
        near = []
        for step in (1e-6, -1e-6):
            moved = pixels.copy()
            moved[place] += step
            near.append(distance(variant, aims, forward(teacher, moved, mask), metadata, labels, share))
        assert made.gradient[place].item() == pytest.approx((near[0] - near[1]) / 2e-6, rel=1e-3, abs=1e-7)


def test_the_whole_spectrum_is_the_plain_distance(tmp_path):
    metadata = statistics_of(small_teacher(), count=60, covariance_units=26)
    made = method(small_teacher(), tmp_path, metadata, Watched, variant="spectral-all", spectrum=1.0)
    made.pixels = torch.randn(6, 1, 5, 5)
    made.make(0, 6)
    given = forward(small_teacher(), made.pixels.double().numpy())
    gaps = [np.maximum(aim.double().numpy(), 0) - np.maximum(given[name], 0) for name, aim in made.aims.items()]
    assert made.value == pytest.approx((np.concatenate(gaps, axis=1) ** 2).mean(), rel=1e-4)


def test_the_inner_loop_is_adam_on_the_matched_logits(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    teacher = Classifier(net, ModelInfo("linear", 4, (1, 3, 3), mean=(0.2,), std=(0.5,)))
    made = method(teacher, tmp_path, statistics_of(teacher), Watched, variant="top", lr=0.07, iterations=5)
    torch.manual_seed(0)
    made.pixels = torch.randn(6, 1, 3, 3)
    result = made.make(0, 6)
    weight, bias = (p.double().numpy() for p in net.parameters())
    aim = np.maximum(made.aims["1"].double().numpy(), 0)

    def gradient(x):
        logits = (((x - 0.2) / 0.5).reshape(6, -1) @ weight.T + bias) / TEMPERATURE
        through = 2 * (np.maximum(logits, 0) - aim) * (logits > 0) / logits.size / TEMPERATURE
        return (through @ weight / 0.5).reshape(x.shape)

    start = made.pixels.double().numpy()
    expected = oracles.adam(start, gradient, 0.07, 5, lambda x: x)
    assert np.abs(expected - start).max() > 0.05
    np.testing.assert_allclose(result.pixels, expected, atol=2e-4)
    assert torch.equal(result.targets, torch.eye(4)[[0, 1, 2, 3, 0, 1]])


def test_dropout_masks_are_fixed_and_new_in_every_batch_and_scaled_as_in_training():
    layer, images = nn.Dropout(0.2).eval(), torch.randn(50, 400)
    drawn = []
    for _ in range(2):
        with fixed_dropout([layer]):
            first = layer(images)
            assert torch.equal(layer(images), first)
        drawn.append(first != 0)
        torch.testing.assert_close(first, images * drawn[-1] / 0.8)
        kept = float(drawn[-1].double().mean())
        assert abs(kept - 0.8) < 5 * (0.8 * 0.2 / images.numel()) ** 0.5
    assert not torch.equal(*drawn)
    assert torch.equal(layer(images), images)
    with fixed_dropout([layer]):  # the same layer after two others
        wide, narrow = layer(images), layer(images[:, :7])
        assert torch.equal(layer(images), wide) and torch.equal(layer(images[:, :7]), narrow)


@pytest.mark.parametrize(("layer", "sides"), [(nn.Dropout1d(0.4), 1), (nn.Dropout2d(0.4), 2), (nn.Dropout3d(0.4), 3)])
def test_dropout_of_whole_channels_drops_whole_channels(layer, sides):
    images = torch.rand(20, 30, *[3] * sides) + 0.1
    with fixed_dropout([layer.eval()]):
        first = layer(images)
        assert torch.equal(layer(images), first)
    kept = (first != 0).flatten(2)
    assert torch.equal(kept.any(2), kept.all(2)) and 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(first, images * (first != 0) / 0.6)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_every_kind_of_dropout_layer_is_found(kind, tmp_path):
    teacher = small_teacher()
    statistics = statistics_of(teacher, covariance_units=26)
    teacher.net[3] = kind(0.2)
    assert method(teacher, tmp_path, statistics, variant="all-dropout").dropouts == [teacher.net[3]]


@pytest.mark.parametrize(
    ("variant", "units", "word"),
    [
        ("spectral-pairs", 3, "covariance-units"),
        ("spectral-all", 3, "covariance-units"),
        ("all-dropout", 26, "dropout"),
    ],
)
def test_a_variant_that_does_not_fit_the_teacher_is_refused(variant, units, word, tmp_path):
    teacher = small_teacher()
    if variant == "all-dropout":
        teacher.net[3] = nn.Identity()
    with pytest.raises(ArtifactError, match=word):
        method(teacher, tmp_path, statistics_of(teacher, covariance_units=units), variant=variant)

"""CutMix, MixUp and enlarged windows: what is mixed, what it is said to be, and what is learned from it."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from stand_ins import Given, check_interruption, work
from tiny_regimes import CLASSES, inputs, linear, network, pixels, regime, response
from torch import nn

from dfkd_cli.data.mixing import Mixing
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.regimes import base

LABELS = torch.tensor([0, 1, 2, 3, 0, 2])
PLAIN = {"schedule": "constant", "optimizer": "sgd", "lr": 0.5, "momentum": 0.0}
SIZE = 12, 16


def numbered(labels: torch.Tensor | None = LABELS) -> Images:
    """Images of one grey each, which is their number."""
    grey = torch.arange(1.0, 7.0).view(6, 1, 1, 1).expand(-1, 2, *SIZE).clone()
    return Images(grey, labels, torch.arange(6), logits=torch.ones(6, CLASSES), targets=torch.ones(6, CLASSES))


def one_hot(labels: torch.Tensor = LABELS) -> np.ndarray:
    return np.eye(CLASSES)[labels.numpy()]


def test_a_window_of_each_image_is_the_one_before_it():
    torch.manual_seed(0)
    mix, areas = Mixing(1.0, 0.0, CLASSES), []
    for _ in range(300):
        before = numbered()
        mixed = mix(before)
        assert torch.equal(before.pixels, numbered().pixels)
        foreign = (mixed.pixels != before.pixels)[:, 0]
        assert torch.equal(mixed.pixels[:, 0][foreign], before.pixels.roll(1, 0)[:, 0][foreign])
        assert (foreign == foreign[:1]).all()
        rows, columns = foreign[0].any(1), foreign[0].any(0)
        window = rows[:, None] & columns
        assert torch.equal(window, foreign[0])
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2  # in one piece
        area = float(window.float().mean())
        np.testing.assert_allclose(mixed.shares, (1 - area) * one_hot() + area * one_hot(LABELS.roll(1)), atol=1e-6)
        assert torch.equal(mixed.labels, mixed.shares.argmax(1))
        assert mixed.logits is None and mixed.targets is None
        assert torch.equal(mixed.positions, before.positions)
        areas.append(area)
    drawn = windows()
    np.testing.assert_allclose(np.mean(areas), drawn.mean(), atol=5 * drawn.std() / len(areas) ** 0.5)


def windows(draws: int = 50_000) -> np.ndarray:
    """Areas as the paper's algorithm has them: sides by sqrt(1 - lambda) about any pixel, cut at the borders."""
    rng = np.random.default_rng(0)
    root = np.sqrt(1 - rng.uniform(size=draws))
    area = np.ones(draws)
    for side in SIZE:
        middle, half = rng.integers(side, size=draws), (root * side / 2).astype(int)
        area *= (np.minimum(middle + half, side) - np.maximum(middle - half, 0)) / side
    return area


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_blended_images_are_the_papers(alpha):
    torch.manual_seed(0)
    mix, before, shares = Mixing(0.0, alpha, CLASSES), numbered(), []
    for _ in range(400):
        mixed = mix(before)
        own = float(mixed.pixels[1, 0, 0, 0] - 1)  # between the images 1 and 2
        np.testing.assert_allclose(mixed.pixels, own * before.pixels + (1 - own) * before.pixels.roll(1, 0), rtol=1e-5)
        np.testing.assert_allclose(mixed.shares, own * one_hot() + (1 - own) * one_hot(LABELS.roll(1)), atol=1e-6)
        shares.append(own)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(a, a)
    np.testing.assert_allclose(np.mean(shares), 0.5, atol=5 * (variance / len(shares)) ** 0.5)
    np.testing.assert_allclose(np.var(shares), variance, rtol=0.35)


def test_with_both_each_batch_is_mixed_in_one_way():
    torch.manual_seed(0)
    mix, before, found = Mixing(1.0, 1.0, CLASSES), numbered(), []
    for _ in range(200):
        values = mix(before).pixels[1].unique()
        found.append(bool(set(values.tolist()) <= {1.0, 2.0}))
    assert 60 < sum(found) < 140


def test_images_without_labels_get_none():
    torch.manual_seed(0)
    mixed = Mixing(1.0, 0.0, CLASSES)(numbered(None))
    assert mixed.shares is None and mixed.labels is None
    assert not torch.equal(mixed.pixels, numbered().pixels)


def test_nothing_is_mixed_unless_asked_for():
    images = numbered()
    state = torch.random.get_rng_state()
    assert Mixing(0.0, 0.0, CLASSES)(images) is images
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("method", ["supervised", "offline"])
@pytest.mark.parametrize("labelled", [True, False])
def test_labels_are_learned_by_their_shares(method, labelled, tmp_path):
    """One step on a batch that is mixed, of all there is: by hand, from the pixels that the student was shown."""
    if method == "supervised" and not labelled:
        pytest.skip("it needs labels")
    source, seen = Given(pixels(), LABELS if labelled else None), {}
    losses = {} if method == "supervised" else {"objectives": [(1.0, response(temperature=2.0, soft=0.3, hard=0.6))]}
    learner = regime(method, source, steps=1, mixup=1.0, batch_size=6, **losses, **PLAIN)
    view = learner.view
    learner.view = lambda images: seen.setdefault("images", view(images))
    teacher, start = (None if method == "supervised" else linear(learner.teacher)), linear(learner.student)
    work(learner, tmp_path / "run")
    shown = seen["images"]
    x = inputs(shown.pixels)
    logits = x @ start.T
    if labelled:
        assert 0.5 <= float(shown.shares.amax(1).min()) < 1
        aim = shown.shares.double().numpy()
    else:
        aim = np.eye(CLASSES)[(x @ teacher.T).argmax(1)]
    gradient = (oracles.softmax(logits) - aim) / len(x)
    if method == "offline":
        gradient = 0.6 * gradient + 0.3 * oracles.response_gradient(logits, x @ teacher.T, 2.0)
    np.testing.assert_allclose(linear(learner.student), start - 0.5 * gradient.T @ x, atol=1e-5)


@pytest.mark.parametrize("method", ["cs-kd", "kdcl", "virtual-teacher", "kcd"])
def test_methods_that_compare_labels_refuse_mixtures(method):
    peers = {"peers": [network(2)]} if method == "kdcl" else {}
    with pytest.raises(ConfigError, match="not about mixtures") as error:
        regime(method, Given(pixels(), LABELS), objectives=[(1.0, response(hard=1.0))], cutmix=1.0, **peers)
    assert "--cutmix" in error.value.hint


def test_a_black_box_is_not_asked_about_mixtures(cli, make_teacher, tmp_path):
    command = ["distill", "--teacher", make_teacher("lenet5"), "--transfer-set", "noise:8", "--answers", "label"]
    code, _, err = cli(*command, "--cutmix", 1, "--out", tmp_path / "s")
    assert code == 2 and "about each image once" in err and err.count("\n") <= 2


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_teacher_answers_with_the_statistics_that_are_wanted(mode):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = network(1, nn.BatchNorm1d(9))
        teacher.net[1].running_mean.normal_()
        teacher.net[1].running_var.uniform_(0.2, 3)
    weights = {name: value.double().numpy().copy() for name, value in teacher.net.state_dict().items()}
    source = Given(pixels(), LABELS)
    learner = regime("offline", source, teacher=teacher, objectives=[(1.0, response(teacher_mode=mode))])
    x = inputs(pixels())[:, :9]
    mean, variance = (x.mean(0), x.var(0)) if mode == "train" else (weights["1.running_mean"], weights["1.running_var"])
    z = (x - mean) / np.sqrt(variance + 1e-5) * weights["1.weight"] + weights["1.bias"]
    with torch.no_grad():
        answers = learner.ask_teacher(source.all())
    assert list(answers) == [mode]
    np.testing.assert_allclose(answers[mode].logits, z @ weights["2.weight"].T + weights["2.bias"], atol=1e-5)
    for name, value in teacher.net.state_dict().items():
        np.testing.assert_array_equal(value.double(), weights[name])  # a teacher that only answers does not learn


def test_an_interruption_does_not_change_what_is_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 4)

    def run(path, *callbacks):
        torch.manual_seed(3)
        student = network(1, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3))
        source = Given(pixels(18), torch.arange(18) % CLASSES)
        changes = {"mixup": 0.8, "cutmix": 1.0, "resized_crop": 0.3}
        return work(regime("offline", source, student, batch_size=6, steps=14, **changes), path, *callbacks)

    check_interruption(run, tmp_path)

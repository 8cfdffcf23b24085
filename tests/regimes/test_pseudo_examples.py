"""Pseudo examples: both steps of the alternation, what they leave alone, and that a kill loses none of their state."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from pipeline import finish, kill_after_saving
from stand_ins import STILL, Given, work
from tiny_regimes import CLASSES, REGIMES, inputs, linear, network, pixels, regime, response
from torch import nn

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.config import build
from dfkd_cli.data.sources import Images
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.objectives.response import soft_loss
from dfkd_cli.regimes import base
from dfkd_cli.regimes.base import Task
from dfkd_cli.stages.distill import Inputs as Distill

NAME = "pseudo-examples"
TAU = 4.0


def seen(images: oracles.Array) -> oracles.Array:
    """What the linear networks see of flat images (N, D): normalised, and a one for the bias."""
    return np.hstack([(images - 0.2) / 0.5, np.ones((len(images), 1))])


def uphill(images: oracles.Array, student: oracles.Array, teacher: oracles.Array) -> oracles.Array:
    """The gradient of ``tau^2 KL(p || q)``, mean over images, in flat images (N, D), through both linear networks.

    With p, q the softened answers: dKL/dz_s = (q - p) / tau and dKL/dz_t = p (log p/q - KL) / tau.
    """
    p, q = (oracles.softmax(seen(images) @ w.T / TAU) for w in (teacher, student))
    ratio = np.log(p / q)
    divergence = (p * ratio).sum(axis=1, keepdims=True)
    through = (q - p) @ student + p * (ratio - divergence) @ teacher
    return TAU * through[:, :-1] / 0.5 / len(images)


def flat(images: torch.Tensor) -> oracles.Array:
    return images.flatten(1).double().numpy()


# -- the two steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "iterations", "weight"), [(1, 1, 1.0), (6, 1, 0.3), (1, 6, 1.0), (4, 3, 2.0)])
def test_student_descends_and_pixels_climb_in_turn(tmp_path, steps, iterations, weight):
    lr, ascent_lr = 0.5, 0.03
    learner = regime(
        NAME, objectives=[(0.7, response(temperature=TAU))], steps=steps, schedule="constant", optimizer="sgd", lr=lr,
        momentum=0, config={"pseudo_images": 9, "pseudo": weight, "iterations": iterations, "ascent_lr": ascent_lr},
    )  # fmt: skip
    real, begin, teacher, first = flat(pixels()), flat(learner.pseudo), linear(learner.teacher), linear(learner.student)
    student, calls = first, 0

    def descent(images):
        x = seen(images)
        return oracles.response_gradient(x @ student.T, x @ teacher.T, TAU).T @ x

    def gradient(images):
        nonlocal student, calls
        if calls % iterations == 0:
            student = student - lr * 0.7 * (descent(real) + weight * descent(images))
        calls += 1
        return -0.7 * uphill(images, student, teacher)

    expected = oracles.adam(begin, gradient, ascent_lr, steps * iterations, lambda images: images.clip(0, 1))
    work(learner, tmp_path / "run")
    assert np.abs(expected - begin).max() > 0.02
    assert np.abs(student - first).max() > 0.01
    np.testing.assert_allclose(flat(learner.pseudo), expected, atol=1e-4)
    np.testing.assert_allclose(linear(learner.student), student, atol=1e-4)


@pytest.mark.parametrize("form", ["kl", "ce", "mse"])
def test_every_form_of_the_response_climbs(form):
    learner = regime(NAME, objectives=[(1.0, response(form=form))], config={"iterations": 20})
    learner.on_fit_start()
    before = learner.pseudo_loss()[0].item()
    learner.after_step()
    assert learner.pseudo_loss()[0].item() > before


def test_losses_of_both_sets_add_up():
    objectives = [(0.9, response(temperature=TAU, soft=0.5, hard=2.0)), (0.1, response(form="mse", soft=3.0))]
    images, labels = pixels(), torch.tensor([0, 1, 2, 3, 0, 1])
    learner = regime(NAME, Given(images, labels), objectives=objectives, config={"pseudo": 0.25, "pseudo_images": 4})

    def terms(x, hard_labels=None):
        student, teacher = (x @ linear(net).T for net in (learner.student, learner.teacher))
        hard_labels = teacher.argmax(1) if hard_labels is None else hard_labels
        return {
            "loss0.soft": oracles.response(student, teacher, "kl", TAU),
            "loss0.hard": oracles.cross_entropy(np.eye(CLASSES)[hard_labels], oracles.softmax(student)),
            "loss1.soft": oracles.response(student, teacher, "mse", 1),
        }

    real, pseudo = terms(inputs(images), labels.numpy()), terms(inputs(learner.pseudo))
    weights = {"loss0.soft": 0.9 * 0.5, "loss0.hard": 0.9 * 2, "loss1.soft": 0.1 * 3}
    loss, logged = learner.loss(Images(images, labels))
    expected = real | {f"pseudo.{name}": value for name, value in pseudo.items()}
    assert {name: term.item() for name, term in logged.items()} == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(sum(w * (real[n] + 0.25 * pseudo[n]) for n, w in weights.items()), rel=1e-5)


def test_averages_of_batch_norm_are_of_the_transfer_set_alone(tmp_path):
    """After a step; the pseudo images were normalised by their own batch."""
    student, images = network(1, nn.BatchNorm1d(9)), pixels()
    learner = regime(NAME, Given(images, torch.zeros(6, dtype=torch.long)), student, steps=1, config={"iterations": 2})
    norm, seen_by_it = learner.student.net[1], []
    norm.register_forward_hook(lambda layer, values, output: seen_by_it.append((layer.training, values[0], output)))
    work(learner, tmp_path)
    x = (flat(images) - 0.2) / 0.5
    np.testing.assert_allclose(norm.running_mean, 0.1 * x.mean(0), atol=1e-6)
    np.testing.assert_allclose(norm.running_var, 0.9 + 0.1 * x.var(0, ddof=1), atol=1e-6)
    assert norm.num_batches_tracked == 1 and norm.track_running_stats
    (_, _, _), (training, values, normalised), *ascent = seen_by_it
    assert training and not any(mode for mode, _, _ in ascent) and len(ascent) == 2
    values = values.detach().double().numpy()
    np.testing.assert_allclose(
        normalised.detach(), (values - values.mean(0)) / np.sqrt(values.var(0) + norm.eps), atol=1e-4
    )


def test_pixels_of_colour_images_climb_along_their_own_gradient():
    """Gradients come out channels last, pixels are not: the optimiser must not mix them up."""

    def colour(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, CLASSES))
        return Classifier(net, ModelInfo("test", CLASSES, (3, 8, 8), (0.5,) * 3, (0.2,) * 3))

    source = Given(0.1 + 0.8 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    task = Task(colour(1), colour(2), source, {"loss": (1.0, response(temperature=TAU))}, build(Distill, STILL), seed=0)
    learner = REGIMES[NAME].load()(task, build(REGIMES[NAME].config, {"pseudo_images": 2, "pseudo_noise": 0}))
    begin = learner.pseudo.clone().requires_grad_()
    loss = soft_loss(task.student(begin), task.teacher(begin), "kl", TAU)
    (gradient,) = torch.autograd.grad(loss, begin)
    learner.on_fit_start()
    learner.after_step()
    clear = gradient.abs() > 1e-6
    assert clear.float().mean() > 0.9
    assert torch.equal((learner.pseudo - begin)[clear].sign(), gradient[clear].sign())


# -- where the images start, and what is left alone --------------------------------------------------------------------


def test_pseudo_images_start_from_the_transfer_set_each_as_often():
    images = pixels(6)
    learner = regime(NAME, Given(images), config={"pseudo_images": 15, "pseudo_noise": 0})
    distances = torch.cdist(learner.pseudo.flatten(1), images.flatten(1))
    assert (distances.min(1).values == 0).all()
    assert sorted((distances == 0).sum(0).tolist()) == [2, 2, 2, 3, 3, 3]
    fewer = regime(NAME, Given(images), config={"pseudo_images": 4, "pseudo_noise": 0}).pseudo
    assert len(fewer.flatten(1).unique(dim=0)) == 4
    assert (torch.cdist(fewer.flatten(1), images.flatten(1)).min(1).values == 0).all()


def test_starting_noise_has_its_standard_deviation_and_the_seed_of_the_run():
    grey, config = torch.full((500, 1, 3, 3), 0.5), {"pseudo_images": 500, "pseudo_noise": 0.05}
    first, second = (regime(NAME, Given(grey), config=config).pseudo for _ in range(2))
    assert torch.equal(first, second)
    noise = first - 0.5
    assert noise.mean().abs() < 4 * 0.05 / 4500**0.5
    assert noise.std().item() == pytest.approx(0.05, rel=4 / (2 * 4500) ** 0.5)
    assert len(noise.flatten(1).unique(dim=0)) == 500


def test_bytes_start_as_pixels_between_zero_and_one():
    images = (pixels() * 255).byte()
    learner = regime(NAME, Given(images), config={"pseudo_images": 6, "pseudo_noise": 0})
    torch.testing.assert_close(learner.pseudo, images.float() / 255)


def test_held_out_images_are_no_start():
    learner = regime(NAME, Given(pixels(20)), holdout=0.5, config={"pseudo_images": 40, "pseudo_noise": 0})
    held = learner.held_out.all().pixels
    assert len(held) == 10
    assert torch.cdist(learner.pseudo.flatten(1), held.flatten(1)).min() > 0


@pytest.mark.parametrize("config", [{"pseudo_noise": 5, "iterations": 0}, {"ascent_lr": 10, "pseudo_noise": 0}])
def test_pixels_stay_between_zero_and_one(tmp_path, config):
    source = Given(pixels() * 4 - 2)  # impressions may leave the range
    learner = regime(NAME, source, steps=3, config=config)
    starts = learner.pseudo.clone()
    work(learner, tmp_path / "run")
    for images in (starts, learner.pseudo):
        assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(starts, learner.pseudo) == (config.get("iterations") == 0)


def test_teacher_and_transfer_set_are_untouched(tmp_path):
    images = pixels()
    learner = regime(NAME, Given(images), steps=5, lr=0.1, config={"pseudo_noise": 0, "pseudo_images": 6})
    kept, teacher = images.clone(), copy.deepcopy(learner.teacher.state_dict())
    begin = learner.pseudo.clone()
    work(learner, tmp_path / "run")
    assert not torch.equal(learner.pseudo, begin)
    assert torch.equal(images, kept)
    assert all(torch.equal(value, teacher[key]) for key, value in learner.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.teacher.parameters())


def test_the_ascent_leaves_the_student_as_it_is():
    student = network(1, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.Dropout(0.5))
    learner = regime(NAME, student=student, config={"iterations": 3})
    learner.on_fit_start()
    learner.student.train()
    kept, begin, drawn = copy.deepcopy(student.state_dict()), learner.pseudo.clone(), torch.get_rng_state()
    learner.after_step()
    assert not torch.equal(learner.pseudo, begin)
    assert all(torch.equal(value, kept[key]) for key, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert student.training and not learner.teacher.training
    assert not learner.pseudo.requires_grad
    assert torch.equal(torch.get_rng_state(), drawn)


# -- continuing --------------------------------------------------------------------------------------------------------


def test_how_steps_are_cut_into_rounds_does_not_change_the_result(tmp_path, monkeypatch):
    results, fresh = [], network(1, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5))
    for length in (1, 3, 200):
        monkeypatch.setattr(base, "STEPS_PER_ROUND", length)
        student = copy.deepcopy(fresh)
        learner = regime(NAME, Given(pixels(20)), student, holdout=0.2, batch_size=5, steps=7, noise=0.1)
        work(learner, tmp_path / str(length))
        results.append(student.state_dict() | {"pseudo": learner.pseudo})
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


def test_a_killed_run_continues_with_its_pixels_and_their_ascent(tmp_path: Path, teacher: Path) -> None:
    """kill -9 after a saved round, the same command again: the bytes of a run that nothing interrupted."""
    command = f"distill --method {NAME} --teacher {teacher} --transfer-set real:50 --pseudo-images 10 --batch-size 10"
    command = [*command.split(), "--steps", "220", "--ascent-lr", "0.003", "--device", "cpu", "--out"]
    finish([*command, "whole"], tmp_path)
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    kill_after_saving([*command, "killed"], tmp_path, checkpoint)
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["state_dict"]["pseudo"].shape == (10, 1, 32, 32)
    assert not (tmp_path / "killed" / "model.json").exists()
    finish([*command, "killed"], tmp_path)
    for name in ("model.safetensors", "metrics.csv"):
        assert sha256_file(tmp_path / "killed" / name) == sha256_file(tmp_path / "whole" / name), name
    states = [
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "killed")
    ]
    pools = [state["state_dict"]["pseudo"] for state in states]
    assert torch.equal(*pools)
    assert not torch.equal(pools[0], saved["state_dict"]["pseudo"])

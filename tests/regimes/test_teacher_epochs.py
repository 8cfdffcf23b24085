"""Teachers that give only the start of a training, or less and less: labels teach after them."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from stand_ins import Given, check_interruption, work
from tiny_regimes import CLASSES, inputs, linear, network, pixels, regime, response
from torch import nn

from dfkd_cli.errors import ConfigError
from dfkd_cli.regimes import base, offline

LABELS = torch.tensor([0, 1, 2, 3, 0, 2])
PLAIN = {"schedule": "constant", "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}


def test_a_share_fades_from_step_to_step(tmp_path, monkeypatch):
    source, shares = Given(pixels(), LABELS), []
    learner = regime("offline", source, epochs=3, batch_size=2, config={"teacher_epochs": 2, "fade": True}, **PLAIN)
    loss = learner.loss
    monkeypatch.setattr(learner, "loss", lambda images: (shares.append(learner.share), loss(images))[1])
    work(learner, tmp_path / "run")
    assert shares == pytest.approx([max(0, 1 - step / 3 / 2) for step in range(9)])


@pytest.mark.parametrize("config", [{"teacher_epochs": 3, "fade": True}, {"teacher_epochs": 1}])
def test_labels_wait_for_what_is_learned_alone(config, tmp_path):
    """As :class:`FSP` lets nothing but its flow be learned at first."""
    loss = response()
    loss.__class__ = type("First", (type(loss),), {"phase": 2})
    learner = regime("offline", Given(pixels(), LABELS), objectives=[(1.0, loss)], epochs=3, config=config, **PLAIN)
    shares = []
    for epoch in range(3):
        loss.epoch = learner.epochs = epoch
        shares.append(learner.share)
    assert shares[:2] == [1, 1] and shares[2] < 1


def learned(source: Given, epochs: int, config: dict, tmp_path) -> tuple[oracles.Array, oracles.Array, list[bool]]:
    """The student after some epochs of one step, the same by hand, and in which of them the teacher was asked."""
    tau, asked = 3.0, []
    learner = regime(
        "offline", source, objectives=[(0.7, response(temperature=tau))], epochs=epochs, config=config, **PLAIN
    )
    learner.student.register_forward_pre_hook(lambda *_: asked.append(False))
    learner.teacher.register_forward_pre_hook(lambda *_: asked.append(True))
    x, teacher, start = inputs(pixels()), linear(learner.teacher), linear(learner.student)
    classes = LABELS.numpy() if source.labelled else (x @ teacher.T).argmax(1)
    last, fades, step = config["teacher_epochs"], config.get("fade"), 0

    def gradient(w):
        nonlocal step
        share = max(0.0, 1 - step / last) if fades else float(step < last)
        step += 1
        logits = x @ w.T
        hard = (oracles.softmax(logits) - np.eye(CLASSES)[classes]) / len(x)
        return (share * 0.7 * oracles.response_gradient(logits, x @ teacher.T, tau) + (1 - share) * hard).T @ x

    expected = oracles.sgd(start, gradient, 0.5, 0.9, 0.01, epochs, True)
    work(learner, tmp_path / "run")
    return linear(learner.student), expected, asked


@pytest.mark.parametrize(("last", "fade"), [(0, False), (1, False), (3, False), (9, False), (1, True), (4, True)])
@pytest.mark.parametrize("labelled", [True, False])
def test_labels_go_on_with_the_same_momentum(last, fade, labelled, tmp_path):
    source = Given(pixels(), LABELS if labelled else None)
    student, expected, asked = learned(source, 6, {"teacher_epochs": last, "fade": fade}, tmp_path)
    np.testing.assert_allclose(student, expected, atol=1e-5)
    assert asked.count(False) == 6
    assert asked.count(True) == (min(last, 6) if labelled else 6)  # of images without labels its classes are wanted


def test_a_round_is_judged_by_its_own_terms(tmp_path, monkeypatch):
    """Lightning keeps those of earlier rounds, which may be of what is learned no more."""
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 1)
    learner, seen = regime("offline", Given(pixels(), LABELS), steps=3, config={"teacher_epochs": 1}, **PLAIN), []
    monkeypatch.setattr(learner, "concern", lambda measures: seen.append(set(measures)))
    work(learner, tmp_path / "run")
    assert seen == [{"soft"}, {"labels"}, {"labels"}]


def test_without_it_the_teacher_teaches_throughout(tmp_path):
    losses = [regime("offline", Given(pixels(), LABELS), config=c).loss(Given(pixels(), LABELS).all())[0]
              for c in ({}, {"teacher_epochs": 1})]  # fmt: skip
    assert torch.equal(*losses)


def test_pseudo_images_are_left_alone_afterwards(tmp_path):
    config = {"pseudo_images": 4, "teacher_epochs": 2}
    learner = regime("pseudo-examples", Given(pixels(), LABELS), steps=2, config=config, **PLAIN)
    work(learner, tmp_path / "two")
    longer = regime("pseudo-examples", Given(pixels(), LABELS), steps=5, config=config, **PLAIN)
    work(longer, tmp_path / "five")
    assert torch.equal(learner.pseudo, longer.pseudo)
    assert not torch.equal(learner.pseudo, regime("pseudo-examples", Given(pixels(), LABELS), config=config).pseudo)


@pytest.mark.parametrize("fade", [False, True])
def test_an_interruption_does_not_change_when_the_teacher_leaves(fade, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 4)

    def run(path, *callbacks):
        torch.manual_seed(3)
        student = network(1, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3))
        config = {"teacher_epochs": 3, "fade": fade}
        source = Given(pixels(18), torch.arange(18) % CLASSES)
        learner = regime("offline", source, student, batch_size=6, steps=14, noise=0.1, config=config)
        return work(learner, path, *callbacks)

    check_interruption(run, tmp_path)


def test_a_share_that_fades_over_no_epochs_is_refused():
    with pytest.raises(ConfigError, match="--fade: over how many epochs"):
        offline.Config(fade=True)

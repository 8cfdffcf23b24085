"""Objectives between two networks: which features are compared, how terms add up, and phases."""

from __future__ import annotations

import copy

import numpy as np
import objective_oracles as losses
import oracles
import pytest
import torch
from stand_ins import work
from tiny_objectives import CLASSES, OBJECTIVES, SIZE, connected, network, offline
from torch import nn

from dfkd_cli.data.batches import Batches
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.taps import find_taps
from dfkd_cli.objectives.base import ask
from dfkd_cli.regimes.offline import Offline


def test_objectives_add_up_and_share_taps():
    names = {"response": 0.5, "at": 10.0, "fitnets": 2.0}
    learner, images = offline(names, network(1, 3, 4), network(2, 4, 6))
    loss, terms = learner.loss(images)
    assert terms.keys() == {"response.soft", "at.attention", "fitnets.hint"}
    weights = dict(zip(terms, names.values(), strict=True))
    assert loss.item() == pytest.approx(sum(weights[n] * t.item() for n, t in terms.items()), rel=1e-5)
    assert list(learner.student_taps) == ["stage1", "stage2"]


def test_answers_hook_nothing():
    learner, _ = offline({"response": 1.0, "dkd": 1.0, "dist": 1.0}, network(1, 3, 4), network(2, 4, 6))
    assert learner.student_taps == learner.teacher_taps == {}


@pytest.mark.parametrize("hard", [0.0, 1.5])
def test_strength_multiplies_the_weight(hard):
    learner, images = offline({"dkd": None}, network(1, 3, 4), network(2, 4, 6), values={"dkd": {"hard": hard}})
    with torch.no_grad():
        student, teacher = (net(images.pixels).double().numpy() for net in (learner.student, learner.teacher))
    labels = images.labels.numpy()
    parts = losses.dkd(student, teacher, labels, 4.0)
    soft = parts["target"] + 8 * parts["non_target"]
    task = hard * oracles.cross_entropy(np.eye(CLASSES)[labels], oracles.softmax(student))
    for learner.losses["dkd"].epoch, strength in ((0, 1 / 20), (9, 1 / 2), (19, 1), (30, 1)):
        assert learner.loss(images)[0].item() == pytest.approx(strength * soft + task, rel=1e-4)


def test_epochs_are_counted_for_objectives(tmp_path):
    learner, _ = offline({"dkd": None}, network(1, 3, 4), network(2, 4, 6), batch_size=3, steps=5)
    work(learner, tmp_path / "run")
    assert learner.losses["dkd"].epoch == 2


def test_regressors_train_with_the_student(tmp_path):
    learner, _ = offline({"fitnets": None}, network(1, 3, 4), network(2, 4, 6), steps=3)
    before = copy.deepcopy(learner.objectives.state_dict())
    work(learner, tmp_path / "run")
    weights = "fitnets.regressors.0.0.weight"
    assert not torch.equal(before[weights], learner.objectives.state_dict()[weights])


def test_pairs_are_as_many_and_of_the_kind_that_is_compared():
    student, teacher = network(1, 3, 4), network(2, 4, 6)
    assert connected("at", student, teacher).pairs == (("stage1", "stage1"), ("stage2", "stage2"))
    crossed = connected("fitnets", student, teacher, taps=["stage1", "head"], teacher_taps=["last", "logits"])
    assert crossed.pairs == (("stage1", "stage2"), ("head", "logits"))
    with pytest.raises(ConfigError, match="cannot pair stage1, stage2 of the student with stage2 of the teacher"):
        connected("at", student, teacher, taps="stages", teacher_taps="last")
    with pytest.raises(ConfigError, match="at compares feature maps"):
        connected("at", student, teacher, taps="penultimate")


@pytest.mark.parametrize("name", ["at", "fitnets", "fsp", "ofd", "reviewkd"])
def test_features_of_tokens_are_refused(name):
    objective = OBJECTIVES[name].load()(OBJECTIVES[name].config())
    for shapes in (((16, 8), (16, 8)), ((8, 4, 4), (16, 8)), ((16, 8), (8,))):
        with pytest.raises(ConfigError, match=rf"{name} compares feature maps.* not features of shape \(16, 8\)"):
            objective.prepare(*shapes)


def phased(epochs: int = 3, **settings) -> tuple[Offline, Images]:
    """Flow alone for some epochs of two steps, then answers; a regressor that only counts then."""
    names, values = {"fsp": 1.0, "response": 1.0, "fitnets": 1.0}, {"fsp": {"pretraining": epochs}}
    return offline(names, network(1, 3, 4), network(2, 3, 4), values=values, batch_size=3, **settings)


@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 0.1), ("adam", 0.1), ("adamw", 0.1), ("sgd", 0.0)])
def test_what_a_phase_does_not_depend_on_is_left_alone_in_it(tmp_path, optimizer, decay):
    settings = {"optimizer": optimizer, "weight_decay": decay, "lr": 0.05}
    names = {"net.head.weight", "net.head.bias", "fitnets.regressors.0.0.weight"}

    def moved(steps: int) -> set[str]:
        learner, _ = phased(steps=steps, **settings)
        state = {**learner.student.state_dict(), **learner.objectives.state_dict()}
        before = {key: value.clone() for key, value in state.items() if "num_batches" not in key}
        work(learner, tmp_path / str(steps))
        return {key for key, value in before.items() if not torch.equal(value, state[key])}

    assert not moved(6) & names
    assert {"net.stage1.0.weight", "net.stage2.0.weight", "net.stage2.1.bias"} <= moved(6)
    assert names <= moved(7)


def test_in_a_phase_the_flow_is_descended(tmp_path):
    """One step of gradient descent with weight decay, on what the flow depends on."""
    learner, _ = phased(steps=1, optimizer="sgd", weight_decay=0.1, momentum=0, nesterov=False, lr=0.5, warmup=0)
    copied = copy.deepcopy(learner.student)
    (batch,) = Batches(learner.train_source, 3, 0, torch.device("cpu")).steps(0, 1)
    copied.train()
    objective, teacher = learner.losses["fsp"], learner.ask_teacher(batch)["eval"]
    student = ask(copied, batch.pixels, find_taps(copied, [own for own, _ in objective.pairs]))
    objective(student, teacher, batch)["flow"].backward()
    work(learner, tmp_path / "run")
    for (name, old), new in zip(copied.named_parameters(), learner.student.parameters(), strict=True):
        expected = old if old.grad is None else old - 0.5 * (old.grad + 0.1 * old)
        assert (old.grad is None) == name.startswith("net.head"), name
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_two_classes_can_be_neither_decoupled_nor_correlated(name):
    two = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(128, 2)), ModelInfo("t", 2, SIZE, (0.0,) * 2, (1.0,) * 2))
    with pytest.raises(ConfigError, match=f"{name} needs three classes"):
        connected(name, two, two)
